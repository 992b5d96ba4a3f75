"""The denoising loss, as sums that add up over micro-batches and devices.

If a model learns its variance, the variational bound is added to the squared error (Nichol and Dhariwal 2102.09672,
equation 16; DiT 2212.09748): equation (12) of `process` at the drawn step, in bits per value, with the mean held
constant. So the squared error alone trains the mean, and the bound alone the variance.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sora_jax.diffusion.posterior import learned_log_variance, log_variance_bounds
from sora_jax.diffusion.prediction import Denoise, from_x0_and_eps, to_x0_and_eps
from sora_jax.diffusion.process import Process, corrupt, lost_snr, step_before
from sora_jax.diffusion.times import per_token
from sora_jax.diffusion.weights import WeightConfig, noise_level_weight
from sora_jax.shapes import PerTokenBL1, RowsBL, SegmentsBL, TimesBR, TokensBLP, WeightBL

# Data in [-1, 1] in 256 bins: half the width of a bin, and where the outermost bins, open to infinity, begin.
_HALF_BIN = 1.0 / 255.0
_LAST_BIN = 0.999
_LEAST_PROBABILITY = 1e-12
# Float32 has no probability left beyond so many standard deviations.
_MAX_DEVIATIONS = 20.0


@dataclass(frozen=True)
class LossSpec:
    """Define a denoising loss: the process, the model's output, and how errors count."""

    process: Process
    prediction_type: str  # a key of `prediction.FORMS`
    weighting: WeightConfig = WeightConfig()  # weight of the squared error at each noise level
    learned_variance: bool = False  # the output holds variance values after the prediction; add the bound
    bins: int = 10  # in which `LossSums` counts noise levels


class Corruption(NamedTuple):
    """Hold what tokens are corrupted with: x_t = a(t) x_0 + b(t) eps at the time t of every token's row."""

    x0_BLP: TokensBLP
    eps_BLP: TokensBLP
    t_BR: TimesBR
    rows_BL: RowsBL


class LossSums(NamedTuple):
    """Hold float32 sums over tokens. Add them up first, then divide by weight: every token counts the same."""

    loss: Float[Array, ""]  # what is trained: mse + vlb
    weight: Float[Array, ""]
    loss_bins: Float[Array, " bins"]  # loss by noise level, bin i for i / bins <= t < (i + 1) / bins
    weight_bins: Float[Array, " bins"]
    mse: Float[Array, ""]  # the squared error, weighted by noise level
    vlb: Float[Array, ""]  # the variational bound in bits per value; 0 unless the model learns its variance


def denoising_loss(spec: LossSpec, denoise: Denoise, data: Corruption, weight_BL: WeightBL) -> LossSums:
    """Sum the mean squared error of the prediction, and the variational bound, over tokens: see `token_losses`."""
    mse_BL, vlb_BL, t_BL = token_losses(spec, denoise, data, weight_BL)
    return _sums(mse_BL, vlb_BL, weight_BL, t_BL, spec.bins)


def token_losses(
    spec: LossSpec, denoise: Denoise, data: Corruption, weight_BL: WeightBL
) -> tuple[WeightBL, WeightBL, WeightBL]:
    """Return the squared error and the variational bound of each token, times its weight, and its noise level.

    `denoise(x_BLP, t_BR)` returns predictions, then variance values if it learns them. weight_BL is 0 where there is
    nothing to learn (`loss_weight`): those tokens add neither loss nor gradient, not even where their error is
    infinite.
    """
    process, (x0_BLP, eps_BLP, t_BR, rows_BL) = spec.process, data
    t_BL1 = per_token(t_BR, rows_BL)[:, :, None]
    x_BLP = corrupt(process, x0_BLP, eps_BLP, t_BL1)
    target_BLP = from_x0_and_eps(process, spec.prediction_type, x0_BLP, eps_BLP, t_BL1)
    # Select, not multiply: 0 times an infinite error would be a NaN, in the loss or in its gradient.
    learns_BL1 = weight_BL[:, :, None] > 0
    out_BLP = jnp.where(learns_BL1, denoise(x_BLP, t_BR).astype(jnp.float32), 0.0)
    width = x0_BLP.shape[2]
    error_BLP = jnp.where(learns_BL1, out_BLP[:, :, :width] - target_BLP, 0.0)
    level_weight_BL1 = noise_level_weight(spec.weighting, process, spec.prediction_type, t_BL1)
    scale_BL1 = jnp.where(learns_BL1, level_weight_BL1, 0.0)
    mse_BL = weight_BL * jnp.mean(scale_BL1 * jnp.square(error_BLP), axis=2)
    vlb_BL = jnp.zeros_like(mse_BL)
    if spec.learned_variance:
        bits_BLP = vlb_bits(spec, out_BLP, x0_BLP, x_BLP, step_before(t_BL1), t_BL1)
        vlb_BL = weight_BL * jnp.mean(jnp.where(learns_BL1, bits_BLP, 0.0), axis=2)
    return mse_BL, vlb_BL, t_BL1[:, :, 0]


def vlb_bits(
    spec: LossSpec,
    out_BLP: Float[Array, "B L out"],
    x0_BLP: TokensBLP,
    x_BLP: TokensBLP,
    s_BL1: PerTokenBL1,
    t_BL1: PerTokenBL1,
) -> TokensBLP:
    """Return equation (12) of `process` for the step from t to s, in bits per value, finite for every t in [0, 1].

    `out_BLP` is the model's output at x_BLP, predictions then variance values; only the latter have a gradient. Where
    s = 0 the term is the likelihood of the data in its bin, else the divergence of the step.
    """
    process, (y_BLP, v_BLP) = spec.process, jnp.split(out_BLP, 2, axis=2)
    model_x0_BLP = to_x0_and_eps(process, spec.prediction_type, jax.lax.stop_gradient(y_BLP), x_BLP, t_BL1)[0]
    log_variance_BLP = learned_log_variance(process, v_BLP, s_BL1, t_BL1)
    # Both means are equation (10) and differ in the x_0 term alone. At s = 0 the mean is x_0 itself.
    off_BLP = process.a(s_BL1) * lost_snr(process, s_BL1, t_BL1) * (x0_BLP - model_x0_BLP)
    true_log_variance_BL1 = log_variance_bounds(process, s_BL1, t_BL1)[0]
    divergence_BLP = normal_divergence(off_BLP, true_log_variance_BL1, log_variance_BLP)
    likelihood_BLP = bin_log_likelihood(x0_BLP, model_x0_BLP, 0.5 * log_variance_BLP)
    return jnp.where(s_BL1 > 0, divergence_BLP, -likelihood_BLP) / math.log(2.0)


def normal_divergence(offset: Array, log_variance: Array, model_log_variance: Array) -> Array:
    """Return KL(N(0, exp(log_variance)) || N(offset, exp(model_log_variance))) in nats; the shapes broadcast."""
    wider = model_log_variance - log_variance
    return 0.5 * (jnp.expm1(-wider) + wider + jnp.square(offset) * jnp.exp(-model_log_variance))


def bin_log_likelihood(x: Array, mean: Array, log_std: Array) -> Array:
    """Return log P of the bin of x under N(mean, exp(2 log_std)), in nats: equation 13 of 2006.11239; shapes broadcast.

    Bins are 2/255 wide around x; the first and the last of [-1, 1] reach to infinity. The result is at least log 1e-12.
    The normal distribution function is the tanh approximation of DDPM's code and DiT's, so that losses compare number
    by number. Its error is up to 1.8e-4; that of the result up to 0.001 nats for x within one standard deviation of the
    mean, 0.04 within three, and whole nats from five on.
    """
    inverse_std = jnp.exp(-log_std)
    upper = jnp.where(x > _LAST_BIN, _MAX_DEVIATIONS, (x + _HALF_BIN - mean) * inverse_std)
    lower = jnp.where(x < -_LAST_BIN, -_MAX_DEVIATIONS, (x - _HALF_BIN - mean) * inverse_std)
    # Reflect into the lower tail, where the distribution function keeps its digits.
    reflects = lower + upper > 0
    low, high = jnp.where(reflects, -upper, lower), jnp.where(reflects, -lower, upper)
    return jnp.log(jnp.maximum(_normal_cdf(high) - _normal_cdf(low), _LEAST_PROBABILITY))


def _normal_cdf(z: Array) -> Array:
    """Return (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2, with its digits in the lower tail."""
    z = jnp.clip(z, -_MAX_DEVIATIONS, _MAX_DEVIATIONS)
    return jax.nn.sigmoid(math.sqrt(8.0 / math.pi) * (z + 0.044715 * z**3))


def loss_weight(segments_BL: SegmentsBL, t_BR: TimesBR, rows_BL: RowsBL) -> WeightBL:
    """Return 1 for tokens to learn from; 0 for padding (segment 0) and for given tokens (row at time 0)."""
    unknown_BL = per_token(t_BR, rows_BL) > 0
    return ((segments_BL > 0) & unknown_BL).astype(jnp.float32)


def _sums(mse_BL: Array, vlb_BL: Array, weight_BL: Array, t_BL: Array, bins: int) -> LossSums:
    in_bin_BLN = jax.nn.one_hot(jnp.minimum((t_BL * bins).astype(jnp.int32), bins - 1), bins)
    mse, vlb = jnp.sum(mse_BL), jnp.sum(vlb_BL)
    return LossSums(
        loss=mse + vlb,
        weight=jnp.sum(weight_BL),
        loss_bins=jnp.sum((mse_BL + vlb_BL)[:, :, None] * in_bin_BLN, axis=(0, 1)),
        weight_bins=jnp.sum(weight_BL[:, :, None] * in_bin_BLN, axis=(0, 1)),
        mse=mse,
        vlb=vlb,
    )
