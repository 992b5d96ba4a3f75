"""Predict the last ten frames of Moving MNIST from the first ten, in pixels, beside the tables of OpenSTL.

    sora-jax bench moving_mnist --digits=mnist --workdir=runs/moving_mnist
    sora-jax bench moving_mnist --digits=mnist --config=configs/moving_mnist.py:h200 --workdir=runs/moving_mnist_h200
    sora-jax bench moving_mnist --digits=mnist --config=configs/moving_mnist.py:stochastic --workdir=runs/random

`mnist` is a folder with the files of MNIST. Variants: none, for two CPU cores; `h200`, the sequences of the published
trainings of 200 epochs; `stochastic`, SVG's digits that bounce at random, five frames given; `tiny`, for a try.

A token is 8 x 8 pixels of ten frames, so that a token sees how its pixels move, and a clip has 128 tokens. Half of the
clips are trained at pure noise, where the net is a regression, the other half at all noise levels. Time and quality:
experiments/moving_mnist.
"""

from sora_jax.config import choose, to_config_dict
from sora_jax.data.storing.drawn import DrawnConfig
from sora_jax.models.transformer import TransformerConfig
from sora_jax.train.denoiser import DenoiserRun
from sora_jax.worlds.moving_mnist import STOCHASTIC, MovingMnistConfig

VARIANTS = ("", "h200", "stochastic", "tiny")


def get_config(variant: str = ""):
    choose("variant of configs/moving_mnist.py", variant, dict.fromkeys(VARIANTS))
    world = STOCHASTIC if variant == "stochastic" else MovingMnistConfig()
    drawn = DrawnConfig(world, clips=100_000, grey=True)
    config = to_config_dict(DenoiserRun(drawn=drawn, model=TransformerConfig(text=None, latent_channels=1)))
    config.drawn.world.frames = 20
    two_cores(config)
    if variant:
        {"h200": h200, "stochastic": stochastic, "tiny": tiny}[variant](config)
    given = {"stochastic": 5, "tiny": 4}.get(variant, 10)
    config.diffusion.given.first_frames = given // config.model.patch[0]
    fit_packs(config)
    return config


def two_cores(config):
    config.batch = 8

    model = config.model
    model.patch = (10, 8, 8)
    model.depth = 6
    model.width = 192
    model.heads = 6
    model.position_theta = 100.0
    model.remat = "none"
    model.unroll = 6

    diffusion = config.diffusion
    diffusion.prediction = "x0"
    diffusion.caption_dropout = 0.0
    diffusion.times.base_tokens = 0
    diffusion.times.pure = 0.5
    diffusion.given.first = 1.0
    diffusion.given.noise = 0.0

    optim = config.optim
    optim.method = "muon"
    optim.muon_rate = 0.015
    optim.learning_rate = 2e-3
    optim.schedule = "cosine"
    optim.warmup_steps = 200
    optim.b2 = 0.95
    optim.skip_spikes = 6.0
    optim.ema = (0.998,)

    config.sampling.guidance.scale = 1.0
    config.sampling.steps = "20"
    config.held_out.every = 0  # it gives no frames, which training always does

    config.loop.steps = 4000
    config.loop.log_every = 100
    config.loop.save_every = 1000


def h200(config):
    """Train on 2,000,000 clips, as many as in 200 epochs of the published trainings."""
    config.drawn.clips = 2_000_000
    config.batch = 64
    config.model.unroll = 1
    config.model.patch = (2, 8, 8)
    config.model.depth = 12
    config.model.width = 256
    config.model.heads = 8
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 1000
    config.loop.steps = 31_250


def stochastic(config):
    """Give five frames and predict ten."""
    config.drawn.world.frames = 15
    config.model.patch = (5, 8, 8)


def tiny(config):
    config.drawn.world.size = 40
    config.drawn.world.frames = 8
    config.drawn.clips = 64
    config.drawn.held_out = 8
    config.batch = 8
    config.model.patch = (2, 8, 8)
    config.model.width = 32
    config.model.heads = 2
    config.model.depth = 2
    config.model.unroll = 1
    config.sampling.steps = "2"
    config.optim.warmup_steps = 1
    config.loop.steps = 8
    config.loop.log_every = 4
    config.loop.save_every = 8


def fit_packs(config):
    """Put one clip into each pack, so that no attention between clips is computed."""
    frames, height, width = config.model.patch
    world = config.drawn.world
    config.packing.length = world.frames // frames * (world.size // height) * (world.size // width)
    config.packing.slots = 1
    config.packing.text_length = 1
