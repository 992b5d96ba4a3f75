"""Train the model of the embedded world that comes with the package: twice the quickstart's pixels, a longer training.

    sora-jax quickstart --config=configs/world.py --workdir=runs/world
    python experiments/quickstart/score_fresh.py --config=configs/world.py --workdir=runs/world --count=256
    sora-jax export runs/world/transformer --out=world.safetensors

A token is 24 x 24 pixels of 2 frames, so a clip has the quickstart's number of tokens. The transformer is narrower, for
the size of its file, and is trained six times as long. It learns the tasks of given frames as the quickstart does.
"""

from sora_jax.config import choose, load
from sora_jax.quickstart import default_config

VARIANTS = ("", "tiny")

PROMPTS = (
    ("a red circle moves right on a plain white background", (9, 48, 72)),
    ("a blue square moves up on a plain grey background", (9, 72, 48)),
    ("a green triangle moves left on a plain black background", (9, 48, 72)),
    ("a yellow ring moves down on a plain slate background", (9, 72, 48)),
    ("a purple cross moves left on a plain sand background", (5, 48, 72)),
    ("an orange ring moves right on a plain slate background", (5, 48, 48)),
    ("a cyan circle on a plain black background", (1, 48, 48)),
    ("a pink square on a plain white background", (1, 72, 48)),
)


def get_config(variant: str = ""):
    choose("variant of configs/world.py", variant, dict.fromkeys(VARIANTS))
    config = load(f"{default_config()}:{variant}" if variant else default_config())
    config.world.sizes = ((48, 48), (48, 72), (72, 48))
    autoencoder(config.autoencoder)
    transformer(config.transformer)
    if not variant:
        full(config)
    for place in (config.show, config.transformer.preview):
        place.prompts = tuple(prompt for prompt, _ in PROMPTS)
        place.sizes = tuple(size for _, size in PROMPTS)
    return config


def autoencoder(config):
    config.crop = (5, 48, 48)
    config.model.space_factor = 8
    config.model.latent_channels = 12
    config.model.patch = (2, 4)


def transformer(config):
    config.model.latent_channels = 12


def full(config):
    """Set the sizes of the networks and the length of the training."""
    config.clips = 6000
    config.evaluate = 256

    config.autoencoder.model.width = 32
    config.autoencoder.loop.log_every = 100
    for stage, count in zip(config.autoencoder.stages, (5000, 2000), strict=True):
        stage.steps = count

    model = config.transformer.model
    model.width = 144
    model.heads = 6

    loop = config.transformer.loop
    loop.steps = 10_000
    loop.log_every = 100
    loop.save_every = 1000
    loop.preview_every = 2000
