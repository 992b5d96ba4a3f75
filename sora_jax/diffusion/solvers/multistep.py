"""Multistep exponential integrators: DPM-Solver++, of the probability-flow ODE and of an SDE, and UniPC.

With lambda = log(a / b) the ODE is solved exactly but for an integral of the model's x_0 along the path
(Lu et al. 2211.01095, equation 8):

    x_s = b(s) / b(t) x_t + b(s) * integral of exp(lambda) x_0(lambda) from lambda_t to lambda_s   (1)

The methods put a polynomial through predictions m_0 at lambda_t and m_i at lambda_i: earlier ones and, to correct,
that at lambda_s. With h = lambda_s - lambda_t, r_i = (lambda_i - lambda_t) / h and D_i = (m_i - m_0) / r_i,

    x_s = b(s) / b(t) x_t + a(s) (1 - exp(-h)) (m_0 + sum over i of w_i D_i)             (2)
    sum over i of w_i r_i^(j - 1) = c_j,  j = 1 .. number of D_i                         (3)

with c_j the integral of exp(u - h) (u / h)^j over 0 .. h, divided by that of exp(u - h); for a single D_i the
methods take w = 1/2 instead, which has the same order.

`dpm_sde` solves the reverse-time SDE of the process in the same way (SDE-DPM-Solver++ of Lu et al., known as DPM++ 2M
SDE): with n fresh noise, and the weight 1/2 as above,

    x_s = b(s) / b(t) exp(-h) x_t + a(s) (1 - exp(-2h)) (m_0 + D_1 / 2) + b(s) sqrt(1 - exp(-2h)) n   (4)

A step evaluates the model once. Earlier predictions are kept with their lambda in a history. Where one is missing, at
the start and after a(t) = 0, its lambda is -infinity and it is left out: so each row starts with lower order. At s = 0,
h is infinite and the step is of first order, which is exact for a prediction that does not change on the way.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from sora_jax.diffusion.process import half_log_snr
from sora_jax.diffusion.solvers.problem import Problem, Step, draw_noise, predict, token_times, walk
from sora_jax.shapes import PerTokenBL1, TimesKBR, TokensBLP


class History(NamedTuple):
    """Hold predictions of x_0, newest first, and their lambda."""

    x0_BLP: list[TokensBLP]
    lambda_BL1: list[PerTokenBL1]


class Coefficients(NamedTuple):
    """Hold what equation (2) needs beside predictions."""

    shrink_BL1: PerTokenBL1  # b(s) / b(t)
    a_BL1: PerTokenBL1  # a(s)
    h_BL1: PerTokenBL1
    past_BL1: list[PerTokenBL1]  # r_i of the earlier predictions in the history
    order_BL1: Int[Array, "B L 1"]  # 0 .. 3


DpmState = tuple[TokensBLP, History]
UnipcState = tuple[TokensBLP, TokensBLP, History, Coefficients]


def dpm_solver(
    problem: Problem,
    x_BLP: TokensBLP,
    times_KBR: TimesKBR,
    order: int = 2,
    lower_order_final: int = 15,
    second_derivative_scale: float = 1.0,
) -> TokensBLP:
    """Solve by DPM-Solver++ (Lu et al. 2211.01095, algorithm 2) of order 1 (which is DDIM), 2 or 3.

    Grids of fewer than `lower_order_final` steps end with orders 2 and 1. `second_derivative_scale` multiplies the
    weight c_2 of equation (3), that of the second derivative of x_0 in lambda, which only order 3 has. The authors'
    code and diffusers (`DPMSolverMultistepScheduler`, order 3) use 1/2, with which order 3 converges at order 2.
    """

    def advance(state: DpmState, step: Step) -> DpmState:
        x_BLP, history = state
        history = _push(problem, history, predict(problem, "x0", x_BLP, step.t_BR), step)
        allowed = _order_allowed(step, times_KBR, order, lower_order_final)
        coefficients = _coefficients(problem, history, step, allowed)
        ratios_BL1, others_BLP = coefficients.past_BL1, history.x0_BLP[1:]
        return _update(x_BLP, coefficients, history, ratios_BL1, others_BLP, second_derivative_scale), history

    return walk(problem, advance, (x_BLP, _empty_history(problem, x_BLP, order)), times_KBR)[0]


def dpm_sde(problem: Problem, x_BLP: TokensBLP, times_KBR: TimesKBR) -> TokensBLP:
    """Solve by equation (4), the second-order multistep SDE form of DPM-Solver++; K - 1 evaluations and draws.

    The first and the last step are of first order, which is `ddim` with eta = 1.
    """

    def advance(state: DpmState, step: Step) -> DpmState:
        x_BLP, history = state
        history = _push(problem, history, predict(problem, "x0", x_BLP, step.t_BR), step)
        known = _coefficients(problem, history, step, 2)
        (ratio_BL1,), (m_BLP, before_BLP) = known.past_BL1, history.x0_BLP
        bend_BLP = jnp.where(known.order_BL1 == 2, 0.5 * (before_BLP - m_BLP) / ratio_BL1, 0.0)
        fresh_BL1 = -jnp.expm1(-2.0 * known.h_BL1)
        b_BL1 = problem.process.b(token_times(problem, step.s_BR))
        kept_BLP = known.shrink_BL1 * jnp.exp(-known.h_BL1) * x_BLP
        drawn_BLP = b_BL1 * jnp.sqrt(fresh_BL1) * draw_noise(problem, step)
        return kept_BLP + known.a_BL1 * fresh_BL1 * (m_BLP + bend_BLP) + drawn_BLP, history

    return walk(problem, advance, (x_BLP, _empty_history(problem, x_BLP, 2)), times_KBR)[0]


def unipc(
    problem: Problem, x_BLP: TokensBLP, times_KBR: TimesKBR, order: int = 2, lower_order_final: int = 15
) -> TokensBLP:
    """Solve by UniPC in its B2(h) form (Zhao et al. 2302.04867, algorithms 1 and 2), of `order` 1 to 3.

    The corrector uses the prediction that the next step needs anyway, so the whole is one order more accurate than the
    predictor for the same evaluations. Grids of fewer than `lower_order_final` steps end with orders 2 and 1.
    """

    def advance(state: UnipcState, step: Step) -> UnipcState:
        x_BLP, before_BLP, history, coefficients = state
        new_BLP = predict(problem, "x0", x_BLP, step.t_BR)
        x_BLP = jnp.where(coefficients.order_BL1 > 0, _correct(before_BLP, coefficients, history, new_BLP), x_BLP)
        history = _push(problem, history, new_BLP, step)
        allowed = _order_allowed(step, times_KBR, order, lower_order_final)
        coefficients = _coefficients(problem, history, step, allowed)
        new_BLP = _update(x_BLP, coefficients, history, coefficients.past_BL1, history.x0_BLP[1:])
        return new_BLP, x_BLP, history, coefficients

    history = _empty_history(problem, x_BLP, order)
    start = Step(jnp.int32(0), times_KBR[0], times_KBR[0])
    return walk(problem, advance, (x_BLP, x_BLP, history, _coefficients(problem, history, start, 0)), times_KBR)[0]


def _empty_history(problem: Problem, x_BLP: TokensBLP, order: int) -> History:
    lambda_BL1 = jnp.full_like(x_BLP[:, :, :1], -jnp.inf)
    return History([jnp.zeros_like(x_BLP)] * order, [lambda_BL1] * order)


def _push(problem: Problem, history: History, x0_BLP: TokensBLP, step: Step) -> History:
    lambda_BL1 = half_log_snr(problem.process, token_times(problem, step.t_BR))
    return History([x0_BLP, *history.x0_BLP[:-1]], [lambda_BL1, *history.lambda_BL1[:-1]])


def _order_allowed(step: Step, times_KBR: TimesKBR, order: int, lower_order_final: int) -> Int[Array, ""] | int:
    left = len(times_KBR) - 1 - step.index
    return jnp.minimum(order, left) if len(times_KBR) - 1 < lower_order_final else order


def _coefficients(problem: Problem, history: History, step: Step, allowed: Int[Array, ""] | int) -> Coefficients:
    """Return the coefficients of a step; its order is at most `allowed` and what the history has predictions for."""
    process = problem.process
    s_BL1, t_BL1 = token_times(problem, step.s_BR), token_times(problem, step.t_BR)
    start_BL1, *past_BL1 = history.lambda_BL1
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
    return Coefficients(shrink_BL1, process.a(s_BL1), h_BL1, ratios_BL1, jnp.minimum(order_BL1, allowed))


def _correct(before_BLP: TokensBLP, coefficients: Coefficients, history: History, new_BLP: TokensBLP) -> TokensBLP:
    """Repeat the previous step with the prediction at its end as the first further node of the polynomial."""
    ends_BL1 = [jnp.ones_like(coefficients.h_BL1), *coefficients.past_BL1]
    coefficients = coefficients._replace(order_BL1=coefficients.order_BL1 + 1)
    return _update(before_BLP, coefficients, history, ends_BL1, [new_BLP, *history.x0_BLP[1:]])


def _update(
    x_BLP: TokensBLP,
    coefficients: Coefficients,
    history: History,
    ratios_BL1: list[PerTokenBL1],
    others_BLP: list[TokensBLP],
    second_derivative_scale: float = 1.0,
) -> TokensBLP:
    """Evaluate equation (2) with the first `order_BL1` - 1 of the other predictions, whose r_i are `ratios_BL1`."""
    m_BLP, integral_BL1 = history.x0_BLP[0], -jnp.expm1(-coefficients.h_BL1)
    moments_BL1 = _moments(coefficients.h_BL1, len(ratios_BL1), second_derivative_scale)
    differences_BLP = [(m - m_BLP) / ratio for m, ratio in zip(others_BLP, ratios_BL1, strict=True)]
    bend_BLP = jnp.zeros_like(m_BLP)
    for count in range(1, len(ratios_BL1) + 1):
        halves = [jnp.full_like(integral_BL1, 0.5)]
        weights_BL1 = halves if count == 1 else _weights(ratios_BL1[:count], moments_BL1[:count])
        sum_BLP = sum(w * d for w, d in zip(weights_BL1, differences_BLP[:count], strict=True))
        bend_BLP = jnp.where(coefficients.order_BL1 == count + 1, sum_BLP, bend_BLP)
    return coefficients.shrink_BL1 * x_BLP + coefficients.a_BL1 * integral_BL1 * (m_BLP + bend_BLP)


def _moments(h_BL1: PerTokenBL1, count: int, second_derivative_scale: float) -> list[PerTokenBL1]:
    """Return c_1 .. c_count of equation (3), c_2 times `second_derivative_scale`."""
    if count == 0:
        return []
    # An infinite step has order 1, or 2 with the weight 1/2, and uses no moment: any finite length will do.
    h_BL1 = jnp.where(jnp.isfinite(h_BL1), h_BL1, 1.0)
    integral_BL1 = -jnp.expm1(-h_BL1)
    # I_j = 1 - j / h I_(j - 1), by parts: upwards it cancels on a short step, downwards on a long one.
    up, down = [integral_BL1], [_last_moment(h_BL1, count)]
    for j in range(1, count + 1):
        up.append(1.0 - j / h_BL1 * up[-1])
    for j in range(count, 1, -1):
        down.insert(0, (1.0 - down[0]) * h_BL1 / j)
    moments = [jnp.where(h_BL1 < 1.0, *pair) / integral_BL1 for pair in zip(down, up[1:], strict=True)]
    return [c * second_derivative_scale if j == 2 else c for j, c in enumerate(moments, start=1)]


def _last_moment(h_BL1: PerTokenBL1, power: int) -> PerTokenBL1:
    """Return I_power, the integral of exp(u - h) (u / h)^power over 0 .. h, by its series; for h up to 1."""
    sum_BL1 = jnp.zeros_like(h_BL1)
    for n in reversed(range(16)):
        sum_BL1 = sum_BL1 * h_BL1 + 1.0 / (math.factorial(n) * (n + power + 1))
    return h_BL1 * jnp.exp(-h_BL1) * sum_BL1


def _weights(nodes: list[PerTokenBL1], moments: list[PerTokenBL1]) -> list[PerTokenBL1]:
    """Solve equation (3), a Vandermonde system, for w by the method of Bjorck and Pereyra (1970)."""
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
