"""Log-likelihood of clips under a model, by the probability-flow ODE (Song et al. 2011.13456, section 4.3).

The ODE is followed from data to noise for z = x / r, r^2 = a^2 + b^2, over the angle theta = atan2(b, a), where it
reads dz/dtheta = v(z, theta) with v = cos(theta) eps - sin(theta) x_0: bounded at both ends, whatever the process.
By the change of variables, for a clip of n values whose z is z_0 = (a / r) x_0 at the first time and z_1 at the last,

    log p(x_0) = log N(z_1; 0, I) + integral of div v over theta + n log(a / r)          (1)

where x_t stands for its mean a x_0 at the first time: an error of the order of b^2 there. The divergence is the
trace of a Jacobian whose blocks between clips are zero: exactly, by one derivative for every value of a clip, or
estimated by the mean of e . (J e) over random signs e (Grathwohl et al. 1810.01367).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sora_jax.diffusion.process import Process, time_of_half_log_snr
from sora_jax.diffusion.solvers.problem import Problem, Step, TimesKBR, predict_ends, token_times, walk
from sora_jax.errors import UserError
from sora_jax.shapes import SegmentsBL, TimesBR, TokensBLP

METHODS = ("heun", "rk4")

Trace = Callable[[Callable[[TokensBLP], TokensBLP]], Float[Array, "B L 1"]]
Field = Callable[[TokensBLP, TimesBR], tuple[TokensBLP, Float[Array, "B L 1"]]]


@dataclass(frozen=True)
class LikelihoodConfig:
    """How to integrate: `heun` (2 evaluations a step) or `rk4` (4); 0 probes are the exact divergence.

    The exact divergence costs as many derivatives of the model as the longest clip has values; a probe costs one.
    """

    method: str = "heun"
    probes: int = 0

    def __post_init__(self):
        if self.method not in METHODS:
            raise UserError(f"likelihood.method must be one of {', '.join(METHODS)}, not {self.method!r}.")
        if self.probes < 0:
            raise UserError(f"likelihood.probes must be 0 (exact) or more, not {self.probes}.")


class Likelihood(NamedTuple):
    """Of every clip slot: log p in nats, and how many values it is a density of; 0 and 0 for an empty slot."""

    nats_BS: Float[Array, "B S"]
    values_BS: Float[Array, "B S"]

    def bits_per_dimension(self) -> Float[Array, "B S"]:
        """-log2 p for each value; of latents as they are, so a difference of two models means more than a number."""
        return -self.nats_BS / (math.log(2.0) * jnp.maximum(self.values_BS, 1.0))


def ascending_times(process: Process, steps: int, first: float = 1e-3) -> np.ndarray:
    """steps + 1 times (K,) float64 from `first` to 1, even in the angle theta: the grid for `log_likelihood`."""
    ends = jnp.asarray([first, 1.0], jnp.float32)
    angles = np.arctan2(np.asarray(process.b(ends), np.float64), np.asarray(process.a(ends), np.float64))
    inner = jnp.asarray(np.linspace(*angles, steps + 1)[1:-1], jnp.float32)
    return np.array([first, *np.asarray(time_of_half_log_snr(process, _log_cotangent(inner)), np.float64), 1.0])


def log_likelihood(
    config: LikelihoodConfig,
    problem: Problem,
    x0_BLP: TokensBLP,
    times_KBR: TimesKBR,
    segments_BL: SegmentsBL,
    index_BL: Int[Array, "B L"],
    slots: int,
) -> Likelihood:
    """Equation (1) for every clip of every pack, over a grid of times that ascends from above 0 to 1.

    index_BL counts the tokens of each clip from 0. Probes are the signs of `problem.noise(0 ..)`, the same all
    along the way; keyed by clip, they keep packed equal to alone. Padding adds nothing. Rows held at time 0 are
    given: the density is that of the other tokens of the clip.
    """
    unknown_BL1 = ((segments_BL > 0)[:, :, None] & (token_times(problem, times_KBR[-1]) > 0)).astype(x0_BLP.dtype)
    trace = _probed(problem, config.probes, unknown_BL1) if config.probes else _exact(x0_BLP, index_BL, unknown_BL1)
    field = _field(problem, trace)
    advance = {"heun": _heun, "rk4": _rk4}[config.method]
    scale_BL1 = _cosine(problem, times_KBR[0])
    state = (scale_BL1 * x0_BLP, jnp.zeros_like(unknown_BL1))
    z_BLP, integral_BL1 = walk(problem, lambda state, step: advance(problem, field, state, step), state, times_KBR)
    normal_BLP = -0.5 * (jnp.square(z_BLP) + math.log(2.0 * math.pi))
    nats_BLP = normal_BLP + jnp.log(scale_BL1) + integral_BL1 / x0_BLP.shape[2]
    of_token_BL2 = jnp.stack([jnp.sum(nats_BLP, axis=2), jnp.full_like(nats_BLP[:, :, 0], x0_BLP.shape[2])], axis=2)
    # Select, not multiply: padding may have left the finite numbers.
    sums_BS2 = _per_clip(jnp.where(unknown_BL1 > 0, of_token_BL2, 0.0), segments_BL, slots)
    return Likelihood(sums_BS2[:, :, 0], sums_BS2[:, :, 1])


def _field(problem: Problem, trace: Trace) -> Field:
    """v and its divergence, token by token, at z and time t."""

    def field(z_BLP: TokensBLP, t_BR: TimesBR) -> tuple[TokensBLP, Array]:
        t_BL1 = token_times(problem, t_BR)
        a_BL1, b_BL1 = problem.process.a(t_BL1), problem.process.b(t_BL1)
        r_BL1 = jnp.sqrt(jnp.square(a_BL1) + jnp.square(b_BL1))

        def velocity(z_BLP: TokensBLP) -> TokensBLP:
            x0_BLP, eps_BLP = predict_ends(problem, r_BL1 * z_BLP, t_BR)
            return (a_BL1 * eps_BLP - b_BL1 * x0_BLP) / r_BL1

        v_BLP, push = jax.linearize(velocity, z_BLP)
        return v_BLP, trace(push)

    return field


def _exact(x_BLP: TokensBLP, index_BL: Int[Array, "B L"], unknown_BL1: Array) -> Trace:
    length, width = x_BLP.shape[1:]
    units_PP = jnp.eye(width, dtype=x_BLP.dtype)

    def trace(push) -> Array:
        def add(sum_BL1, place):
            # One token of every clip at a time: clips do not see each other.
            here_BL1 = unknown_BL1 * (index_BL == place)[:, :, None].astype(x_BLP.dtype)
            turned_PBLP = jax.lax.map(lambda unit_P: push(here_BL1 * unit_P[None, None, :]), units_PP)
            diagonal_BL1 = jnp.einsum("pblp->bl", turned_PBLP)[:, :, None]
            return sum_BL1 + here_BL1 * diagonal_BL1, None

        return jax.lax.scan(add, jnp.zeros_like(unknown_BL1), jnp.arange(length, dtype=index_BL.dtype))[0]

    return trace


def _probed(problem: Problem, probes: int, unknown_BL1: Array) -> Trace:
    if problem.noise is None:
        raise UserError("noise must be given to a likelihood with probes, not None.")

    def trace(push) -> Array:
        def add(sum_BL1, probe):
            signs_BLP = unknown_BL1 * jnp.where(problem.noise(probe) < 0, -1.0, 1.0).astype(unknown_BL1.dtype)
            return sum_BL1 + jnp.sum(signs_BLP * push(signs_BLP), axis=2, keepdims=True) / probes, None

        return jax.lax.scan(add, jnp.zeros_like(unknown_BL1), jnp.arange(probes))[0]

    return trace


def _heun(problem: Problem, field: Field, state, step: Step):
    h_BL1 = _angle(problem, step.s_BR) - _angle(problem, step.t_BR)
    first = field(state[0], step.t_BR)
    second = field(state[0] + h_BL1 * first[0], step.s_BR)
    return tuple(y + 0.5 * h_BL1 * (k1 + k2) for y, k1, k2 in zip(state, first, second, strict=True))


def _rk4(problem: Problem, field: Field, state, step: Step):
    h_BL1 = _angle(problem, step.s_BR) - _angle(problem, step.t_BR)
    middle_BR = _middle(problem.process, step)
    first = field(state[0], step.t_BR)
    second = field(state[0] + 0.5 * h_BL1 * first[0], middle_BR)
    third = field(state[0] + 0.5 * h_BL1 * second[0], middle_BR)
    fourth = field(state[0] + h_BL1 * third[0], step.s_BR)
    slopes = zip(state, first, second, third, fourth, strict=True)
    return tuple(y + h_BL1 / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4) for y, k1, k2, k3, k4 in slopes)


def _middle(process: Process, step: Step) -> TimesBR:
    """The time half-way in angle; held rows keep theirs."""
    angles = [jnp.arctan2(process.b(t_BR), process.a(t_BR)) for t_BR in (step.t_BR, step.s_BR)]
    moves_BR = step.t_BR < step.s_BR
    middle_BR = time_of_half_log_snr(process, _log_cotangent(jnp.where(moves_BR, 0.5 * sum(angles), 1.0)))
    return jnp.where(moves_BR, middle_BR, step.t_BR)


def _log_cotangent(angle):
    return jnp.log(jnp.cos(angle)) - jnp.log(jnp.sin(angle))


def _angle(problem: Problem, t_BR: TimesBR) -> Float[Array, "B L 1"]:
    t_BL1 = token_times(problem, t_BR)
    return jnp.arctan2(problem.process.b(t_BL1), problem.process.a(t_BL1))


def _cosine(problem: Problem, t_BR: TimesBR) -> Float[Array, "B L 1"]:
    return jnp.cos(_angle(problem, t_BR))


def _per_clip(values_BLN: Float[Array, "B L N"], segments_BL: SegmentsBL, slots: int) -> Float[Array, "B S N"]:
    """Sums over the tokens of every slot, by comparison, legal whichever axes are sharded."""
    mine_BLS = segments_BL[:, :, None] == jnp.arange(1, slots + 1, dtype=segments_BL.dtype)[None, None, :]
    return jnp.sum(jnp.where(mine_BLS[:, :, :, None], values_BLN[:, :, None, :], 0.0), axis=1)
