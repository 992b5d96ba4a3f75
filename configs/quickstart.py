"""The quickstart: text to video on the embedded world, from nothing, on two CPU cores.

    sora-jax quickstart                                       about nine minutes
    sora-jax quickstart --config=configs/quickstart.py:short  about two minutes, the same code, worse clips

Writes to runs/quickstart. Expect on held-out clips: see experiments/quickstart/README.md.
"""

from sora_jax.config import check, mutable
from sora_jax.quickstart import QuickstartConfig

PROMPTS = (
    ("a red circle moves right on a plain white background", (9, 32, 32)),
    ("a blue square moves up on a plain grey background", (9, 40, 24)),
    ("a green triangle moves left on a plain black background", (9, 24, 40)),
    ("a yellow star moves down on a gradient slate background", (9, 24, 24)),
    ("a purple cross moves left on a plain sand background", (5, 32, 32)),
    ("an orange ring moves right on a plain slate background", (5, 24, 40)),
    ("a cyan circle on a plain black background", (1, 32, 32)),
    ("a pink square on a gradient white background", (1, 40, 24)),
)


def get_config(variant: str = ""):
    config = mutable(QuickstartConfig())
    world(config)
    autoencoder(config.autoencoder)
    transformer(config.transformer)
    config.show.prompts = tuple(prompt for prompt, _ in PROMPTS)
    config.show.sizes = tuple(size for _, size in PROMPTS)
    config.show.steps, config.show.guidance = 25, 3.0
    if variant == "short":
        config.clips, config.evaluate = 600, 16
        config.autoencoder.loop.steps = config.autoencoder.optim.decay_steps = 150
        config.transformer.loop.steps = config.transformer.optim.decay_steps = 120
        config.transformer.loop.preview_every = 60
    else:
        check(not variant, f"--config names the variant {variant!r}; allowed: none and 'short'")
    return config


def world(config):
    config.clips = 5000
    config.world.frames = (5, 9)


def autoencoder(config):
    config.crop, config.batch, config.image_share = (9, 24, 24), 16, 0.125
    model = config.model
    model.time_factor, model.space_factor, model.latent_channels = 4, 4, 8
    model.patch, model.width, model.multipliers = (1, 2), 32, (1, 2, 3)
    model.encoder_blocks, model.decoder_blocks = 1, 1
    optim = config.optim
    optim.learning_rate, optim.schedule, optim.warmup_steps, optim.ema = 2e-3, "cosine", 50, (0.99,)
    config.loop.steps = optim.decay_steps = 900
    config.loop.save_every, config.loop.preview_every = 300, 300


def transformer(config):
    config.batch = 16
    model = config.model
    model.depth, model.width, model.heads, model.latent_channels = 6, 192, 6, 8
    model.sincos_positions, model.rotary_theta = True, 100.0
    model.text.vocabulary, model.text.width, model.text.depth = 128, 128, 1
    config.tokenizer.vocab, config.tokenizer.max_tokens = 128, 24
    packing = config.packing
    packing.length, packing.slots, packing.text_length = 128, 10, 96
    config.diffusion.times.base_tokens = 32
    optim = config.optim
    optim.learning_rate, optim.schedule, optim.warmup_steps, optim.ema = 1e-3, "cosine", 100, (0.995,)
    config.loop.steps = optim.decay_steps = 600
    config.loop.save_every, config.loop.preview_every = 200, 100
    config.preview.prompts = tuple(prompt for prompt, _ in PROMPTS)
    config.preview.sizes = tuple(size for _, size in PROMPTS)
    config.preview.steps = 12
