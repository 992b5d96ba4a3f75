"""Train the field's autoencoders: causal video, 4 x 8 x 8 with 16 channels; images, 8 x 8 with 4 or 16 channels.

    sora-jax data build --source=folder --path=clips --out=data/clips --max-frames=17 --max-pixels=65536
    sora-jax train --config=configs/autoencoder.py:base --workdir=runs/autoencoder --config.data=data/clips
    sora-jax data encode --autoencoder=runs/autoencoder --data=data/clips --out=data/latents

base: width 128, multipliers 1, 2, 4, 4 (CogVideoX 2408.06072, Wan 2503.20314), crops of 17 frames of 128 x 128; smaller
clips are not drawn. Hardware: one accelerator with 40 GB or more; with less, add `--config.batch=8` and
`--config.loop.accumulate=2`. Time and PSNR: not measured here. On a laptop train `configs/video.py:autoencoder`.

kl4, kl16: the image autoencoder of latent diffusion (2112.10752), as in Stable Diffusion (84 million parameters, 4
channels) and in SD3 (16 channels, no convolutions around the latent). It encodes each frame of a clip as an image.
Import published weights instead of training:

    sora-jax convert --from=diffusers-vae --weights=sd-vae-ft-ema --out=runs/kl4
    sora-jax data encode --autoencoder=runs/kl4 --data=data/pictures --out=data/latents

Or train from scratch, with L1 and KL losses alone (the paper adds perceptual and adversarial losses). Time and PSNR:
not measured here.

    sora-jax data build --path=pictures --out=data/pictures --time-factor=1 --multiple=8
    sora-jax train --config=configs/autoencoder.py:kl4 --workdir=runs/own --config.data=data/pictures
    sora-jax train --config=configs/autoencoder.py:kl16 --workdir=runs/own --config.data=data/pictures
"""

from sora_jax.config import choose, to_config_dict
from sora_jax.models.autoencoder_kl import KLConfig
from sora_jax.train.autoencoder import AutoencoderRun

VARIANTS = ("base", "kl4", "kl16")


def get_config(variant: str = "base"):
    return choose("variant of configs/autoencoder.py", variant or "base", {"base": base, "kl4": kl4, "kl16": kl16})()


def base():
    config = to_config_dict(AutoencoderRun())
    config.crop = (17, 128, 128)
    config.batch = 16
    config.image_share = 0.25

    model = config.model
    model.time_factor = 4
    model.space_factor = 8
    model.latent_channels = 16
    model.patch = (1, 1)
    model.width = 128
    model.multipliers = (1, 2, 4, 4)
    model.encoder_blocks = 2
    model.decoder_blocks = 3
    model.remat = True
    return _recipe(config)


def kl4():
    config = to_config_dict(AutoencoderRun(model=KLConfig(latent_channels=4, quant=True, remat=True)))
    config.crop = (1, 256, 256)
    config.batch = 16
    config.image_share = 0.0
    return _recipe(config)


def kl16():
    config = to_config_dict(AutoencoderRun(model=KLConfig(latent_channels=16, quant=False, remat=True)))
    config.crop = (1, 256, 256)
    config.batch = 16
    config.image_share = 0.0
    return _recipe(config)


def _recipe(config):
    """Set the optimizer and the length of a run; return the config."""
    optim = config.optim
    optim.learning_rate = 1e-4
    optim.schedule = "cosine"
    optim.warmup_steps = 1000

    config.loop.steps = 200_000
    config.loop.log_every = 50
    config.loop.save_every = 2000
    config.loop.preview_every = 2000
    return config
