"""A parameter is declared once; initial values, shardings, counts and abstract trees are derived.

A function `xxx_specs(config)` returns a tree of `ParamSpec` and stands above the function `xxx(params, ...)`
that uses the tree of arrays of the same structure.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from sora_jax.parallel.mesh import check_split
from sora_jax.parallel.rules import partition

zeros = jax.nn.initializers.zeros
ones = jax.nn.initializers.ones


def normal(std: float) -> Callable:
    """Gaussian with this standard deviation."""
    return jax.nn.initializers.normal(std)


def xavier(in_axis=-2, out_axis=-1) -> Callable:
    """Xavier uniform; the axes say what counts as fan in and fan out."""
    return jax.nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axis, out_axis)


def lecun(in_axis=-2, out_axis=-1) -> Callable:
    """Truncated normal with variance 1 / fan in."""
    return jax.nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis, out_axis)


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: shape, logical axes (one name or None per dimension), initialiser, dtype."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Callable = zeros
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")
        partition(*self.axes)


def _map(function, specs):
    return jax.tree_util.tree_map_with_path(function, specs, is_leaf=lambda x: isinstance(x, ParamSpec))


def stack(specs, layers: int):
    """The specs of `layers` equal layers, stacked along a new first axis for `jax.lax.scan`."""

    def stacked(_, spec):
        def init(key, shape, dtype):
            return jax.vmap(lambda k: spec.init(k, shape[1:], dtype))(jax.random.split(key, shape[0]))

        return ParamSpec((layers, *spec.shape), ("layers", *spec.axes), init, spec.dtype)

    return _map(stacked, specs)


def init(specs, key: jax.Array):
    """Initial values. Each key comes from the parameter's path, so a new parameter changes no other."""

    def value(path, spec):
        path_key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        return spec.init(path_key, spec.shape, spec.dtype)

    return _map(value, specs)


def abstract(specs):
    """The tree of `jax.ShapeDtypeStruct`, for tracing without values."""
    return _map(lambda _, spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs)


def abstract_on(specs, mesh: Mesh):
    """As `abstract`, each with its sharding on `mesh`: what to restore into."""

    def struct(_, spec):
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=NamedSharding(mesh, partition(*spec.axes)))

    return _map(struct, specs)


def shardings(specs, mesh: Mesh):
    """The tree of `NamedSharding` on `mesh`."""
    return _map(lambda _, spec: NamedSharding(mesh, partition(*spec.axes)), specs)


def check_splits(specs, mesh: Mesh) -> None:
    """UserError that names the first parameter which the mesh would split into unequal parts."""

    def visit(path, spec):
        name = "/".join(str(getattr(entry, "key", getattr(entry, "idx", entry))) for entry in path)
        for axis, size in zip(spec.axes, spec.shape, strict=True):
            if axis:
                check_split(mesh, axis, size, f"axis {axis!r} of parameter {name}")

    _map(visit, specs)


def count(specs) -> int:
    """Number of trainable scalars."""
    leaves = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, ParamSpec))
    return sum(math.prod(spec.shape) for spec in leaves)
