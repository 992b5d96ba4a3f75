"""The programs of a run as they would be compiled: the real functions, with abstract arrays in place of values."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh

from sora_jax.nn import params as param
from sora_jax.parallel.compile import abstract_on_mesh, use_mesh
from sora_jax.train.loop import with_fixed
from sora_jax.train.run_config import RunConfig
from sora_jax.train.state import MODEL, Group, abstract_state, make_optimizers
from sora_jax.train.step import LossFunction, make_step

AnyMesh = Mesh | AbstractMesh


@dataclasses.dataclass(frozen=True)
class Load:
    """Describe what a call works through, and what of it can be split or made smaller.

    model_flops: of one call on all devices. units: tokens or pixels of clips, named by `unit`. rows: of the batch.
    splits: for a mesh axis, the sizes that it must divide to be used. shorten(factor): options that make a call smaller
    by that factor, and why.
    """

    model_flops: float
    units: int
    unit: str
    rows: int
    shorten: Callable[[float], tuple[str, str]]
    splits: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Program:
    """Hold a jitted function with abstract arguments. `held` names the arguments for the memory report.

    activations: what the forward pass keeps for the backward pass, of one micro-batch.
    """

    function: Callable
    arguments: tuple
    held: dict[str, object]
    load: Load
    activations: tuple = ()


def for_accelerator(config: RunConfig) -> RunConfig:
    """Return the config with the dtype that "auto" means on an accelerator."""
    if getattr(config.model, "dtype", None) != "auto":
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))


class Trained(NamedTuple):
    """Hold what a step trains: groups of parameters, the loss, and frozen weights (abstract arrays on a mesh).

    fixed: the specs of those parameters of the network that are not trained.
    """

    groups: Mapping[str, Group]
    loss: LossFunction
    frozen: Any = ()
    fixed: Mapping = {}


def training_program(config: RunConfig, trained: Trained, batch: Any, load: Load, mesh: AnyMesh) -> Program:
    """Make the whole training step: loss and gradient, optimizers, averages of the parameters.

    batch: abstract arrays on `mesh` with a leading axis of micro-batches.
    """
    fixed = {MODEL: param.abstract_on(trained.fixed, mesh)}
    trained = trained._replace(loss=with_fixed(trained.loss), frozen=(fixed, trained.frozen))
    optimizers = make_optimizers(trained.groups, config.loop.steps)
    state = abstract_state(trained.groups, optimizers, mesh)
    held = {
        "parameters": state.params,
        "optimizer": (state.step, state.opt_state),
        "averages": state.ema,
        "frozen": trained.frozen,
        "batch": batch,
    }
    held = {name: tree for name, tree in held.items() if jax.tree.leaves(tree)}
    kept = activations(trained, state.params, batch, mesh)
    return Program(make_step(trained.loss, optimizers), (state, trained.frozen, batch), held, load, kept)


def activations(trained: Trained, params: dict, batch: Any, mesh: AnyMesh) -> tuple:
    """Return what differentiating a loss keeps, without the weights: abstract arrays on `mesh`."""

    def kept(params, frozen, batch):
        micro = jax.tree.map(lambda x: x[0], batch)
        return jax.vjp(lambda params: trained.loss(params, frozen, micro, 0, 0)[0], params)[1]

    with use_mesh(mesh):
        leaves = jax.tree.leaves(abstract_on_mesh(jax.eval_shape(kept, params, trained.frozen, batch), mesh))
    known = Counter((x.shape, x.dtype) for x in jax.tree.leaves((params, trained.frozen)))
    found = []
    for leaf in leaves:
        key = leaf.shape, leaf.dtype
        if known[key]:
            known[key] -= 1
        else:
            found.append(leaf)
    return tuple(found)


def many(row: dict, leading: tuple[int, ...]) -> dict:
    """Return abstract arrays of so many rows, of the arrays of a batch of one."""
    return {name: jax.ShapeDtypeStruct((*leading, *x.shape[1:]), x.dtype) for name, x in row.items()}
