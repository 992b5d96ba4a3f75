"""Train class-conditional image generation from scratch on a laptop: an autoencoder and a DiT on its latents.

    sora-jax data build --source=tfds:NAME --out=data/pictures --multiple=4 --max-pixels=1024
    sora-jax train --config=configs/images.py:autoencoder --workdir=runs/pictures_ae --config.data=data/pictures
    sora-jax data encode --autoencoder=runs/pictures_ae --data=data/pictures --out=data/picture_latents
    sora-jax train --config=configs/images.py:transformer --workdir=runs/pictures --config.latents=data/picture_latents
    sora-jax sample --workdir=runs/pictures --class=0,1,2,3,4,5,6,7,8,9 --size=28

Images have about 28 pixels a side, any size and aspect ratio, and one of 10 classes (`--config.model.classes`).
autoencoder: 4 x 4 pixels to 4 channels. transformer (default): rectified flow, sampled with Heun; DiT blocks with
adaLN-Zero, rotary and sin-cos positions, depth 4, width 128; each latent position is a token; a pack of 294 tokens
holds six images of 28 x 28, a batch eight packs. fixed: the same with one image of 28 x 28 per pack, as DiT trains.
Hardware: two CPU cores. Times and samples: experiments/images/README.md.
"""

from sora_jax.config import choose, to_config_dict
from sora_jax.train.autoencoder import AutoencoderRun
from sora_jax.train.denoiser import DenoiserRun

VARIANTS = ("transformer", "fixed", "autoencoder")


def get_config(variant: str = "transformer"):
    variants = {"transformer": transformer, "fixed": fixed, "autoencoder": autoencoder}
    return choose("variant of configs/images.py", variant or "transformer", variants)()


def autoencoder():
    config = to_config_dict(AutoencoderRun())
    config.crop = (1, 20, 20)
    config.batch = 32
    config.image_share = 1.0

    model = config.model
    model.time_factor = 1
    model.space_factor = 4
    model.latent_channels = 4
    model.patch = (1, 2)
    model.width = 24
    model.multipliers = (1, 2)
    model.encoder_blocks = 1
    model.decoder_blocks = 2
    model.kernels = ((1, 3, 3),)
    model.l1_weight = 0.5
    model.l2_weight = 1.0
    model.kl_weight = 1e-4

    optim = config.optim
    optim.learning_rate = 4e-3
    optim.schedule = "cosine"
    optim.warmup_steps = 100
    optim.ema = (0.99,)

    config.loop.steps = 1500
    config.loop.save_every = 500
    config.loop.preview_every = 500
    return config


def transformer():
    config = to_config_dict(DenoiserRun())
    config.batch = 8

    model = config.model
    model.depth = 4
    model.width = 128
    model.heads = 4
    model.patch = (1, 1, 1)
    model.latent_channels = 4
    model.text = None
    model.classes = 10
    model.sincos_positions = True
    model.sincos_axes = "xy"
    model.position_theta = 100.0

    config.packing.length = 294
    config.packing.slots = 16

    diffusion = config.diffusion
    diffusion.times.distribution = "logit_normal"
    diffusion.times.base_tokens = 0

    optim = config.optim
    optim.learning_rate = 2e-3
    optim.schedule = "cosine"
    optim.warmup_steps = 100
    optim.ema = (0.999,)

    config.loop.steps = 2000
    config.loop.save_every = 500
    config.loop.preview_every = 500

    config.preview.classes = tuple(range(10))
    config.preview.sizes = ((1, 28, 28),)
    config.preview.steps = "15"

    config.sampling.solver.name = "heun"
    config.sampling.steps = "30"
    config.sampling.guidance.scale = 2.0
    return config


def fixed():
    config = transformer()
    config.batch = 48

    config.packing.length = 49
    config.packing.slots = 1
    return config
