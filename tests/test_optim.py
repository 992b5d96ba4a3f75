"""Schedules, averages, clipping and decay against their formulas, computed here in float64."""

import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sora_jax.errors import UserError
from sora_jax.models.autoencoder import AutoencoderConfig, autoencoder_specs
from sora_jax.models.transformer import TransformerConfig, denoiser_specs
from sora_jax.nn.params import ParamSpec, abstract, init, normal, shardings
from sora_jax.parallel.mesh import MeshConfig, make_mesh
from sora_jax.parallel.rules import partition
from sora_jax.train.optim import OptimConfig, learning_rate, make_optimizer, skip_spikes, update_ema, weights_only

PEAK, WARM, LAST, FINAL = 2e-3, 10, 50, 0.1


def expected(schedule: str, step: int) -> float:
    if step < WARM:
        return PEAK * (step + 1) / WARM
    done = min((step - WARM) / (LAST - WARM), 1.0)
    fraction = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[schedule]
    return PEAK * (FINAL + (1 - FINAL) * fraction)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedule_is_its_formula(schedule):
    rate = learning_rate(OptimConfig(PEAK, schedule, WARM, LAST, FINAL))
    steps = [0, 1, WARM - 1, WARM, WARM + 1, 30, LAST - 1, LAST, LAST + 100]
    np.testing.assert_allclose([rate(s) for s in steps], [expected(schedule, s) for s in steps], rtol=1e-5)


@pytest.mark.parametrize("warmup", [0, 1])
def test_without_a_warm_up_the_first_step_has_the_peak(warmup):
    rate = learning_rate(OptimConfig(PEAK, warmup_steps=warmup))
    np.testing.assert_allclose([rate(0), rate(1)], PEAK, rtol=1e-6)


def test_averages_are_of_the_new_parameters_and_young_ones_are_short():
    decays, values = (0.5, 0.9), [1.0, -2.0, 5.0, 4.0, 0.5, 3.0, 3.0, -1.0, 2.0, 7.0]
    ema = tuple({"weight": jnp.float32(10.0)} for _ in decays)
    wanted = np.full(2, 10.0)
    for step, value in enumerate(values):
        ema = update_ema(ema, {"weight": jnp.float32(value)}, decays, jnp.int32(step))
        decay = np.minimum(decays, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * value
        np.testing.assert_allclose([tree["weight"] for tree in ema], wanted, rtol=1e-5)


def adamw(config: OptimConfig, weight, gradients):
    """Algorithm 2 of 1711.05101 with clipping of the gradient's norm, in float64; one array, weight decay on."""
    first, second = np.zeros_like(weight), np.zeros_like(weight)
    for step, gradient in enumerate(gradients):
        gradient = gradient * min(1.0, config.clip_norm / np.linalg.norm(gradient))
        first = config.b1 * first + (1 - config.b1) * gradient
        second = config.b2 * second + (1 - config.b2) * gradient**2
        direction = first / (1 - config.b1 ** (step + 1))
        direction /= np.sqrt(second / (1 - config.b2 ** (step + 1))) + config.eps
        rate = config.learning_rate * min(1.0, (step + 1) / config.warmup_steps)
        weight = weight - rate * (direction + config.weight_decay * weight)
    return weight


def test_updates_are_adamw_behind_clipping():
    config = OptimConfig(1e-2, warmup_steps=3, weight_decay=0.1, clip_norm=1.0)
    rng = np.random.default_rng(0)
    weight, gradients = rng.standard_normal(6), rng.standard_normal((8, 6)) * 10.0 ** np.arange(-4, 4)[:, None]
    optimizer = make_optimizer(config)
    params = {"weight": jnp.asarray(weight, jnp.float32)}
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update({"weight": jnp.asarray(gradient, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["weight"], adamw(config, weight, gradients), rtol=2e-5)


def adafactor(config: OptimConfig, weight, gradients):
    """Algorithms 4 and 5 of 1804.04235 without relative step sizes, with momentum and decay, in float64.

    Rows and columns of a matrix are means, not sums: the ratio is the same.
    """
    rows, columns, whole, momentum = 0.0, 0.0, 0.0, np.zeros_like(weight)
    for step, gradient in enumerate(gradients, 1):
        decay, square = 1 - step**-0.8, gradient**2 + 1e-30
        if weight.ndim == 2:
            rows = decay * rows + (1 - decay) * square.mean(1)
            columns = decay * columns + (1 - decay) * square.mean(0)
            update = gradient / np.sqrt(np.outer(rows, columns) / rows.mean())
        else:
            whole = decay * whole + (1 - decay) * square
            update = gradient / np.sqrt(whole)
        update = update / max(1.0, np.sqrt(np.mean(update**2)))
        momentum = config.b1 * momentum + (1 - config.b1) * update
        weight = weight - config.learning_rate * (momentum + config.weight_decay * weight * (weight.ndim == 2))
    return weight


@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_adafactor_is_its_algorithms(b1):
    config = OptimConfig(1e-2, warmup_steps=0, weight_decay=0.1, clip_norm=0.0, b1=b1, method="adafactor")
    rng = np.random.default_rng(0)
    shapes = {"weight": (130, 140), "bias": (140,)}
    start = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    gradients = [
        {n: rng.standard_normal(s) * 10.0 ** rng.integers(-3, 3, s[-1]) for n, s in shapes.items()} for _ in range(4)
    ]
    optimizer, params = make_optimizer(config), jax.tree.map(jnp.float32, start)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    moments = sum(x.size for x in jax.tree.leaves(state)) - (b1 > 0) * (130 * 140 + 140)
    assert moments < 1000  # 130 + 140 of the weight, 140 of the bias, and counts
    for gradient in gradients:
        updates, state = update(jax.tree.map(jnp.float32, gradient), state, params)
        params = optax.apply_updates(params, updates)
    for name in shapes:
        wanted = adafactor(config, start[name], [gradient[name] for gradient in gradients])
        np.testing.assert_allclose(params[name], wanted, rtol=2e-5, atol=1e-6)


def test_the_state_of_adafactor_is_split_as_the_weights_are():
    """Means keep the axes, and their parts of the mesh, that they are not taken over; updates are as on one device."""
    specs = {"weight": ParamSpec((3, 128, 256), ("layers", "embed", "hidden"), normal(1.0))}
    optimizer = make_optimizer(OptimConfig(method="adafactor", warmup_steps=0, b1=0.0, clip_norm=0.0), specs)
    params = init(specs, jax.random.key(0))

    @jax.jit
    def step(params):
        state = optimizer.init(params)
        updates, state = optimizer.update(jax.tree.map(jnp.sin, params), state, params)
        return optimizer.update(jax.tree.map(jnp.cos, params), state, params)

    one, _ = step(params)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    with jax.set_mesh(mesh):
        split, state = step(jax.device_put(params, shardings(specs, mesh)))
    rows, columns = (optax.tree_utils.tree_get(state, name)["weight"] for name in ("v_row", "v_col"))
    assert (rows.shape, rows.sharding.spec) == ((3, 128), partition("layers", "embed"))
    assert (columns.shape, columns.sharding.spec) == ((3, 256), partition("layers", "hidden"))
    np.testing.assert_allclose(split["weight"], one["weight"], rtol=1e-5, atol=1e-9)


def test_the_state_of_adafactor_is_small_for_attention_too():
    """One mean for each row and column of every head's matrix."""
    optimizer = make_optimizer(OptimConfig(method="adafactor", warmup_steps=0, b1=0.0))
    weight = jax.ShapeDtypeStruct((26, 1920, 3, 16, 120), jnp.float32)
    state = jax.eval_shape(optimizer.init, {"weight": weight})
    assert sum(x.size for x in jax.tree.leaves(state)) - 26 * 3 * 16 * (1920 + 120) < 10


def test_without_clipping_and_decay_it_is_the_adam_of_optax():
    ours = make_optimizer(OptimConfig(1e-3, warmup_steps=0, clip_norm=0.0, b2=0.999))
    params, large = {"weight": jnp.ones(3)}, {"weight": jnp.array([1e4, -3.0, 1e-4])}
    other = optax.adam(1e-3, 0.9, 0.999)
    first, second = (o.update(large, o.init(params), params)[0]["weight"] for o in (ours, other))
    np.testing.assert_allclose(first, second, rtol=1e-6)


def test_clipping_is_by_the_norm_of_the_whole_tree():
    optimizer = make_optimizer(OptimConfig(clip_norm=1.0, b1=0.0))
    gradient = {"a": {"weight": jnp.array([30.0])}, "b": {"bias": jnp.array([40.0])}}
    params = jax.tree.map(jnp.zeros_like, gradient)
    state = optimizer.update(gradient, optimizer.init(params), params)[1]
    moments = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose([moments["a"]["weight"][0], moments["b"]["bias"][0]], [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize(
    "specs", [denoiser_specs(TransformerConfig(depth=2)), autoencoder_specs(AutoencoderConfig(width=8))]
)
def test_decay_acts_on_every_matrix_and_kernel_and_on_nothing_else(specs):
    params = abstract(specs)
    optimizer = make_optimizer(OptimConfig(1.0, warmup_steps=0, weight_decay=0.5))

    def update():
        ones = jax.tree.map(lambda x: jnp.ones(x.shape), params)
        return optimizer.update(jax.tree.map(jnp.zeros_like, ones), optimizer.init(ones), ones)[0]

    moved = jax.tree.map(lambda x: float(x.ravel()[0]), jax.jit(update)())
    for path, value in jax.tree_util.tree_leaves_with_path(moved):
        name = path[-1].key
        assert value == (-0.5 if name in ("weight", "kernel") else 0.0), path
    masks = jax.tree_util.tree_leaves_with_path(weights_only(params))
    decayed = [path for path, on in masks if on]
    shapes = dict(jax.tree_util.tree_leaves_with_path(params))
    assert decayed and all(len(shapes[path].shape) >= 2 for path in decayed)
    kept = {str(path[-1].key) for path, on in masks if not on}
    assert not any("kernel" in name or "weight" in name for name in kept), kept


@pytest.mark.parametrize(
    "field, value",
    [
        ("schedule", "step"),
        ("learning_rate", 0.0),
        ("learning_rate", math.inf),
        ("warmup_steps", -5),
        ("decay_steps", -3),
        ("final_fraction", -2.0),
        ("final_fraction", 1.5),
        ("b1", 1.5),
        ("b1", 1.0),
        ("b2", -1.0),
        ("b2", math.nan),
        ("eps", -1.0),
        ("eps", 0.0),
        ("weight_decay", -1.0),
        ("weight_decay", math.inf),
        ("clip_norm", -1.0),
        ("skip_spikes", math.nan),
        ("ema", ()),
        ("ema", (1.0,)),
    ],
)
def test_wrong_settings_are_named(field, value):
    with pytest.raises(UserError, match=re.escape(f"optim.{field} is {value!r}")):
        OptimConfig(**{field: value})


@pytest.mark.parametrize(
    "field, value", [("b1", 0.0), ("final_fraction", 1.0), ("warmup_steps", 0), ("weight_decay", 0.0), ("ema", (0.0,))]
)
def test_the_ends_of_what_is_allowed_are_allowed(field, value):
    assert getattr(OptimConfig(**{field: value}), field) == value


def norms_through(norms, deviations=3.0, warmup=20):
    """Which of these gradient norms change the parameter, and the state after each."""
    optimizer = skip_spikes(optax.scale_by_adam(), deviations, warmup=warmup)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    state, states, moved = optimizer.init(params), [], []
    update = jax.jit(optimizer.update)
    for norm in norms:
        gradient = {"a": jnp.array([0.0, 0.6 * norm]), "b": jnp.array([-0.8 * norm, 0.0])}
        updates, state = update(gradient, state, params)
        moved.append(bool(jnp.any(updates["a"] != 0)))
        states.append(state)
    return np.array(moved), states


def test_a_spike_of_the_gradient_changes_nothing_but_the_count():
    norms = 1 + 0.1 * np.random.default_rng(0).standard_normal(60).clip(-2, 2)
    norms[30], norms[40], norms[45], norms[10] = 2.0, np.nan, np.inf, 50.0  # the last one is young
    quiet = np.delete(norms, 10)
    moved, states = norms_through(quiet)
    spikes = [29, 39, 44]
    assert not moved[spikes].any() and moved[:20].all() and moved.sum() >= 52
    for spike in spikes:
        chex.assert_trees_all_equal(states[spike].inner, states[spike - 1].inner)
    assert int(states[-1].skipped_updates) == (~moved).sum()
    mean, variance = states[19].mean, states[19].variance
    np.testing.assert_allclose([mean, variance], [quiet[:20].mean(), quiet[:20].var()], rtol=1e-4)
    assert norms_through(norms[:25])[0].all()  # a young run skips nothing, not even its first large one


def test_a_gradient_that_stays_large_is_no_spike_for_long():
    moved, _ = norms_through([*(1 + 0.1 * (-1) ** i for i in range(100)), *[1000.0] * 400], warmup=50)
    assert moved[:100].all() and not moved[100:120].any() and moved[-100:].all()
