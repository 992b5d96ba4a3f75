"""Train text to video on photographs of fruit that turn on a table, on two CPU cores.

    sora-jax data build --source=folder --path=fruits_rotating --max-frames=17 --clips-per-file=4 --out=data/fruit
    sora-jax train --config=configs/fruit.py:autoencoder --workdir=runs/fruit_autoencoder --config.data=data/fruit
    sora-jax evaluate --autoencoder=runs/fruit_autoencoder --data=data/fruit
    sora-jax data encode --autoencoder=runs/fruit_autoencoder --data=data/fruit --out=data/fruit_latents
    sora-jax train --config=configs/fruit.py:transformer --workdir=runs/fruit --config.latents=data/fruit_latents
    sora-jax sample --workdir=runs/fruit --prompt="a red apple rotating on a white background" --frames=17 \\
        --height=96 --width=96 --out=apple.mp4

`fruits_rotating` holds 152 videos of 96 x 96 pixels at 8 frames a second, made from Fruits-360, and captions.csv with
the splits "train" and "test" (experiments/fruit/README.md). Four clips of 17 frames are taken of each. Varieties of the
split "test" are not trained on.

autoencoder: 4 x 8 x 8, 16 channels; then its decoder alone, on noisy latents. transformer (default): patches of
1 x 2 x 2, so 180 tokens a clip, one to a pack. Time: 78 and 54 minutes on one busy core each (AMD EPYC). Held-out PSNR:
31.6 dB. Samples: experiments/fruit/README.md.
"""

from sora_jax.config import choose, to_config_dict
from sora_jax.train.autoencoder import AutoencoderRun, StageConfig
from sora_jax.train.denoiser import DenoiserRun
from sora_jax.train.optim import OptimConfig
from sora_jax.train.reconstruction import LossConfig

VARIANTS = ("transformer", "autoencoder")

PREVIEW = (
    "a green apple rotating on a white background",
    "a red cherry tomato rotating on a white background",
    "a black cherry rotating on a white background",
    "an orange ribbed tomato rotating on a white background",
)


def get_config(variant: str = "transformer"):
    variants = {"transformer": transformer, "autoencoder": autoencoder}
    return choose("variant of configs/fruit.py", variant or "transformer", variants)()


def autoencoder():
    config = to_config_dict(AutoencoderRun())
    config.crop = (9, 48, 48)
    config.batch = 4
    config.image_share = 0.0  # an image is a clip's first frame

    model = config.model
    model.time_factor = 4
    model.space_factor = 8
    model.latent_channels = 16
    model.patch = (4, 4)
    model.width = 96
    model.multipliers = (1, 2)
    model.kernels = ((1, 3, 3), (3, 1, 1))
    model.encoder_blocks = 2
    model.decoder_blocks = 3
    model.linear = True
    model.l1_weight = 0.25
    model.l2_weight = 8.0
    model.kl_weight = 1e-4

    muon = OptimConfig(
        method="muon", learning_rate=4e-3, schedule="cosine", warmup_steps=100, b2=0.95, ema=(0.999,)
    )  # fmt: skip
    stages = (
        StageConfig(3000, optim=muon),
        # The decoder alone, on noisy latents: it learns to forgive what the transformer leaves.
        StageConfig(1000, trained="decoder", loss=LossConfig(latent_noise=0.15), optim=muon),
    )
    config.stages = tuple(to_config_dict(stage) for stage in stages)
    config.loop.save_every = 500
    config.loop.preview_every = 1000
    return config


def transformer():
    config = to_config_dict(DenoiserRun())
    config.batch = 8

    model = config.model
    model.depth = 6
    model.width = 192
    model.heads = 6
    model.latent_channels = 16
    model.patch = (1, 2, 2)
    model.input_skip = True
    model.sincos_positions = True
    model.position_theta = 10.0
    model.remat = "none"
    model.unroll = 6

    model.text.vocabulary = 256
    model.text.width = 128
    model.text.depth = 1
    config.tokenizer.vocab = 256
    config.tokenizer.max_tokens = 16

    packing = config.packing
    packing.length = 180
    packing.slots = 1
    packing.text_length = 16

    config.diffusion.times.base_tokens = 30
    config.diffusion.times.stratified = True

    optim = config.optim
    optim.learning_rate = 2e-3
    optim.schedule = "cosine"
    optim.warmup_steps = 100
    optim.b2 = 0.95
    optim.ema = (0.995,)

    config.loop.steps = 2500
    config.loop.save_every = 250
    config.loop.preview_every = 500

    config.preview.prompts = PREVIEW
    config.preview.sizes = ((17, 96, 96),)
    config.preview.steps = "20"

    config.sampling.guidance.scale = 2.0
    return config
