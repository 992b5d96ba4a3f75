"""The training step: a pure function of (state, batch), jitted once, its state donated."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from sora_jax.train.optim import update_ema
from sora_jax.train.state import TrainState

Means = dict[str, tuple[jax.Array, jax.Array]]
LossFunction = Callable[..., tuple[jax.Array, tuple[jax.Array, Means]]]


def make_step(
    loss: LossFunction, optimizer: optax.GradientTransformation, decays: tuple[float, ...], ema_warmup: bool = True
) -> Callable:
    """Builds `step(state, batches) -> (state, metrics)`.

    `loss(params, batch, step)` returns (sum, (weight, means)): sums over what is counted (tokens, clips), never
    means, so that micro-batches and devices weigh by what they hold. `batches` has a leading axis of micro-batches
    whose gradients are accumulated. `means` maps a name to (sum, count). Metrics are scalars or small vectors;
    "skipped_updates", where the optimizer skips spikes, counts from the beginning of the run.
    """

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batches):
        gradient, total, weight, means = _accumulate(loss, state, batches)
        gradient = jax.tree.map(lambda g: g / weight, gradient)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # 0 / 0 is NaN, and says that nothing was counted
        metrics = {name: value / count for name, (value, count) in means.items()} | {
            "loss": total / weight,
            "gradient_norm": optax.tree.norm(gradient),
            "update_norm": optax.tree.norm(updates),
            "parameter_norm": optax.tree.norm(params),
        }
        skipped = optax.tree.get(opt_state, "skipped_updates")
        metrics |= {} if skipped is None else {"skipped_updates": skipped}
        ema = update_ema(state.ema, params, decays, state.step, ema_warmup)
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return step


def _accumulate(loss: LossFunction, state: TrainState, batches):
    """Sums of gradients, losses, weights and means over the leading axis of `batches`."""

    def one(index):
        batch = jax.tree.map(lambda x: x[index], batches)
        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        (total, (weight, means)), gradient = value_and_grad(state.params, batch, state.step, index)
        return gradient, total, weight, means

    count = jax.tree.leaves(batches)[0].shape[0]
    if count == 1:
        return one(0)
    first = one(0)
    body = lambda sums, index: (jax.tree.map(jnp.add, sums, one(index)), None)  # noqa: E731
    return jax.lax.scan(body, first, jnp.arange(1, count))[0]
