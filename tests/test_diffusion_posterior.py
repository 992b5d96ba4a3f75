"""One step back: Bayes' rule, DDPM's coefficients in float64, and the variance between its two ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion.posterior import learned_log_variance, log_variance_bounds, posterior_mean
from sora_jax.diffusion.process import PROCESSES, process_named, transition, vp_linear

ALL = list(PROCESSES.values())
BETAS = np.linspace(1e-4, 0.02, 1000)
ABAR = np.cumprod(1 - BETAS)
BEFORE = np.append(1.0, ABAR[:-1])
S, T = (jnp.asarray(steps / 1000, jnp.float32) for steps in (np.arange(1000), np.arange(1, 1001)))


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def test_mean_has_the_coefficients_of_ddpm():
    """2006.11239, equation 7, for all thousand steps: the mean is linear, so unit vectors show its coefficients."""
    one, none = jnp.ones_like(T), jnp.zeros_like(T)
    mean = jax.jit(lambda x0, x_t: posterior_mean(vp_linear, x0, x_t, S, T))
    np.testing.assert_allclose(mean(one, none), np.sqrt(BEFORE) * BETAS / (1 - ABAR), rtol=3e-6)
    np.testing.assert_allclose(mean(none, one), np.sqrt(1 - BETAS) * (1 - BEFORE) / (1 - ABAR), rtol=3e-6)


def test_bounds_are_the_variances_of_ddpm_with_the_first_clipped():
    lower, upper = jax.jit(lambda: log_variance_bounds(vp_linear, S, T))()
    variance = BETAS * (1 - BEFORE) / (1 - ABAR)
    variance[0] = variance[1]
    np.testing.assert_allclose(upper, np.log(BETAS), rtol=1e-6)
    np.testing.assert_allclose(lower, np.log(variance), rtol=1e-6)
    np.testing.assert_allclose(np.exp(lower[0]), 5.45319e-5, rtol=1e-5)
    np.testing.assert_allclose(lower[0], -9.81673, rtol=1e-6)


@pytest.mark.parametrize("process", ALL, ids=lambda process: process.name)
@pytest.mark.parametrize("times", [(0.3, 0.8), (0.5, 0.502), (0.9, 1.0)])
def test_posterior_is_bayes_rule(process, times):
    """Precisions add up: that of x_s given x_0 and that of x_t given x_s, in float64 from a and b alone."""
    s, t = map(jnp.float32, times)
    a_s, b_s, a_t, b_t = (np.float64(value) for value in (process.a(s), process.b(s), process.a(t), process.b(t)))
    alpha = a_t / a_s
    step = b_t**2 - alpha**2 * b_s**2
    precision = 1 / b_s**2 + alpha**2 / step
    wanted = (a_s * 0.7 / b_s**2 + alpha * -1.3 / step) / precision
    lower, upper = log_variance_bounds(process, s, t)
    np.testing.assert_allclose(posterior_mean(process, jnp.float32(0.7), jnp.float32(-1.3), s, t), wanted, rtol=1e-4)
    np.testing.assert_allclose(np.exp(np.float64(lower)), 1 / precision, rtol=3e-4)
    np.testing.assert_allclose(np.exp(np.float64(upper)), step, rtol=3e-4)
    assert float(lower) <= float(upper) == float(jnp.log(transition(process, s, t)[1]))


@pytest.mark.parametrize("process", ALL, ids=lambda process: process.name)
def test_ends_of_the_mean_are_exact(process):
    x0, x_t = jnp.array([0.3, -1.2]), jnp.array([5.0, 0.1])
    for t in (1e-5, 0.001, 0.6, 1.0):
        same, start = jnp.full(2, t), jnp.zeros(2)
        np.testing.assert_array_equal(posterior_mean(process, x0, x_t, same, same), x_t)
        np.testing.assert_array_equal(posterior_mean(process, x0, x_t, start, same), x0)
    held = jnp.zeros(2)
    np.testing.assert_array_equal(posterior_mean(process, x0, x_t, held, held), x_t)


@pytest.mark.parametrize("process", ALL, ids=lambda process: process.name)
def test_variances_are_finite_and_in_order_everywhere(process):
    grid = jnp.array([0.0, 1e-5, 1e-3, 2e-3, 0.3, 0.6, 0.999, 1.0])
    s, t = (values.ravel() for values in jnp.meshgrid(grid, grid))
    s, t = s[s <= t], t[s <= t]
    lower, upper = log_variance_bounds(process, s, t)
    assert np.all(np.isfinite(lower)) and np.all(np.isfinite(upper))
    moves = np.asarray((s > 0) & (s < t))
    assert np.all(np.asarray(lower)[moves] <= np.asarray(upper)[moves] + 1e-6)
    gradient = jax.grad(lambda v: jnp.sum(learned_log_variance(process, v, s, t)))(jnp.zeros_like(s))
    np.testing.assert_allclose(gradient, 0.5 * (upper - lower), atol=1e-5)


def test_learned_variance_runs_from_end_to_end():
    lower, upper = log_variance_bounds(process_named("vp_scaled_linear"), S, T)
    for value, wanted in ((-1.0, lower), (1.0, upper), (0.0, 0.5 * (lower + upper)), (3.0, 2 * upper - lower)):
        found = learned_log_variance(process_named("vp_scaled_linear"), jnp.full_like(T, value), S, T)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
