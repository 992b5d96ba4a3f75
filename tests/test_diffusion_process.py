"""Noising processes and conversions between predictions: closed forms, exact ends, round trips."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion.prediction import FORMS, convert, express, solve
from sora_jax.diffusion.process import (
    PROCESSES,
    corrupt,
    cosine,
    derivatives,
    linear_flow,
    process_named,
    snr,
    time_of_step,
    vp_linear,
)
from sora_jax.errors import UserError

ALL = list(PROCESSES.values())
INSIDE = jnp.linspace(1e-3, 1 - 1e-3, 301)


def name_of(process):
    return process.name


def clean_and_noise(shape=(301, 5)):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.mark.parametrize("process", ALL, ids=name_of)
def test_ends_are_exact(process):
    x0, eps = clean_and_noise()
    np.testing.assert_array_equal(corrupt(process, x0, eps, jnp.zeros((301, 1))), x0)
    if process is not vp_linear:  # the DDPM schedule leaves a little signal at its last step
        np.testing.assert_array_equal(corrupt(process, x0, eps, jnp.ones((301, 1))), eps)


@pytest.mark.parametrize("process", ALL, ids=name_of)
def test_noise_only_grows(process):
    assert np.all(np.diff(snr(process, INSIDE)) < 0)
    assert corrupt(process, *clean_and_noise(), jnp.full((301, 1), 0.5)).dtype == jnp.float32


@pytest.mark.parametrize("process", [cosine, vp_linear], ids=name_of)
def test_variance_is_preserved(process):
    a, b = process.a(INSIDE), process.b(INSIDE)
    da, db = derivatives(process, INSIDE)
    np.testing.assert_allclose(a**2 + b**2, 1.0, atol=3e-7)
    np.testing.assert_allclose(a * da + b * db, 0.0, atol=2e-5)


def test_derivatives_match_the_closed_forms():
    da, db = derivatives(cosine, INSIDE)
    angle = 0.5 * np.pi * np.asarray(INSIDE, np.float64)
    np.testing.assert_allclose(da, -0.5 * np.pi * np.sin(angle), atol=1e-6)
    np.testing.assert_allclose(db, 0.5 * np.pi * np.cos(angle), atol=1e-6)
    da, db = derivatives(linear_flow, INSIDE)
    np.testing.assert_array_equal(da, -1.0)
    np.testing.assert_array_equal(db, 1.0)


def test_ddpm_schedule_is_met_at_every_step():
    """All thousand steps against the running product in float64, and three published values."""
    t = jnp.asarray(time_of_step(np.arange(1000)), jnp.float32)
    abar = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(vp_linear.a(t) ** 2, abar, rtol=1e-5)
    np.testing.assert_allclose(vp_linear.b(t) ** 2, 1.0 - abar, rtol=1e-5)
    np.testing.assert_allclose(vp_linear.a(t[0]), 0.99995, rtol=1e-6)
    np.testing.assert_allclose(vp_linear.a(t[499]) ** 2, 0.0785872, rtol=1e-5)
    np.testing.assert_allclose(vp_linear.a(t[999]), 0.00635282, rtol=1e-5)


def test_ddpm_schedule_is_smooth_between_steps():
    """-d log abar / dt is 1000 beta up to second order in beta: no kinks where steps meet."""
    t = jnp.asarray(np.linspace(0.05, 0.95, 2001), jnp.float32)
    da, _ = derivatives(vp_linear, t)
    beta = 1e-4 + (0.02 - 1e-4) * (1000.0 * np.asarray(t, np.float64) - 0.5) / 999.0
    np.testing.assert_allclose(-2.0 * da / vp_linear.a(t), -1000.0 * np.log1p(-beta), rtol=1e-4)


@pytest.mark.parametrize("process", [cosine, vp_linear], ids=name_of)
def test_equal_snr_maps_to_the_linear_flow(process):
    a, b = process.a(INSIDE), process.b(INSIDE)
    np.testing.assert_allclose(snr(linear_flow, b / (a + b)), snr(process, INSIDE), rtol=2e-3)


@pytest.mark.parametrize("process", ALL, ids=name_of)
@pytest.mark.parametrize("source, target", list(itertools.product(FORMS, FORMS)))
def test_every_prediction_converts_to_every_other_and_back(process, source, target):
    """Near both ends too, where rounding is magnified by at most 1 / 1e-3."""
    x0, eps = clean_and_noise()
    t = INSIDE[:, None]
    x_t = corrupt(process, x0, eps, t)
    given = express(process, source, x0, eps, t)
    there = convert(process, source, target, given, x_t, t)
    wanted = express(process, target, x0, eps, t)
    back = convert(process, target, source, there, x_t, t)
    scale = 1.0 + np.abs(wanted).max(axis=1, keepdims=True) + np.abs(given).max(axis=1, keepdims=True)
    np.testing.assert_array_less(np.abs(there - wanted) / scale, 2e-3)
    np.testing.assert_array_less(np.abs(back - given) / scale, 2e-3)
    assert there.dtype == jnp.float32


def test_conversions_match_the_formula_card():
    """Written out by hand for one time: x0 and eps from v (VP) and from the flow velocity."""
    x0, eps = clean_and_noise()
    t = jnp.full((301, 1), 0.3)
    a, b = np.cos(0.15 * np.pi), np.sin(0.15 * np.pi)
    x_t, v = a * x0 + b * eps, a * eps - b * x0
    solved = solve(cosine, "v", v, x_t, t)
    np.testing.assert_allclose(solved[0], a * x_t - b * v, atol=1e-5)
    np.testing.assert_allclose(solved[1], b * x_t + a * v, atol=1e-5)
    x_t = 0.7 * x0 + 0.3 * eps
    np.testing.assert_allclose(express(linear_flow, "velocity", x0, eps, t), eps - x0, atol=1e-6)
    np.testing.assert_allclose(solve(linear_flow, "velocity", eps - x0, x_t, t)[0], x_t - 0.3 * (eps - x0), atol=1e-5)


@pytest.mark.parametrize("process", [linear_flow, cosine], ids=name_of)
@pytest.mark.parametrize("kind, end", [("v", 0), ("v", 1), ("velocity", 0), ("velocity", 1), ("eps", 0), ("x0", 1)])
def test_ends_that_lose_nothing(process, kind, end):
    x0, eps = clean_and_noise()
    t = jnp.full((301, 1), float(end))
    solved = solve(process, kind, express(process, kind, x0, eps, t), corrupt(process, x0, eps, t), t)
    np.testing.assert_allclose(solved[0], x0, atol=1e-6)
    np.testing.assert_allclose(solved[1], eps, atol=1e-6)


def test_ends_that_lose_a_half_give_its_mean():
    x0, eps = clean_and_noise()
    cases = (cosine, "eps", 1.0, 0), (linear_flow, "eps", 1.0, 0), (vp_linear, "x0", 0.0, 1)
    for process, kind, end, lost in cases:
        t = jnp.full((301, 1), end)
        solved = solve(process, kind, express(process, kind, x0, eps, t), corrupt(process, x0, eps, t), t)
        np.testing.assert_array_equal(solved[lost], 0.0)
        np.testing.assert_array_equal(solved[1 - lost], (x0, eps)[1 - lost])


@pytest.mark.parametrize("process", ALL, ids=name_of)
@pytest.mark.parametrize("kind", FORMS)
def test_gradients_are_finite_on_the_whole_interval(process, kind):
    x0, eps = clean_and_noise((3, 2))

    def total(y, x_t, t):
        return sum(jnp.sum(half) for half in solve(process, kind, y, x_t, t))

    t = jnp.array([[0.0], [0.5], [1.0]])
    gradients = jax.jit(jax.grad(total, (0, 1, 2)))(express(process, kind, x0, eps, t), x0, t)
    assert all(bool(jnp.all(jnp.isfinite(gradient))) for gradient in gradients)


def test_unknown_names_are_user_errors():
    with pytest.raises(UserError, match="linear_flow, cosine, vp_linear, not 'ddpm'"):
        process_named("ddpm")
    with pytest.raises(UserError, match="x0, eps, v, velocity, not 'score'"):
        express(cosine, "score", *clean_and_noise(), jnp.ones((301, 1)))
    assert process_named("cosine") is cosine
