"""Build optimisers as optax chains from a config."""

import dataclasses
import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sora_jax.config import check, choose
from sora_jax.nn.params import ParamSpec, input_axes
from sora_jax.parallel.rules import layout_of, on_mesh
from sora_jax.shapes import PyTree


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Configure the optimizer behind clipping by global norm, with a linear warm-up of the learning rate."""

    learning_rate: float = 1e-4  # peak, after the warm-up
    schedule: str = "constant"  # of the learning rate after the warm-up: constant, cosine or linear
    warmup_steps: int = 100  # steps in which the learning rate rises linearly to its peak; 0: none
    decay_steps: int = 0  # step at which cosine and linear end; 0: the last step of the run
    final_fraction: float = 0.0  # share of the peak at which they end
    # Decay of Adam's first moment and of Adafactor's momentum (0 saves its memory); weight of it in Lion's update.
    b1: float = 0.9
    b2: float = 0.99  # decay of Adam's second moment, of Lion's momentum; Adafactor's is 1 - n^-0.8 at step n
    eps: float = 1e-8  # AdamW's epsilon; the other methods do not read it
    weight_decay: float = 0.0  # decoupled; of weights alone, never of biases, norm scales or embedding tables
    clip_norm: float = 1.0  # global norm to which gradients are clipped; 0: no clipping
    skip_spikes: float = 0.0  # skip updates this many standard deviations above the mean gradient norm; 0: none
    ema: tuple[float, ...] = (0.999,)  # decays of the averages of the parameters; the first one is sampled with
    ema_warmup: bool = True  # let the averages follow faster at the start of a run, see `update_ema`
    method: Literal["adamw", "adafactor", "muon", "lion", "sgd"] = "adamw"
    """adafactor: AdamW with row and column means in place of second moments, so that its state is small; muon:
    orthogonalised momentum for weights, Adam with Nesterov momentum for the rest; lion: the sign of momentum, which
    wants a third to a tenth of AdamW's rate; sgd: the gradient itself"""
    muon_rate: float = 0.02  # peak learning rate of what Muon updates; `learning_rate` is that of the rest

    def __post_init__(self):
        choose("optim.schedule", self.schedule, SCHEDULES)
        choose("optim.method", self.method, METHODS)
        for name, (fits, allowed) in ALLOWED.items():
            value = getattr(self, name)
            check(fits(value), f"optim.{name} is {value}; it must be {allowed}")
        check(
            len(self.ema) > 0 and all(0 <= d < 1 for d in self.ema),
            f"optim.ema is {self.ema}; it must hold at least one decay in [0, 1)",
        )


FACTORED = 64  # least length of the two axes over which Adafactor keeps means: the width of an attention head
POSITIVE = (lambda x: 0 < x < math.inf, "positive and finite")
NOT_NEGATIVE = (lambda x: 0 <= x < math.inf, "0 or more, and finite")
OR_NONE = (lambda x: 0 <= x < math.inf, "positive and finite, or 0 for none")
DECAY = (lambda x: 0 <= x < 1, "from 0 to less than 1")
ALLOWED = {
    "learning_rate": POSITIVE,
    "muon_rate": POSITIVE,
    "warmup_steps": NOT_NEGATIVE,
    "decay_steps": NOT_NEGATIVE,
    "final_fraction": (lambda x: 0 <= x <= 1, "from 0 to 1"),
    "b1": DECAY,
    "b2": DECAY,
    "eps": POSITIVE,  # at 0 a gradient of 0 would become NaN
    "weight_decay": NOT_NEGATIVE,
    "clip_norm": OR_NONE,
    "skip_spikes": OR_NONE,
}
SCHEDULES = {
    "constant": lambda c: optax.constant_schedule(c.learning_rate),
    "cosine": lambda c: optax.cosine_decay_schedule(
        c.learning_rate, max(c.decay_steps - c.warmup_steps, 1), c.final_fraction
    ),
    "linear": lambda c: optax.linear_schedule(
        c.learning_rate, c.learning_rate * c.final_fraction, max(c.decay_steps - c.warmup_steps, 1)
    ),
}


def check_schedule(config: OptimConfig, steps: int, name: str = "optim") -> str:
    """Return a line about a run of `steps` that ends in its warm-up, "" for others; `name` is that of the config.

    Raises:
        UserError: the schedule ends before its warm-up does, so that the rate would fall to its end at once.
    """
    end, warm = config.decay_steps, config.warmup_steps
    check(
        config.schedule == "constant" or not end or warm < end,
        f"--config.{name}.warmup_steps is {warm}; it must be below {name}.decay_steps = {end}, where the schedule "
        f"{config.schedule!r} ends",
    )
    short = f"--config.{name}.warmup_steps is {warm} and the run has {steps} steps: the rate does not reach its peak"
    return short if steps < warm else ""


def learning_rate(config: OptimConfig) -> optax.Schedule:
    """Return the schedule step -> learning rate; step 0 of a warm-up of n steps already has 1 / n of the peak."""
    after = SCHEDULES[config.schedule](config)
    if not config.warmup_steps:
        return after
    peak = config.learning_rate
    warm = optax.linear_schedule(peak / config.warmup_steps, peak, config.warmup_steps - 1)
    return optax.join_schedules([warm, after], [config.warmup_steps])


def make_optimizer(config: OptimConfig, specs: PyTree = None) -> optax.GradientTransformation:
    """Chain clipping by global norm and the updates of `config.method`; `specs` of the parameters, for Muon."""
    optimizer = optax.chain(
        *([optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []),
        *METHODS[config.method](config, specs),
    )
    return skip_spikes(optimizer, config.skip_spikes) if config.skip_spikes else optimizer


def _adamw(config: OptimConfig, specs: PyTree) -> list[optax.GradientTransformation]:
    """Return Adam with decoupled weight decay (1711.05101)."""
    return [
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=weights_only),
        optax.scale_by_learning_rate(learning_rate(config)),
    ]


def _lion(config: OptimConfig, specs: PyTree) -> list[optax.GradientTransformation]:
    """Return Lion with decoupled weight decay (2302.06675)."""
    return [
        optax.scale_by_lion(config.b1, config.b2),
        optax.add_decayed_weights(config.weight_decay, mask=weights_only),
        optax.scale_by_learning_rate(learning_rate(config)),
    ]


def _adafactor(config: OptimConfig, specs: PyTree) -> list[optax.GradientTransformation]:
    """Return Adafactor (1804.04235) with decoupled weight decay, as it is used at scale (2106.04560, section 3.4).

    Second moments of weights are kept as means over rows and columns, those of attention for each head, with the decay
    1 - n^-0.8 at step n; axes shorter than FACTORED are not averaged over. Updates of each array are clipped to a root
    mean square of 1. The learning rate is absolute: updates are not scaled by the size of the parameters.
    """
    return [
        optax.scale_by_factored_rms(min_dim_size_to_factor=FACTORED),
        optax.clip_by_block_rms(1.0),
        *([optax.ema(config.b1, debias=False)] if config.b1 else []),
        optax.add_decayed_weights(config.weight_decay, mask=weights_only),
        optax.scale_by_learning_rate(learning_rate(config)),
    ]


def _muon(config: OptimConfig, specs: PyTree) -> list[optax.GradientTransformation]:
    """Return Muon (Jordan 2024) for weights, with weight decay, and Adam for the rest."""
    muon = optax.contrib.muon(
        learning_rate(dataclasses.replace(config, learning_rate=config.muon_rate)),
        weight_decay=config.weight_decay,
        adam_b1=config.b1,
        adam_b2=config.b2,
        adam_learning_rate=learning_rate(config),
        muon_weight_dimension_numbers=lambda _: matrix_axes(specs),
    )

    def update(gradient: PyTree, state: optax.OptState, params: PyTree = None) -> tuple:
        if not on_mesh():
            return muon.update(gradient, state, params)
        # It reshapes weights to matrices, whose shardings JAX cannot infer: here the compiler chooses them.
        layouts = jax.tree.map(layout_of, (gradient, state))
        return jax.sharding.auto_axes(muon.update, out_sharding=layouts)(gradient, state, params)

    return [optax.GradientTransformation(muon.init, update)]


def matrix_axes(specs: PyTree) -> PyTree:
    """Return for each weight which of its axes are inputs and outputs of a matrix; None for other parameters.

    Stacked layers are matrices of their own.
    """

    def axes(path: tuple, spec: ParamSpec) -> optax.contrib.MuonDimensionNumbers | None:
        if path[-1].key != "weight":
            return None
        return optax.contrib.MuonDimensionNumbers(*map(tuple, input_axes(spec)))

    return jax.tree_util.tree_map_with_path(axes, specs, is_leaf=lambda x: isinstance(x, ParamSpec))


def _sgd(config: OptimConfig, specs: PyTree) -> list[optax.GradientTransformation]:
    return [optax.scale_by_learning_rate(learning_rate(config))]


METHODS = {"adamw": _adamw, "adafactor": _adafactor, "muon": _muon, "lion": _lion, "sgd": _sgd}


class SpikeState(NamedTuple):
    """Hold the running mean and variance of the gradient norm, the number of norms in them, and that of spikes."""

    mean: jax.Array
    variance: jax.Array
    seen: jax.Array
    skipped_updates: jax.Array
    inner: optax.OptState


def skip_spikes(
    optimizer: optax.GradientTransformation, deviations: float, decay: float = 0.99, warmup: int = 100
) -> optax.GradientTransformation:
    """Skip updates whose gradient norm is above its running mean + deviations * std; the optimizer stays as it was.

    Open-Sora-Plan does so with 3 deviations (2412.00131). A norm that is not finite counts as a spike. Never skip
    during the first `warmup` updates. A spike is clipped to the threshold before it is added to the statistics, so a
    lasting rise of the norm is soon accepted.
    """

    def init(params):
        zero, none = jnp.float32(0), jnp.int32(0)
        return SpikeState(zero, zero, none, none, optimizer.init(params))

    def update(gradient, state, params=None):
        norm = optax.tree.norm(gradient)
        limit = jnp.where(state.seen < warmup, jnp.inf, state.mean + deviations * jnp.sqrt(state.variance))
        regular = norm <= limit
        updates, inner = optimizer.update(gradient, state.inner, params)
        choose = functools.partial(jax.tree.map, functools.partial(jax.lax.select, regular))
        updates = choose(updates, jax.tree.map(jnp.zeros_like, updates))
        counted = jnp.where(jnp.isfinite(norm), jnp.minimum(norm, limit), state.mean)
        share = jnp.maximum(1 - decay, 1 / (1.0 + state.seen))
        far = counted - state.mean
        variance = (1 - share) * (state.variance + share * far**2)
        skipped = state.skipped_updates + ~regular
        return updates, SpikeState(
            state.mean + share * far, variance, state.seen + 1, skipped, choose(inner, state.inner)
        )

    return optax.GradientTransformation(init, update)


def weights_only(params: dict) -> dict:
    """Return a tree that is True for matrices and kernels, by the last name of their path."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "weight", params)


def update_ema(ema: tuple, params: dict, decays: tuple[float, ...], step: jax.Array, warmup: bool = True) -> tuple:
    """Update the averages by the *new* parameters; with `warmup` the decay is at most (1 + n) / (10 + n) at step n."""

    def one(average, decay):
        warm = jnp.minimum(decay, (1.0 + step) / (10.0 + step)) if warmup else decay
        return jax.tree.map(lambda a, p: a + (1 - warm) * (p - a), average, params)

    return tuple(one(average, decay) for average, decay in zip(ema, decays, strict=True))
