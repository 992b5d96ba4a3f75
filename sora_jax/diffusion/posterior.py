"""One step back of a noising process when the data are known, and the variance that a model may learn for it.

Equations are those of `process`. The functions are elementwise: s <= t have one shape and broadcast to the values.
"""

import jax.numpy as jnp
from jaxtyping import Array

from sora_jax.diffusion.process import Process, lost_snr, transition


def posterior_mean(process: Process, x0: Array, x_t: Array, s: Array, t: Array) -> Array:
    """Return m of equation (10), E[x_s | x_t, x_0]; exactly x_t where s = t, exactly x_0 where s = 0 < t."""
    moves = s < t
    noise = process.b(jnp.where(moves, t, 1.0))
    ratio = jnp.where(moves, process.b(s) / noise, 1.0)
    alpha = jnp.where(moves, transition(process, s, t)[0], 1.0)
    return process.a(s) * lost_snr(process, s, t) * x0 + alpha * jnp.square(ratio) * x_t


def log_variance_bounds(process: Process, s: Array, t: Array) -> tuple[Array, Array]:
    """Return (log w, log v) of equation (10), the bounds of equation (11); finite also where s = t.

    Where s = 0, w is 0: its logarithm is taken one step earlier, of (t, 2 t), as DDPM's code does at its first step.
    """
    # One step earlier, or, where that would be beyond t = 1, the upper bound itself.
    first = (s <= 0) & (t < 1.0)
    before, after = jnp.where(first, t, s), jnp.where(first, jnp.minimum(2.0 * t, 1.0), t)
    upper = _log_or_least(transition(process, s, t)[1])
    lower = _log_or_least(jnp.square(process.b(before)) * lost_snr(process, before, after))
    return jnp.where((s <= 0) & (t >= 1.0), upper, lower), upper


def learned_log_variance(process: Process, v: Array, s: Array, t: Array) -> Array:
    """Return equation (11): v = -1 is the lower of `log_variance_bounds`, v = 1 the upper; others go beyond."""
    lower, upper = log_variance_bounds(process, s, t)
    share = 0.5 * (v + 1.0)
    return share * upper + (1.0 - share) * lower


def _log_or_least(variance: Array) -> Array:
    """Return the logarithm, finite at 0."""
    return jnp.log(jnp.maximum(variance, jnp.finfo(variance.dtype).tiny))
