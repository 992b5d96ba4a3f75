"""Train the diffusion transformer in the four sizes of DiT (2212.09748, table 1), on latents of 16 channels.

    sora-jax train --config=configs/transformer.py:B --workdir=runs/B --config.latents=data/latents
    sora-jax train --config=configs/transformer.py:XL --workdir=runs/XL --config.latents=data/latents --dry-run

Variants: S, B, L, XL. `--dry-run` prints the resolved config and the number of parameters. The latent cache comes from
`sora-jax data encode` with an autoencoder of 16 channels, such as `configs/autoencoder.py:base`.

Hardware: one accelerator with 16 GB or more for S and B, with 40 GB or more for L and XL, or several with
`--config.mesh.fsdp=8`. `--config.packing.length` must hold the longest clip: 17 frames of 256 x 256 are 1280 tokens.
Time and quality: not measured here.
"""

from sora_jax.config import choose, to_config_dict
from sora_jax.models.transformer import SIZES
from sora_jax.train.denoiser import DenoiserRun

VARIANTS = ("B", "S", "L", "XL")


def get_config(variant: str = "B"):
    depth, width, heads = choose("variant of configs/transformer.py", variant or "B", SIZES)
    config = to_config_dict(DenoiserRun())
    config.batch = 32

    model = config.model
    model.depth = depth
    model.width = width
    model.heads = heads
    model.patch = (1, 2, 2)
    model.latent_channels = 16

    model.text.vocabulary = 8192
    model.text.width = 512
    model.text.depth = 4
    config.tokenizer.vocab = 8192
    config.tokenizer.max_tokens = 128

    packing = config.packing
    packing.length = 2048
    packing.slots = 32
    packing.text_length = 1024

    optim = config.optim
    optim.learning_rate = 1e-4
    optim.warmup_steps = 1000
    optim.ema = (0.9999,)

    config.loop.steps = 400_000
    config.loop.log_every = 50
    config.loop.save_every = 2000
    return config
