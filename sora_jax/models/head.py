"""The last layer of a denoiser: from tokens of its width to predictions, variances and gates of the input."""

from typing import Protocol

import jax
import jax.numpy as jnp

from sora_jax.models.conditioning import Condition, modulation, modulation_specs
from sora_jax.nn.layers import dense, dense_specs, layer_norm
from sora_jax.nn.params import zeros
from sora_jax.parallel.rules import reshard


class HeadConfig(Protocol):
    """List what the last layer reads of a network's config."""

    @property
    def width(self) -> int:
        """Return D."""

    @property
    def patch_values(self) -> int:
        """Return P."""

    @property
    def learned_variance(self) -> bool:
        """Return True if the variance of a step is predicted, too."""

    @property
    def input_skip(self) -> bool:
        """Return True if the noisy tokens, times a gate for each value, are added to the prediction."""


def head_specs(config: HeadConfig, modulated: bool = True) -> dict:
    """Declare the last layer, zero at the start, and the modulation of its norm by noise level and label."""
    outputs = config.patch_values * (1 + config.learned_variance + config.input_skip)
    return {
        **modulation_specs(config.width, 2 if modulated else 0),
        "head": dense_specs(config.width, outputs, ("embed", None), zeros),
    }


def predict(params: dict, config: HeadConfig, x_BLD: jax.Array, x_BLP: jax.Array, known: Condition) -> jax.Array:
    """Return the prediction (B, L, P) float32, or (B, L, 2 P) with variance values; x_BLP: the noisy tokens."""
    with jax.named_scope("head"):
        shift, scale = modulation(params, known, 2) if "modulation" in params else (0.0, 0.0)
        x_BLD = layer_norm(x_BLD) * (1 + scale) + shift
        y = dense(params["head"], x_BLD, ("batch", None, None)).astype(jnp.float32)
        return _with_input(y, reshard(x_BLP, "batch", None, None)) if config.input_skip else y


def _with_input(y: jax.Array, x_BLP: jax.Array) -> jax.Array:
    """Add x, times the gates that stand last in y, to the prediction that stands first."""
    P = x_BLP.shape[-1]
    prediction, variance, gate = y[..., :P], y[..., P:-P], y[..., -P:]
    return jnp.concatenate([prediction + gate * x_BLP, variance], axis=-1)
