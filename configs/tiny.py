"""Try the whole chain in seconds on a CPU, on a folder of your own clips; the tests use these configs, too.

    sora-jax data build --source=folder --path=clips --out=data/clips --max-frames=9 --multiple=8 --max-pixels=384
    sora-jax train --config=configs/tiny.py:autoencoder --workdir=runs/tiny-autoencoder --config.data=data/clips
    sora-jax data encode --autoencoder=runs/tiny-autoencoder --data=data/clips --out=data/latents
    sora-jax train --config=configs/tiny.py:transformer --workdir=runs/tiny --config.latents=data/latents
    sora-jax sample --workdir=runs/tiny --prompt="a fox runs" --frames=9 --height=16 --width=24 --out=fox.gif

Hardware: two CPU cores. Time: a minute or two in all, most of it compilation. Result: grey noise that moves; the models
are too small and trained too briefly for more. Batches divide over 1, 2, 4 or 8 devices.
"""

from sora_jax.config import choose, to_config_dict
from sora_jax.train.autoencoder import AutoencoderRun
from sora_jax.train.denoiser import DenoiserRun

VARIANTS = ("transformer", "autoencoder")


def get_config(variant: str = "transformer"):
    return choose("the variant in --config", variant, {"autoencoder": autoencoder, "transformer": transformer})()


def autoencoder():
    config = to_config_dict(AutoencoderRun())
    config.crop = (5, 16, 16)
    config.batch = 16
    config.image_share = 0.5

    model = config.model
    model.time_factor = 4
    model.space_factor = 4
    model.latent_channels = 4
    model.patch = (2, 2)
    model.width = 8
    model.multipliers = (1, 2)
    model.encoder_blocks = 1
    model.decoder_blocks = 1

    _short(config)
    return config


def transformer():
    config = to_config_dict(DenoiserRun())
    config.batch = 8

    model = config.model
    model.depth = 2
    model.width = 32
    model.heads = 2
    model.latent_channels = 4

    model.text.vocabulary = 64
    model.text.width = 32
    model.text.depth = 1
    model.text.head_width = 16
    config.tokenizer.vocab = 64
    config.tokenizer.max_tokens = 16

    packing = config.packing
    packing.length = 48
    packing.slots = 4
    packing.text_length = 48

    config.diffusion.times.base_tokens = 18
    config.held_out.every = 0

    _short(config)
    return config


def _short(config) -> None:
    """Set the optimizer and the length of a run."""
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 5
    config.optim.ema = (0.9, 0.99)

    config.loop.steps = 20
    config.loop.log_every = 1
    config.loop.save_every = 10
