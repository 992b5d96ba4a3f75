"""Eight virtual devices: attention on a split sequence; where arrays lie, and layout mistakes."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from sora_jax.errors import UserError
from sora_jax.models.text import TextConfig
from sora_jax.models.transformer import TransformerConfig, denoiser_specs
from sora_jax.nn.attention import How, Place, Places, attention, dense_attention
from sora_jax.nn.params import check_splits
from sora_jax.parallel.mesh import MeshConfig, _laid_out, check_split, make_mesh, place_batch, with_slices
from sora_jax.parallel.rules import (
    AUTOENCODER,
    MESH_AXES,
    RULES,
    SHARED,
    TRANSFORMER,
    laid_out_as,
    out_sharding,
    partition,
    parts,
    reshard,
)

TEXT = TextConfig(vocabulary=16, width=16, depth=1, head_width=8)
MODEL = TransformerConfig(depth=2, width=24, heads=2, latent_channels=2, text=TEXT, dtype="float32")


@pytest.fixture(scope="module")
def clips_on_a_line():
    """q, k, v of four packs, segments in runs with one out of order, and the dense values, slopes and tangents."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 4, 32, 8, 4), np.float32)
    segments = np.sort(rng.integers(0, 5, (4, 32), np.int32), axis=1)
    segments[:, -1] = 1
    return (q, k, v, segments), jax.jit(derivatives(dense_attention))(q, k, v, segments)


def derivatives(attend):
    def found(q, k, v, segments):
        places = Places(Place(segments), Place(segments))
        loss = lambda q, k, v: jnp.sin(attend(q, k, v, places)).sum()  # noqa: E731
        values, slopes = jax.value_and_grad(loss, (0, 1, 2))(q, k, v)
        moved = jax.jvp(lambda q, k, v: attend(q, k, v, places), (q, k, v), (v, q, k))[1]
        return values, slopes, moved

    return found


@pytest.mark.parametrize("mesh", [MeshConfig(data=2, tensor=2, sequence=2), MeshConfig(data=1, sequence=8)], ids=str)
@pytest.mark.parametrize(
    "how", [("dense", "gather"), ("blockwise", "gather"), ("blockwise", "all_to_all"), ("blockwise", "ring")]
)
def test_attention_on_a_split_sequence_is_that_on_one_device(clips_on_a_line, mesh, how):
    arrays, expected = clips_on_a_line
    mesh = make_mesh(mesh)
    with jax.set_mesh(mesh):
        layouts = [*[("batch", "length", "heads", None)] * 3, ("batch", "length")]
        arrays = zip(arrays, layouts, strict=True)
        placed = [jax.device_put(x, NamedSharding(mesh, partition(*axes))) for x, axes in arrays]
        found = jax.jit(derivatives(lambda *a: attention(*a, how=How(*how))))(*placed)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


def test_heads_that_cannot_be_shared_out_go_round_or_are_refused():
    q = jax.ShapeDtypeStruct((1, 8, 2, 4), jnp.float32)
    place = Place(jax.ShapeDtypeStruct((1, 8), jnp.int32))
    with jax.set_mesh(make_mesh(MeshConfig(data=1, sequence=4), jax.devices()[:4])):
        program = jax.make_jaxpr(functools.partial(attention, how=How("blockwise", "auto")))
        assert "ppermute" in str(program(q, q, q, Places(place, place)))
        with pytest.raises(UserError, match="model.sequence is 'all_to_all'; 2 heads"):
            attention(q, q, q, Places(place, place), how=How("blockwise", "all_to_all"))


class Chip:
    """What JAX reads of a device to lay out a mesh: two slices, each a square of four."""

    platform, device_kind, process_index = "tpu", "TPU v5 lite", 0

    def __init__(self, number: int):
        self.id, self.slice_index = number, number // 4
        self.coords, self.core_on_chip = (number % 2, number // 2 % 2, 0), 0


def test_slices_lie_along_the_slice_axis_alone():
    chips = [Chip(number) for number in (0, 4, 1, 5, 2, 6, 3, 7)]
    grid = _laid_out([2, 1, 2, 1, 2], chips)
    assert [{chip.slice_index for chip in part.flat} for part in grid] == [{0}, {1}]
    assert grid.shape == (2, 1, 2, 1, 2) and {chip.id for chip in grid.flat} == set(range(8))
    assert with_slices(MeshConfig(fsdp=4), 2) == MeshConfig(slice=2, fsdp=4)
    with pytest.raises(UserError, match="mesh.slice is 4; it must be the number of slices, 2"):
        make_mesh(MeshConfig(slice=4, data=1, fsdp=2), chips)


def test_a_batch_is_split_along_its_batch_axis():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert parts("batch", mesh) == 4
    placed = place_batch({"x": np.arange(2 * 8 * 3).reshape(2, 8, 3)}, mesh, leading=1)["x"]
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2, 3)}
    np.testing.assert_array_equal(placed, np.arange(48).reshape(2, 8, 3))


def test_what_cannot_be_split_evenly_is_refused_by_name():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    check_split(mesh, "batch", 8, "packs")
    with pytest.raises(UserError, match="packs is 6; with a mesh of data=2 x fsdp=2 it must be a multiple of 4"):
        check_split(mesh, "batch", 6, "packs")
    check_splits(denoiser_specs(MODEL), mesh)
    with pytest.raises(UserError, match=r"axis 'heads' of parameter blocks/\w+/\w+ is 3; .* multiple of 2"):
        check_splits(denoiser_specs(dataclasses.replace(MODEL, heads=3)), mesh)


def test_all_axes_exist_and_the_open_one_takes_the_rest():
    assert dict(make_mesh().shape) == dict(zip(MESH_AXES, (1, 8, 1, 1, 1), strict=True))
    assert dict(make_mesh(MeshConfig(data=2, tensor=-1)).shape) == dict(zip(MESH_AXES, (1, 2, 1, 1, 4), strict=True))


@pytest.mark.parametrize("sizes", [{"data": 0}, {"fsdp": -2}, {"data": -1, "tensor": -1}])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(UserError, match=r"mesh\.\w+ (is .*; it must be positive|and mesh\.tensor are -1; only one)"):
        MeshConfig(**sizes)


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": 4}, {"fsdp": 3}, {"tensor": 16}])
def test_a_mesh_uses_all_devices(sizes):
    with pytest.raises(UserError, match=f"{next(iter(sizes))}=.*8 devices"):
        make_mesh(MeshConfig(**sizes))


def test_two_axes_may_not_claim_one_mesh_axis():
    with pytest.raises(ValueError, match="'batch' and 'embed' both map to mesh axis 'fsdp'"):
        partition("batch", "embed")
    with pytest.raises(ValueError, match="'heads' and 'heads' both"):
        partition("heads", None, "heads")


def test_unknown_axes_are_named_with_those_that_exist():
    with pytest.raises(ValueError, match="'colour'.*batch.*embed"):
        partition("batch", "colour")


def test_the_rules_of_the_models_stand_apart():
    tables = (SHARED, TRANSFORMER, AUTOENCODER)
    assert sum(map(len, tables)) == len(RULES)  # no name means two things
    splitting = {name for name, axes in AUTOENCODER.items() if axes}
    assert splitting == {"height"} and partition("batch", "height") == jax.P(("slice", "data", "fsdp"), "sequence")


def test_every_rule_names_axes_of_the_mesh():
    assert set().union(*RULES.values()) == set(MESH_AXES)
    assert partition("batch", None, "hidden", "width") == jax.P(("slice", "data", "fsdp"), None, "tensor", None)


def test_without_a_mesh_nothing_is_laid_out():
    x = np.ones(3)
    assert out_sharding("batch") is None and reshard(x, "batch") is x and laid_out_as(x, x) is x
    with jax.set_mesh(make_mesh(MeshConfig(data=4, sequence=2))):
        assert out_sharding("length") == partition("length")
        split = jax.jit(reshard, static_argnums=1)(np.ones(4), "length")
    assert split.sharding.spec == partition("length")
