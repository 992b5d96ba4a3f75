"""The field's video autoencoder: causal, 4 x 8 x 8 compression, 16 channels (CogVideoX 2408.06072, Wan 2503.20314).

    sora-jax data build --source=folder --path=clips --out=data/clips --max-frames=17 --max-pixels=65536
    sora-jax train --config=configs/autoencoder.py:base --workdir=runs/autoencoder --config.data=data/clips
    sora-jax data encode --autoencoder=runs/autoencoder --data=data/clips --out=data/latents

base: width 128, multiples 1, 2, 4, 4, crops of 17 frames of 128 x 128; every clip must be at least that large for a
row of a batch to be drawn from it. For one accelerator with 40 GB or more; `--config.batch=8` and
`--config.loop.accumulate=2` where there is less. Time and PSNR: not measured here. Not for a laptop:
`configs/video.py:autoencoder` is.
"""

from sora_jax.config import choose, mutable
from sora_jax.train.autoencoder import AutoencoderRun


def get_config(variant: str = "base"):
    config = mutable(AutoencoderRun())
    choose("variant of configs/autoencoder.py", variant or "base", {"base": base})(config)
    return config


def base(config):
    config.crop, config.batch, config.image_share = (17, 128, 128), 16, 0.25
    model = config.model
    model.time_factor, model.space_factor, model.latent_channels = 4, 8, 16
    model.patch, model.width, model.multipliers = (1, 1), 128, (1, 2, 4, 4)
    model.encoder_blocks, model.decoder_blocks, model.remat = 2, 3, True
    optim = config.optim
    optim.learning_rate, optim.schedule, optim.warmup_steps = 1e-4, "cosine", 1000
    config.loop.steps = 200_000
    config.loop.log_every, config.loop.save_every, config.loop.preview_every = 50, 2000, 2000
