"""Loss weights: the formulas of their papers for the predictions these are written in, and one meaning on all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion.prediction import FORMS, check_pair, convert, express
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
from sora_jax.diffusion.weights import WEIGHTS, WeightConfig, check_weight, loss_scale
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
    for kind, wanted in (("x0", limited), ("eps", limited / snr), ("v", limited / (snr + 1))):
        np.testing.assert_allclose(loss_scale(WeightConfig("min_snr"), vp_linear, kind, t), wanted, rtol=1e-4)
    flow = ratios(linear_flow, t)
    found = loss_scale(WeightConfig("min_snr", gamma=2.0), linear_flow, "velocity", t)
    np.testing.assert_allclose(found, np.minimum(flow, 2.0) * np.float64(t) ** 2, rtol=1e-4)


def test_edm_is_one_on_its_own_network():
    """The paper's weight undoes its output scale: 2206.00364, section 5. On a path of constant variance v is F."""
    t = jnp.linspace(0.3, 0.999, 50)
    np.testing.assert_allclose(loss_scale(WeightConfig("edm"), edm, "edm", t), 1.0, rtol=1e-5)
    np.testing.assert_allclose(loss_scale(WeightConfig("edm"), trigonometric, "v", t), 1.0, rtol=1e-5)
    sigma = np.float64(edm.b(t))
    found = loss_scale(WeightConfig("edm", sigma_data=0.5), edm, "x0", t)
    np.testing.assert_allclose(found, (sigma**2 + 0.25) / (sigma * 0.5) ** 2, rtol=1e-4)


def test_sigmoid_and_elbo_in_closed_form():
    """-d log snr / dt of the linear flow is 2 / (t (1 - t))."""
    t = jnp.linspace(0.05, 0.95, 50)
    time = np.float64(t)
    slope = 2 / (time * (1 - time))
    np.testing.assert_allclose(loss_scale(WeightConfig("elbo"), linear_flow, "eps", t), slope, rtol=1e-4)
    sigmoid = slope / (1 + ratios(linear_flow, t) * np.exp(1.0))
    found = loss_scale(WeightConfig("sigmoid", bias=-1.0), linear_flow, "eps", t)
    np.testing.assert_allclose(found, sigmoid, rtol=1e-4)
    found = loss_scale(WeightConfig("sigmoid", bias=-1.0), linear_flow, "velocity", t)
    np.testing.assert_allclose(found, sigmoid * (1 - time) ** 2, rtol=1e-4)


@pytest.mark.parametrize("name", ["elbo", "sigmoid"])
def test_weights_with_the_slope_do_not_depend_on_the_schedule(name):
    """The weight of a stretch of noise levels is the same on every path: the integral over its times."""
    totals = []
    for process in (linear_flow, trigonometric, edm, PROCESSES["vp"]):
        ends = time_of_half_log_snr(process, jnp.array([2.0, -2.0]))
        t = jnp.linspace(ends[0], ends[1], 4001)
        totals.append(np.trapezoid(np.float64(loss_scale(WeightConfig(name), process, "eps", t)), np.float64(t)))
    np.testing.assert_allclose(totals, totals[0], rtol=2e-4)
    if name == "elbo":
        np.testing.assert_allclose(totals[0], 8.0, rtol=2e-4)


@pytest.mark.parametrize("process", ALL, ids=lambda process: process.name)
def test_one_error_has_one_loss_whatever_is_predicted(process):
    """A prediction wrong by any error, written in every kind: the weighted squares agree."""
    rng = np.random.default_rng(0)
    x0, eps, off = (jnp.asarray(rng.normal(size=(7, 5)), jnp.float32) for _ in range(3))
    ends = time_of_half_log_snr(process, jnp.array([2.0, -1.5]))
    t = jnp.linspace(ends[0], ends[1], 7)[:, None]
    x_t = corrupt(process, x0, eps, t)
    wrong = express(process, "v", x0, eps, t) + off
    for name in ("min_snr", "sigmoid"):  # one defined on x_0, one on eps
        losses = []
        for kind in FORMS:
            error = convert(process, "v", kind, wrong, x_t, t) - express(process, kind, x0, eps, t)
            losses.append(loss_scale(WeightConfig(name), process, kind, t) * jnp.square(error))
        for loss in losses:
            scale = np.asarray(losses[0]).max(axis=1, keepdims=True)
            np.testing.assert_allclose(loss / scale, losses[0] / scale, atol=5e-4)


@pytest.mark.parametrize("process", ALL, ids=lambda process: process.name)
def test_losses_are_finite_wherever_a_clip_is_trained(process):
    """For whatever may be predicted and however it may be weighed; an unweighted loss stays below 1e6."""
    t = jnp.concatenate([jnp.geomspace(MIN_TIME, 0.1, 30), jnp.linspace(0.15, 1.0, 60), jnp.array([0.9995, 1.0])])
    kinds = [kind for kind in FORMS if passes(check_pair, process.name, kind)]
    assert {"x0", "v", "edm"} <= {*kinds}
    for kind in kinds:
        error = express(process, kind, jnp.ones_like(t), jnp.full_like(t, -2.0), t) - 0.1
        for name in WEIGHTS:
            if passes(check_weight, name, kind):
                scale = np.asarray(loss_scale(WeightConfig(name), process, kind, t))
                loss = scale * np.square(error)
                assert np.all(np.isfinite(loss)) and np.all(scale >= 0), (name, kind)
                assert name != "uniform" or (np.all(scale == 1.0) and loss.max() < 1e6), kind


def passes(check, *names):
    try:
        check(*names)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("process", [linear_flow, trigonometric, vp_linear], ids=lambda process: process.name)
def test_score_matching_weighs_by_the_variance_of_the_noise(process):
    t = jnp.linspace(0.01, 0.99, 50)
    found = loss_scale(WeightConfig("eps"), process, "score", t)
    np.testing.assert_allclose(found, np.square(process.b(t)), rtol=1e-4)


def test_a_score_is_not_weighed_uniformly():
    said = "weight.name must be one of eps, elbo, min_snr, sigmoid, edm with the prediction score, not 'uniform'"
    with pytest.raises(UserError, match=said):
        DiffusionConfig(prediction="score")
    DiffusionConfig(prediction="score", weight=WeightConfig("eps"))


def test_bad_options_are_user_errors():
    for options, said in (
        ({"name": "p2"}, "weight.name must be one of uniform, eps, elbo, min_snr, sigmoid, edm, not 'p2'"),
        ({"gamma": 0.0}, "weight.gamma must be above 0, not 0.0"),
        ({"sigma_data": -1.0}, "weight.sigma_data must be above 0, not -1.0"),
    ):
        with pytest.raises(UserError, match=said):
            WeightConfig(**options)
