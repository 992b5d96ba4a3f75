"""Every denoising network behind one set of functions; only this file imports them.

The class of the config says which module does the work. A network is one module with `denoiser_specs`,
`encode_condition`, `denoise` and `forward_flops`, a config with the fields of `DenoiserConfig`, and one line in
`MODULES`.
"""

from types import ModuleType
from typing import Annotated, Any, Protocol

import jax

from sora_jax.config import OneOf
from sora_jax.models import transformer
from sora_jax.models.text import TextConfig
from sora_jax.models.transformer import TransformerConfig
from sora_jax.nn.pack import Pack


class DenoiserConfig(Protocol):
    """List what the config of a network must say of itself, by fields or properties of a frozen dataclass."""

    name: str  # tells the network from others in files; a value of its own
    patch: tuple[int, int, int]  # (t, y, x) latent positions in one token
    latent_channels: int  # C, channels of the latents
    patch_values: int  # P, values in a token
    learned_variance: bool  # the output has a second half, for the variance of a step
    positions_in_time: bool  # tokens of different frames are told apart, so clips may have several frames
    text: TextConfig | None  # text encoder; None for a network that reads no captions
    classes: int  # number of classes; 0 for none


MODULES: dict[type, ModuleType] = {TransformerConfig: transformer}
AnyDenoiser = Annotated[DenoiserConfig, OneOf(MODULES)]


def denoiser_specs(config: DenoiserConfig) -> dict:
    """Declare all parameters."""
    return MODULES[type(config)].denoiser_specs(config)


def encode_condition(params: dict, config: DenoiserConfig, pack: Pack) -> Any:
    """Encode what stays the same while a pack is denoised (captions); for `denoise`. None where there is nothing."""
    return MODULES[type(config)].encode_condition(params, config, pack)


def denoise(
    params: dict,
    config: DenoiserConfig,
    pack: Pack,
    x_BLP: jax.Array,
    times_BR: jax.Array,
    condition: Any = None,
) -> jax.Array:
    """Predict the target of every token of a pack: noisy tokens (B, L, P), noise levels (B, R) -> (B, L, P) float32.

    The result is (B, L, 2 P) where the variance is learned, too. condition: the result of `encode_condition`, which
    is computed here when None.
    """
    return MODULES[type(config)].denoise(params, config, pack, x_BLP, times_BR, condition)


def forward_flops(config: DenoiserConfig, batch: dict, encodes_condition: bool = True) -> float:
    """Return the model FLOPs of one forward pass over the clips of a host batch, see `transformer.forward_flops`."""
    return MODULES[type(config)].forward_flops(config, batch, encodes_condition)


def train_flops(config: DenoiserConfig, batch: dict) -> float:
    """Return the model FLOPs of one forward and backward pass over a host batch: three times the forward ones."""
    return 3 * forward_flops(config, batch)
