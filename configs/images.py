"""Class-conditional pictures from scratch, small enough for a laptop: an autoencoder and a DiT on its latents.

    sora-jax data build --source=tfds:NAME --out=data/pictures --multiple=4 --max-pixels=1024
    sora-jax train --config=configs/images.py:autoencoder --workdir=runs/pictures_ae --config.data=data/pictures
    sora-jax data encode --autoencoder=runs/pictures_ae --data=data/pictures --out=data/picture_latents
    sora-jax train --config=configs/images.py:transformer --workdir=runs/pictures --config.latents=data/picture_latents
    sora-jax sample --workdir=runs/pictures --class=0,1,2,3,4,5,6,7,8,9 --size=28

Pictures of about 28 pixels a side, of any sizes and aspect ratios, with a class each (`--config.model.classes`, 10).
autoencoder: 4 x 4 pixels to 4 channels. transformer (also the default): DiT blocks with adaLN-Zero, rotary and sin-cos
positions, depth 4, width 128, each latent position a token, six pictures of 28 x 28 in a pack of 294 tokens, eight
packs a step; `fixed` is the same with one picture of 28 x 28 in a pack, as DiT trains. Rectified flow, Heun. For two
cores; times and samples: experiments/images/README.md.
"""

from sora_jax.config import choose, to_config_dict
from sora_jax.train.autoencoder import AutoencoderRun
from sora_jax.train.denoiser import DenoiserRun


def get_config(variant: str = "transformer"):
    variants = {"transformer": transformer, "fixed": fixed, "autoencoder": autoencoder}
    return choose("variant of configs/images.py", variant or "transformer", variants)()


def autoencoder():
    config = to_config_dict(AutoencoderRun())
    config.crop, config.batch, config.image_share = (1, 20, 20), 32, 1.0
    model = config.model
    model.time_factor, model.space_factor, model.latent_channels = 1, 4, 4
    model.patch, model.width, model.multipliers = (1, 2), 24, (1, 2)
    model.encoder_blocks, model.decoder_blocks, model.kernels = 1, 2, ((1, 3, 3),)
    model.l1_weight, model.l2_weight, model.kl_weight = 0.5, 1.0, 1e-4
    optim = config.optim
    optim.learning_rate, optim.schedule, optim.warmup_steps, optim.ema = 4e-3, "cosine", 100, (0.99,)
    config.loop.steps, config.loop.save_every, config.loop.preview_every = 1500, 500, 500
    return config


def transformer():
    config = to_config_dict(DenoiserRun())
    config.batch = 8
    model = config.model
    model.depth, model.width, model.heads, model.patch = 4, 128, 4, (1, 1, 1)
    model.latent_channels, model.text, model.classes = 4, None, 10
    model.sincos_positions, model.sincos_axes, model.position_theta = True, "xy", 100.0
    config.packing.length, config.packing.slots = 294, 16
    diffusion = config.diffusion
    diffusion.times.distribution, diffusion.times.base_tokens = "logit_normal", 0
    optim = config.optim
    optim.learning_rate, optim.schedule, optim.warmup_steps, optim.ema = 2e-3, "cosine", 100, (0.999,)
    config.loop.steps, config.loop.save_every, config.loop.preview_every = 2000, 500, 500
    config.preview.classes, config.preview.sizes, config.preview.steps = tuple(range(10)), ((1, 28, 28),), "15"
    config.sampling.solver.name, config.sampling.steps, config.sampling.guidance.scale = "heun", "30", 2.0
    return config


def fixed():
    config = transformer()
    config.batch = 48
    config.packing.length, config.packing.slots = 49, 1
    return config
