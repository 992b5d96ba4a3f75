"""Loss weights: the formulas of their papers for the predictions these are written in, and one meaning on all."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures_diffusion import quick_jit

from sora_jax.diffusion.prediction import FORMS, check_pair, convert, from_x0_and_eps
from sora_jax.diffusion.process import (
    PROCESSES,
    corrupt,
    edm,
    linear_flow,
    time_of_half_log_snr,
    trigonometric,
    vp_linear,
)
from sora_jax.diffusion.times import MIN_TIME
from sora_jax.diffusion.weights import WEIGHTS, WeightConfig, check_weight, noise_level_weight
from sora_jax.errors import UserError
from sora_jax.train.denoiser import DiffusionConfig

ALL = list(PROCESSES.values())


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def ratios(process, t):
    return np.square(np.float64(process.a(t)) / np.float64(process.b(t)))


def test_min_snr_is_the_table_of_the_paper():
    """2303.09556: min(snr, gamma) for x_0, divided by snr for eps, by snr + 1 for v."""
    t = jnp.linspace(0.05, 0.95, 50)
    snr = ratios(vp_linear, t)
    limited = np.minimum(snr, 5.0)
    assert (limited < snr).any() and (limited == snr).any()
    for prediction_type, wanted in (("x0", limited), ("eps", limited / snr), ("v", limited / (snr + 1))):
        found = noise_level_weight(WeightConfig("min_snr"), vp_linear, prediction_type, t)
        np.testing.assert_allclose(found, wanted, rtol=1e-4)
    flow = ratios(linear_flow, t)
    found = noise_level_weight(WeightConfig("min_snr", gamma=2.0), linear_flow, "velocity", t)
    np.testing.assert_allclose(found, np.minimum(flow, 2.0) * np.float64(t) ** 2, rtol=1e-4)


def test_edm_is_one_on_its_own_network():
    """The paper's weight undoes its output scale: 2206.00364, section 5. On a path of constant variance v is F."""
    t = jnp.linspace(0.3, 0.999, 50)
    np.testing.assert_allclose(noise_level_weight(WeightConfig("edm"), edm, "edm", t), 1.0, rtol=1e-5)
    np.testing.assert_allclose(noise_level_weight(WeightConfig("edm"), trigonometric, "v", t), 1.0, rtol=1e-5)
    sigma = np.float64(edm.b(t))
    found = noise_level_weight(WeightConfig("edm", sigma_data=0.5), edm, "x0", t)
    np.testing.assert_allclose(found, (sigma**2 + 0.25) / (sigma * 0.5) ** 2, rtol=1e-4)


def test_velocity_divides_the_error_of_x0_by_t():
    """x_0 of the linear flow is x_t - t velocity, eps is x_t + (1 - t) velocity; JiT divides by at least 0.05."""
    t = jnp.linspace(0.01, 0.99, 50)
    for prediction_type, share in (("x0", np.float64(t)), ("eps", 1 - np.float64(t)), ("velocity", np.ones(50))):
        found = noise_level_weight(WeightConfig("velocity"), linear_flow, prediction_type, t)
        np.testing.assert_allclose(found, np.maximum(share, 0.05) ** -2, rtol=1e-4)
    found = noise_level_weight(WeightConfig("velocity"), trigonometric, "v", t)
    np.testing.assert_allclose(found, (np.pi / 2) ** 2, rtol=1e-4)


def test_sigmoid_and_elbo_in_closed_form():
    """-d log snr / dt of the linear flow is 2 / (t (1 - t))."""
    t = jnp.linspace(0.05, 0.95, 50)
    time = np.float64(t)
    slope = 2 / (time * (1 - time))
    np.testing.assert_allclose(noise_level_weight(WeightConfig("elbo"), linear_flow, "eps", t), slope, rtol=1e-4)
    sigmoid = slope / (1 + ratios(linear_flow, t) * np.exp(1.0))
    found = noise_level_weight(WeightConfig("sigmoid", bias=-1.0), linear_flow, "eps", t)
    np.testing.assert_allclose(found, sigmoid, rtol=1e-4)
    found = noise_level_weight(WeightConfig("sigmoid", bias=-1.0), linear_flow, "velocity", t)
    np.testing.assert_allclose(found, sigmoid * (1 - time) ** 2, rtol=1e-4)


@pytest.mark.parametrize("name", ["elbo", "sigmoid"])
def test_weights_with_the_slope_do_not_depend_on_the_schedule(name):
    """The weight of a stretch of noise levels is the same on every path: the integral over its times."""

    @quick_jit
    def times_and_weights():
        ends = {process: time_of_half_log_snr(process, jnp.array([2.0, -2.0])) for process in processes}
        times = {process: jnp.linspace(*ends[process], 4001) for process in processes}
        return [(t, noise_level_weight(WeightConfig(name), process, "eps", t)) for process, t in times.items()]

    processes = (linear_flow, trigonometric, edm, PROCESSES["vp"])
    totals = [np.trapezoid(np.float64(weight), np.float64(t)) for t, weight in times_and_weights()]
    np.testing.assert_allclose(totals, totals[0], rtol=2e-4)
    if name == "elbo":
        np.testing.assert_allclose(totals[0], 8.0, rtol=2e-4)


@pytest.mark.parametrize("process", ALL, ids=lambda process: process.name)
def test_one_error_has_one_loss_whatever_is_predicted(process):
    """A prediction wrong by any error, converted to every type: the weighted squares agree."""
    rng = np.random.default_rng(0)
    x0, eps, off = (jnp.asarray(rng.normal(size=(7, 5)), jnp.float32) for _ in range(3))

    @quick_jit
    def losses_by_weight():
        ends = time_of_half_log_snr(process, jnp.array([2.0, -1.5]))
        t = jnp.linspace(ends[0], ends[1], 7)[:, None]
        x_t = corrupt(process, x0, eps, t)
        wrong = from_x0_and_eps(process, "v", x0, eps, t) + off
        answers = {form: from_x0_and_eps(process, form, x0, eps, t) for form in FORMS}
        squares = {form: jnp.square(convert(process, "v", form, wrong, x_t, t) - answers[form]) for form in FORMS}
        weights = WeightConfig("min_snr"), WeightConfig("sigmoid")  # one defined on x_0, one on eps
        return [[noise_level_weight(weight, process, form, t) * squares[form] for form in FORMS] for weight in weights]

    for losses in losses_by_weight():
        for loss in losses:
            scale = np.asarray(losses[0]).max(axis=1, keepdims=True)
            np.testing.assert_allclose(loss / scale, losses[0] / scale, atol=5e-4)


@pytest.mark.parametrize("process", ALL, ids=lambda process: process.name)
def test_losses_are_finite_wherever_a_clip_is_trained(process):
    """For whatever may be predicted and however it may be weighed; an unweighted loss stays below 1e6."""
    t = jnp.concatenate([jnp.geomspace(MIN_TIME, 0.1, 30), jnp.linspace(0.15, 1.0, 60), jnp.array([0.9995, 1.0])])
    types = [form for form in FORMS if passes(check_pair, process.name, form)]
    assert {"x0", "v", "edm"} <= {*types}
    pairs = [pair for pair in itertools.product(WEIGHTS, types) if passes(check_weight, *pair)]

    @quick_jit
    def scales_and_errors():
        answers = {form: from_x0_and_eps(process, form, jnp.ones_like(t), jnp.full_like(t, -2.0), t) for form in types}
        scales = {pair: noise_level_weight(WeightConfig(pair[0]), process, pair[1], t) for pair in pairs}
        return [(scales[pair], answers[pair[1]] - 0.1) for pair in pairs]

    for (name, form), (scale, error) in zip(pairs, scales_and_errors(), strict=True):
        loss = np.asarray(scale) * np.square(error)
        assert np.all(np.isfinite(loss)) and np.all(np.asarray(scale) >= 0), (name, form)
        assert name != "uniform" or (np.all(np.asarray(scale) == 1.0) and loss.max() < 1e6), form


def passes(check, *names):
    try:
        check(*names)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("process", [linear_flow, trigonometric, vp_linear], ids=lambda process: process.name)
def test_score_matching_weighs_by_the_variance_of_the_noise(process):
    t = jnp.linspace(0.01, 0.99, 50)
    found = noise_level_weight(WeightConfig("eps"), process, "score", t)
    np.testing.assert_allclose(found, np.square(process.b(t)), rtol=1e-4)


def test_a_score_is_not_weighed_uniformly():
    said = "weight.name is 'uniform'; with the prediction score it must be one of eps, elbo, min_snr, sigmoid, edm"
    with pytest.raises(UserError, match=said):
        DiffusionConfig(prediction="score")
    DiffusionConfig(prediction="score", weight=WeightConfig("eps"))


def test_bad_options_are_user_errors():
    for options, said in (
        ({"name": "p2"}, "weight.name is 'p2'; allowed: 'uniform', 'eps', 'elbo', 'min_snr', 'sigmoid', 'edm'"),
        ({"gamma": 0.0}, "weight.gamma is 0.0; it must be above 0"),
        ({"sigma_data": -1.0}, "weight.sigma_data is -1.0; it must be above 0"),
    ):
        with pytest.raises(UserError, match=said):
            WeightConfig(**options)
