"""Call every kind of autoencoder through one set of functions.

The class of the config selects the module. Every module has the same functions: `autoencoder_specs`, `latent_fields`,
`latent_grid`, `receptive_field`, `encode`, `decode`.
"""

from types import ModuleType
from typing import Annotated

import jax
import jax.numpy as jnp

from sora_jax.config import OneOf
from sora_jax.models import autoencoder, autoencoder_kl, autoencoder_wan, pixels
from sora_jax.models.autoencoder import AutoencoderConfig
from sora_jax.models.autoencoder_kl import KLConfig
from sora_jax.models.autoencoder_wan import WanConfig
from sora_jax.models.codes import CodesConfig
from sora_jax.models.pixels import PixelsConfig
from sora_jax.nn.draws import per_clip
from sora_jax.nn.past import Past
from sora_jax.parallel.rules import laid_out_as

TRAINED: dict[type, ModuleType] = {AutoencoderConfig: autoencoder, KLConfig: autoencoder_kl, WanConfig: autoencoder_wan}
MODULES = TRAINED | {PixelsConfig: pixels}
ENCODER = ("encoder", "quant")  # names of the parameters that a latent depends on
TrainedConfig = Annotated[AutoencoderConfig | KLConfig | WanConfig, OneOf(TRAINED)]  # of those with parameters
FirstStageConfig = Annotated[AutoencoderConfig | KLConfig | WanConfig | PixelsConfig, OneOf(MODULES)]


def autoencoder_specs(config: FirstStageConfig) -> dict:
    """Declare all parameters."""
    return MODULES[type(config)].autoencoder_specs(config)


def block_of(config: FirstStageConfig) -> tuple[int, int, int]:
    """Return the block (time, height, width) of pixels that a latent position stands for."""
    return config.time_factor, config.space_factor, config.space_factor


def codes_of(config: FirstStageConfig) -> CodesConfig:
    """Return the config of discrete latents; that of kinds of autoencoders without any is "none"."""
    return getattr(config, "codes", CodesConfig())


def encoder_part(params: dict) -> dict:
    """Return the part of the parameters, or of their specs, that a latent depends on."""
    return {name: tree for name, tree in params.items() if name in ENCODER}


def decoder_part(params: dict) -> dict:
    """Return the part of the parameters, or of their specs, that is used to decode."""
    return {name: tree for name, tree in params.items() if name not in ENCODER}


def latent_fields(config: FirstStageConfig) -> tuple[str, ...]:
    """Return the names of the fields that change a latent of given weights and pixels, for its fingerprint."""
    return MODULES[type(config)].latent_fields(config)


def latent_grid(config: FirstStageConfig, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Return the size (t, h, w) of a clip's latent; UserError, with the nearest size, if the clip has none."""
    return MODULES[type(config)].latent_grid(config, frames, height, width)


def receptive_field(config: FirstStageConfig, direction: str) -> tuple[float, float]:
    """Return the radius of the receptive field of "encode" or "decode": (backward in time, both ways in space).

    It is the distance, in latent positions, of the farthest input that one output depends on.
    """
    return MODULES[type(config)].receptive_field(config, direction)


def encode(
    params: dict,
    config: FirstStageConfig,
    video_BTHWC: jax.Array,
    sizes_B2: jax.Array | None = None,
    past: Past | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return mean and log variance of the posterior of video (B, T, H, W, 3) in [-1, 1], float32, each (B, t, h, w, C).

    `sizes_B2` are the height and width of each clip in the top left corner of its frames; the latent of that part is
    that of the clip alone. `past`: the video is a chunk of f_t t frames of a clip, see `nn.past`.
    """
    return MODULES[type(config)].encode(params, config, video_BTHWC, sizes_B2, past)


def decode(
    params: dict,
    config: FirstStageConfig,
    z_BthwC: jax.Array,
    sizes_B2: jax.Array | None = None,
    past: Past | None = None,
) -> jax.Array:
    """Decode latents: (B, t, h, w, C) -> (B, T, H, W, 3) float32, about [-1, 1], not clipped.

    `sizes_B2` are heights and widths of the decoded clips, in pixels, as for `encode`. `past`: the latents are a chunk
    of a clip, and f_t t frames are returned, see `nn.past`.
    """
    return MODULES[type(config)].decode(params, config, z_BthwC, sizes_B2, past)


def sample_posterior(key: jax.Array, mean_BthwC: jax.Array, logvar_BthwC: jax.Array) -> jax.Array:
    """Draw mean + std * eps, differentiable in both (1312.6114, section 2.4); key: see `nn.draws.per_clip`."""
    clips, *shape = mean_BthwC.shape
    eps = per_clip(lambda key: jax.random.normal(key, shape, jnp.float32), key, clips)
    return mean_BthwC + jnp.exp(0.5 * logvar_BthwC) * laid_out_as(eps, mean_BthwC)


def kl_to_standard_normal(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """Return KL(N(mean, exp(logvar)) || N(0, 1)) of each element, in nats (1312.6114, appendix B)."""
    return 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)


def psnr(video_BTHWC: jax.Array, reference_BTHWC: jax.Array) -> jax.Array:
    """Return the peak signal-to-noise ratio (B,) of each clip in dB, for values in [-1, 1], peak 2; at most 100."""
    error_B = jnp.square(video_BTHWC - reference_BTHWC).mean(axis=(1, 2, 3, 4))
    return 10.0 * jnp.log10(4.0 / jnp.maximum(error_B, 4e-10))
