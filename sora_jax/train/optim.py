"""Optimisers as optax chains from a config."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from sora_jax.config import check, choose


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW behind global-norm clipping; the learning rate warms up linearly, then follows `schedule`.

    `decay_steps` is where "cosine" and "linear" reach `final_fraction` of the peak, 0 = the end of the run. Weight
    decay acts on weights alone (never on biases, gains or embedding tables). `ema` holds decays, several at once; the
    first one samples. `clip_norm` 0 clips nothing. `ema_warmup` lets young averages follow faster, see `update_ema`.
    """

    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup_steps: int = 100
    decay_steps: int = 0
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema: tuple[float, ...] = (0.999,)
    ema_warmup: bool = True

    def __post_init__(self):
        choose("optim.schedule", self.schedule, SCHEDULES)
        check(self.learning_rate > 0, f"optim.learning_rate is {self.learning_rate}; it must be positive")
        check(self.clip_norm >= 0, f"optim.clip_norm is {self.clip_norm}; it must be positive, or 0 for none")
        check(
            len(self.ema) > 0 and all(0 <= d < 1 for d in self.ema),
            f"optim.ema is {self.ema}; it must hold at least one decay in [0, 1)",
        )


SCHEDULES = {
    "constant": lambda c: optax.constant_schedule(c.learning_rate),
    "cosine": lambda c: optax.cosine_decay_schedule(
        c.learning_rate, max(c.decay_steps - c.warmup_steps, 1), c.final_fraction
    ),
    "linear": lambda c: optax.linear_schedule(
        c.learning_rate, c.learning_rate * c.final_fraction, max(c.decay_steps - c.warmup_steps, 1)
    ),
}


def learning_rate(config: OptimConfig) -> optax.Schedule:
    """Step -> learning rate; step 0 of a warm-up of n steps already has 1 / n of the peak."""
    after = SCHEDULES[config.schedule](config)
    if not config.warmup_steps:
        return after
    peak = config.learning_rate
    warm = optax.linear_schedule(peak / config.warmup_steps, peak, config.warmup_steps - 1)
    return optax.join_schedules([warm, after], [config.warmup_steps])


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Clip by global norm, Adam with decoupled weight decay (1711.05101)."""
    return optax.chain(
        *([optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=weights_only),
        optax.scale_by_learning_rate(learning_rate(config)),
    )


def weights_only(params):
    """True for matrices and kernels, by the last name of their path in the parameter tree."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "weight", params)


def update_ema(ema: tuple, params, decays: tuple[float, ...], step: jax.Array, warmup: bool = True) -> tuple:
    """Averages of the *new* parameters; with `warmup` the decay grows as (1 + n) / (10 + n) while the run is young."""

    def one(average, decay):
        warm = jnp.minimum(decay, (1.0 + step) / (10.0 + step)) if warmup else decay
        return jax.tree.map(lambda a, p: a + (1 - warm) * (p - a), average, params)

    return tuple(one(average, decay) for average, decay in zip(ema, decays, strict=True))
