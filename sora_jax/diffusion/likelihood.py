"""Log-likelihood of clips under a model, by the probability-flow ODE (Song et al. 2011.13456, section 4.3).

The ODE is solved from data to noise for z = x / r, r^2 = a^2 + b^2, over the angle theta = atan2(b, a), where it
reads dz/dtheta = v(z, theta) with v = cos(theta) eps - sin(theta) x_0: bounded at both ends, whatever the process.
By the change of variables, for a clip of n values whose z is z_0 = (a / r) x_0 at the first time and z_1 at the last,

    log p(x_0) = log N(z_1; 0, I) + integral of div v over theta + n log(a / r)          (1)

where x_t stands for its mean a x_0 at the first time: an error of the order of b^2 there. The divergence is the
trace of a Jacobian whose blocks between clips are zero. It is computed exactly, by one derivative for every value of a
clip, or by Hutchinson's estimate: the mean of e . (J e) over random signs e (Grathwohl et al. 1810.01367).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sora_jax.config import check, choose
from sora_jax.diffusion.process import Process, time_of_half_log_snr
from sora_jax.diffusion.solvers.problem import Problem, Step, predict_x0_and_eps, token_times, walk
from sora_jax.shapes import IndexBL, PerClipBS, PerTokenBL1, SegmentsBL, TimesBR, TimesKBR, TokensBLP

Jvp = Callable[[TokensBLP], TokensBLP]  # a tangent times the Jacobian of the velocity
Trace = Callable[[Jvp], PerTokenBL1]
State = tuple[TokensBLP, PerTokenBL1]  # z, and each token's part of the integral
Field = Callable[[TokensBLP, TimesBR], State]  # the derivative of the state: velocity and divergence


@dataclass(frozen=True)
class LikelihoodConfig:
    """Configure the integration of equation (1)."""

    method: str = "heun"  # `heun` (2 evaluations a step) or `rk4` (4 evaluations a step)
    # Random signs of Hutchinson's estimate, one derivative of the model each; 0: the exact divergence, which costs as
    # many derivatives as the longest clip has values.
    probes: int = 0

    def __post_init__(self):
        choose("likelihood.method", self.method, METHODS)
        check(self.probes >= 0, f"likelihood.probes is {self.probes}; it must be 0 (exact) or more")


class ClipTokens(NamedTuple):
    """Locate the tokens of clips in packs."""

    segments_BL: SegmentsBL
    index_BL: IndexBL
    slots: int  # clip slots of a pack


class Likelihood(NamedTuple):
    """Hold the log-likelihood of every clip slot; an empty slot has 0 nats and 0 values."""

    nats_BS: PerClipBS  # log p
    values_BS: PerClipBS  # number of values that p is the density of

    def bits_per_dimension(self) -> PerClipBS:
        """Return -log2 p per value. It depends on the scale of the latents: compare models on the same latents."""
        return -self.nats_BS / (math.log(2.0) * jnp.maximum(self.values_BS, 1.0))


def ascending_times(process: Process, steps: int, first: float = 1e-3) -> np.ndarray:
    """Return steps + 1 times (K,) float64 from `first` to 1, even in the angle theta: a grid for `log_likelihood`."""
    ends = jnp.asarray([first, 1.0], jnp.float32)
    low, high = np.arctan2(np.asarray(process.b(ends), np.float64), np.asarray(process.a(ends), np.float64))
    inner = jnp.asarray(np.linspace(low, high, steps + 1)[1:-1], jnp.float32)
    return np.array([first, *np.asarray(time_of_half_log_snr(process, _log_cotangent(inner)), np.float64), 1.0])


def log_likelihood(
    config: LikelihoodConfig, problem: Problem, x0_BLP: TokensBLP, times_KBR: TimesKBR, clips: ClipTokens
) -> Likelihood:
    """Evaluate equation (1) for every clip of every pack, over a grid of times that ascends from above 0 to 1.

    Probes are the signs of `problem.noise(0 ..)`, the same at every step; keyed by clip, they keep packed equal to
    alone. Padding adds nothing. Tokens of rows held at time 0 are given: the density is that of the clip's other
    tokens.

    Raises:
        UserError: the config has probes and the problem has no noise.
    """
    segments_BL, index_BL, slots = clips
    unknown_BL1 = ((segments_BL > 0)[:, :, None] & (token_times(problem, times_KBR[-1]) > 0)).astype(x0_BLP.dtype)
    exact = config.probes == 0
    trace = _exact(x0_BLP, index_BL, unknown_BL1) if exact else _hutchinson(problem, config.probes, unknown_BL1)
    field = _field(problem, trace)
    advance = METHODS[config.method]
    scale_BL1 = _cosine(problem, times_KBR[0])
    state = (scale_BL1 * x0_BLP, jnp.zeros_like(unknown_BL1))
    z_BLP, integral_BL1 = walk(problem, lambda state, step: advance(problem, field, state, step), state, times_KBR)
    normal_BLP = -0.5 * (jnp.square(z_BLP) + math.log(2.0 * math.pi))
    nats_BLP = normal_BLP + jnp.log(scale_BL1) + integral_BL1 / x0_BLP.shape[2]
    of_token_BL2 = jnp.stack([jnp.sum(nats_BLP, axis=2), jnp.full_like(nats_BLP[:, :, 0], x0_BLP.shape[2])], axis=2)
    # Select, not multiply: the numbers of padding may be infinite.
    sums_BS2 = _per_clip(jnp.where(unknown_BL1 > 0, of_token_BL2, 0.0), segments_BL, slots)
    return Likelihood(sums_BS2[:, :, 0], sums_BS2[:, :, 1])


def _field(problem: Problem, trace: Trace) -> Field:
    """Make the function that evaluates v and its divergence, token by token, at z and time t."""

    def field(z_BLP: TokensBLP, t_BR: TimesBR) -> State:
        t_BL1 = token_times(problem, t_BR)
        a_BL1, b_BL1 = problem.process.a(t_BL1), problem.process.b(t_BL1)
        r_BL1 = jnp.sqrt(jnp.square(a_BL1) + jnp.square(b_BL1))

        def velocity(z_BLP: TokensBLP) -> TokensBLP:
            x0_BLP, eps_BLP = predict_x0_and_eps(problem, r_BL1 * z_BLP, t_BR)
            return (a_BL1 * eps_BLP - b_BL1 * x0_BLP) / r_BL1

        v_BLP, jvp = jax.linearize(velocity, z_BLP)
        return v_BLP, trace(jvp)

    return field


def _exact(x_BLP: TokensBLP, index_BL: IndexBL, unknown_BL1: PerTokenBL1) -> Trace:
    """Make the exact trace: one derivative for every value of the longest clip."""
    length, width = x_BLP.shape[1:]
    units_PP = jnp.eye(width, dtype=x_BLP.dtype)

    def trace(jvp: Jvp) -> PerTokenBL1:
        def entry(here_BL1: PerTokenBL1, unit_11P: Array) -> Array:
            return jnp.sum(jnp.where(unit_11P > 0, jvp(here_BL1 * unit_11P), 0.0), axis=2)

        def add(sum_BL1: PerTokenBL1, place: Array) -> tuple[PerTokenBL1, None]:
            # One token of every clip at a time: no clip depends on another.
            here_BL1 = unknown_BL1 * (index_BL == place)[:, :, None].astype(x_BLP.dtype)
            diagonal_PBL = jax.lax.map(lambda unit_P: entry(here_BL1, unit_P[None, None, :]), units_PP)
            return sum_BL1 + here_BL1 * jnp.sum(diagonal_PBL, axis=0)[:, :, None], None

        return jax.lax.scan(add, jnp.zeros_like(unknown_BL1), jnp.arange(length, dtype=index_BL.dtype))[0]

    return trace


def _hutchinson(problem: Problem, probes: int, unknown_BL1: PerTokenBL1) -> Trace:
    """Make the estimate of the trace by random signs."""
    noise = problem.noise
    check(noise, f"noise is None; with likelihood.probes = {probes} it must be given")
    assert noise is not None

    def trace(jvp: Jvp) -> PerTokenBL1:
        def add(sum_BL1: PerTokenBL1, probe: Array) -> tuple[PerTokenBL1, None]:
            signs_BLP = unknown_BL1 * jnp.where(noise(probe) < 0, -1.0, 1.0).astype(unknown_BL1.dtype)
            return sum_BL1 + jnp.sum(signs_BLP * jvp(signs_BLP), axis=2, keepdims=True) / probes, None

        return jax.lax.scan(add, jnp.zeros_like(unknown_BL1), jnp.arange(probes))[0]

    return trace


def _heun(problem: Problem, field: Field, state: State, step: Step) -> State:
    h_BL1 = _angle(problem, step.s_BR) - _angle(problem, step.t_BR)
    first = field(state[0], step.t_BR)
    second = field(state[0] + h_BL1 * first[0], step.s_BR)
    return jax.tree.map(lambda y, k1, k2: y + 0.5 * h_BL1 * (k1 + k2), state, first, second)


def _rk4(problem: Problem, field: Field, state: State, step: Step) -> State:
    h_BL1 = _angle(problem, step.s_BR) - _angle(problem, step.t_BR)
    middle_BR = _middle(problem.process, step)
    first = field(state[0], step.t_BR)
    second = field(state[0] + 0.5 * h_BL1 * first[0], middle_BR)
    third = field(state[0] + 0.5 * h_BL1 * second[0], middle_BR)
    fourth = field(state[0] + h_BL1 * third[0], step.s_BR)
    moved = lambda y, k1, k2, k3, k4: y + h_BL1 / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)  # noqa: E731
    return jax.tree.map(moved, state, first, second, third, fourth)


METHODS: dict[str, Callable[[Problem, Field, State, Step], State]] = {"heun": _heun, "rk4": _rk4}


def _middle(process: Process, step: Step) -> TimesBR:
    """Return the time half-way in angle; rows that are held keep theirs."""
    angles = [jnp.arctan2(process.b(t_BR), process.a(t_BR)) for t_BR in (step.t_BR, step.s_BR)]
    moves_BR = step.t_BR < step.s_BR
    middle_BR = time_of_half_log_snr(process, _log_cotangent(jnp.where(moves_BR, 0.5 * sum(angles), 1.0)))
    return jnp.where(moves_BR, middle_BR, step.t_BR)


def _log_cotangent(angle: Array) -> Array:
    return jnp.log(jnp.cos(angle)) - jnp.log(jnp.sin(angle))


def _angle(problem: Problem, t_BR: TimesBR) -> PerTokenBL1:
    t_BL1 = token_times(problem, t_BR)
    return jnp.arctan2(problem.process.b(t_BL1), problem.process.a(t_BL1))


def _cosine(problem: Problem, t_BR: TimesBR) -> PerTokenBL1:
    return jnp.cos(_angle(problem, t_BR))


def _per_clip(values_BLN: Float[Array, "B L N"], segments_BL: SegmentsBL, slots: int) -> Float[Array, "B S N"]:
    """Sum over the tokens of every slot, by comparison, which is legal whichever axes are sharded."""
    mine_BLS = segments_BL[:, :, None] == jnp.arange(1, slots + 1, dtype=segments_BL.dtype)[None, None, :]
    return jnp.sum(jnp.where(mine_BLS[:, :, :, None], values_BLN[:, :, None, :], 0.0), axis=1)
