"""Everything that a run changes, as one tree; trained weights come in groups."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import serialization, struct
from jax.sharding import Mesh

from sora_jax.diffusion.keys import Purpose, step_key
from sora_jax.nn import params as param
from sora_jax.parallel.compile import abstract_on_mesh, use_mesh
from sora_jax.parallel.rules import AnyMesh
from sora_jax.train.optim import OptimConfig, learning_rate, make_optimizer

MODEL = "model"  # the group of a run that trains a single network
PER_GROUP = ("params", "ema", "opt_state")


@dataclasses.dataclass(frozen=True)
class Group:
    """Declare parameters that are trained together, with an optimizer, clip norm and averages of their own."""

    specs: dict
    optim: OptimConfig


class Optimizer(NamedTuple):
    """Update a group: the gradient transformation, the decays of its averages, and its learning rate."""

    transformation: optax.GradientTransformation
    decays: tuple[float, ...]
    ema_warmup: bool = True
    rate: optax.Schedule = lambda count: 0.0  # learning rate after so many updates


def make_optimizers(groups: Mapping[str, Group], steps: int) -> dict[str, Optimizer]:
    """Build the optimizer of each group for a run of `steps`, where schedules without an end of their own end."""

    def one(group: Group) -> Optimizer:
        optim = dataclasses.replace(group.optim, decay_steps=group.optim.decay_steps or steps)
        return Optimizer(make_optimizer(optim, group.specs), optim.ema, optim.ema_warmup, learning_rate(optim))

    return {name: one(group) for name, group in groups.items()}


@struct.dataclass
class TrainState:
    """Hold the updates done (step) and, by group: params, a tree; ema, such a tree for each decay; opt_state."""

    step: jax.Array
    params: dict[str, Any]
    ema: dict[str, tuple]
    opt_state: dict[str, Any]


def init_state(groups: Mapping[str, Group], optimizers: Mapping[str, Optimizer], seed: int, mesh: Mesh) -> TrainState:
    """Make the state before the first step; every array is created with its sharding.

    A parameter's key is a function of the seed, its group's place among the groups and its path inside the group.
    """
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    params, ema, opt_state = {}, {}, {}
    for number, (name, group) in enumerate(groups.items()):
        param.check_splits(group.specs, mesh)
        key = step_key(seed, number, Purpose.INIT)  # the first group's is that of runs before there were groups
        shardings = param.shardings(group.specs, mesh)
        params[name] = jax.jit(partial(param.init, group.specs), out_shardings=shardings)(key)
        ema[name] = tuple(copy(params[name]) for _ in optimizers[name].decays)
        opt_state[name] = jax.jit(optimizers[name].transformation.init)(params[name])
    return TrainState(jnp.zeros((), jnp.int32), params, ema, opt_state)


def abstract_state(groups: Mapping[str, Group], optimizers: Mapping[str, Optimizer], mesh: AnyMesh) -> TrainState:
    """Return what `init_state` makes, as shapes with shardings."""
    params, ema, opt_state = {}, {}, {}
    for name, group in groups.items():
        param.check_splits(group.specs, mesh)
        params[name] = param.abstract_on(group.specs, mesh)
        ema[name] = (params[name],) * len(group.optim.ema)
        with use_mesh(mesh):
            shapes = jax.eval_shape(optimizers[name].transformation.init, params[name])
            opt_state[name] = abstract_on_mesh(shapes, mesh)
    return TrainState(abstract_on_mesh(jax.ShapeDtypeStruct((), jnp.int32), mesh), params, ema, opt_state)


def start_from(state: TrainState, params: Mapping[str, Any]) -> TrainState:
    """Return a state before the first step with these parameters, of some groups, and averages equal to them."""

    def place(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda x, there: jax.device_put(x, there.sharding).astype(there.dtype), new, old)

    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))  # a step donates its state: no array may be in it twice
    placed = {name: copy(place(tree, state.params[name])) for name, tree in params.items()}
    ema = {name: tuple(copy(placed[name]) for _ in state.ema[name]) for name in placed}
    return TrainState(state.step, state.params | placed, state.ema | ema, state.opt_state)


def to_stored(state: TrainState) -> dict:
    """Convert a state into the nested dict that a checkpoint holds; a single group is stored without its name.

    So the checkpoints of a run with one group are those from before there were groups.
    """
    tree = serialization.to_state_dict(state)
    if len(state.params) == 1:
        for part in PER_GROUP:
            (tree[part],) = tree[part].values()
    return tree


def from_stored(state: TrainState, tree: dict) -> TrainState:
    """Convert what a checkpoint holds back into a state with the structure of `state`."""
    if len(state.params) == 1:
        (name,) = state.params
        tree = tree | {part: {name: tree[part]} for part in PER_GROUP}
    return serialization.from_state_dict(state, tree)


def abstract_ema(groups: Mapping[str, Group], mesh: Mesh) -> dict[str, tuple]:
    """Return the averages of all groups as abstract trees with shardings: what a checkpoint restores into."""
    return {name: (param.abstract_on(group.specs, mesh),) * len(group.optim.ema) for name, group in groups.items()}
