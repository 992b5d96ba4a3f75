"""Learn a world of Phyworld, balls that move by a law of mechanics, and measure its physics, on two CPU cores.

    sora-jax bench phyworld --config=configs/phyworld.py:uniform --workdir=runs/phyworld/uniform
    sora-jax bench phyworld --config=configs/phyworld.py:parabola --workdir=runs/phyworld/parabola
    sora-jax bench phyworld --config=configs/phyworld.py:collision --workdir=runs/phyworld/collision
    sora-jax bench phyworld --config=configs/phyworld.py:latent --workdir=runs/phyworld/latent    latents, uniform
    sora-jax bench phyworld --config=configs/phyworld.py:tiny --workdir=runs/phyworld/tiny        checks every stage

--scenario, --size and --level change the world of each. A token is 8 x 8 pixels of three frames, so that a token sees
how its pixels move; `latent` and `collision` learn latents, and a token is three whole frames. The clip of 32 frames is
continued by one, which is not measured: the given frames are a row of tokens, and ten rows follow. Frames in latents
have 32 pixels; another --size needs another --config.run.model.patch. Settings tried, and results:
experiments/phyworld/README.md.
"""

from sora_jax.benchmarks.phyworld import PhyworldBench
from sora_jax.config import choose, to_config_dict
from sora_jax.train.autoencoder import AutoencoderRun, StageConfig
from sora_jax.train.optim import OptimConfig

VARIANTS = ("", "uniform", "parabola", "collision", "tiny", "latent")


def get_config(variant: str = ""):
    choose("variant of configs/phyworld.py", variant, dict.fromkeys(VARIANTS))
    autoencoder = AutoencoderRun() if variant in ("latent", "collision") else None
    config = to_config_dict(PhyworldBench(autoencoder=autoencoder))
    if variant in ("parabola", "collision"):
        config.world.scenario = variant
    config.world.frames = 33
    denoiser(config.run)
    if variant == "latent":
        latent(config)
    if variant == "collision":
        collision(config)
    if variant == "tiny":
        tiny(config)
    return config


def denoiser(run):
    run.batch = 8

    model = run.model
    model.depth = 6
    model.width = 128
    model.heads = 4
    model.latent_channels = 3
    model.patch = (3, 8, 8)
    model.text = None
    model.sincos_positions = True
    model.position_theta = 10.0
    model.remat = "none"
    model.unroll = 6

    # The motion follows from what is given, so it is learnt at pure noise, and one step of the solver tells it. A few
    # clips at other noise levels would do harm: levels that are seldom seen have large errors, and make Muon diverge.
    diffusion = run.diffusion
    diffusion.prediction = "x0"
    diffusion.times.base_tokens = 0
    diffusion.times.pure = 1.0
    diffusion.caption_dropout = 0.0
    diffusion.given.first = 1.0
    diffusion.given.first_frames = 1
    diffusion.given.noise = 0.0

    optim = run.optim
    optim.method = "muon"
    optim.muon_rate = 0.015
    optim.learning_rate = 2e-3
    optim.schedule = "cosine"
    optim.warmup_steps = 200
    optim.b2 = 0.95
    optim.skip_spikes = 6.0
    optim.ema = (0.998,)

    run.sampling.steps = "1"
    run.sampling.guidance.scale = 1.0
    run.held_out.every = 0
    steps(run, 7000)


def steps(run, count):
    run.loop.steps = count
    run.loop.log_every = max(count // 50, 1)
    run.loop.save_every = -(-count // 8)
    run.loop.keep = 8


def latent(config):
    """Learn latents of an autoencoder that is trained first, 8 x 8 pixels to a latent of 8 channels."""
    config.clips = 4000

    autoencoder = config.autoencoder
    autoencoder.crop = (4, 32, 32)
    autoencoder.batch = 8
    autoencoder.image_share = 0.0
    autoencoder.model.time_factor = 1
    autoencoder.model.space_factor = 8
    autoencoder.model.latent_channels = 8
    autoencoder.model.patch = (1, 4)
    autoencoder.model.width = 24
    autoencoder.model.multipliers = (1, 3)
    autoencoder.model.encoder_blocks = 1
    autoencoder.model.decoder_blocks = 2
    autoencoder.model.l1_weight = 0.25
    autoencoder.model.l2_weight = 8.0
    autoencoder.model.kl_weight = 1e-3
    muon = OptimConfig(
        method="muon", learning_rate=4e-3, schedule="cosine", warmup_steps=100, b2=0.95, ema=(0.999,)
    )  # fmt: skip
    autoencoder.stages = (to_config_dict(StageConfig(3000, optim=muon)),)
    autoencoder.loop.log_every = 100
    autoencoder.loop.save_every = 1000

    config.run.model.latent_channels = 8
    config.run.model.patch = (3, 4, 4)


def collision(config):
    """Learn latents, whose steps are cheap, in more of them: a hit is harder to learn than what one ball does.

    An MLP reads tokens off: those of two balls have more dimensions than the network is wide.
    """
    latent(config)
    config.clips = 16_000
    config.run.batch = 16
    config.run.model.head_hidden = 512
    steps(config.run, 18_000)


def tiny(config):
    config.clips = 64
    config.count = 4
    config.curve = 2
    config.show = 1
    config.world.frames = 9
    config.world.size = 16
    config.run.batch = 2
    config.run.model.depth = 2
    config.run.model.width = 32
    config.run.model.heads = 2
    config.run.optim.warmup_steps = 2
    steps(config.run, 4)
