"""Train the space-time U-Net of video diffusion (2204.03458) in the place of the transformer.

    sora-jax train --config=configs/unet.py:B --workdir=runs/unet_B --config.latents=data/latents
    sora-jax train --config=configs/unet.py:small --workdir=runs/unet --config.latents=runs/quickstart/latents
    sora-jax train --config=configs/unet.py:tiny --workdir=runs/unet_tiny --config.latents=data/latents
    python experiments/unet/match.py --transformer=configs/transformer.py:B --unet=configs/unet.py:B

Each variant has the data, the times, the optimizer and the text encoder of a config of the transformer:

variant    in the place of                        forward FLOPs of a clip, over those of the transformer
tiny       configs/tiny.py, for the tests         not matched
small      configs/quickstart.py                  0.97 (9 frames of 24 x 36 pixels)
S          configs/transformer.py:S               0.99 (17 frames of 256 x 256 pixels)
B          configs/transformer.py:B               1.04

The last line of the commands prints them. Packs are those of the transformer, but that the rooms of clips are rounded
up so that resolutions can be halved; `small` and `tiny` have a latent position in a token, in place of a patch.

Hardware: two CPU cores for tiny and small; S and B as the transformers. Results: experiments/unet/README.md.
"""

import dataclasses

from sora_jax.config import choose, from_dict, load, to_config_dict
from sora_jax.config_files import package_config
from sora_jax.models.unet_layers import UNetConfig
from sora_jax.train.denoiser import DenoiserRun

VARIANTS = ("B", "S", "small", "tiny")
NETWORKS = {  # in the place of that of which config and variant
    "B": ("transformer.py", "B", UNetConfig(width=256, head_width=64)),
    "S": ("transformer.py", "S", UNetConfig(width=136, head_width=34)),
    "small": ("quickstart.py", "", UNetConfig(width=32, multipliers=(1, 2), blocks=1, attended=(0, 1), remat="none")),
    "tiny": ("tiny.py", "transformer", UNetConfig(width=8, multipliers=(1, 2), blocks=1, attended=(1,), head_width=8)),
}
LATENTS = (1, 1, 1)  # patch of the small variants


def get_config(variant: str = "B"):
    file, form, model = choose("variant of configs/unet.py", variant or "B", NETWORKS)
    config = load(f"{package_config(file)}:{form}" if form else str(package_config(file)))
    run = from_dict(DenoiserRun, config.transformer if file == "quickstart.py" else config)
    return to_config_dict(with_unet(run, model, run.model.patch if variant in "SB" else LATENTS))


def with_unet(run: DenoiserRun, model: UNetConfig, patch: tuple[int, int, int]) -> DenoiserRun:
    """Return a run of the transformer with a U-Net in its place, for packs of as many clips."""
    old = run.model
    model = dataclasses.replace(
        model,
        patch=patch,
        latent_channels=old.latent_channels,
        text=old.text,
        input_skip=old.input_skip,
        position_theta=old.position_theta,
    )
    finer = old.patch_values // model.patch_values
    times = dataclasses.replace(run.diffusion.times, base_tokens=run.diffusion.times.base_tokens * finer)
    margin = 1.25 if finer > 1 else 1.0  # room for the sides that are rounded up
    return dataclasses.replace(
        run,
        model=model,
        packing=dataclasses.replace(run.packing, length=round(run.packing.length * finer * margin)),
        diffusion=dataclasses.replace(run.diffusion, times=times),
    )
