"""The two ends of a denoiser over packs: noisy patches to tokens, tokens to predictions; shared by networks."""

from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp

from sora_jax.nn.layers import dense, dense_specs, embed, embedding_specs, layer_norm
from sora_jax.nn.pack import Pack
from sora_jax.nn.params import zeros
from sora_jax.nn.positions import sincos_table
from sora_jax.parallel.rules import reshard

Shift = jax.Array | float
GUIDE_KINDS = 2  # key frames and sketches, see `data.guides`


class HeadConfig(Protocol):
    """List what the last layer reads of a network's config; see `TransformerConfig` for what each field means."""

    @property
    def width(self) -> int:
        """Return D."""

    @property
    def patch_values(self) -> int:
        """Return P, the values in a token."""

    @property
    def learned_variance(self) -> bool:
        """Return True if the variance of a step is predicted, too."""

    @property
    def input_skip(self) -> bool:
        """Return True if the prediction is added to the noisy tokens, times a gate for each value."""


class EndsConfig(HeadConfig, Protocol):
    """List what both ends read of a network's config."""

    @property
    def guides(self) -> bool:
        """Return True if guide tokens are told from those of clips."""

    @property
    def sincos_positions(self) -> bool:
        """Return True if sin-cos position tables are added to the tokens."""

    @property
    def sincos_axes(self) -> str:
        """Return the axes that share the width of those tables."""

    @property
    def position_theta(self) -> float:
        """Return the ratio of their longest wavelength to their shortest."""


def ends_specs(config: EndsConfig) -> dict:
    """Declare both ends."""
    return {
        "patch": dense_specs(config.patch_values, config.width, (None, "embed")),
        **({"guides": embedding_specs(GUIDE_KINDS, config.width)} if config.guides else {}),
        **head_specs(config),
    }


def head_specs(config: HeadConfig) -> dict:
    """Declare the last layer, zero at the start, and a hidden one before it if the config has `head_hidden`.

    Its outputs are the prediction, variances if they are learned, and the gates of the input if there are any.
    """
    outputs, hidden = config.patch_values * (1 + config.learned_variance + config.input_skip), head_hidden(config)
    if not hidden:
        return {"head": dense_specs(config.width, outputs, ("embed", None), zeros)}
    up = dense_specs(config.width, hidden, ("embed", "hidden"))
    return {"head": {"up": up, "down": dense_specs(hidden, outputs, ("hidden", None), zeros)}}


def head_hidden(config: HeadConfig) -> int:
    """Return the width of the hidden layer of the head, 0 for none: also where the config has no such field."""
    return getattr(config, "head_hidden", 0)


def embed_tokens(params: dict, config: EndsConfig, pack: Pack, x_BLP: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Embed noisy patches, kinds of guides and positions: (B, L, P) -> (B, L, D) in `dtype`."""
    axes = ("batch", "length", "width")
    x_BLD = dense(params["patch"], x_BLP.astype(dtype), axes)
    if config.guides and pack.guides_BL is not None:
        kinds = embed(params["guides"].astype(dtype), jnp.maximum(pack.guides_BL - 1, 0), axes)
        x_BLD += jnp.where(pack.guides_BL[..., None] > 0, kinds, 0)
    if config.sincos_positions:
        table = sincos_table(pack.coords_BL3, config.width, config.position_theta, config.sincos_axes)
        x_BLD += table.astype(dtype)
    return x_BLD


def predict(
    params: dict, config: HeadConfig, x_BLD: jax.Array, x_BLP: jax.Array, modulation: Sequence[Shift] = (0.0, 0.0)
) -> jax.Array:
    """Read the prediction off the last tokens: (B, L, D) -> (B, L, P) float32, (B, L, 2 P) with variances.

    x_BLP: the noisy tokens, for the gates. modulation: shift and scale of the last norm.
    """
    shift, scale = modulation
    with jax.named_scope("head"):
        x_BLD = layer_norm(x_BLD) * (1 + scale) + shift
        head = params["head"]
        if head_hidden(config):
            up_BLF = dense(head["up"], x_BLD, ("batch", "length", "hidden"))
            head, x_BLD = head["down"], jax.nn.gelu(up_BLF, approximate=True)
        y = dense(head, x_BLD, ("batch", None, None)).astype(jnp.float32)
        return _with_input(y, reshard(x_BLP, "batch", None, None)) if config.input_skip else y


def _with_input(y: jax.Array, x_BLP: jax.Array) -> jax.Array:
    """Add x, times the gates that stand last in y, to the prediction that stands first."""
    P = x_BLP.shape[-1]
    prediction, variance, gate = y[..., :P], y[..., P:-P], y[..., -P:]
    return jnp.concatenate([prediction + gate * x_BLP, variance], axis=-1)
