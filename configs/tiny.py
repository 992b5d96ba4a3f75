"""The smallest useful runs: seconds on a CPU, to try the whole chain on a folder of your own clips, and for the tests.

    sora-jax data build --source=folder --path=clips --out=data/clips --max-frames=9 --multiple=8 --max-pixels=384
    sora-jax train --config=configs/tiny.py:autoencoder --workdir=runs/tiny-autoencoder --config.data=data/clips
    sora-jax data encode --autoencoder=runs/tiny-autoencoder --data=data/clips --out=data/latents
    sora-jax train --config=configs/tiny.py:transformer --workdir=runs/tiny --config.latents=data/latents
    sora-jax sample --workdir=runs/tiny --prompt="a fox runs" --frames=9 --height=16 --width=24 --out=fox.gif

Hardware: two CPU cores. Time: a minute or two in all, most of it compilation. Expect grey noise that moves: too small
and too short to show anything else. Batches divide over 1, 2, 4 or 8 devices.
"""

from sora_jax.config import choose, to_config_dict
from sora_jax.train.autoencoder import AutoencoderRun
from sora_jax.train.denoiser import DenoiserRun


def get_config(variant: str = "transformer"):
    return choose("the variant in --config", variant, {"autoencoder": autoencoder, "transformer": transformer})()


def autoencoder():
    config = to_config_dict(AutoencoderRun())
    config.crop, config.batch, config.image_share = (5, 16, 16), 16, 0.5
    model = config.model
    model.time_factor, model.space_factor, model.latent_channels = 4, 4, 4
    model.patch, model.width, model.multipliers = (2, 2), 8, (1, 2)
    model.encoder_blocks, model.decoder_blocks = 1, 1
    _short(config)
    return config


def transformer():
    config = to_config_dict(DenoiserRun())
    config.batch = 8
    model = config.model
    model.depth, model.width, model.heads, model.latent_channels = 2, 32, 2, 4
    model.text.vocabulary, model.text.width, model.text.depth, model.text.head_width = 64, 32, 1, 16
    config.tokenizer.vocab, config.tokenizer.max_tokens = 64, 16
    packing = config.packing
    packing.length, packing.slots, packing.text_length = 48, 4, 48
    config.diffusion.times.base_tokens = 18
    _short(config)
    return config


def _short(config):
    config.optim.learning_rate, config.optim.warmup_steps, config.optim.ema = 1e-3, 5, (0.9, 0.99)
    config.loop.steps, config.loop.log_every, config.loop.save_every = 20, 1, 10
