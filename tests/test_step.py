"""One training step: accumulation, donation, metrics."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures_runs import TINY

from sora_jax.config import load
from sora_jax.data.packing.packs import PackItem, pack, stack
from sora_jax.kinds import run_config
from sora_jax.nn.pack import Pack
from sora_jax.nn.params import abstract, shardings
from sora_jax.parallel.mesh import make_mesh, place_batch
from sora_jax.train.denoiser import NOISE_BINS, denoiser_groups, denoiser_loss
from sora_jax.train.loop import split_batch
from sora_jax.train.optim import OptimConfig
from sora_jax.train.state import MODEL, Group, TrainState, make_optimizers
from sora_jax.train.step import fetch, make_step

OPTIM = OptimConfig(1e-2, warmup_steps=2, ema=(0.5, 0.9))
OPTIMIZERS = make_optimizers({MODEL: Group({}, OPTIM)}, 100)


def line_loss(params, frozen, batch, step, part):
    """Squared error of a line over real points; the number of points differs between rows."""
    error = (params[MODEL]["weight"] * batch["x"] + params[MODEL]["bias"] - batch["y"]) ** 2 * batch["real"]
    means = {"first": (error[:, 0].sum(), batch["real"][:, 0].sum())}
    return {MODEL: error.sum()}, ({MODEL: batch["real"].sum()}, means)


def line_batch():
    rng = np.random.default_rng(0)
    real = (np.arange(6) < np.array([1, 6, 2, 5, 3, 4, 6, 1])[:, None]).astype(np.float32)
    x = rng.standard_normal((8, 6)).astype(np.float32)
    return {"x": x, "y": 3 * x + 1 + 0.1 * rng.standard_normal((8, 6)).astype(np.float32), "real": real}


def state_of(params) -> TrainState:
    """The state of one group before its first step."""
    ema = tuple(jax.tree.map(jnp.copy, params) for _ in OPTIM.ema)
    opt_state = OPTIMIZERS[MODEL].transformation.init(params)
    return TrainState(jnp.int32(0), {MODEL: params}, {MODEL: ema}, {MODEL: opt_state})


def line_state():
    return state_of({"weight": jnp.float32(0.5), "bias": jnp.float32(0.0)})


def steps(loss, make_state, batch, parts, count=3):
    step, state = jax.jit(make_step(loss, OPTIMIZERS)), make_state()
    for _ in range(count):
        state, metrics = step(state, (), batch(parts))
    return jax.device_get((state, metrics))


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_micro_batches_of_unequal_counts_equal_one_big_batch(parts):
    run = functools.partial(steps, line_loss, line_state, lambda parts: split_batch(line_batch(), parts))
    (whole, metrics), (split, metrics_split) = run(1), run(parts)
    chex.assert_trees_all_close(split, whole, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(metrics_split, metrics, rtol=1e-5)


def test_the_first_step_is_its_formula():
    batch = line_batch()
    state, metrics = make_step(line_loss, OPTIMIZERS)(line_state(), (), split_batch(batch, 2))
    error = (0.5 * batch["x"] - batch["y"]) * batch["real"]
    points = batch["real"].sum()
    gradient = np.array([(2 * error * batch["x"]).sum(), 2 * error.sum()]) / points
    np.testing.assert_allclose(metrics["loss"], (error**2).sum() / points, rtol=1e-5)
    np.testing.assert_allclose(metrics["first"], (error[:, 0] ** 2).sum() / batch["real"][:, 0].sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], np.linalg.norm(gradient), rtol=1e-5)
    # Adam's first update is the sign of the gradient times the rate, here half of the peak.
    new = np.array([0.5, 0.0]) - 0.5 * OPTIM.learning_rate * np.sign(gradient)
    params = state.params[MODEL]
    np.testing.assert_allclose([params["weight"], params["bias"]], new, rtol=1e-4)
    np.testing.assert_allclose(metrics["parameter_norm"], np.linalg.norm(new), rtol=1e-4)
    np.testing.assert_allclose(metrics["update_norm"], 0.5 * OPTIM.learning_rate * 2**0.5, rtol=1e-4)
    young = 1 / 10  # both averages start with this decay, from the new parameters
    averages = [[tree["weight"], tree["bias"]] for tree in state.ema[MODEL]]
    np.testing.assert_allclose(averages, [young * np.array([0.5, 0.0]) + (1 - young) * new] * 2, rtol=1e-4)
    assert int(state.step) == 1


def test_a_mean_of_nothing_is_nan_on_the_host_alone():
    """Under JAX's detector, which looks at what the device returns."""

    def loss(*arguments):
        sums, (weights, means) = line_loss(*arguments)
        zero = jnp.zeros(3).at[1].set(means["first"][1])
        return sums, (weights, means | {"bins": (jnp.stack([0.0, means["first"][0], 0.0]), zero)})

    batch = split_batch(line_batch(), 1)
    with jax.debug_nans(True):
        _, metrics = make_step(loss, OPTIMIZERS)(line_state(), (), batch)
    found = fetch(metrics)
    np.testing.assert_array_equal(np.isnan(found["bins"]), [True, False, True])
    assert found["bins"][1] == found["first"] and found["bins"].dtype == np.float32 and "counted" not in found


def test_the_old_state_is_donated():
    old = line_state()
    make_step(line_loss, OPTIMIZERS)(old, (), split_batch(line_batch(), 1))
    assert all(x.is_deleted() for x in jax.tree.leaves((old.params, old.ema)))


def packs(config) -> dict:
    """Eight packs of one to four clips of three sizes."""
    rng = np.random.default_rng(1)
    sizes, rows, number = [(3, 4, 6), (1, 4, 4), (2, 4, 4)], [], 0
    for count in (1, 4, 2, 1, 3, 2, 4, 1):
        items = []
        for i in range(count):
            number += 1
            latent = rng.standard_normal((*sizes[(number + i) % 3 if count < 3 else 1], 4), np.float32)
            items.append(PackItem(latent, number, rng.integers(2, 60, 1 + number % 5)))
        rows.append(pack(items, config.packs))
    return stack(rows)


def test_the_denoiser_accumulates_packs_of_unequal_tokens():
    config = run_config(load(f"{TINY}:transformer", ["model.depth=1"]))
    mesh, batch = make_mesh(devices=jax.devices()[:1]), packs(config)
    tokens = batch["grids_BS3"].prod(-1).sum(-1).reshape(4, 2).sum(-1)
    assert len(set(tokens.tolist())) > 1
    specs = denoiser_groups(config)[MODEL].specs
    rng = np.random.default_rng(0)  # not the initial values, whose closed gates would hide most of the model
    params = jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), abstract(specs))

    def make_state():
        return state_of(jax.device_put(params, shardings(specs, mesh)))

    def place(parts):
        return Pack(**place_batch(split_batch(batch, parts), mesh, leading=1))

    with jax.set_mesh(mesh):
        loss = functools.partial(denoiser_loss, config)
        whole, split = (steps(loss, make_state, place, parts, 2)[1] for parts in (1, 4))
    assert whole["loss_by_noise"].shape == (NOISE_BINS,)
    chex.assert_trees_all_close(split, whole, rtol=2e-4, atol=1e-6)
