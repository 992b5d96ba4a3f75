"""The first stage that compresses nothing: latents are pixels, and the denoiser's patches are patches of pixels.

It has no parameters and is not trained. `--autoencoder=pixels` and `--autoencoder=pixels-grey` name it.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from sora_jax.config import check
from sora_jax.models.autoencoder import LOGVAR_RANGE
from sora_jax.nn.past import Past


@dataclasses.dataclass(frozen=True)
class PixelsConfig:
    """Choose the channels of the latents."""

    latent_channels: int = 3  # 3: red, green, blue; 1: their mean, decoded as grey
    dtype: str = "float32"  # of the pixels

    name: Literal["pixels"] = "pixels"  # tells this first stage from others in files

    def __post_init__(self):
        check(
            self.latent_channels in (1, 3),
            f"model.latent_channels is {self.latent_channels}; the latents of pixels have 1 (grey) or 3",
        )

    @property
    def time_factor(self) -> int:
        """Return the frames to a latent frame."""
        return 1

    @property
    def space_factor(self) -> int:
        """Return the pixels to a latent position, in height and in width."""
        return 1


def latent_fields(config: PixelsConfig) -> tuple[str, ...]:
    """Return the names of the fields that change a latent, for its fingerprint."""
    return ("latent_channels",)


def latent_grid(config: PixelsConfig, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Return the size (t, h, w) of a clip's latent: that of the clip. UserError if a side is not positive."""
    for name, size in (("frames", frames), ("height", height), ("width", width)):
        check(size > 0, f"{name} is {size}; it must be positive")
    return frames, height, width


def receptive_field(config: PixelsConfig, direction: str) -> tuple[int, int]:
    """Return (0, 0): no pixel depends on another."""
    return 0, 0


def autoencoder_specs(config: PixelsConfig) -> dict:
    """Declare no parameters."""
    return {}


def encode(
    params: dict,
    config: PixelsConfig,
    video_BTHWC: jax.Array,
    sizes_B2: jax.Array | None = None,
    past: Past | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return the video as the mean of a posterior, and its log variance, the least that there is: see `first_stage`."""
    mean = video_BTHWC.astype(jnp.float32)
    if config.latent_channels == 1:
        mean = mean.mean(axis=-1, keepdims=True)
    return mean, jnp.full_like(mean, LOGVAR_RANGE[0])


def decode(
    params: dict,
    config: PixelsConfig,
    z_BthwC: jax.Array,
    sizes_B2: jax.Array | None = None,
    past: Past | None = None,
) -> jax.Array:
    """Return latents as a video of three channels: see `first_stage`."""
    z = z_BthwC.astype(jnp.float32)
    return jnp.repeat(z, 3, axis=-1) if config.latent_channels == 1 else z
