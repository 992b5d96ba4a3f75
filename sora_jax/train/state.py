"""Everything that a run changes, as one tree."""

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from sora_jax.diffusion.keys import Purpose, step_key
from sora_jax.nn import params as param


@struct.dataclass
class TrainState:
    """step: updates done; ema: one tree of parameters per decay."""

    step: jax.Array
    params: dict
    ema: tuple
    opt_state: optax.OptState


def init_state(specs, optimizer: optax.GradientTransformation, averages: int, seed: int, mesh: Mesh) -> TrainState:
    """The state before the first step; every array is born with its sharding."""
    param.check_splits(specs, mesh)
    shardings = param.shardings(specs, mesh)
    params = jax.jit(lambda key: param.init(specs, key), out_shardings=shardings)(step_key(seed, 0, Purpose.INIT))
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    ema = tuple(copy(params) for _ in range(averages))
    return TrainState(jnp.zeros((), jnp.int32), params, ema, jax.jit(optimizer.init)(params))
