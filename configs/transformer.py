"""The diffusion transformer in the four sizes of DiT (2212.09748, table 1), for latents of 16 channels.

    sora-jax train --config=configs/transformer.py:B --workdir=runs/B --config.latents=data/latents
    sora-jax train --config=configs/transformer.py:XL --workdir=runs/XL --config.latents=data/latents --dry-run

Variants: S, B, L, XL. `--dry-run` prints the resolved config and the number of parameters. The latent cache comes from
`sora-jax data encode` with an autoencoder of 16 channels, such as `configs/autoencoder.py:base`.

S and B are for one accelerator of 16 GB or more, L and XL for 40 GB or more, or for several with
`--config.mesh.fsdp=8`. `--config.packing.length` must hold the longest clip: 17 frames of 256 x 256 are 1280 tokens.
Time and quality: not measured here.
"""

from sora_jax.config import choose, to_config_dict
from sora_jax.models.transformer import SIZES
from sora_jax.train.denoiser import DenoiserRun


def get_config(variant: str = "B"):
    depth, width, heads = choose("variant of configs/transformer.py", variant or "B", SIZES)
    config = to_config_dict(DenoiserRun())
    config.batch = 32
    model = config.model
    model.depth, model.width, model.heads = depth, width, heads
    model.patch, model.latent_channels = (1, 2, 2), 16
    model.text.vocabulary, model.text.width, model.text.depth = 8192, 512, 4
    config.tokenizer.vocab, config.tokenizer.max_tokens = 8192, 128
    packing = config.packing
    packing.length, packing.slots, packing.text_length = 2048, 32, 1024
    optim = config.optim
    optim.learning_rate, optim.warmup_steps, optim.ema = 1e-4, 1000, (0.9999,)
    config.loop.steps, config.loop.log_every, config.loop.save_every = 400_000, 50, 2000
    return config
