"""Declare each parameter once; derive initial values, shardings, counts and abstract trees.

A function `xxx_specs(config)` returns a tree of `ParamSpec` and stands above the function `xxx(params, ...)`
that uses the tree of arrays of the same structure.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from sora_jax.parallel.mesh import check_split
from sora_jax.parallel.rules import AnyMesh, partition
from sora_jax.shapes import PyTree

zeros = jax.nn.initializers.zeros
ones = jax.nn.initializers.ones


def normal(std: float) -> Initializer:
    """Return a Gaussian initialiser with this standard deviation."""
    return jax.nn.initializers.normal(std)


def xavier(in_axis: int | Sequence[int] = -2, out_axis: int | Sequence[int] = -1) -> Initializer:
    """Return Xavier's uniform initialiser (Glorot and Bengio 2010); the axes are those of fan in and fan out."""
    return jax.nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axis, out_axis)


def lecun(in_axis: int | Sequence[int] = -2, out_axis: int | Sequence[int] = -1) -> Initializer:
    """Return LeCun's initialiser: truncated normal with variance 1 / fan in."""
    return jax.nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis, out_axis)


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Declare one parameter."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical axis of each dimension (`parallel.rules`); None: never split
    init: Initializer = zeros
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")
        partition(*self.axes)


def input_axes(weight: ParamSpec) -> tuple[list[int], list[int]]:
    """Return which axes of a weight are inputs and which outputs of its matrix, without that of stacked layers.

    A projection onto heads has its inputs first; all other weights have one axis of outputs, the last.
    """
    own = [i for i, name in enumerate(weight.axes) if name != "layers"]
    inputs = own[:1] if weight.axes[own[-1]] == "head" else own[:-1]
    return inputs, own[len(inputs) :]


def _map(function: Callable[[tuple, ParamSpec], Any], specs: PyTree) -> PyTree:
    return jax.tree_util.tree_map_with_path(function, specs, is_leaf=lambda x: isinstance(x, ParamSpec))


def stack(specs: PyTree, layers: int) -> PyTree:
    """Return the specs of `layers` equal layers, stacked along a new first axis for `jax.lax.scan`."""

    def stacked(_: tuple, spec: ParamSpec) -> ParamSpec:
        def init(key: jax.Array, shape: Sequence[int], dtype: Any = spec.dtype, out_sharding: Any = None) -> jax.Array:
            return jax.vmap(lambda k: spec.init(k, shape[1:], dtype))(jax.random.split(key, shape[0]))

        return ParamSpec((layers, *spec.shape), ("layers", *spec.axes), init, spec.dtype)

    return _map(stacked, specs)


def init(specs: PyTree, key: jax.Array) -> PyTree:
    """Return initial values. A parameter's key depends on its path alone, so a new parameter changes no other."""

    def value(path: tuple, spec: ParamSpec) -> jax.Array:
        path_key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        return spec.init(path_key, spec.shape, spec.dtype)

    return _map(value, specs)


def abstract(specs: PyTree) -> PyTree:
    """Return the tree of `jax.ShapeDtypeStruct`, for tracing without values."""
    return _map(lambda _, spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs)


def abstract_on(specs: PyTree, mesh: AnyMesh) -> PyTree:
    """Return the tree of `jax.ShapeDtypeStruct` with shardings on `mesh`, for restoring a checkpoint."""

    def struct(_: tuple, spec: ParamSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=NamedSharding(mesh, partition(*spec.axes)))

    return _map(struct, specs)


def shardings(specs: PyTree, mesh: AnyMesh) -> PyTree:
    """Return the tree of `NamedSharding` on `mesh`."""
    return _map(lambda _, spec: NamedSharding(mesh, partition(*spec.axes)), specs)


def check_splits(specs: PyTree, mesh: AnyMesh) -> None:
    """Raise UserError, naming the parameter, if the mesh would split one unevenly."""

    def visit(path: tuple, spec: ParamSpec) -> None:
        name = "/".join(str(getattr(entry, "key", getattr(entry, "idx", entry))) for entry in path)
        for axis, size in zip(spec.axes, spec.shape, strict=True):
            if axis:
                check_split(mesh, axis, size, f"axis {axis!r} of parameter {name}")

    _map(visit, specs)


def count(specs: PyTree) -> int:
    """Return the number of trainable scalars."""
    leaves = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, ParamSpec))
    return sum(math.prod(spec.shape) for spec in leaves)
