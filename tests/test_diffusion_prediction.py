"""Conversions between predictions: every pair on every process, near both ends of time, and what the ends lose."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion.prediction import FORMS, check_pair, convert, from_x0_and_eps, to_x0_and_eps
from sora_jax.diffusion.process import (
    PROCESSES,
    corrupt,
    edm,
    half_log_snr,
    linear_flow,
    time_of_half_log_snr,
    trigonometric,
    vp_linear,
    vp_linear_zero_snr,
)
from sora_jax.errors import UserError

ALL = list(PROCESSES.values())
COUNT = 301


def name_of(process):
    return process.name


def inside(process):
    """Times from a noise level of a thousandth to a signal level of a thousandth, or to the end of the process."""
    ends = time_of_half_log_snr(process, jnp.log(jnp.array([1e3, 1e-3])))
    return jnp.linspace(ends[0], ends[1], COUNT)


def clean_and_noise(shape=(COUNT, 5)):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.mark.parametrize("process", ALL, ids=name_of)
def test_the_times_of_these_tests_reach_both_ends(process):
    levels = np.asarray(half_log_snr(process, inside(process)))
    assert levels[0] > 6.8 and levels[-1] < -2.6


@pytest.mark.parametrize("process", ALL, ids=name_of)
def test_every_prediction_converts_to_every_other_and_back(process):
    """Near both ends too, where rounding is magnified by at most the thousand of `inside`."""
    x0, eps = clean_and_noise()
    t = inside(process)[:, None]
    x_t = corrupt(process, x0, eps, t)
    given = {prediction_type: from_x0_and_eps(process, prediction_type, x0, eps, t) for prediction_type in FORMS}

    scale = {
        prediction_type: 1.0 + np.abs(given[prediction_type]).max(axis=1, keepdims=True) for prediction_type in FORMS
    }
    for source, target in itertools.product(FORMS, FORMS):
        there = convert(process, source, target, given[source], x_t, t)
        wrong = np.abs(there - given[target]) / scale[target]
        undone = np.abs(convert(process, target, source, there, x_t, t) - given[source]) / scale[source]
        assert wrong.max() < 2e-3 and undone.max() < 2e-3, (source, target, wrong.max(), undone.max())
        assert there.dtype == jnp.float32


def test_conversions_match_the_formula_card():
    """Written out by hand for one time: x0 and eps from v, from the flow velocity, from the score, from EDM's F."""
    x0, eps = clean_and_noise()
    t = jnp.full((COUNT, 1), 0.3)
    a, b = np.cos(0.15 * np.pi), np.sin(0.15 * np.pi)
    x_t, v = a * x0 + b * eps, a * eps - b * x0
    solved = to_x0_and_eps(trigonometric, "v", v, x_t, t)
    np.testing.assert_allclose(solved[0], a * x_t - b * v, atol=1e-5)
    np.testing.assert_allclose(solved[1], b * x_t + a * v, atol=1e-5)
    solved = to_x0_and_eps(trigonometric, "score", -eps / b, x_t, t)
    np.testing.assert_allclose(solved[0], x0, atol=1e-5)
    np.testing.assert_allclose(solved[1], eps, atol=1e-5)
    x_t, u = 0.7 * x0 + 0.3 * eps, eps - x0
    np.testing.assert_allclose(from_x0_and_eps(linear_flow, "velocity", x0, eps, t), u, atol=1e-6)
    np.testing.assert_allclose(convert(linear_flow, "velocity", "score", u, x_t, t), -(x_t + 0.7 * u) / 0.3, atol=1e-4)
    np.testing.assert_allclose(to_x0_and_eps(linear_flow, "velocity", u, x_t, t)[0], x_t - 0.3 * u, atol=1e-5)


def test_edm_is_the_network_of_the_paper():
    """D = c_skip x + c_out F with sigma_data = 1 gives back the data at every noise level: 2206.00364, table 1."""
    x0, eps = clean_and_noise()
    t = inside(edm)[:, None]
    sigma = np.asarray(edm.b(t), np.float64)
    x, network = corrupt(edm, x0, eps, t), from_x0_and_eps(edm, "edm", x0, eps, t)
    denoised = x / (sigma**2 + 1) + sigma / np.sqrt(sigma**2 + 1) * network
    np.testing.assert_allclose(denoised, x0, atol=5e-5)
    np.testing.assert_allclose(to_x0_and_eps(edm, "edm", network, x, t)[0], x0, atol=5e-5)


def test_score_is_the_gradient_of_the_log_density():
    """For data known to be x_0 the density of x_t is a normal one; its gradient by autodiff."""
    x0, eps = clean_and_noise((7, 1))
    t = jnp.linspace(0.1, 0.9, 7)[:, None]
    x_t = corrupt(linear_flow, x0, eps, t)
    gradient = jax.grad(lambda x: jnp.sum(jax.scipy.stats.norm.logpdf(x, (1 - t) * x0, t)))(x_t)
    np.testing.assert_allclose(from_x0_and_eps(linear_flow, "score", x0, eps, t), gradient, rtol=1e-4)


@pytest.mark.parametrize(
    "prediction_type, end", [("v", 0), ("v", 1), ("edm", 0), ("edm", 1), ("velocity", 1), ("x0", 1), ("eps", 0)]
)
@pytest.mark.parametrize("process", ALL, ids=name_of)
def test_ends_that_lose_nothing(process, prediction_type, end):
    x0, eps = clean_and_noise()
    t = jnp.full((COUNT, 1), float(end))
    solved = to_x0_and_eps(
        process, prediction_type, from_x0_and_eps(process, prediction_type, x0, eps, t), corrupt(process, x0, eps, t), t
    )
    size = float(process.b(jnp.float32(1.0)))  # of edm: the digits of x_0 in x_t are those of 1 in 80
    np.testing.assert_allclose(solved[0], x0, atol=2e-6 * size)
    np.testing.assert_allclose(solved[1], eps, atol=2e-6)


def test_ends_that_lose_a_half_give_its_mean():
    x0, eps = clean_and_noise()
    cases = (
        (trigonometric, "eps", 1.0, 0),
        (linear_flow, "eps", 1.0, 0),
        (linear_flow, "score", 1.0, 0),
        (vp_linear_zero_snr, "eps", 1.0, 0),
        (vp_linear, "x0", 0.0, 1),
        (vp_linear, "velocity", 0.0, 1),
        (edm, "velocity", 0.0, 1),
    )
    for process, prediction_type, end, lost in cases:
        t = jnp.full((COUNT, 1), end)
        solved = to_x0_and_eps(
            process,
            prediction_type,
            from_x0_and_eps(process, prediction_type, x0, eps, t),
            corrupt(process, x0, eps, t),
            t,
        )
        np.testing.assert_array_equal(solved[lost], 0.0)
        np.testing.assert_allclose(solved[1 - lost], (x0, eps)[1 - lost], rtol=2e-6)


@pytest.mark.parametrize("process", ALL, ids=name_of)
def test_gradients_are_finite_on_the_whole_interval(process):
    x0, eps = clean_and_noise((5, 2))
    t = jnp.array([[0.0], [1e-5], [0.5], [0.9995], [1.0]])

    def total(prediction_type, y, x_t, t):
        return sum(jnp.sum(half) for half in to_x0_and_eps(process, prediction_type, y, x_t, t))

    for prediction_type in FORMS:
        y, x_t = from_x0_and_eps(process, prediction_type, x0, eps, t), corrupt(process, x0, eps, t)
        assert all(bool(jnp.all(jnp.isfinite(half))) for half in to_x0_and_eps(process, prediction_type, y, x_t, t)), (
            prediction_type
        )
        gradients = jax.grad(total, (1, 2))(prediction_type, y, x_t, t)
        assert all(bool(jnp.all(jnp.isfinite(gradient))) for gradient in gradients), prediction_type


def test_unknown_names_are_user_errors():
    with pytest.raises(UserError, match="prediction is 'mean'; allowed: 'x0', 'eps', 'v', 'velocity', 'score', 'edm'"):
        from_x0_and_eps(trigonometric, "mean", *clean_and_noise(), jnp.ones((COUNT, 1)))


def test_pairs_that_cannot_work_are_user_errors():
    """The rest can: what is refused is told with what may stand in its place."""
    refused = {
        (name, prediction_type) for name in PROCESSES for prediction_type in FORMS if not works(name, prediction_type)
    }
    zero = ("vp_linear_zero_snr", "vp_scaled_linear_zero_snr")
    assert refused == {("edm", "velocity"), ("edm", "score"), *itertools.product(zero, ("eps", "score"))}
    with pytest.raises(
        UserError, match="prediction is 'eps'; with the process vp_linear_zero_snr it must be one of x0, v, velo"
    ):
        check_pair("vp_linear_zero_snr", "eps")
    for prediction_type in ("velocity", "score"):
        with pytest.raises(
            UserError, match=f"'{prediction_type}'; with the process edm it must be one of x0, eps, v, edm"
        ):
            check_pair("edm", prediction_type)
    for pair in (("vp_cubic", "v"), ("vp", "noise")):
        with pytest.raises(UserError, match="; allowed: "):
            check_pair(*pair)


def works(name, prediction_type):
    try:
        check_pair(name, prediction_type)
    except UserError:
        return False
    return True
