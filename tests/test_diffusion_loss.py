"""The denoising loss: closed form, exact zeros where nothing is to be learnt, sums that add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion.loss import denoising_loss, loss_weight
from sora_jax.diffusion.prediction import FORMS
from sora_jax.diffusion.process import PROCESSES, cosine, linear_flow, process_named

B, L, P, R = 4, 12, 3, 5
GIVEN_ROW = 4


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


def sums(data, denoise, process=linear_flow, kind="velocity", weight_BL=None, bins=10):
    if weight_BL is None:
        weight_BL = loss_weight(data["segments_BL"], data["t_BR"], data["rows_BL"])
    fields = (data[name] for name in ("x0_BLP", "eps_BLP", "t_BR", "rows_BL"))
    loss = jax.jit(denoising_loss, static_argnums=(0, 1, 2, 8))
    return loss(denoise, process, kind, *fields, weight_BL, bins)


def tanh_denoise(x_BLP, t_BR):
    return jnp.tanh(1.7 * x_BLP) + jnp.mean(t_BR)


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
    found = sums(data, tanh_denoise)
    np.testing.assert_allclose(found.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(found.loss_bins, loss_bins, rtol=1e-5)
    np.testing.assert_array_equal(found.weight_bins, weight_bins)
    assert 0 < float(found.weight) == weight < B * L


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("kind", FORMS)
def test_only_the_right_prediction_has_no_loss(process, kind):
    """A denoiser told the answer scores 0, and one that is off by 0.5 everywhere scores 0.25 a token."""
    data, process = batch(), process_named(process)
    t_BL1 = jnp.take_along_axis(data["t_BR"], data["rows_BL"], 1)[:, :, None]
    c, d = FORMS[kind](process, t_BL1)
    answer_BLP = c * data["x0_BLP"] + d * data["eps_BLP"]
    np.testing.assert_allclose(sums(data, lambda x, t: answer_BLP, process, kind).loss, 0.0, atol=1e-5)
    off = sums(data, lambda x, t: answer_BLP + 0.5, process, kind)
    np.testing.assert_allclose(off.loss / off.weight, 0.25, rtol=1e-4)


@pytest.mark.parametrize("process", PROCESSES)
def test_padding_and_given_tokens_get_exactly_no_gradient(process):
    """Even when the prediction there is infinite; every other token gets some."""
    data = batch()
    unknown_BL = np.asarray(loss_weight(data["segments_BL"], data["t_BR"], data["rows_BL"])) > 0
    assert unknown_BL.any(1).all() and not unknown_BL.all(1).any()

    def loss(x0_BLP, eps_BLP, offset_BLP):
        given = {**data, "x0_BLP": x0_BLP, "eps_BLP": eps_BLP}
        return sums(given, lambda x, t: jnp.tanh(x) + offset_BLP, process_named(process)).loss

    offset_BLP = jnp.where(jnp.asarray(unknown_BL)[:, :, None], 0.1, jnp.inf) * jnp.ones((B, L, P))
    for gradient in jax.jit(jax.grad(loss, (0, 1, 2)))(data["x0_BLP"], data["eps_BLP"], offset_BLP):
        np.testing.assert_array_equal(np.asarray(gradient)[~unknown_BL], 0.0)
        assert np.all(np.isfinite(gradient)) and np.all(np.abs(np.asarray(gradient)[unknown_BL]).max(-1) > 0)


def test_halves_add_up_to_the_whole():
    """With unequal fill the mean of two means is another number: only sums may be averaged."""
    data = batch()

    def denoise(x_BLP, t_BR):
        return jnp.tanh(x_BLP)

    whole = sums(data, denoise)
    first, second = (
        sums({name: value[half] for name, value in data.items()}, denoise) for half in (slice(0, 1), slice(1, B))
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
    found = sums(data, lambda x, t: x, weight_BL=weight_BL, bins=4)
    wanted = np.sum(np.asarray(weight_BL) * np.mean(np.asarray(data["x0_BLP"]) ** 2, axis=2))
    np.testing.assert_allclose(found.loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(found.loss_bins, [0, 0, 0, wanted], rtol=1e-5)


def test_float32_whatever_the_model_computes_in():
    found = sums(batch(), lambda x, t: x.astype(jnp.bfloat16), cosine, "v")
    assert {leaf.dtype for leaf in found} == {jnp.dtype("float32")}


def test_jit_grad_and_vmap():
    data = batch()

    def loss(scale):
        return sums(data, lambda x, t: scale * x).loss

    scales = jnp.array([0.5, 1.0, 2.0])
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(loss)))(scales)
    np.testing.assert_allclose(values, [loss(scale) for scale in scales], rtol=1e-5)
    differences = [(loss(scale + 0.01) - loss(scale - 0.01)) / 0.02 for scale in scales]
    np.testing.assert_allclose(slopes, differences, rtol=1e-3)
