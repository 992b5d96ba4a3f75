"""Solvers and guidance on mixtures of Gaussians, whose every prediction is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from sora_jax.diffusion.guidance import guide, guided
from sora_jax.diffusion.prediction import FORMS, express
from sora_jax.diffusion.process import PROCESSES, cosine, linear_flow, process_named
from sora_jax.diffusion.solvers import SOLVERS, Problem, solver_named
from sora_jax.diffusion.times import per_token
from sora_jax.errors import UserError

SHARES, MEANS, WIDTHS = np.array([0.3, 0.7]), np.array([-1.5, 1.0]), np.array([0.4, 0.6])
CLOSED = {
    "linear_flow": lambda t: (1 - t, t, -1.0, 1.0),
    "cosine": lambda t: (
        np.cos(np.pi * t / 2),
        np.sin(np.pi * t / 2),
        -np.pi / 2 * np.sin(np.pi * t / 2),
        np.pi / 2 * np.cos(np.pi * t / 2),
    ),
}


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def posterior_means(a, b, x, xp, shares=SHARES, means=MEANS, widths=WIDTHS):
    """E[x_0 | x_t = x] and E[eps | x_t = x] of the mixture by Bayes' rule; `xp` is numpy or jax.numpy."""
    clean, noise, total = 0.0, 0.0, 0.0
    for share, mean, width in zip(shares.tolist(), means.tolist(), widths.tolist(), strict=True):
        variance = a**2 * width**2 + b**2
        offset = x - a * mean
        likely = share * xp.exp(-(offset**2) / (2 * variance)) / xp.sqrt(variance)
        clean = clean + likely * (mean + a * width**2 / variance * offset)
        noise = noise + likely * b / variance * offset
        total = total + likely
    return clean / total, noise / total


def mixture(process, kind, rows_BL, **components):
    """The perfect model of the mixture, predicting `kind`."""

    def denoise(x_BLP, t_BR):
        t_BL1 = per_token(t_BR, rows_BL)[:, :, None]
        means = posterior_means(process.a(t_BL1), process.b(t_BL1), x_BLP, jnp, **components)
        return express(process, kind, *means, t_BL1)

    return Problem(denoise, kind, process, rows_BL)


def one_row(length):
    return jnp.zeros((1, length), jnp.int32)


def grid(steps, start=1.0):
    return jnp.linspace(start, 0.0, steps + 1)[:, None, None]


def solve(solver, problem, x_BLP, times_KBR):
    return np.asarray(jax.jit(lambda x, times: SOLVERS[solver](problem, x, times))(x_BLP, times_KBR))


def exact_ends(process, starts):
    """The probability-flow ODE in float64 by SciPy's eighth-order Runge-Kutta."""

    def velocity(t, x):
        a, b, da, db = CLOSED[process](t)
        clean, noise = posterior_means(a, b, x, np)
        return da * clean + db * noise

    return integrate.solve_ivp(velocity, (1.0, 0.0), starts, method="DOP853", rtol=1e-10, atol=1e-12).y[:, -1]


@pytest.mark.parametrize("process", CLOSED)
@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_order_of_convergence(process, solver, order):
    starts = np.linspace(-2.5, 2.5, 41)
    problem = mixture(process_named(process), "velocity", one_row(41))
    wanted = exact_ends(process, starts)
    x_BLP = jnp.asarray(starts, jnp.float32)[None, :, None]
    steps = (32, 64, 128) if order == 2 else (128, 256, 512)
    ends = [solve(solver, problem, x_BLP, grid(count))[0, :, 0] for count in steps]
    errors = [np.sqrt(np.mean((end - wanted) ** 2)) for end in ends]
    measured = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(measured - order) < 0.15, (measured, errors)


@pytest.mark.parametrize("process", PROCESSES)
def test_all_predictions_give_one_trajectory(process):
    """From t = 0.98: at t = 1 an eps prediction says nothing about x_0."""
    x_BLP = jnp.linspace(-2.0, 2.0, 33)[None, :, None]
    problems = {kind: mixture(process_named(process), kind, one_row(33)) for kind in FORMS}
    ends = {kind: solve("heun", problem, x_BLP, grid(12, 0.98)) for kind, problem in problems.items()}
    for kind in FORMS:
        np.testing.assert_allclose(ends[kind], ends["velocity"], atol=5e-5, err_msg=kind)


@pytest.mark.parametrize("process", PROCESSES)
def test_samples_have_the_distribution_of_the_data(process):
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(1, 20_000, 1)), jnp.float32)
    problem = mixture(process_named(process), "v", one_row(20_000))
    samples = solve("heun", problem, noise, grid(100)).ravel()

    def cumulative(x):
        return sum(s * stats.norm.cdf(x, m, w) for s, m, w in zip(SHARES, MEANS, WIDTHS, strict=True))

    assert stats.kstest(samples, cumulative).pvalue > 0.05
    assert stats.kstest(np.asarray(noise).ravel(), cumulative).pvalue < 1e-6


@pytest.mark.parametrize("process", [linear_flow, cosine], ids=lambda process: process.name)
def test_one_gaussian_has_a_closed_form(process):
    """Data N(m, s^2): the flow carries x_1 to m + s x_1."""
    components = {"shares": np.ones(1), "means": np.array([0.8]), "widths": np.array([0.5])}
    problem = mixture(process, "velocity", one_row(9), **components)
    x_BLP = jnp.linspace(-2.0, 2.0, 9)[None, :, None]
    found = solve("heun", problem, x_BLP, grid(200))
    np.testing.assert_allclose(found, 0.8 + 0.5 * np.asarray(x_BLP), atol=2e-4)


@pytest.mark.parametrize("process", [linear_flow, cosine], ids=lambda process: process.name)
@pytest.mark.parametrize("solver", SOLVERS)
def test_eps_predictions_start_safely_from_pure_noise(process, solver):
    x_BLP = jnp.linspace(-2.0, 2.0, 33)[None, :, None]
    problems = [mixture(process, kind, one_row(33)) for kind in ("eps", "velocity")]
    ends = [solve(solver, problem, x_BLP, grid(200)) for problem in problems]
    np.testing.assert_allclose(*ends, atol=0.05)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("process, kind", [("linear_flow", "eps"), ("cosine", "velocity"), ("vp_linear", "x0")])
def test_rows_keep_their_own_times(process, kind, solver):
    """Two clips on different grids in one pack end as they do alone; a row held at time 0 does not move."""
    rng = np.random.default_rng(4)
    x_BLP = jnp.asarray(rng.normal(size=(1, 12, 2)), jnp.float32)
    rows_BL = jnp.asarray(rng.permutation(np.arange(12) % 3)[None], jnp.int32)
    even = grid(6)
    times_KBR = jnp.concatenate([even, even**2, jnp.zeros_like(even)], axis=2)
    packed = solve(solver, mixture(process_named(process), kind, rows_BL), x_BLP, times_KBR)
    for row in range(3):
        mine = np.asarray(rows_BL)[0] == row
        problem = mixture(process_named(process), kind, one_row(4))
        alone = solve(solver, problem, x_BLP[:, mine], times_KBR[:, :, row : row + 1])
        np.testing.assert_allclose(packed[:, mine], alone, atol=1e-5, rtol=1e-5)
        assert (row == 2) == np.array_equal(packed[:, mine], x_BLP[:, mine])


@pytest.mark.parametrize("solver, evaluations", [("euler", 8), ("heun", 15)])
def test_number_of_model_evaluations(solver, evaluations):
    calls = []

    def denoise(x_BLP, t_BR):
        jax.debug.callback(lambda t: calls.append(float(t)), t_BR[0, 0])
        return x_BLP

    solve(solver, Problem(denoise, "velocity", linear_flow, one_row(2)), jnp.ones((1, 2, 1)), grid(8))
    jax.effects_barrier()
    assert len(calls) == evaluations and min(calls) > 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_step_of_the_linear_flow_is_the_prediction(solver):
    x_BLP, clean_BLP = jnp.full((1, 4, 2), 0.3), jnp.arange(8.0).reshape(1, 4, 2)
    problem = Problem(lambda x, t: clean_BLP.astype(jnp.bfloat16), "x0", linear_flow, one_row(4))
    ends = solve(solver, problem, x_BLP, grid(1))
    assert ends.dtype == np.float32
    np.testing.assert_allclose(ends, clean_BLP, atol=1e-6)


def test_guidance_scales_are_exact_and_per_clip():
    rng = np.random.default_rng(5)
    conditional, unconditional = (jnp.asarray(rng.normal(size=(2, 9, 3)), jnp.float32) for _ in range(2))
    segments_BL = jnp.asarray([[1, 1, 2, 2, 2, 3, 3, 0, 0], [3, 2, 2, 1, 1, 1, 1, 1, 0]], jnp.int32)
    scale_BS = jnp.array([[1.0, 0.0, 4.0], [2.5, 1.0, 0.0]])
    model = guided(lambda x, t: conditional, lambda x, t: unconditional, scale_BS, segments_BL)
    out = np.asarray(jax.jit(model)(conditional, jnp.ones((2, 3))))
    for b, token in np.argwhere(np.asarray(segments_BL) > 0):
        scale = float(scale_BS[b, segments_BL[b, token] - 1])
        c, u = np.asarray(conditional)[b, token], np.asarray(unconditional)[b, token]
        np.testing.assert_allclose(out[b, token], u + scale * (c - u), atol=2e-6)
        if scale in (0.0, 1.0):
            np.testing.assert_array_equal(out[b, token], c if scale else u)
    assert np.all(np.isfinite(out))


def test_guidance_is_float32():
    half = jnp.ones((1, 2, 3), jnp.bfloat16)
    assert guide(half, half, jnp.full((1, 2, 1), 3.0)).dtype == jnp.float32


def test_unknown_solver_is_a_user_error():
    with pytest.raises(UserError, match="solver must be one of euler, heun, not 'rk4'"):
        solver_named("rk4")
    assert solver_named("heun") is SOLVERS["heun"]
