"""Train text to video on a small form of the full world, from scratch, on one CPU core in about three quarters of an
hour.

    sora-jax quickstart --config=configs/full_world.py --workdir=runs/full_world
    sora-jax evaluate runs/full_world/transformer --data=runs/full_world/world --count=64

The world has all motions, cameras and backgrounds of `--world=full`, and shapes that pass in front of others. It is
small where time would otherwise be spent on size: clips of 9 frames of 36 x 48 pixels, at most two shapes, none of them
small. The oracle reads the world's own clips of this size without error in colour, kind, motion, count, background and
camera.

The settings are those of configs/quickstart.py, with a token of 12 x 12 pixels of 2 frames: a clip has 60 tokens. What
differs: a longer training of the autoencoder, and no training on given frames. Time: 9 minutes for the autoencoder, 32
for the transformer, which is too little: colours come out right, kinds and motions seldom. Results:
experiments/consistency/README.md.
"""

from sora_jax.config import choose, to_config_dict
from sora_jax.quickstart import QuickstartConfig
from sora_jax.train.autoencoder import StageConfig
from sora_jax.train.optim import OptimConfig
from sora_jax.train.reconstruction import LossConfig

PROMPTS = (
    ("a red circle moves right in front of a blue square on a plain white background", (9, 36, 48)),
    ("a yellow ring moves up in front of a purple cross on a plain black background", (9, 48, 36)),
    ("a green triangle moves left on a textured grey background while the camera pans right", (9, 36, 48)),
    ("an orange square spins clockwise on a plain slate background", (9, 48, 36)),
    ("a cyan ring orbits counterclockwise on a gradient sand background", (9, 36, 48)),
    ("a pink cross bounces left and right on a plain white background", (9, 36, 48)),
    ("a blue circle grows on a textured white background", (9, 48, 36)),
    ("a red square stays still on a textured black background while the camera zooms in", (9, 36, 48)),
)


def get_config(variant: str = ""):
    config = to_config_dict(QuickstartConfig())
    world(config)
    autoencoder(config.autoencoder)
    transformer(config.transformer)
    config.show.prompts = tuple(prompt for prompt, _ in PROMPTS)
    config.show.sizes = tuple(size for _, size in PROMPTS)
    config.show.steps = "25"
    variants = {"": lambda _: None, "tiny": tiny}
    choose("variant of configs/full_world.py", variant, variants)(config)
    return config


def world(config):
    config.clips = 5000
    config.holdout = 0.15
    config.evaluate = 32
    config.workers = 1

    world = config.world
    world.sizes = ((36, 48), (48, 36))
    world.frames = (9,)
    world.image_share = 0.1
    world.max_shapes = 2
    world.scale = (0.34, 0.48)
    world.backgrounds = ("plain", "gradient", "textured")
    world.shapes = ("circle", "square", "triangle", "cross", "ring")
    # A word that stands there twice is twice as frequent; a pass needs two shapes, so that 23 % of the clips show one.
    world.motions = (
        "move", "move", "still", "bounce", "orbit", "rotate", "grow", "shrink", "pass", "pass", "pass"
    )  # fmt: skip
    world.cameras = (
        "still", "still", "still", "still", "still", "still",
        "pan left", "pan right", "pan up", "pan down", "zoom in", "zoom out",
    )  # fmt: skip
    world.caption_levels = ("sentence",)


def autoencoder(config):
    config.crop = (5, 24, 24)
    config.batch = 6
    config.image_share = 0.0  # an image is a clip's first frame

    model = config.model
    model.time_factor = 2
    model.space_factor = 4
    model.latent_channels = 8
    model.patch = (2, 2)
    model.width = 24
    model.multipliers = (1, 3)
    model.encoder_blocks = 1
    model.decoder_blocks = 2
    model.kernels = ((1, 3, 3), (3, 1, 1))
    model.linear = True
    model.l1_weight = 0.25
    model.l2_weight = 8.0
    model.kl_weight = 1e-3

    autoencoder_steps(config, 4500, 1500)


def transformer(config):
    config.batch = 8

    model = config.model
    model.depth = 4
    model.width = 192
    model.heads = 6
    model.latent_channels = 8
    model.patch = (1, 3, 3)
    model.input_skip = True
    model.sincos_positions = True
    model.position_theta = 10.0
    model.remat = "none"
    model.unroll = 4

    model.text.vocabulary = 192
    model.text.width = 128
    model.text.depth = 1
    config.tokenizer.vocab = 192
    config.tokenizer.max_tokens = 40

    packing = config.packing
    packing.length = 120
    packing.slots = 4
    packing.text_length = 120

    config.diffusion.times.base_tokens = 8

    optim = config.optim
    optim.learning_rate = 2e-3
    optim.schedule = "cosine"
    optim.warmup_steps = 100
    optim.b2 = 0.95
    optim.ema = (0.995,)

    steps(config, 1750, previews=2)

    config.preview.prompts = tuple(prompt for prompt, _ in PROMPTS)
    config.preview.sizes = tuple(size for _, size in PROMPTS)
    config.preview.steps = "12"

    config.sampling.guidance.scale = 2.0


def autoencoder_steps(config, count, decoder, previews=3):
    """Train all of the autoencoder, then the decoder alone on noisy latents, which makes it forgive a denoiser."""
    muon = OptimConfig(
        method="muon", learning_rate=4e-3, schedule="cosine", warmup_steps=100, b2=0.95, ema=(0.999,)
    )  # fmt: skip
    stages = (
        StageConfig(count, optim=muon),
        StageConfig(decoder, trained="decoder", loss=LossConfig(latent_noise=0.1), optim=muon),
    )
    config.stages = tuple(to_config_dict(stage) for stage in stages)
    config.loop.log_every = max(count // 50, 1)
    config.loop.save_every = -(-count // previews)
    config.loop.preview_every = config.loop.save_every


def steps(config, count, previews):
    """Set the number of steps, and how often metrics, checkpoints and previews are written."""
    config.loop.steps = count
    config.loop.log_every = max(count // 50, 1)
    config.loop.save_every = -(-count // previews)
    config.loop.preview_every = config.loop.save_every


def tiny(config):
    """Check in a minute or two that every stage runs."""
    config.clips = 60
    config.holdout = 0.3
    config.evaluate = 4
    config.show.steps = "2"

    config.autoencoder.batch = 2
    config.autoencoder.model.width = 8
    autoencoder_steps(config.autoencoder, 6, 4, previews=1)

    config.transformer.batch = 2
    config.transformer.preview.steps = "2"
    model = config.transformer.model
    model.depth = 2
    model.width = 48
    model.heads = 2
    model.text.width = 32
    steps(config.transformer, 6, previews=1)
