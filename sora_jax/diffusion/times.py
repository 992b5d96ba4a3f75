"""Noise levels: the times at which a clip is trained and the grid along which it is sampled.

Both pass through the same size-dependent shift: more tokens average noise away more easily, so a large clip
needs more of it to lose as much. On every process noise over signal, b / a, is multiplied by one factor (Esser et al.
2403.03206, section 5.3.2, for the linear flow; Hoogeboom et al. 2301.11093, section 3.1, where variance is preserved),

    lambda(shift(t)) = lambda(t) - log alpha,    alpha = sqrt(tokens / base_tokens)       (1)

which for the linear flow is shift(t) = alpha t / (1 + (alpha - 1) t). (The released FLUX models take log alpha linear
in the tokens, from 0.5 at 256 to 1.15 at 4096.) Times 0 and 1 stay. A process that keeps some signal at t = 1 has no
more noise than it has there: what (1) would put beyond is at t = 1, and grids may begin with steps of no length.

Grids of discrete steps and of Karras et al. are moved like any other, off the steps and to other noise levels. In
training, discrete steps stay what they are: the distribution `steps` takes no shift.

A training time is a quantile function at a uniform number u: one draw per clip, or, `stratified`, points that
fill [0, 1) evenly over the whole batch (the low-discrepancy sampler of Kingma et al. 2107.00630):

    u_i = frac(u_0 + i / n),    clip i of n, one u_0 for the step                         (2)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Num, UInt32

from sora_jax.diffusion.keys import clip_keys
from sora_jax.diffusion.process import (
    DDPM_STEPS,
    Process,
    half_log_snr,
    linear_flow,
    time_of_half_log_snr,
    time_of_step,
)
from sora_jax.errors import UserError
from sora_jax.shapes import ClipIdsBS

# Time 0 is kept for tokens that are given; a clip in training always has at least this much noise.
MIN_TIME = 1e-5
SHIFT_RULES = ("root", "exponential")
FLUX_TOKENS, FLUX_LOG_SHIFTS = (256, 4096), (0.5, 1.15)
# Beyond this scale the quantile function of `mode` is not monotonic (2403.03206, section 3.1).
MAX_MODE_SCALE = 1.7519


@dataclass(frozen=True)
class TimesConfig:
    """How training times are drawn and how clip size moves all times; n ~ N(0, 1) and u ~ U[0, 1) below.

    distribution    time
    uniform         u
    logit_normal    sigmoid(mean + std n); 2403.03206, equation 19
    mode            1 - u - mode_scale (cos^2(pi u / 2) - 1 + u); 2403.03206, equation 20
    cosmap          1 - 1 / (1 + tan(pi u / 2)), the noise levels of `trigonometric`; 2403.03206, equation 21
    log_sigma       where b / a = exp(mean + std n); Karras et al. 2206.00364, table 1, has mean -1.2 and std 1.2
    steps           one of the thousand discrete steps, each as often; DDPM and DiT; not to be shifted

    shift_rule: `root` is equation (1), `exponential` that of FLUX. By `root` a clip of `base_tokens` tokens is not
    shifted; base_tokens = 0 shifts no clip, whatever the rule.
    """

    distribution: str = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    mode_scale: float = 1.29
    base_tokens: int = 256
    shift_rule: str = "root"
    stratified: bool = False

    def __post_init__(self):
        if self.distribution not in QUANTILES:
            allowed = ", ".join(QUANTILES)
            raise UserError(f"times.distribution must be one of {allowed}, not {self.distribution!r}.")
        for name in ("mean", "std"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"times.{name} must be finite, not {getattr(self, name)}.")
        if not self.std > 0:
            raise UserError(f"times.std must be above 0, not {self.std}.")
        if not -1.0 <= self.mode_scale <= MAX_MODE_SCALE:
            raise UserError(f"times.mode_scale must be from -1 to {MAX_MODE_SCALE}, not {self.mode_scale}.")
        if self.shift_rule not in SHIFT_RULES:
            raise UserError(f"times.shift_rule must be one of {', '.join(SHIFT_RULES)}, not {self.shift_rule!r}.")
        if self.base_tokens < 0:
            raise UserError(f"times.base_tokens must be 0 (no shift) or more, not {self.base_tokens}.")
        if self.distribution == "steps" and self.base_tokens:
            raise UserError(
                f"times.base_tokens must be 0 (no shift) with times.distribution 'steps', not {self.base_tokens}."
            )


def _normal(config: TimesConfig, u: Array) -> Array:
    return config.mean + config.std * jnp.sqrt(2.0) * jax.lax.erf_inv(2.0 * u - 1.0)


def _logit_normal(config: TimesConfig, process: Process, u: Array) -> Array:
    return jax.nn.sigmoid(_normal(config, u))


def _mode(config: TimesConfig, process: Process, u: Array) -> Array:
    return 1.0 - u - config.mode_scale * (jnp.square(jnp.cos(0.5 * jnp.pi * u)) - 1.0 + u)


def _cosmap(config: TimesConfig, process: Process, u: Array) -> Array:
    # tan / (1 + tan) with both multiplied by the cosine: finite up to u = 1.
    sine, cosine = jnp.sin(0.5 * jnp.pi * u), jnp.cos(0.5 * jnp.pi * u)
    return sine / (sine + cosine)


def _log_sigma(config: TimesConfig, process: Process, u: Array) -> Array:
    return time_of_half_log_snr(process, -_normal(config, u))


def _steps(config: TimesConfig, process: Process, u: Array) -> Array:
    return time_of_step(jnp.minimum(jnp.floor(u * DDPM_STEPS), DDPM_STEPS - 1.0))


# Quantile functions: time from a uniform number.
QUANTILES: dict[str, Callable[[TimesConfig, Process, Array], Array]] = {
    "uniform": lambda config, process, u: u,
    "logit_normal": _logit_normal,
    "mode": _mode,
    "cosmap": _cosmap,
    "log_sigma": _log_sigma,
    "steps": _steps,
}


def shift(
    config: TimesConfig, t: Float[Array, "..."], tokens: Int[Array, "..."], process: Process
) -> Float[Array, "..."]:
    """Times moved by clip size, equation (1); t and tokens have one shape. Exact at t = 0 and t = 1, and for alpha = 1.

    Never falls in t; where the process keeps some signal at t = 1, times that would lie beyond are 1.
    """
    if config.base_tokens == 0:
        return t
    # An empty slot has no tokens: any positive count keeps its time finite.
    count = jnp.maximum(tokens, 1).astype(jnp.float32)
    alpha = jnp.sqrt(count / config.base_tokens) if config.shift_rule == "root" else _flux_alpha(count)
    moved = alpha * t / (alpha * t + (1.0 - t)) if process is linear_flow else _less_signal(process, t, alpha)
    return jnp.where((t <= 0.0) | (t >= 1.0) | (alpha == 1.0), t, moved)


def _less_signal(process: Process, t: Array, factor: Array) -> Array:
    return time_of_half_log_snr(process, half_log_snr(process, t) - jnp.log(factor))


def _flux_alpha(count: Array) -> Array:
    (small, large), (low, high) = FLUX_TOKENS, FLUX_LOG_SHIFTS
    return jnp.exp(low + (high - low) * (count - small) / (large - small))


def draw_times(
    config: TimesConfig,
    key: Key[Array, ""],
    clip_ids_BS: ClipIdsBS,
    tokens_BS: Int[Array, "B S"],
    ranks_BS: Float[Array, "B S"] | None,
    process: Process,
) -> Float[Array, "B S"]:
    """One training time per clip, in [MIN_TIME, 1], float32: a function of (key, clip id, clip size).

    Stratified times are a function of (key, rank, clip size). `ranks_BS` is then needed if clip_ids_BS is not the whole
    batch but a part of it: the part's slice of the whole's `batch_ranks`. Else it may be None. Of `process`, log_sigma
    and the shift take the times at which noise levels are reached.
    """
    if config.stratified:
        ranks_BS = batch_ranks(clip_ids_BS) if ranks_BS is None else ranks_BS
        # No clip has id 0: the step's own number is nobody else's.
        drawn_BS = ranks_BS + jax.random.uniform(jax.random.fold_in(key, 0))
        uniform_BS = drawn_BS - jnp.floor(drawn_BS)
    else:
        keys_BS = clip_keys(key, clip_ids_BS)
        uniform_BS = jax.vmap(jax.vmap(lambda clip_key: jax.random.uniform(clip_key)))(keys_BS)
    times_BS = QUANTILES[config.distribution](config, process, uniform_BS)
    return jnp.clip(shift(config, times_BS, tokens_BS, process), MIN_TIME, 1.0)


def batch_ranks(clips: UInt32[Array, "*slots"]) -> Float[Array, "*slots"]:
    """i / n of equation (2) for every clip of the batch, in [0, 1); 0 for empty slots. Any shape of clip ids.

    The order i is that of the scrambled clip ids: the same wherever the clips are packed and however the batch lies
    on a mesh (the ids are gathered: four bytes per slot). Under gradient accumulation call it on the whole batch.
    """
    sharding = jax.typeof(clips).sharding
    if sharding.mesh.empty:
        return _ranks(clips)
    # The array's own mesh, not one that is set: batches are ranked where they are placed, too.
    everywhere = jax.NamedSharding(sharding.mesh, jax.P(*[None] * clips.ndim))
    return jax.sharding.reshard(_ranks(jax.sharding.reshard(clips, everywhere)), sharding)


def _ranks(clips: Array) -> Array:
    ids = clips.ravel()
    # Ids that follow each other often belong to like clips; an odd factor scrambles the order and keeps ids apart.
    place = jnp.argsort(jnp.argsort(ids * jnp.uint32(2654435761)))
    empty = jnp.sum(ids == 0)
    count = jnp.maximum(ids.size - empty, 1).astype(jnp.float32)
    return jnp.maximum(place - empty, 0).astype(jnp.float32).reshape(clips.shape) / count


def sampling_times(
    config: TimesConfig, base_K: Float[Array, " K"], tokens_BR: Int[Array, "B R"], process: Process
) -> Float[Array, "K B R"]:
    """The times of every row, float32: the decreasing grid base_K (`spacing.base_times`), shifted by the row's size.

    tokens_BR counts the tokens of the clip that a row serves. To hold a row of given tokens, set all its
    times to 0.
    """
    base_K = jnp.asarray(base_K, jnp.float32)
    return jax.vmap(lambda t: shift(config, jnp.full_like(tokens_BR, t, jnp.float32), tokens_BR, process))(base_K)


def per_token(values_BR: Num[Array, "B R"], rows_BL: Int[Array, "B L"]) -> Num[Array, "B L"]:
    """The value of every token's row (or slot): values_BR[b, rows_BL[b, l]]."""
    # Comparison and sum, not a gather: legal and local whichever axes of rows_BL are sharded.
    rows_11R = jnp.arange(values_BR.shape[1], dtype=rows_BL.dtype)[None, None, :]
    mine_BLR = rows_BL[:, :, None] == rows_11R
    return jnp.sum(jnp.where(mine_BLR, values_BR[:, None, :], 0), axis=2, dtype=values_BR.dtype)
