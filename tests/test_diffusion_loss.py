"""The denoising loss: closed form, exact zeros where nothing is to be learnt, sums that add up."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures_diffusion import quick_jit
from scipy import stats

from sora_jax.diffusion.loss import (
    Corruption,
    LossSpec,
    bin_log_likelihood,
    denoising_loss,
    loss_weight,
    normal_divergence,
    vlb_bits,
)
from sora_jax.diffusion.prediction import FORMS
from sora_jax.diffusion.process import (
    PROCESSES,
    corrupt,
    linear_flow,
    process_named,
    step_before,
    trigonometric,
    vp_linear,
)
from sora_jax.diffusion.weights import WeightConfig, noise_level_weight

B, L, P, R = 4, 12, 3, 5
GIVEN_ROW = 4
FLOW = LossSpec(linear_flow, "velocity")
HYBRID = LossSpec(vp_linear, "eps", learned_variance=True)


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def batch():
    """Packs with padding (segment 0), unequal fill, and a row of given tokens at time 0."""
    rng = np.random.default_rng(0)
    segments_BL = np.sort(rng.integers(0, 4, (B, L)))[:, ::-1].astype(np.int32).copy()
    segments_BL[0, 2:] = 0
    rows_BL = np.maximum(segments_BL - 1, 0)
    rows_BL[:, :2] = GIVEN_ROW
    t_BR = rng.uniform(0.02, 0.98, (B, R)).astype(np.float32)
    t_BR[:, GIVEN_ROW] = 0.0
    x0_BLP, eps_BLP = rng.normal(size=(2, B, L, P)).astype(np.float32)
    rows_BL[0, 1] = 0
    return {name: jnp.asarray(value) for name, value in locals().items() if name != "rng"}


def corruption(data):
    return Corruption(*(data[name] for name in Corruption._fields))


@functools.partial(quick_jit, static_argnums=(0, 1))
def compiled(spec, model, data, weight_BL, given):
    return denoising_loss(spec, lambda x, t: model(x, t, *given), data, weight_BL)


def sums(data, model, *given, spec=FLOW, weight_BL=None):
    """Sums of model(x, t, *given), in one program for each model and spec."""
    if weight_BL is None:
        weight_BL = loss_weight(data["segments_BL"], data["t_BR"], data["rows_BL"])
    return compiled(spec, model, corruption(data), weight_BL, given)


def tanh_and_time(x_BLP, t_BR):
    return jnp.tanh(1.7 * x_BLP) + jnp.mean(t_BR)


def tanh(x_BLP, t_BR):
    return jnp.tanh(x_BLP)


def scaled(x_BLP, t_BR, scale):
    return scale * x_BLP


def in_bfloat16(x_BLP, t_BR):
    return x_BLP.astype(jnp.bfloat16)


def constant(x_BLP, t_BR, out_BLP):
    return out_BLP


def test_matches_numpy():
    """Token by token in a plain loop, for the velocity eps - x0 of the linear flow."""
    data = batch()
    loss, weight, loss_bins, weight_bins = 0.0, 0, np.zeros(10), np.zeros(10)
    arrays = {name: np.asarray(value) for name, value in data.items()}
    for b, token in np.ndindex(B, L):
        t = arrays["t_BR"][b, arrays["rows_BL"][b, token]]
        if arrays["segments_BL"][b, token] == 0 or t == 0:
            continue
        x0, eps = arrays["x0_BLP"][b, token], arrays["eps_BLP"][b, token]
        predicted = np.tanh(1.7 * ((1 - t) * x0 + t * eps)) + arrays["t_BR"].mean()
        error = np.mean((predicted - (eps - x0)) ** 2)
        loss, weight = loss + error, weight + 1
        loss_bins[int(t * 10)] += error
        weight_bins[int(t * 10)] += 1
    found = sums(data, tanh_and_time)
    np.testing.assert_allclose(found.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(found.loss_bins, loss_bins, rtol=1e-5)
    np.testing.assert_array_equal(found.weight_bins, weight_bins)
    assert 0 < float(found.weight) == weight < B * L


@pytest.mark.parametrize("process", PROCESSES)
def test_only_the_right_prediction_has_no_loss(process):
    """A denoiser told the answer scores 0, and one that is off by 0.5 everywhere scores 0.25 a token."""
    data, process = batch(), process_named(process)
    weight_BL = loss_weight(data["segments_BL"], data["t_BR"], data["rows_BL"])
    t_BL1 = jnp.take_along_axis(data["t_BR"], data["rows_BL"], 1)[:, :, None]

    @quick_jit
    def answers_and_losses(error):
        """For each prediction the largest value of the answer, and the loss of a model off by `error`."""
        found = []
        for prediction_type in ("eps", "v", "edm", "velocity", "x0"):
            c, d = FORMS[prediction_type](process, t_BL1)
            answer_BLP = c * data["x0_BLP"] + d * data["eps_BLP"]
            model = functools.partial(constant, out_BLP=answer_BLP + error)
            sums = denoising_loss(LossSpec(process, prediction_type), model, corruption(data), weight_BL)
            found.append((jnp.max(jnp.abs(answer_BLP)), sums.loss, sums.weight))
        return found

    for (largest, right, _), (_, off, weight) in zip(*map(answers_and_losses, (0.0, 0.5)), strict=True):
        size = 1 + float(largest)
        np.testing.assert_allclose(right, 0.0, atol=1e-5 * size)
        np.testing.assert_allclose(off / weight, 0.25, rtol=1e-5 * size)


@pytest.mark.parametrize("process, learned", [("linear_flow", False), *((name, True) for name in PROCESSES)])
def test_padding_and_given_tokens_get_exactly_no_gradient(process, learned):
    """Even when the prediction there is infinite; every other token gets some. Prediction and variance alike."""
    data = batch()
    unknown_BL = np.asarray(loss_weight(data["segments_BL"], data["t_BR"], data["rows_BL"])) > 0
    assert unknown_BL.any(1).all() and not unknown_BL.all(1).any()

    spec = LossSpec(process_named(process), "v", WeightConfig("min_snr"), learned)

    def loss(x0_BLP, eps_BLP, offset_BLP):
        def denoise(x, t):
            return jnp.tile(jnp.tanh(x), (1, 1, 1 + learned)) + offset_BLP

        tokens = corruption({**data, "x0_BLP": x0_BLP, "eps_BLP": eps_BLP})
        return denoising_loss(spec, denoise, tokens, jnp.asarray(unknown_BL, jnp.float32)).loss

    offset_BLP = jnp.where(jnp.asarray(unknown_BL)[:, :, None], 0.1, jnp.inf) * jnp.ones((B, L, P * (1 + learned)))
    for gradient in quick_jit(jax.grad(loss, (0, 1, 2)))(data["x0_BLP"], data["eps_BLP"], offset_BLP):
        np.testing.assert_array_equal(np.asarray(gradient)[~unknown_BL], 0.0)
        assert np.all(np.isfinite(gradient)) and np.all(np.abs(np.asarray(gradient)[unknown_BL]).max(-1) > 0)


def test_halves_add_up_to_the_whole():
    """With unequal fill the mean of two means is another number: only sums may be averaged."""
    data = batch()
    whole = sums(data, tanh)
    first, second = (
        sums({name: value[half] for name, value in data.items()}, tanh) for half in (slice(0, 1), slice(1, B))
    )
    for part, total in zip(jax.tree.map(jnp.add, first, second), whole, strict=True):
        np.testing.assert_allclose(part, total, rtol=1e-6)
    mean_of_means = (first.loss / first.weight + second.loss / second.weight) / 2
    assert abs(float(mean_of_means - whole.loss / whole.weight)) > 1e-2


def test_weights_scale_tokens_and_the_last_bin_holds_time_one():
    data = batch()
    data["t_BR"] = jnp.ones((B, R))
    rng = np.random.default_rng(3)
    weight_BL = jnp.asarray(rng.uniform(size=(B, L)), jnp.float32)
    spec = LossSpec(linear_flow, "velocity", bins=4)
    found = sums(data, scaled, jnp.float32(1.0), spec=spec, weight_BL=weight_BL)
    wanted = np.sum(np.asarray(weight_BL) * np.mean(np.asarray(data["x0_BLP"]) ** 2, axis=2))
    np.testing.assert_allclose(found.loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(found.loss_bins, [0, 0, 0, wanted], rtol=1e-5)


def test_float32_whatever_the_model_computes_in():
    found = sums(batch(), in_bfloat16, spec=LossSpec(trigonometric, "v"))
    assert {leaf.dtype for leaf in found} == {jnp.dtype("float32")}


def test_jit_grad_and_vmap():
    data = batch()

    def loss(scale):
        return sums(data, scaled, scale).loss

    def traced_loss(scale):
        weight_BL = loss_weight(data["segments_BL"], data["t_BR"], data["rows_BL"])
        return denoising_loss(FLOW, functools.partial(scaled, scale=scale), corruption(data), weight_BL).loss

    scales = jnp.array([0.5, 1.0, 2.0])
    values, slopes = quick_jit(jax.vmap(jax.value_and_grad(traced_loss)))(scales)
    np.testing.assert_allclose(values, [loss(scale) for scale in scales], rtol=1e-5)
    differences = [(loss(scale + 0.01) - loss(scale - 0.01)) / 0.02 for scale in scales]
    np.testing.assert_allclose(slopes, differences, rtol=1e-3)


def test_weight_by_noise_level_scales_the_squared_error_alone():
    """Token by token; the variance's share of the loss stays as it was."""
    data, config = batch(), WeightConfig("min_snr", gamma=2.0)
    rng = np.random.default_rng(5)
    out_BLP = jnp.asarray(rng.normal(size=(B, L, 2 * P)), jnp.float32)
    specs = (LossSpec(linear_flow, "velocity", weight, learned_variance=True) for weight in (config, WeightConfig()))
    found, plain = (sums(data, constant, out_BLP, spec=spec) for spec in specs)
    t_BL = jnp.take_along_axis(data["t_BR"], data["rows_BL"], 1)
    learns = np.asarray(loss_weight(data["segments_BL"], data["t_BR"], data["rows_BL"]))
    error = np.mean((np.asarray(out_BLP)[..., :P] - np.asarray(data["eps_BLP"] - data["x0_BLP"])) ** 2, axis=2)
    weight = np.where(learns > 0, noise_level_weight(config, linear_flow, "velocity", t_BL), 0.0)
    np.testing.assert_allclose(plain.mse, np.sum(learns * error), rtol=1e-5)
    np.testing.assert_allclose(found.mse, np.sum(weight * error), rtol=1e-5)
    np.testing.assert_allclose(found.vlb, plain.vlb, rtol=1e-6)
    for each in (found, plain):
        np.testing.assert_allclose(each.loss, each.mse + each.vlb, rtol=1e-6)
        np.testing.assert_allclose(np.sum(each.loss_bins), each.loss, rtol=1e-5)


def tanh_cdf(z):
    """The normal distribution function as DDPM's code and DiT's have it."""
    return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def ddpm_bits(x0, eps, y, v, step):
    """DDPM's bound at one step in bits, float64, from the betas: 2006.11239, equations 5 to 7 and 13; 2102.09672."""
    betas = np.linspace(1e-4, 0.02, 1000)
    abar = np.cumprod(1 - betas)
    before = np.append(1.0, abar[:-1])
    variances = betas * (1 - before) / (1 - abar)
    variances[0] = variances[1]
    x_t = np.sqrt(abar[step]) * x0 + np.sqrt(1 - abar[step]) * eps
    model_x0 = (x_t - np.sqrt(1 - abar[step]) * y) / np.sqrt(abar[step])

    def mean(clean):
        first = np.sqrt(before[step]) * betas[step] / (1 - abar[step])
        return first * clean + np.sqrt(1 - betas[step]) * (1 - before[step]) / (1 - abar[step]) * x_t

    log_variance = (v + 1) / 2 * np.log(betas[step]) + (1 - v) / 2 * np.log(variances[step])
    if step == 0:
        std = np.exp(log_variance / 2)
        high = np.where(x0 > 0.999, 1.0, tanh_cdf((x0 + 1 / 255 - mean(model_x0)) / std))
        low = np.where(x0 < -0.999, 0.0, tanh_cdf((x0 - 1 / 255 - mean(model_x0)) / std))
        return -np.log2(np.maximum(high - low, 1e-12))
    log_ratio = log_variance - np.log(variances[step])
    square = (mean(x0) - mean(model_x0)) ** 2
    nats = 0.5 * (-1 + log_ratio + np.exp(-log_ratio) + square * np.exp(-log_variance))
    return nats / np.log(2)


def all_steps(width=16):
    """One pack of a thousand tokens, each at its own step, and a model's output; data a little beyond [-1, 1]."""
    rng = np.random.default_rng(6)
    x0, eps = np.clip(rng.normal(size=(1000, width)), -1.2, 1.2), rng.normal(size=(1000, width))
    y, v = eps + 0.3 * rng.normal(size=eps.shape), rng.uniform(-1.5, 1.5, eps.shape)
    y[0] = eps[0] + rng.uniform(-3, 3, width)
    return [values.astype(np.float32) for values in (x0, eps, y, v)], (np.arange(1000, dtype=np.float32) + 1) / 1000


def test_bound_is_that_of_ddpm_at_every_step():
    arrays, t = all_steps()
    wanted = np.stack([ddpm_bits(*(np.float64(values[step]) for values in arrays), step) for step in range(1000)])
    x0, eps, y, v = (jnp.asarray(values)[None] for values in arrays)
    t_BL1, s_BL1 = (
        jnp.asarray(t)[None, :, None],
        jnp.asarray((np.arange(1000) / 1000).astype(np.float32))[None, :, None],
    )
    x_t = corrupt(vp_linear, x0, eps, t_BL1)
    bits = quick_jit(vlb_bits, static_argnums=0)
    found = np.asarray(bits(HYBRID, jnp.concatenate([y, v], axis=2), x0, x_t, s_BL1, t_BL1))[0]
    assert np.all(np.isfinite(found)) and found.dtype == np.float32
    np.testing.assert_allclose(found[0], wanted[0], rtol=2e-3)  # x_0 and x_t differ by a hundredth: their digits
    np.testing.assert_allclose(found[1:], wanted[1:], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.mean(1), wanted.mean(1), rtol=2e-5)
    at_own_step = bits(HYBRID, jnp.concatenate([y, v], axis=2), x0, x_t, step_before(t_BL1), t_BL1)
    np.testing.assert_allclose(np.asarray(at_own_step)[0].mean(1), wanted.mean(1), rtol=2e-5)


def hybrid(spec=HYBRID, scale=1.0):
    """The two terms of the loss of a pack over all steps, as a function of predictions and variance values."""
    (x0, eps, y, v), t = all_steps(4)
    rows_BL = jnp.arange(1000, dtype=jnp.int32)[None]
    data = Corruption(jnp.asarray(x0)[None] * scale, jnp.asarray(eps)[None], jnp.asarray(t)[None], rows_BL)

    def terms(y, v):
        model = functools.partial(constant, out_BLP=jnp.concatenate([y, v], axis=2))
        return denoising_loss(spec, model, data, jnp.ones((1, 1000)))

    return terms, jnp.asarray(y)[None], jnp.asarray(v)[None]


def test_hybrid_loss_trains_the_mean_by_the_error_and_the_variance_by_the_bound():
    """Gradients by term: exactly none of the bound to the predictions, none of the error to the variance."""
    terms, y, v = hybrid()
    gradients = quick_jit(jax.jacrev(lambda *outputs: (terms(*outputs).mse, terms(*outputs).vlb), (0, 1)))
    (mse_y, mse_v), (vlb_y, vlb_v) = gradients(y, v)
    np.testing.assert_array_equal(vlb_y, 0.0)
    np.testing.assert_array_equal(mse_v, 0.0)
    assert np.all(np.isfinite(vlb_v)) and np.all(np.abs(np.asarray(vlb_v))[:, 1:].max(2) > 0)
    assert np.all(np.abs(np.asarray(mse_y)).max(2) > 0)


@pytest.mark.parametrize(
    "process, prediction_type", [("vp_linear_zero_snr", "v"), *((name, "eps") for name in PROCESSES if name != "edm")]
)
def test_hybrid_loss_is_finite_at_every_step(process, prediction_type):
    """Also for data far from [-1, 1] and a process without signal at its end."""
    terms, y, v = hybrid(LossSpec(process_named(process), prediction_type, learned_variance=True), 20.0)
    found, gradient = quick_jit(jax.value_and_grad(lambda *a: terms(*a).loss, (0, 1)))(y, v)
    assert np.isfinite(found) and all(np.all(np.isfinite(part)) for part in gradient)


def test_best_variance_of_a_perfect_mean_is_the_posterior():
    """The bound is least at the lower end when nothing is wrong with the mean: v = -1."""
    (x0, eps, _, _), t = all_steps(1)
    t_BL1, x0, eps = jnp.asarray(t)[None, 1:, None], jnp.asarray(x0)[None, 1:], jnp.asarray(eps)[None, 1:]

    @quick_jit
    @jax.value_and_grad
    def total(v):
        out = jnp.concatenate([eps, v], axis=2)
        bits = vlb_bits(HYBRID, out, x0, corrupt(vp_linear, x0, eps, t_BL1), t_BL1 - 1e-3, t_BL1)
        return jnp.sum(bits[:, :200])

    at_best = -jnp.ones_like(eps)
    best, slope = total(at_best)
    np.testing.assert_allclose(slope, 0.0, atol=1e-4)
    assert best < min(total(at_best + 0.1)[0], total(at_best - 0.1)[0])


def test_divergence_of_normal_distributions_by_quadrature():
    """KL(p || q) as the mean of log p - log q under p."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    for offset, std, other in ((0.0, 1.0, 1.0), (0.3, 0.5, 0.8), (-2.0, 1.5, 1.1)):
        x = std * nodes
        wanted = np.sum(weights * (stats.norm.logpdf(x, 0, std) - stats.norm.logpdf(x, offset, other)))
        wanted /= np.sqrt(2 * np.pi)
        found = normal_divergence(*map(jnp.float32, (offset, 2 * np.log(std), 2 * np.log(other))))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)


def test_bins_share_all_the_probability():
    """The 256 bins of [-1, 1] add up to one for any mean and width, and each is its difference in float64."""
    bins = np.linspace(-1, 1, 256)
    for mean, std in ((0.0, 0.01), (0.9, 0.3), (-3.0, 1.0), (0.99, 0.005)):
        log_std = jnp.log(jnp.full((256,), std))
        found = np.asarray(bin_log_likelihood(jnp.asarray(bins, jnp.float32), jnp.full((256,), mean), log_std))
        np.testing.assert_allclose(np.sum(np.exp(np.float64(found))), 1.0, rtol=1e-4)
        inside = tanh_cdf((bins + 1 / 255 - mean) / std) - tanh_cdf((bins - 1 / 255 - mean) / std)
        likely = (inside > 1e-6) & (np.abs(bins) < 0.999)
        np.testing.assert_allclose(found[likely], np.log(inside[likely]), atol=5e-4)
        exact = stats.norm.cdf(bins + 1 / 255, mean, std) - stats.norm.cdf(bins - 1 / 255, mean, std)
        near = np.abs(bins - mean) < std
        np.testing.assert_allclose(found[near & likely], np.log(exact[near & likely]), atol=2e-3)
    tail = bin_log_likelihood(jnp.float32(1.0), jnp.float32(-5.0), jnp.float32(-3.0))
    np.testing.assert_allclose(tail, np.log(1e-12), rtol=1e-6)


def test_bins_are_finite_however_far_the_mean_and_however_narrow_the_distribution():
    """Value and gradient, in float32, at the outermost bins too."""
    x, mean, log_std = jnp.meshgrid(
        jnp.array([-2.0, -1.0, -0.5, 0.0, 1.0]), jnp.array([-1e30, -1e4, -1.0, 0.0, 0.3, 1e12]),
        jnp.array([-80.0, -40.0, -5.0, 0.0, 40.0, 80.0]),
    )  # fmt: skip
    total = lambda *point: jnp.sum(bin_log_likelihood(*point))  # noqa: E731
    assert np.all(np.isfinite(bin_log_likelihood(x, mean, log_std)))
    assert all(np.all(np.isfinite(part)) for part in quick_jit(jax.grad(total, (0, 1, 2)))(x, mean, log_std))
