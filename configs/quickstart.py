"""Train text to video from scratch on the embedded world, on two CPU cores.

    sora-jax quickstart                                       about ten minutes
    sora-jax quickstart --config=configs/quickstart.py:short  three minutes: the same code, clips not yet right (0 %)
    sora-jax quickstart --config=configs/quickstart.py:tiny   about a minute: checks that every stage runs

Writes to runs/quickstart. Measured results: experiments/quickstart/README.md.

Everything is small on purpose. The number of tokens decides how much is learnt in minutes: a token is 12 x 12 pixels of
2 frames, so a clip has 4 to 30 tokens. Shapes are large, because the model spends more of its capacity on the position
of a small one. Position embeddings are no longer than the clips. Times are shifted towards noise (base_tokens = 4),
where the content that the caption describes is decided. The transformer has gates for its input, without which it would
need far more steps on latents of a sharp autoencoder. The decoder is trained further on noisy latents, so that it
forgives what the transformer leaves. Settings tried: experiments/quickstart/README.md.
"""

from sora_jax.config import choose, to_config_dict
from sora_jax.quickstart import QuickstartConfig
from sora_jax.train.autoencoder import StageConfig
from sora_jax.train.optim import OptimConfig
from sora_jax.train.reconstruction import LossConfig

CLOSING = "this form checks that all stages run; for clips that are right: sora-jax quickstart"
VARIANTS = ("", "short", "tiny")

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
    config.clips = 3000
    config.holdout = 0.25
    config.evaluate = 64

    world = config.world
    world.sizes = ((24, 24), (24, 36), (36, 24))
    world.frames = (5, 9)
    world.scale = (0.62, 0.7)
    world.backgrounds = ("plain",)
    world.shapes = ("circle", "square", "triangle", "cross", "ring")
    world.motions = ("move", "move", "move", "still")
    world.extra_captions = ("short",)


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

    autoencoder_steps(config, 3500, 1300)


def transformer(config):
    config.batch = 16
    config.captions = "original=3,short=2"

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

    model.text.vocabulary = 128
    model.text.width = 128
    model.text.depth = 1
    config.tokenizer.vocab = 128
    config.tokenizer.max_tokens = 24

    packing = config.packing
    packing.length = 48
    packing.slots = 6
    packing.text_length = 48

    config.diffusion.times.base_tokens = 4

    given = config.diffusion.given
    given.first = 0.1
    given.last = 0.05
    given.ends = 0.05
    given.frames = 0.05
    given.boxes = 0.05
    given.levels = 0.05
    given.headless = 0.1
    packing.rows_per_clip = 6  # the token frames of 9 frames, and one row for what is given

    optim = config.optim
    optim.learning_rate = 2e-3
    optim.schedule = "cosine"
    optim.warmup_steps = 100
    optim.b2 = 0.95
    optim.ema = (0.995,)

    steps(config, 1700, previews=5)

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


def steps(config, count, previews=6):
    """Set the number of steps, and how often metrics, checkpoints and previews are written."""
    config.loop.steps = count
    config.loop.log_every = max(count // 50, 1)
    config.loop.save_every = -(-count // previews)
    config.loop.preview_every = config.loop.save_every


def short(config):
    config.clips = 1000
    config.evaluate = 16
    autoencoder_steps(config.autoencoder, 500, 200, previews=2)
    config.transformer.optim.warmup_steps = 15
    steps(config.transformer, 120, previews=2)
    config.closing = CLOSING


def tiny(config):
    config.clips = 60
    config.holdout = 0.3
    config.evaluate = 4
    config.workers = 1
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
    config.closing = CLOSING
