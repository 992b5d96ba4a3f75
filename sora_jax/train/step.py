"""The training step: a pure function of (state, frozen weights, batch), jitted once, its state donated."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sora_jax.train.optim import update_ema
from sora_jax.train.state import Optimizer, TrainState

Sums = dict[str, jax.Array]
MetricSums = dict[str, tuple[jax.Array, jax.Array]]
LossResult = tuple[Sums, tuple[Sums, MetricSums]]
METRICS = ("loss", "gradient_norm", "update_norm", "parameter_norm", "skipped_updates", "counted")
LossFunction = Callable[..., LossResult]


def make_step(loss: LossFunction, optimizers: Mapping[str, Optimizer]) -> Callable:
    """Build `step(state, frozen, batches) -> (state, metrics)`.

    `loss(params, frozen, batch, step, part)` takes the parameters by group and returns
    ({group: sum}, ({group: weight}, means)): sums over what is counted (tokens, clips), never means, so that
    micro-batches and devices weigh by what they hold. The gradient of a group is that of its own sum alone, also where
    the sums of other groups read its parameters. `frozen` holds weights that the loss reads and nothing trains: an
    argument, since a closure would compile them into the program. `batches` has a leading axis of micro-batches whose
    gradients are accumulated. `means` maps a name to (sum, count). Where there are several groups, one with weight 0
    rests in this step: its parameters, averages and optimizer stay as they are.

    Metrics are scalars or small vectors, for `fetch` to read: "loss" and the norms of gradient, update and parameters,
    the latter followed by "/group" where there are several groups; "skipped_updates", where an optimizer skips spikes,
    counts from the beginning of the run.
    """

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, frozen: Any, batches: Any) -> tuple[TrainState, dict]:
        gradients, totals, weights, means = _accumulate(loss, state, frozen, batches)
        _check_names(means, optimizers)
        # `fetch` makes NaN of what counted nothing: on the device, JAX's detector of NaN would stop a healthy run.
        metrics = {name: value / jnp.where(count == 0, 1, count) for name, (value, count) in means.items()}
        metrics["counted"] = {name: count > 0 for name, (_, count) in means.items()}
        updated, losses = {}, []
        for name, optimizer in optimizers.items():
            gradient = jax.tree.map(lambda g, weight=weights[name]: g / weight, gradients[name])
            updated[name], found = _update(optimizer, state, name, gradient)
            loss_of_group = totals[name] / weights[name]
            if len(optimizers) > 1:
                before = state.params[name], state.ema[name], state.opt_state[name]
                resting = dict.fromkeys(found, 0.0) | {"parameter_norm": optax.tree.norm(state.params[name])}
                rested = before, 0.0, resting
                updated[name], loss_of_group, found = jax.tree.map(
                    partial(jnp.where, weights[name] > 0), (updated[name], loss_of_group, found), rested
                )
            losses.append(loss_of_group)
            suffix = f"/{name}" if len(optimizers) > 1 else ""
            metrics |= {f"{metric}{suffix}": value for metric, value in found.items()}
            metrics |= {f"loss{suffix}": losses[-1]}
        metrics["loss"] = sum(losses[1:], start=losses[0])
        params, ema, opt_state = ({name: parts[i] for name, parts in updated.items()} for i in range(3))
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return step


def fetch(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of a step on the host, with NaN for each mean that counted nothing; waits for the step."""
    found = jax.device_get(dict(metrics))
    counted = found.pop("counted", {})
    return found | {name: np.where(counts, found[name], np.nan) for name, counts in counted.items()}


def _check_names(means: MetricSums, optimizers: Mapping[str, Optimizer]) -> None:
    """Raise a ValueError where a loss names a mean as the step names its own metrics."""
    own = set(METRICS) | {f"{metric}/{name}" for metric in METRICS for name in optimizers}
    if taken := own & means.keys():
        raise ValueError(f"a loss has means named {', '.join(sorted(taken))}; these names are the training step's own")


def _update(optimizer: Optimizer, state: TrainState, name: str, gradient: Any) -> tuple[tuple, dict]:
    """Return (params, ema, opt_state) of one group after an update, and its metrics."""
    transformation, decays, ema_warmup, _ = optimizer
    updates, opt_state = transformation.update(gradient, state.opt_state[name], state.params[name])
    params = optax.apply_updates(state.params[name], updates)
    metrics = {
        "gradient_norm": optax.tree.norm(gradient),
        "update_norm": optax.tree.norm(updates),
        "parameter_norm": optax.tree.norm(params),
    }
    skipped = optax.tree.get(opt_state, "skipped_updates")
    metrics |= {} if skipped is None else {"skipped_updates": skipped}
    return (params, update_ema(state.ema[name], params, decays, state.step, ema_warmup), opt_state), metrics


def _accumulate(loss: LossFunction, state: TrainState, frozen: Any, batches: Any) -> tuple:
    """Sum gradients, losses, weights and means over the leading axis of `batches`."""

    def one(index):
        batch = jax.tree.map(lambda x: x[index], batches)
        return gradients(loss, state.params, frozen, batch, state.step, index)

    count = jax.tree.leaves(batches)[0].shape[0]
    if count == 1:
        return one(0)
    first = one(0)
    body = lambda sums, index: (jax.tree.map(jnp.add, sums, one(index)), None)  # noqa: E731
    return jax.lax.scan(body, first, jnp.arange(1, count))[0]


def gradients(loss: LossFunction, params: dict, frozen: Any, batch: Any, step: jax.Array, part: jax.Array) -> tuple:
    """Return the gradient of each group's own sum by its own parameters, then sums, weights and means.

    One forward pass serves all. Each sum is pulled back by itself, and what it gives for the parameters of other groups
    is dropped (and so not computed): no loss has to stop gradients by hand.
    """
    sums, pull, (weights, means) = jax.vjp(lambda params: loss(params, frozen, batch, step, part), params, has_aux=True)

    def own(name: str):
        unit = {other: jnp.ones_like(x) if other == name else jnp.zeros_like(x) for other, x in sums.items()}
        return pull(unit)[0][name]

    return {name: own(name) for name in params}, sums, weights, means
