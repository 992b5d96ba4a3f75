"""The denoising loss, as sums that add up over micro-batches and devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sora_jax.diffusion.prediction import Denoise, express
from sora_jax.diffusion.process import Process, corrupt
from sora_jax.diffusion.times import per_token
from sora_jax.shapes import SegmentsBL, TimesBR, TokensBLP


class LossSums(NamedTuple):
    """Float32 sums over tokens. Add them up first, then divide loss by weight: every token counts the same.

    loss and weight are scalars; loss_bins and weight_bins hold the same sums by noise level, bin i for
    i / bins <= t < (i + 1) / bins.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    loss_bins: Float[Array, " bins"]
    weight_bins: Float[Array, " bins"]


def denoising_loss(
    denoise: Denoise,
    process: Process,
    kind: str,
    x0_BLP: TokensBLP,
    eps_BLP: TokensBLP,
    t_BR: TimesBR,
    rows_BL: Int[Array, "B L"],
    weight_BL: Float[Array, "B L"],
    bins: int = 10,
) -> LossSums:
    """Weighted sum over tokens of the mean squared error of the prediction (2006.11239, equation 14).

    `denoise(x_BLP, t_BR)` predicts the given kind; rows_BL points every token at its noise-level row.
    weight_BL is 0 where there is nothing to learn (`loss_weight`): those tokens add neither loss nor
    gradient, not even where their error is infinite.
    """
    t_BL1 = per_token(t_BR, rows_BL)[:, :, None]
    x_BLP = corrupt(process, x0_BLP, eps_BLP, t_BL1)
    target_BLP = express(process, kind, x0_BLP, eps_BLP, t_BL1)
    error_BLP = denoise(x_BLP, t_BR).astype(jnp.float32) - target_BLP
    # Select, not multiply: 0 times an infinite error would be a NaN, in the loss or in its gradient.
    error_BLP = jnp.where(weight_BL[:, :, None] > 0, error_BLP, 0.0)
    loss_BL = weight_BL * jnp.mean(jnp.square(error_BLP), axis=2)
    in_bin_BLN = jax.nn.one_hot(_noise_bin(t_BL1[:, :, 0], bins), bins)
    return LossSums(
        loss=jnp.sum(loss_BL),
        weight=jnp.sum(weight_BL),
        loss_bins=jnp.sum(loss_BL[:, :, None] * in_bin_BLN, axis=(0, 1)),
        weight_bins=jnp.sum(weight_BL[:, :, None] * in_bin_BLN, axis=(0, 1)),
    )


def loss_weight(segments_BL: SegmentsBL, t_BR: TimesBR, rows_BL: Int[Array, "B L"]) -> Float[Array, "B L"]:
    """1 for tokens to learn from; 0 for padding (segment 0) and for given tokens (row at time 0)."""
    unknown_BL = per_token(t_BR, rows_BL) > 0
    return ((segments_BL > 0) & unknown_BL).astype(jnp.float32)


def _noise_bin(t_BL: Array, bins: int) -> Array:
    return jnp.minimum((t_BL * bins).astype(jnp.int32), bins - 1)
