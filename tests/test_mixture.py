"""The closed forms of a mixture of Gaussians, against differentiation, quadrature and draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures_mixtures import PLANE, one_row
from mixture import denoiser, draw_data, log_density, petals, posterior_means
from scipy import stats

from sora_jax.diffusion.process import PROCESSES, process_named


@pytest.mark.parametrize("mixture", [PLANE, petals()], ids=["plane", "petals"])
def test_density_is_that_of_scipy(mixture):
    points = np.random.default_rng(0).normal(size=(50, 2))
    a, b = 0.8, 0.3
    wanted = 0.0
    for share, mean, axes, deviation in zip(*vars(mixture).values(), strict=True):
        covariance = a**2 * axes @ np.diag(deviation**2) @ axes.T + b**2 * np.eye(2)
        wanted = wanted + share * stats.multivariate_normal(a * mean, covariance).pdf(points)
    with jax.enable_x64(True):
        found = log_density(mixture, jnp.asarray(points), a, b)
    np.testing.assert_allclose(found, np.log(wanted), rtol=1e-10)


@pytest.mark.parametrize("name", PROCESSES)
def test_score_is_the_slope_of_the_log_density(name):
    process, t = process_named(name), 0.4
    with jax.enable_x64(True):
        x_BLP = jnp.asarray(np.random.default_rng(1).normal(size=(1, 20, 2)) * process.b(jnp.float64(t)))
        score = denoiser(PLANE, process, "score", one_row(20))(x_BLP, jnp.full((1, 1), t))
        a, b = process.a(jnp.float64(t)), process.b(jnp.float64(t))
        slope = jax.grad(lambda x: jnp.sum(log_density(PLANE, x, a, b)))(x_BLP)
        np.testing.assert_allclose(score, slope, rtol=1e-8, atol=1e-10)


def test_posterior_means_are_those_of_bayes_rule_on_a_grid():
    a, b = 0.7, 0.6
    side = np.linspace(-5, 5, 401)
    clean = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    x = np.array([0.3, -0.5])
    with jax.enable_x64(True):
        prior = np.exp(np.asarray(log_density(PLANE, jnp.asarray(clean))))
        found = posterior_means(PLANE, a, b, jnp.asarray(x))
    weight = prior * np.exp(-np.sum((x - a * clean) ** 2, axis=1) / (2 * b**2))
    mean = weight @ clean / weight.sum()
    np.testing.assert_allclose(found[0], mean, rtol=1e-6)
    np.testing.assert_allclose(found[1], (x - a * mean) / b, rtol=1e-6)


@pytest.mark.parametrize("name", PROCESSES)
def test_both_ends_of_time_are_finite(name):
    x_BLP = jnp.ones((1, 2, 2))
    rows_BL = jnp.array([[0, 1]])
    found = denoiser(PLANE, process_named(name), "x0", rows_BL)(x_BLP, jnp.array([[0.0, 1.0]]))
    np.testing.assert_allclose(found[0, 0], x_BLP[0, 0], rtol=1e-6)
    assert np.all(np.isfinite(found))


def test_draws_have_the_moments_of_the_mixture():
    draws = np.asarray(draw_data(PLANE, jax.random.key(0), 100_000))
    covariances = PLANE.axes @ (PLANE.deviations[:, :, None] ** 2 * np.swapaxes(PLANE.axes, 1, 2))
    mean = PLANE.shares @ PLANE.means
    spread = covariances + PLANE.means[:, :, None] * PLANE.means[:, None, :]
    covariance = np.einsum("m,mij->ij", PLANE.shares, spread) - np.outer(mean, mean)
    np.testing.assert_allclose(draws.mean(axis=0), mean, atol=0.015)
    np.testing.assert_allclose(np.cov(draws.T), covariance, atol=0.02)
