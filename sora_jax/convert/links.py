"""Link the tensors of a file to parameters, once for both directions."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.errors import UserError
from sora_jax.nn.params import ParamSpec, abstract
from sora_jax.shapes import PyTree


@dataclasses.dataclass(frozen=True)
class Form:
    """Convert between a parameter and the layout of a file's tensors."""

    read: Callable[..., np.ndarray]  # tensors of the file -> parameter
    write: Callable[[np.ndarray], Sequence[np.ndarray]]  # the inverse


def form(read: Callable, write: Callable) -> Form:
    """Return the form of a parameter that a single tensor holds."""
    return Form(read, lambda x: (write(x),))


# PyTorch: (outputs, inputs) and (outputs, inputs, height, width). Here: inputs first, outputs last.
SAME = form(lambda w: w, lambda w: w)
MATRIX = form(lambda w: w.transpose(1, 0), lambda w: w.transpose(1, 0))
KERNEL = form(lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1))


@dataclasses.dataclass(frozen=True)
class Link:
    """Link a parameter, or one layer of a stacked one, to the tensors that hold it."""

    path: tuple  # keys from the root of the tree to the parameter
    names: tuple[str, ...]  # of the tensors
    form: Form = SAME
    layer: int | None = None  # index along the first axis of a stacked parameter; None: not stacked


def layer_links(path: tuple, name: str, weight: Form, layer: int | None = None) -> list[Link]:
    """Link weight and bias of one module."""
    return [
        Link((*path, "weight"), (f"{name}.weight",), weight, layer),
        Link((*path, "bias"), (f"{name}.bias",), SAME, layer),
    ]


def read_tree(links: Iterable[Link], specs: PyTree, tensors: dict[str, np.ndarray], source: str) -> PyTree:
    """Return the tree of parameters that the tensors hold.

    Raises:
        UserError: tensors are missing, unknown or of another shape; the sentence lists all of them.
    """
    grouped: dict[tuple, list[Link]] = {}
    for link in links:
        grouped.setdefault(link.path, []).append(link)
    _check_names(_shapes(grouped, specs), {name: x.shape for name, x in tensors.items()}, source)

    def value(path: tuple, _: jax.ShapeDtypeStruct) -> jax.Array:
        members = grouped[_keys(path)]
        layers = [link.form.read(*(tensors[name] for name in link.names)) for link in members]
        return jnp.asarray(layers[0] if members[0].layer is None else np.stack(layers))

    return jax.tree_util.tree_map_with_path(value, abstract(specs))


def write_tree(links: Iterable[Link], params: PyTree) -> dict[str, np.ndarray]:
    """Return the tensors that hold a tree of parameters: the inverse of `read_tree`."""
    values = {_keys(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}
    tensors: dict[str, np.ndarray] = {}
    for link in links:
        x = values[link.path]
        parts = link.form.write(x if link.layer is None else x[link.layer])
        tensors |= dict(zip(link.names, parts, strict=True))
    return tensors


def _shapes(grouped: dict[tuple, list[Link]], specs: PyTree) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that a file must hold, by its name."""
    leaves = jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda x: isinstance(x, ParamSpec))
    by_path = {_keys(path): spec for path, spec in leaves}
    if set(by_path) != set(grouped):
        raise ValueError(f"parameters without links, or links without a parameter: {set(by_path) ^ set(grouped)}")
    shapes: dict[str, tuple[int, ...]] = {}
    for path, members in grouped.items():
        for link in members:
            own = by_path[path].shape[0 if link.layer is None else 1 :]
            parts = jax.eval_shape(link.form.write, jax.ShapeDtypeStruct(own, np.float32))
            shapes |= {name: part.shape for name, part in zip(link.names, parts, strict=True)}
    return shapes


def _check_names(wanted: dict, found: dict, source: str) -> None:
    shared = [name for name in wanted if name in found]
    faults = {
        "missing": [name for name in wanted if name not in found],
        "unknown": [name for name in found if name not in wanted],
        "of another shape": [
            f"{name} {found[name]} instead of {wanted[name]}" for name in shared if found[name] != wanted[name]
        ],
    }
    listed = "; ".join(f"{fault}: {', '.join(names)}" for fault, names in faults.items() if names)
    if listed:
        raise UserError(f"the tensors of {source!r} are not those of this model: {listed}")


def _keys(path: tuple) -> tuple:
    """Return the dict keys and list indices of a JAX key path."""
    return tuple(getattr(entry, "key", getattr(entry, "idx", None)) for entry in path)
