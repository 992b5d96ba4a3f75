"""The distribution that stochastic solvers make, against exact variances and exact samples.

For data N(0, s^2) the perfect model is linear, so a sample is a fixed sum of its starting noise and its draws: with
one of them 1 and the others 0 in every token of a pack, the solver prints the weights, and the variance of its
samples is known without sampling.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures_diffusion import quick_jit
from fixtures_mixtures import PLANE, down, gaussian, one_row, perfect
from mixture import draw_data

from sora_jax.diffusion.process import initial, process_named
from sora_jax.diffusion.solvers import COEFFICIENTS, Problem, SolverConfig, solve
from sora_jax.diffusion.spacing import base_times


def variance(config, name, times, deviation, scale=1.0, **fields):
    """Variance of the solver's samples in float64, exactly; `scale` spoils its noise on purpose."""
    draws = len(times) - 1
    with jax.enable_x64(True):
        process, start = process_named(name), jnp.full((1, 1, 1), times[0])
        begin = np.hypot(process.a(start) * deviation, process.b(start))[0, 0, 0]
        x_BLP = jnp.zeros((1, draws + 1, 1)).at[0, 0, 0].set(begin)
        units_NBLP = scale * jnp.eye(draws, draws + 1, 1)[:, None, :, None]
        problem = perfect(
            name, "v", one_row(draws + 1), gaussian(0.0, deviation), noise=lambda step: units_NBLP[step], **fields
        )
        times_KBR = jnp.asarray(times)[:, None, None]
        weights = quick_jit(lambda x, t: solve(config, problem, x, t))(x_BLP, times_KBR)
        return float(jnp.sum(jnp.square(weights)))


STOCHASTIC = {
    "ddpm": (SolverConfig("ddpm"), 1),
    "ddim": (SolverConfig("ddim", eta=0.6), 1),
    "dpm2_sde": (SolverConfig("dpm2_sde"), 2),
    "euler_sde": (SolverConfig("euler_sde"), 1),
    "heun_sde": (SolverConfig("heun_sde"), 2),
    "heun_sde, noise first": (SolverConfig("heun_sde", noise_first=True), 1),
    "edm": (SolverConfig("edm", churn=8.0), 2),
}
SLOW = ("dpm2_sde", "heun_sde, noise first")  # their orders show on finer grids
every_stochastic = pytest.mark.parametrize("name", STOCHASTIC)


@every_stochastic
def test_weak_order_of_convergence(name):
    config, order = STOCHASTIC[name]
    counts = (96, 192) if name in SLOW else (48, 96)
    errors = [abs(variance(config, "linear_flow", down(n, 0.9), 0.6) - 0.36) for n in counts]
    assert abs(np.log2(errors[0] / errors[1]) - order) < 0.25, errors


@every_stochastic
def test_a_wrong_noise_scale_would_be_seen(name):
    """Five per cent too much noise leaves an error that no number of steps removes."""
    config, _ = STOCHASTIC[name]
    right, wrong = (variance(config, "linear_flow", down(384, 0.9), 0.6, scale) for scale in (1.0, 1.05))
    assert abs(right - 0.36) < 0.006 < abs(wrong - 0.36) / 1.2, (right, wrong)


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
@pytest.mark.parametrize("name", ["linear_flow", "vp_linear"])
def test_every_coefficient_has_the_same_marginals(name, coefficient):
    config = SolverConfig("heun_sde", coefficient=coefficient)
    assert abs(variance(config, name, down(200, 0.9, 0.1), 0.6) - marginal(name, 0.1, 0.6)) < 2e-3


def test_the_default_coefficient_keeps_the_variance_of_the_data_on_edm():
    """In 50 steps of Karras et al., where `sigma`, the default of the other processes, loses half of it."""
    times = base_times("edm", 50, "karras")
    assert abs(variance(SolverConfig("euler_sde"), "edm", times, 0.6) - 0.36) < 0.01
    assert variance(SolverConfig("euler_sde", coefficient="sigma"), "edm", times, 0.6) < 0.2
    times = down(9, 0.9)
    found = [variance(SolverConfig("euler_sde", **o), "vp", times, 0.6) for o in ({}, {"coefficient": "sigma"})]
    assert found[0] == found[1]


def marginal(name, t, deviation):
    process = process_named(name)
    return float(process.a(jnp.float32(t)) ** 2 * deviation**2 + process.b(jnp.float32(t)) ** 2)


@pytest.mark.parametrize("steps", [2, 7])
@pytest.mark.parametrize("name", ["vp_linear", "vp_cosine"])
def test_the_upper_variance_is_exact_for_unit_data(name, steps):
    """Ho et al. (2006.11239, section 3.2): beta is right for x_0 ~ N(0, I), whatever the length of the steps."""
    times = down(steps, 1.0, 0.2)
    assert abs(variance(SolverConfig("ddpm"), name, times, 1.0, variance="upper") - 1.0) < 2e-6
    assert variance(SolverConfig("ddpm"), name, times, 1.0, variance="lower") < 0.99


@pytest.mark.parametrize("steps", [2, 7])
@pytest.mark.parametrize("name", ["vp_linear", "linear_flow"])
def test_the_lower_variance_is_exact_for_a_point(name, steps):
    """... and beta tilde for data that are one point."""
    found = variance(SolverConfig("ddpm"), name, down(steps, 0.9, 0.2), 1e-6, variance="lower")
    assert abs(found - marginal(name, 0.2, 1e-6)) < 2e-6
    assert variance(SolverConfig("ddpm"), name, down(steps, 0.9, 0.2), 1e-6, variance="upper") > found + 1e-3


def test_the_variance_is_the_problems_or_else_the_solvers():
    def found(option, own):
        config = SolverConfig("ddpm", variance=option)
        return variance(config, "vp_linear", down(3, 0.9, 0.2), 0.6, variance=own)

    lower, upper = found("lower", None), found("upper", None)
    assert upper > lower + 1e-3
    assert found("upper", "lower") == lower and found("lower", "upper") == upper
    assert variance(SolverConfig("ddpm"), "vp_linear", down(3, 0.9, 0.2), 0.6) == lower


def test_a_learned_variance_lies_where_the_model_says():
    x_BLP, noise_BLP = jnp.zeros((1, 3, 1)), jnp.ones((1, 3, 1))
    process, rows_BL = process_named("vp_linear"), one_row(3)
    values_BL1 = jnp.array([-1.0, 1.0, 0.0])[None, :, None]
    times_KBR = jnp.array([0.6, 0.4])[:, None, None]

    def ends(variance, denoise):
        problem = Problem(denoise, "eps", process, rows_BL, lambda step: noise_BLP, variance)
        return np.asarray(quick_jit(lambda x, t: solve(SolverConfig("ddpm"), problem, x, t))(x_BLP, times_KBR))[0, :, 0]

    lower, upper = (ends(variance, lambda x, t: 0 * x)[0] for variance in ("lower", "upper"))
    learned = ends("learned", lambda x, t: jnp.concatenate([0 * x, values_BL1], axis=2))
    np.testing.assert_allclose(learned, [lower, upper, np.sqrt(lower * upper)], rtol=1e-5)


@pytest.mark.parametrize("spacing", ["respaced", "linspace"])
@pytest.mark.parametrize("steps", [2, 3])
def test_ddim_with_eta_one_is_finite_on_the_longest_steps(spacing, steps):
    """All but a rounding error of the noise is drawn anew: what is kept is the root of nearly nothing."""
    for name in ("vp_linear", "vp_scaled_linear", "vp_cosine", "vp"):
        problem = perfect(name, "v", one_row(2), gaussian(0.0, 0.6), noise=lambda step: jnp.ones((1, 2, 1)))
        times_KBR = jnp.asarray(base_times(name, steps, spacing), jnp.float32)[:, None, None]
        # Not compiled: it is the rounding of single operations that would go below 0.
        assert np.all(np.isfinite(solve(SolverConfig("ddim", eta=1.0), problem, jnp.ones((1, 2, 1)), times_KBR)))


def test_ddim_with_eta_one_is_ancestral():
    """Song et al. (2010.02502, section 4.1), for a process that does not preserve variance too."""
    for name in ("vp_linear", "linear_flow"):
        found = [variance(SolverConfig(s, eta=1.0), name, down(5, 0.9), 0.6) for s in ("ddim", "ddpm")]
        np.testing.assert_allclose(*found, rtol=1e-5)


def sliced_distance(one, two, directions=32):
    """Mean over directions of the Wasserstein distance of projections; as many samples in both."""
    angles = np.pi * np.arange(directions) / directions
    along = np.stack([np.cos(angles), np.sin(angles)])
    return np.mean(np.abs(np.sort(one @ along, axis=0) - np.sort(two @ along, axis=0)))


@pytest.fixture(scope="module")
def data():
    return np.asarray(draw_data(PLANE, jax.random.key(7), 8000))


@every_stochastic
def test_samples_have_the_distribution_of_the_data(name, data):
    """A mixture: mean, covariance and sliced Wasserstein distance, in bounds that 15 % more noise breaks."""
    config, _ = STOCHASTIC[name]
    process, count = process_named("linear_flow"), len(data)
    times_KBR = jnp.asarray(down(100), jnp.float32)[:, None, None]
    x_BLP = initial(process, jax.random.normal(jax.random.key(1), (1, count, 2)), jnp.ones((1, 1, 1)))

    @quick_jit
    def samples(x_BLP, scale):
        def noise(step):
            return scale * jax.random.normal(jax.random.fold_in(jax.random.key(2), step), (1, count, 2))

        return solve(config, perfect("linear_flow", "velocity", one_row(count), noise=noise), x_BLP, times_KBR)[0]

    good, noisy = (np.asarray(samples(x_BLP, jnp.float32(scale))) for scale in (1.0, 1.15))
    np.testing.assert_allclose(good.mean(axis=0), data.mean(axis=0), atol=0.05)
    np.testing.assert_allclose(np.cov(good.T), np.cov(data.T), atol=0.07)
    assert sliced_distance(good, data) < 0.035 < sliced_distance(noisy, data)
