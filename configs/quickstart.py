"""The quickstart: text to video on the embedded world, from nothing, on two CPU cores.

    sora-jax quickstart                                       about ten minutes
    sora-jax quickstart --config=configs/quickstart.py:short  three minutes: the same code, clips not yet right (0 %)
    sora-jax quickstart --config=configs/quickstart.py:tiny   a minute or so: does every stage run?

Writes to runs/quickstart. What to expect, with the figures measured: experiments/quickstart/README.md.

Small on purpose everywhere. Few tokens decide how much is learnt in minutes: a token is 12 x 12 pixels of 2 frames,
so a clip has 4 to 30 of them. Shapes are large, because the smaller one is the more of the model's effort goes into
where it is; position codes are as short as the clips; times are shifted towards noise (base_tokens = 4), because what
the caption decides, which shape goes where, is decided there. What was tried: experiments/quickstart/README.md.
"""

from sora_jax.config import choose, to_config_dict
from sora_jax.quickstart import QuickstartConfig

PROMPTS = (
    ("a red circle moves right on a plain white background", (9, 24, 36)),
    ("a blue square moves up on a plain grey background", (9, 36, 24)),
    ("a green triangle moves left on a plain black background", (9, 24, 36)),
    ("a yellow ring moves down on a plain slate background", (9, 36, 24)),
    ("a purple cross moves left on a plain sand background", (5, 24, 36)),
    ("an orange ring moves right on a plain slate background", (5, 24, 24)),
    ("a cyan circle on a plain black background", (1, 24, 24)),
    ("a pink square on a plain white background", (1, 36, 24)),
)


def get_config(variant: str = ""):
    config = to_config_dict(QuickstartConfig())
    world(config)
    autoencoder(config.autoencoder)
    transformer(config.transformer)
    config.show.prompts = tuple(prompt for prompt, _ in PROMPTS)
    config.show.sizes = tuple(size for _, size in PROMPTS)
    config.show.steps = "25"
    variants = {"": lambda _: None, "short": short, "tiny": tiny}
    choose("variant of configs/quickstart.py", variant, variants)(config)
    return config


def world(config):
    config.clips, config.holdout, config.evaluate = 3000, 0.25, 64
    world = config.world
    world.sizes, world.frames = ((24, 24), (24, 36), (36, 24)), (5, 9)
    world.scale, world.backgrounds = (0.62, 0.7), ("plain",)
    world.shapes = ("circle", "square", "triangle", "cross", "ring")
    world.motions = ("move", "move", "move", "still")


def autoencoder(config):
    config.crop, config.batch, config.image_share = (5, 24, 24), 6, 0.0  # an image is a clip's first frame
    model = config.model
    model.time_factor, model.space_factor, model.latent_channels = 2, 4, 8
    model.patch, model.width, model.multipliers = (2, 4), 64, (1,)
    model.encoder_blocks, model.decoder_blocks, model.kernels = 2, 4, ((3, 1, 1), (1, 3, 3))
    model.l2_weight, model.kl_weight = 4.0, 1e-3
    optim = config.optim
    optim.learning_rate, optim.schedule, optim.warmup_steps = 4e-3, "cosine", 100
    optim.b2, optim.ema = 0.95, (0.999,)
    steps(config, 3500)


def transformer(config):
    config.batch = 16
    model = config.model
    model.depth, model.width, model.heads, model.latent_channels = 4, 192, 6, 8
    model.patch, model.sincos_positions, model.position_theta = (1, 3, 3), True, 10.0
    model.remat, model.unroll = "none", 4
    model.text.vocabulary, model.text.width, model.text.depth = 128, 128, 1
    config.tokenizer.vocab, config.tokenizer.max_tokens = 128, 24
    packing = config.packing
    packing.length, packing.slots, packing.text_length = 48, 6, 48
    config.diffusion.times.base_tokens = 4
    optim = config.optim
    optim.learning_rate, optim.schedule, optim.warmup_steps = 2e-3, "cosine", 100
    optim.b2, optim.ema = 0.95, (0.995,)
    steps(config, 1600, previews=5)
    config.preview.prompts = tuple(prompt for prompt, _ in PROMPTS)
    config.preview.sizes = tuple(size for _, size in PROMPTS)
    config.preview.steps, config.sampling.guidance.scale = "12", 2.0


def steps(config, count, previews=6):
    """The length of a run, with its saves and previews."""
    config.loop.steps = count
    config.loop.log_every = max(count // 50, 1)
    config.loop.save_every = config.loop.preview_every = -(-count // previews)


def short(config):
    config.clips, config.evaluate = 1000, 16
    steps(config.autoencoder, 600, previews=2)
    steps(config.transformer, 120, previews=2)


def tiny(config):
    config.clips, config.holdout, config.evaluate, config.workers = 60, 0.3, 4, 1
    config.autoencoder.model.width, config.autoencoder.batch = 8, 2
    steps(config.autoencoder, 6, previews=1)
    model = config.transformer.model
    model.depth, model.width, model.heads, model.text.width = 2, 48, 2, 32
    config.transformer.batch = 2
    steps(config.transformer, 6, previews=1)
    config.show.steps = config.transformer.preview.steps = "2"
