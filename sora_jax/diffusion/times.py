"""Noise levels: the times at which a clip is trained and the grid along which it is sampled.

Both pass through the same size-dependent shift: more tokens average noise away more easily, so a large clip needs more
noise to lose as much. On every process the shift multiplies noise over signal, b / a, by one factor (Esser et al.
2403.03206, section 5.3.2, for the linear flow; Hoogeboom et al. 2301.11093, section 3.1, where variance is preserved),

    lambda(shift(t)) = lambda(t) - log alpha,    alpha = sqrt(tokens / base_tokens)       (1)

which for the linear flow is shift(t) = alpha t / (1 + (alpha - 1) t). (The released FLUX and LTX-Video models take log
alpha linear in the tokens, from 0.5 at 256 to 1.15 at 4096 and from 0.95 at 1024 to 2.05 at 4096; those of SD3 take
alpha = 3 for all sizes.) Times 0 and 1 stay. A process that keeps some signal at t = 1 has no
more noise than it has there: what (1) would put beyond is at t = 1, and grids may begin with steps of no length.

Grids of discrete steps and of Karras et al. are moved like any other, off the steps and to other noise levels. In
training, discrete steps stay what they are: the distribution `steps` takes no shift.

A share `pure` of the training times is 1, whatever the distribution: there the network sees nothing but what is given,
and its prediction of x_0 is the mean of all clips that begin so.

A training time is a quantile function at a uniform number u: one draw per clip, or, `stratified`, points that
fill [0, 1) evenly over the whole batch (the low-discrepancy sampler of Kingma et al. 2107.00630):

    u_i = frac(u_0 + i / n),    clip i of n, one u_0 for the step                         (2)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Num, UInt32

from sora_jax.config import check, choose
from sora_jax.diffusion.keys import clip_keys
from sora_jax.diffusion.process import (
    DDPM_STEPS,
    Process,
    half_log_snr,
    linear_flow,
    time_of_half_log_snr,
    time_of_step,
)
from sora_jax.shapes import ClipIdsBS, PerClipBS, RowsBL

# Time 0 is reserved for tokens that are given; a clip in training always has at least this much noise.
MIN_TIME = 1e-5
LAST_UNIFORM = 1.0 - 2.0**-24  # the largest float32 below 1
# Beyond this scale the quantile function of `mode` is not monotonic (2403.03206, section 3.1).
MAX_MODE_SCALE = 1.7519


@dataclass(frozen=True)
class TimesConfig:
    """Configure how training times are drawn and how clip size shifts all times.

    With n ~ N(0, 1) and u ~ U[0, 1) the distributions are

    distribution    time
    uniform         u
    logit_normal    sigmoid(mean + std n); 2403.03206, equation 19
    mode            1 - u - mode_scale (cos^2(pi u / 2) - 1 + u); 2403.03206, equation 20
    cosmap          1 - 1 / (1 + tan(pi u / 2)), the noise levels of `trigonometric`; 2403.03206, equation 21
    log_sigma       where b / a = exp(mean + std n); Karras et al. 2206.00364, table 1, has mean -1.2 and std 1.2
    steps           one of the thousand discrete steps, all equally likely; DDPM and DiT; takes no shift
    """

    distribution: str = "logit_normal"  # distribution of the noise levels of training, see docs/training.md
    mean: float = 0.0  # of the normal number, for logit_normal and log_sigma
    std: float = 1.0  # of the normal number, for logit_normal and log_sigma
    mode_scale: float = 1.29  # for mode, from -1 to 1.7519: positive favours the middle, negative the ends
    base_tokens: int = 256  # a clip of so many tokens is not shifted by `root`; 0: no clip is shifted by any rule
    shift_rule: str = "root"  # root(tokens / base_tokens); exponential, the rule of FLUX; constant, that of SD3
    shift_tokens: tuple[int, int] = (256, 4096)  # of `exponential`: two clip sizes; log alpha is linear in tokens
    log_shifts: tuple[float, float] = (0.5, 1.15)  # of `exponential`: log alpha at these two sizes
    constant_shift: float = 3.0  # of `constant`: alpha
    pure: float = 0.0  # share of the clips that are trained at pure noise, time 1; at 1 a regression
    stratified: bool = False  # spread the times of a batch evenly over the distribution: equation (2)

    def __post_init__(self):
        choose("times.distribution", self.distribution, QUANTILES)
        choose("times.shift_rule", self.shift_rule, SHIFT_RULES)
        for name in ("mean", "std"):
            value = getattr(self, name)
            check(math.isfinite(value), f"times.{name} is {value}; it must be finite")
        check(self.std > 0, f"times.std is {self.std}; it must be above 0")
        check(
            -1.0 <= self.mode_scale <= MAX_MODE_SCALE,
            f"times.mode_scale is {self.mode_scale}; it must be from -1 to {MAX_MODE_SCALE}",
        )
        check(0 <= self.pure <= 1, f"times.pure is {self.pure}; it must be from 0 to 1")
        check(self.base_tokens >= 0, f"times.base_tokens is {self.base_tokens}; it must be 0 (no shift) or more")
        small, large = self.shift_tokens
        check(0 < small < large, f"times.shift_tokens is {self.shift_tokens}; it must be two rising numbers above 0")
        finite = all(map(math.isfinite, self.log_shifts))
        check(finite, f"times.log_shifts is {self.log_shifts}; its numbers must be finite")
        alpha = self.constant_shift
        check(0 < alpha < math.inf, f"times.constant_shift is {alpha}; it must be above 0 and finite")
        check(
            self.distribution != "steps" or self.base_tokens == 0,
            f"times.base_tokens is {self.base_tokens}; with times.distribution 'steps' it must be 0 (no shift)",
        )


class ClipBatch(NamedTuple):
    """Identify the clips of packs, slot by slot; an empty slot has id 0."""

    clip_ids_BS: ClipIdsBS
    tokens_BS: Int[Array, "B S"]  # the size of each clip
    ranks_BS: PerClipBS | None = None  # the slice of `batch_ranks`, if these clips are a part of the batch


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


# Quantile functions: (config, process, uniform number) -> time.
QUANTILES: dict[str, Callable[[TimesConfig, Process, Array], Array]] = {
    "uniform": lambda config, process, u: u,
    "logit_normal": _logit_normal,
    "mode": _mode,
    "cosmap": _cosmap,
    "log_sigma": _log_sigma,
    "steps": _steps,
}


def _root_alpha(config: TimesConfig, count: Array) -> Array:
    return jnp.sqrt(count / config.base_tokens)


def _exponential_alpha(config: TimesConfig, count: Array) -> Array:
    (small, large), (low, high) = config.shift_tokens, config.log_shifts
    return jnp.exp(low + (high - low) * (count - small) / (large - small))


# (config, float32 number of tokens) -> alpha of equation (1).
SHIFT_RULES: dict[str, Callable[[TimesConfig, Array], Array]] = {
    "root": _root_alpha,
    "exponential": _exponential_alpha,
    "constant": lambda config, count: jnp.full_like(count, config.constant_shift),
}


def shift(
    config: TimesConfig, t: Float[Array, "..."], tokens: Int[Array, "..."], process: Process
) -> Float[Array, "..."]:
    """Shift times by clip size, equation (1); t and tokens have one shape.

    The result never falls in t and is exactly t at t = 0, at t = 1 and for alpha = 1. Where the process keeps some
    signal at t = 1, times that would lie beyond are 1.
    """
    if config.base_tokens == 0:
        return t
    # An empty slot has no tokens: any positive count keeps its time finite.
    count = jnp.maximum(tokens, 1).astype(jnp.float32)
    alpha = SHIFT_RULES[config.shift_rule](config, count)
    moved = alpha * t / (alpha * t + (1.0 - t)) if process is linear_flow else _shift_by_snr(process, t, alpha)
    return jnp.where((t <= 0.0) | (t >= 1.0) | (alpha == 1.0), t, moved)


def _shift_by_snr(process: Process, t: Array, alpha: Array) -> Array:
    return time_of_half_log_snr(process, half_log_snr(process, t) - jnp.log(alpha))


def draw_times(config: TimesConfig, process: Process, key: Key[Array, ""], clips: ClipBatch) -> PerClipBS:
    """Draw one training time per clip, in [MIN_TIME, 1], float32: a function of (key, clip id, clip size).

    Stratified times are a function of (key, rank, clip size); without `clips.ranks_BS` the clips count as the whole
    batch. The process tells log_sigma and the shift at which times noise levels are reached.
    """
    clip_ids_BS, tokens_BS, ranks_BS = clips
    if config.stratified:
        ranks_BS = batch_ranks(clip_ids_BS) if ranks_BS is None else ranks_BS
        # No clip has id 0, so the draw of the step coincides with that of no clip.
        drawn_BS = ranks_BS + jax.random.uniform(jax.random.fold_in(key, 0), dtype=jnp.float32)
        uniform_BS = drawn_BS - jnp.floor(drawn_BS)
    else:
        keys_BS = clip_keys(key, clip_ids_BS)
        uniform_BS = jax.vmap(jax.vmap(lambda clip_key: jax.random.uniform(clip_key, dtype=jnp.float32)))(keys_BS)
    return time_quantiles(config, process, uniform_BS, tokens_BS)


def time_quantiles(
    config: TimesConfig, process: Process, uniform_BS: PerClipBS, tokens_BS: Int[Array, "B S"]
) -> PerClipBS:
    """Return the training times, in [MIN_TIME, 1], of clips of these sizes at uniform numbers in [0, 1)."""
    drawn = 1.0 - config.pure
    if drawn == 0.0:
        return jnp.ones_like(uniform_BS)
    times_BS = QUANTILES[config.distribution](config, process, jnp.minimum(uniform_BS / drawn, LAST_UNIFORM))
    times_BS = jnp.clip(shift(config, times_BS, tokens_BS, process), MIN_TIME, 1.0)
    return jnp.where(uniform_BS < drawn, times_BS, 1.0)


def batch_ranks(clips: UInt32[Array, "*slots"]) -> Float[Array, "*slots"]:
    """Rank the clips of a batch: i / n of equation (2), in [0, 1); 0 for empty slots. Clip ids have any shape.

    The order i is that of the scrambled clip ids: the same wherever the clips are packed and however the batch is
    sharded (the ids are gathered: four bytes per slot). Under gradient accumulation rank the whole batch.
    """
    sharding = jax.typeof(clips).sharding
    if sharding.mesh.empty:
        return _ranks(clips)
    # The array's own mesh, not the current one: placed batches are ranked outside `jax.set_mesh`, too.
    everywhere = jax.NamedSharding(sharding.mesh, jax.P(*[None] * clips.ndim))
    return jax.sharding.reshard(_ranks(jax.sharding.reshard(clips, everywhere)), sharding)


def _ranks(clips: Array) -> Array:
    ids = clips.ravel()
    # Neighbouring ids often belong to similar clips; an odd factor scrambles the order and keeps ids distinct.
    place = jnp.argsort(jnp.argsort(ids * jnp.uint32(2654435761)))
    empty = jnp.sum(ids == 0)
    count = jnp.maximum(ids.size - empty, 1).astype(jnp.float32)
    return jnp.maximum(place - empty, 0).astype(jnp.float32).reshape(clips.shape) / count


def sampling_times(
    config: TimesConfig, base_K: Float[Array, " K"], tokens_BR: Int[Array, "B R"], process: Process
) -> Float[Array, "K B R"]:
    """Return the times of every row, float32: the decreasing grid base_K (`spacing.base_times`) with the row's shift.

    tokens_BR counts the tokens of the clip that a row serves. To hold a row of given tokens, set all its times to 0.
    """
    base_K = jnp.asarray(base_K, jnp.float32)
    return jax.vmap(lambda t: shift(config, jnp.zeros_like(tokens_BR, jnp.float32) + t, tokens_BR, process))(base_K)


def per_token(values_BR: Num[Array, "B R"], rows_BL: RowsBL) -> Num[Array, "B L"]:
    """Return the value of every token's row (or slot): values_BR[b, rows_BL[b, l]]."""
    # Comparison and sum, not a gather: legal and without communication whichever axes of rows_BL are sharded.
    rows_11R = jnp.arange(values_BR.shape[1], dtype=rows_BL.dtype)[None, None, :]
    mine_BLR = rows_BL[:, :, None] == rows_11R
    return jnp.sum(jnp.where(mine_BLR, values_BR[:, None, :], 0), axis=2, dtype=values_BR.dtype)
