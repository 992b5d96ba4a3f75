"""Parameter trees: values by path, stacking, and everything that is derived from a spec."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.nn import params
from sora_jax.nn.params import ParamSpec, abstract, abstract_on, count, lecun, normal, shardings, stack, xavier
from sora_jax.parallel.mesh import MeshConfig, make_mesh
from sora_jax.parallel.rules import partition

SPECS = {
    "in": {"weight": ParamSpec((8, 6), ("embed", "hidden"), xavier()), "bias": ParamSpec((6,), ("hidden",))},
    "out": {"weight": ParamSpec((6, 8), ("hidden", "embed"), xavier())},
}
SIZE = 8 * 6 + 6 + 6 * 8


def init(specs, key):
    return jax.jit(lambda key: params.init(specs, key))(key)


def test_a_new_parameter_changes_no_other():
    more = {"before": ParamSpec((3,), (None,), normal(1.0)), **SPECS}
    few, many = (init(specs, jax.random.key(5)) for specs in (SPECS, more))
    chex.assert_trees_all_equal(few, {name: many[name] for name in few})


def test_equal_shapes_get_different_values_and_a_key_repeats_itself():
    specs = {"a": ParamSpec((50,), (None,), normal(1.0)), "b": ParamSpec((50,), (None,), normal(1.0))}
    first, again, other = (init(specs, jax.random.key(seed)) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    assert not np.isclose(first["a"], first["b"]).any() and not np.isclose(first["a"], other["a"]).any()


def test_stacked_layers_are_drawn_apart_with_the_spread_of_one_layer():
    layers = init(stack({"w": ParamSpec((400, 100), ("embed", "hidden"), xavier())}, 3), jax.random.key(0))["w"]
    assert layers.shape == (3, 400, 100)
    bound = np.sqrt(6 / (400 + 100))
    assert np.abs(layers).max() <= bound
    np.testing.assert_allclose(layers.std((1, 2)), bound / np.sqrt(3), rtol=0.02)
    assert np.abs(np.corrcoef(np.asarray(layers).reshape(3, -1)) - np.eye(3)).max() < 0.03


def test_stacking_keeps_the_initialiser_of_every_kind():
    specs = {"zero": ParamSpec((2, 3), (None, None)), "one": ParamSpec((2,), (None,), jax.nn.initializers.ones)}
    values = init(stack(specs, 4), jax.random.key(0))
    np.testing.assert_array_equal(values["zero"], np.zeros((4, 2, 3)))
    np.testing.assert_array_equal(values["one"], np.ones((4, 2)))


@pytest.mark.parametrize("draw, variance", [(normal(0.3), 0.09), (xavier(), 2 / 900), (lecun(), 1 / 500)])
def test_initialisers_have_their_variance(draw, variance):
    value = draw(jax.random.key(0), (500, 400), jnp.float32)
    np.testing.assert_allclose(value.var(), variance, rtol=0.02)


def test_abstract_trees_describe_the_values():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    values, shapes, placed = init(SPECS, jax.random.key(0)), abstract(SPECS), abstract_on(SPECS, mesh)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), values) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), placed)
    assert jax.tree.map(lambda x: x.sharding, placed) == shardings(SPECS, mesh)
    assert count(SPECS) == SIZE == sum(x.size for x in jax.tree.leaves(values))
    assert count(stack(SPECS, 5)) == 5 * SIZE


def test_values_do_not_depend_on_the_mesh():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    split = jax.jit(lambda key: params.init(SPECS, key), out_shardings=shardings(SPECS, mesh))(jax.random.key(3))
    weight = split["in"]["weight"]
    assert weight.sharding.spec == partition("embed", "hidden")
    assert weight.addressable_shards[0].data.shape == (4, 3)
    chex.assert_trees_all_equal(split, init(SPECS, jax.random.key(3)))


def test_a_spec_names_every_axis_once():
    with pytest.raises(ValueError, match="differ in length"):
        ParamSpec((2, 3), ("embed",))
    with pytest.raises(ValueError, match="'heads' and 'hidden'"):
        ParamSpec((2, 3), ("heads", "hidden"))
