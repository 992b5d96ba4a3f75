"""Multistep exponential integrators of the probability-flow ODE: DPM-Solver++ and UniPC.

With lambda = log(a / b) the ODE is solved exactly but for an integral of the model's x_0 along the path
(Lu et al. 2211.01095, equation 8):

    x_s = b(s) / b(t) x_t + b(s) * integral of exp(lambda) x_0(lambda) from lambda_t to lambda_s   (1)

The methods put a polynomial through predictions m_0 at lambda_t and m_i at lambda_i: earlier ones and, to correct,
that at lambda_s. With h = lambda_s - lambda_t, r_i = (lambda_i - lambda_t) / h and D_i = (m_i - m_0) / r_i,

    x_s = b(s) / b(t) x_t + a(s) (1 - exp(-h)) (m_0 + sum over i of w_i D_i)             (2)
    sum over i of w_i r_i^(j - 1) = c_j,  j = 1 .. number of D_i                         (3)

with c_j the integral of exp(u - h) (u / h)^j over 0 .. h, divided by that of exp(u - h); for a single D_i the
methods take w = 1/2 instead, which has the same order.

One evaluation a step. Earlier predictions wait in a memory with their lambda; where there is none yet, and after
a(t) = 0, lambda is -infinity and the place is left out: so the start has lower order, row by row. At s = 0, h is
infinite and the step of first order, which is exact for a prediction that stays as it is.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sora_jax.diffusion.process import half_log_snr
from sora_jax.diffusion.solvers.problem import Problem, Step, TimesKBR, predict, token_times, walk
from sora_jax.shapes import TokensBLP

Nodes = Float[Array, "B L 1"]


class Memory(NamedTuple):
    """Predictions of x_0, newest first, and their lambda."""

    x0_BLP: list[TokensBLP]
    lambda_BL1: list[Nodes]


class Stretch(NamedTuple):
    """Equation (2) but for predictions: b(s)/b(t), a(s), h, the r_i of the memory's past, and the order 0 .. 3."""

    shrink_BL1: Nodes
    a_BL1: Nodes
    h_BL1: Nodes
    past_BL1: list[Nodes]
    order_BL1: Int[Array, "B L 1"]


def dpm_solver(
    problem: Problem,
    x_BLP: TokensBLP,
    times_KBR: TimesKBR,
    order: int = 2,
    lower_order_final: int = 15,
    halved_curvature: bool = False,
) -> TokensBLP:
    """DPM-Solver++ (Lu et al. 2211.01095, algorithm 2) of order 1 (which is DDIM), 2 or 3.

    Grids of fewer than `lower_order_final` steps end with orders 2 and 1. `halved_curvature` gives the second
    derivative half its weight, as the authors' code and diffusers do, which makes order 3 order 2.
    """
    curvature = 0.5 if halved_curvature else 1.0

    def advance(state, step: Step):
        x_BLP, memory = state
        memory = _remember(problem, memory, predict(problem, "x0", x_BLP, step.t_BR), step)
        stretch = _stretch(problem, memory, step, _order_allowed(step, times_KBR, order, lower_order_final))
        return _advanced(x_BLP, stretch, memory, stretch.past_BL1, memory.x0_BLP[1:], curvature), memory

    return walk(problem, advance, (x_BLP, _nothing(problem, x_BLP, order)), times_KBR)[0]


def unipc(
    problem: Problem, x_BLP: TokensBLP, times_KBR: TimesKBR, order: int = 2, lower_order_final: int = 15
) -> TokensBLP:
    """UniPC in its B2(h) form (Zhao et al. 2302.04867, algorithms 1 and 2), predictor and corrector of `order` 1 to 3.

    The corrector takes the prediction that the next step needs anyway, so the whole is one order more accurate
    than the predictor for the same evaluations. Grids of fewer than `lower_order_final` steps end with orders 2
    and 1.
    """

    def advance(state, step: Step):
        x_BLP, before_BLP, memory, stretch = state
        new_BLP = predict(problem, "x0", x_BLP, step.t_BR)
        x_BLP = jnp.where(stretch.order_BL1 > 0, _corrected(before_BLP, stretch, memory, new_BLP), x_BLP)
        memory = _remember(problem, memory, new_BLP, step)
        stretch = _stretch(problem, memory, step, _order_allowed(step, times_KBR, order, lower_order_final))
        return _advanced(x_BLP, stretch, memory, stretch.past_BL1, memory.x0_BLP[1:]), x_BLP, memory, stretch

    memory = _nothing(problem, x_BLP, order)
    start = Step(jnp.int32(0), times_KBR[0], times_KBR[0])
    return walk(problem, advance, (x_BLP, x_BLP, memory, _stretch(problem, memory, start, 0)), times_KBR)[0]


def _nothing(problem: Problem, x_BLP: TokensBLP, order: int) -> Memory:
    lambda_BL1 = jnp.full_like(x_BLP[:, :, :1], -jnp.inf)
    return Memory([jnp.zeros_like(x_BLP)] * order, [lambda_BL1] * order)


def _remember(problem: Problem, memory: Memory, x0_BLP: TokensBLP, step: Step) -> Memory:
    lambda_BL1 = half_log_snr(problem.process, token_times(problem, step.t_BR))
    return Memory([x0_BLP, *memory.x0_BLP[:-1]], [lambda_BL1, *memory.lambda_BL1[:-1]])


def _order_allowed(step: Step, times_KBR: TimesKBR, order: int, lower_order_final: int) -> Int[Array, ""] | int:
    left = len(times_KBR) - 1 - step.index
    return jnp.minimum(order, left) if len(times_KBR) - 1 < lower_order_final else order


def _stretch(problem: Problem, memory: Memory, step: Step, allowed: Int[Array, ""] | int) -> Stretch:
    """The step after the newest memory; order is `allowed` less what the past and the end of the grid lack."""
    process = problem.process
    s_BL1, t_BL1 = token_times(problem, step.s_BR), token_times(problem, step.t_BR)
    start_BL1, *past_BL1 = memory.lambda_BL1
    h_BL1 = jnp.where(s_BL1 < t_BL1, half_log_snr(process, s_BL1) - half_log_snr(process, t_BL1), 1.0)
    order_BL1 = jnp.ones_like(h_BL1, jnp.int32)
    ratios_BL1 = []
    for place, lambda_BL1 in enumerate(past_BL1, start=1):
        usable_BL1 = jnp.isfinite(h_BL1) & jnp.isfinite(lambda_BL1)
        ratio_BL1 = jnp.where(usable_BL1, lambda_BL1 - start_BL1, 0.0) / jnp.where(usable_BL1, h_BL1, 1.0)
        ratios_BL1.append(jnp.where(usable_BL1, ratio_BL1, -float(place)))
        order_BL1 += usable_BL1.astype(jnp.int32)
    b_BL1 = process.b(t_BL1)
    shrink_BL1 = process.b(s_BL1) / jnp.where(b_BL1 > 0, b_BL1, 1.0)
    return Stretch(shrink_BL1, process.a(s_BL1), h_BL1, ratios_BL1, jnp.minimum(order_BL1, allowed))


def _corrected(before_BLP: TokensBLP, stretch: Stretch, memory: Memory, new_BLP: TokensBLP) -> TokensBLP:
    """The step that led here, taken again with the prediction at its end as the first further node."""
    ends_BL1 = [jnp.ones_like(stretch.h_BL1), *stretch.past_BL1]
    stretch = stretch._replace(order_BL1=stretch.order_BL1 + 1)
    return _advanced(before_BLP, stretch, memory, ends_BL1, [new_BLP, *memory.x0_BLP[1:]])


def _advanced(
    x_BLP: TokensBLP,
    stretch: Stretch,
    memory: Memory,
    ratios_BL1: list[Nodes],
    others_BLP: list[TokensBLP],
    curvature: float = 1.0,
) -> TokensBLP:
    """Equation (2) with the first order - 1 of the other predictions, order as each token's stretch says."""
    m_BLP, gain_BL1 = memory.x0_BLP[0], -jnp.expm1(-stretch.h_BL1)
    moments_BL1 = _moments(stretch.h_BL1, len(ratios_BL1), curvature)
    differences_BLP = [(m - m_BLP) / ratio for m, ratio in zip(others_BLP, ratios_BL1, strict=True)]
    bend_BLP = jnp.zeros_like(m_BLP)
    for count in range(1, len(ratios_BL1) + 1):
        halves = [jnp.full_like(gain_BL1, 0.5)]
        weights_BL1 = halves if count == 1 else _weights(ratios_BL1[:count], moments_BL1[:count])
        sum_BLP = sum(w * d for w, d in zip(weights_BL1, differences_BLP[:count], strict=True))
        bend_BLP = jnp.where(stretch.order_BL1 == count + 1, sum_BLP, bend_BLP)
    return stretch.shrink_BL1 * x_BLP + stretch.a_BL1 * gain_BL1 * (m_BLP + bend_BLP)


def _moments(h_BL1: Nodes, count: int, curvature: float) -> list[Nodes]:
    """c_1 .. c_count of equation (3); the second times `curvature`."""
    if count == 0:
        return []
    # An infinite step has order 1, or 2 with the weight 1/2: any finite length will do for what is not taken.
    h_BL1 = jnp.where(jnp.isfinite(h_BL1), h_BL1, 1.0)
    gain_BL1 = -jnp.expm1(-h_BL1)
    # I_j = 1 - j / h I_(j - 1), by parts: upwards it cancels on a short step, downwards on a long one.
    up, down = [gain_BL1], [_last_moment(h_BL1, count)]
    for j in range(1, count + 1):
        up.append(1.0 - j / h_BL1 * up[-1])
    for j in range(count, 1, -1):
        down.insert(0, (1.0 - down[0]) * h_BL1 / j)
    moments = [jnp.where(h_BL1 < 1.0, *pair) / gain_BL1 for pair in zip(down, up[1:], strict=True)]
    return [c * curvature if j == 2 else c for j, c in enumerate(moments, start=1)]


def _last_moment(h_BL1: Nodes, power: int) -> Nodes:
    """I_power, the integral of exp(u - h) (u / h)^power over 0 .. h, by its series; for h up to 1."""
    sum_BL1 = jnp.zeros_like(h_BL1)
    for n in reversed(range(16)):
        sum_BL1 = sum_BL1 * h_BL1 + 1.0 / (math.factorial(n) * (n + power + 1))
    return h_BL1 * jnp.exp(-h_BL1) * sum_BL1


def _weights(nodes: list[Nodes], moments: list[Nodes]) -> list[Nodes]:
    """w of equation (3), a Vandermonde system, by the method of Bjorck and Pereyra (1970)."""
    w, last = list(moments), len(nodes) - 1
    for k in range(last):
        for i in range(last, k, -1):
            w[i] = w[i] - nodes[k] * w[i - 1]
    for k in range(last - 1, -1, -1):
        for i in range(k + 1, last + 1):
            w[i] = w[i] / (nodes[i] - nodes[i - k - 1])
        for i in range(k, last):
            w[i] = w[i] - w[i + 1]
    return w
