"""Train the factorised space-time U-Net in the place of the transformer; all else is that of the transformer's config.

    sora-jax train --config=configs/unet.py:B --workdir=runs/unet_B --config.latents=data/latents
    sora-jax quickstart --config=configs/unet.py:quickstart --workdir=runs/quickstart_unet
    python experiments/unet/match.py --transformer=configs/transformer.py:B --unet=configs/unet.py:B

Variants: tiny (configs/tiny.py), quickstart (configs/quickstart.py, two CPU cores), S and B (configs/transformer.py).
"""

from sora_jax.config import load

print(load)
