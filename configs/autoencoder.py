"""The field's autoencoders: causal for video, 4 x 8 x 8 with 16 channels; for images, 8 x 8 with 4 or 16 channels.

    sora-jax data build --source=folder --path=clips --out=data/clips --max-frames=17 --max-pixels=65536
    sora-jax train --config=configs/autoencoder.py:base --workdir=runs/autoencoder --config.data=data/clips
    sora-jax data encode --autoencoder=runs/autoencoder --data=data/clips --out=data/latents

base: width 128, multiples 1, 2, 4, 4 (CogVideoX 2408.06072, Wan 2503.20314), crops of 17 frames of 128 x 128; every
clip must be at least that large for a row of a batch to be drawn from it. For one accelerator with 40 GB or more;
`--config.batch=8` and `--config.loop.accumulate=2` where there is less. Time and PSNR: not measured here. Not for a
laptop: `configs/video.py:autoencoder` is.

kl4, kl16: the image autoencoder of latent diffusion (2112.10752), in the form of Stable Diffusion (84 million
parameters, 4 channels) and of SD3 (16 channels, no convolutions around the latent); the frames of a clip are pictures.
Published weights need no training:

    sora-jax convert --from=diffusers-vae --weights=sd-vae-ft-ema --out=runs/kl4
    sora-jax data encode --autoencoder=runs/kl4 --data=data/pictures --out=data/latents

Weights of one's own:

    sora-jax data build --path=pictures --out=data/pictures --time-factor=1 --multiple=8
    sora-jax train --config=configs/autoencoder.py:kl4 --workdir=runs/own --config.data=data/pictures
    sora-jax train --config=configs/autoencoder.py:kl16 --workdir=runs/own --config.data=data/pictures

That is by L1 and KL alone, without the perceptual and adversarial losses of the paper. Not measured here.
"""

from sora_jax.config import choose, to_config_dict
from sora_jax.models.autoencoder_kl import KLConfig
from sora_jax.train.autoencoder import AutoencoderRun


def get_config(variant: str = "base"):
    return choose("variant of configs/autoencoder.py", variant or "base", {"base": base, "kl4": kl4, "kl16": kl16})()


def base():
    config = to_config_dict(AutoencoderRun())
    config.crop, config.batch, config.image_share = (17, 128, 128), 16, 0.25
    model = config.model
    model.time_factor, model.space_factor, model.latent_channels = 4, 8, 16
    model.patch, model.width, model.multipliers = (1, 1), 128, (1, 2, 4, 4)
    model.encoder_blocks, model.decoder_blocks, model.remat = 2, 3, True
    return _recipe(config)


def kl4():
    config = to_config_dict(AutoencoderRun(model=KLConfig(latent_channels=4, quant=True, remat=True)))
    config.crop, config.batch, config.image_share = (1, 256, 256), 16, 0.0
    return _recipe(config)


def kl16():
    config = to_config_dict(AutoencoderRun(model=KLConfig(latent_channels=16, quant=False, remat=True)))
    config.crop, config.batch, config.image_share = (1, 256, 256), 16, 0.0
    return _recipe(config)


def _recipe(config):
    optim = config.optim
    optim.learning_rate, optim.schedule, optim.warmup_steps = 1e-4, "cosine", 1000
    config.loop.steps = 200_000
    config.loop.log_every, config.loop.save_every, config.loop.preview_every = 50, 2000, 2000
    return config
