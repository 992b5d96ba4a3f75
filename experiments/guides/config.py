"""Train the quickstart's transformer with key frames and sketches beside its clips, on two CPU cores.

    sora-jax quickstart
    sora-jax data encode --autoencoder=runs/quickstart/autoencoder --data=runs/quickstart/world \\
        --out=runs/guides_latents --key-frames=2 --sketches=2
    sora-jax train --config=experiments/guides/config.py --workdir=runs/guides

Times and figures: experiments/guides/README.md.
"""

from sora_jax.config import load
from sora_jax.quickstart import default_config


def get_config(variant: str = ""):
    config = load(default_config()).transformer
    config.latents = "runs/guides_latents"
    config.model.guides = True
    config.diffusion.given.key_frames = 0.15
    config.diffusion.given.sketches = 0.25
    config.preview.prompts = ()
    return config
