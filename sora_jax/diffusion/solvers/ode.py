"""Runge-Kutta solvers of the probability-flow ODE dx/dt = u(x, t), in steps of time t.

The velocity of a smooth density is bounded for every process, and the orders are those of the textbook. Where data
are finer than the noise b of the last step, so that the model sees them as a point, steps in t reach that point only if
b is linear in t near 0 (linear_flow, trigonometric). Of a unit of noise, for data at one point, 30 steps leave

    process      spacing    last b    euler     heun     midpoint    rk4
    edm          karras     0.002     0.0005    0.022    0.12        0.0015
    edm          even       4e-9      3e-13     2e-4     5e-4        4e-6
    vp_linear    karras     0.01      0.006     0.004    0.002       0.002
    vp_linear    even       0.12      0.015     0.013    0.010       0.010

since b is like t^7 in `edm`, and the last step of `karras` goes from t = 0.22 to 0; and like the square root of t in
the discrete processes and `vp`. There use `ddim`, `dpm2`, `unipc` or `edm`, which end exactly at the model's x_0.
`edm` is Heun's method in the noise level, the sampler of 2206.00364.
"""

import functools

from sora_jax.diffusion.solvers.problem import (
    Problem,
    Step,
    keep_held,
    predict,
    token_times,
    walk,
    walk_end,
)
from sora_jax.shapes import PerTokenBL1, TimesKBR, TokensBLP


def euler(problem: Problem, x_BLP: TokensBLP, times_KBR: TimesKBR) -> TokensBLP:
    """Solve by first-order steps along the velocity; K - 1 evaluations for K times."""
    return walk(problem, functools.partial(_euler_step, problem), x_BLP, times_KBR)


def heun(problem: Problem, x_BLP: TokensBLP, times_KBR: TimesKBR) -> TokensBLP:
    """Solve by second-order steps along the mean velocity of both ends; 2 K - 3 evaluations for K times.

    The last step is Euler's, since at t = 0 the velocity of some predictions is undefined; one step of first order
    leaves the second order of the whole (Karras et al. 2206.00364, algorithm 1).
    """

    def advance(x_BLP: TokensBLP, step: Step) -> TokensBLP:
        h_BL1 = _length(problem, step)
        first_BLP = predict(problem, "velocity", x_BLP, step.t_BR)
        second_BLP = predict(problem, "velocity", x_BLP + h_BL1 * first_BLP, step.s_BR)
        return x_BLP + h_BL1 * 0.5 * (first_BLP + second_BLP)

    x_BLP = walk(problem, advance, x_BLP, times_KBR[:-1])
    return walk_end(problem, functools.partial(_euler_step, problem), x_BLP, times_KBR)


def midpoint(problem: Problem, x_BLP: TokensBLP, times_KBR: TimesKBR) -> TokensBLP:
    """Solve by second-order steps along the velocity half-way; 2 K - 2 evaluations for K times."""

    def advance(x_BLP: TokensBLP, step: Step) -> TokensBLP:
        return x_BLP + _length(problem, step) * _velocities(problem, x_BLP, step, (0.0, 1 / 2))[-1]

    return walk(problem, advance, x_BLP, times_KBR)


def rk4(problem: Problem, x_BLP: TokensBLP, times_KBR: TimesKBR) -> TokensBLP:
    """Solve by the classical fourth-order steps; 4 K - 5 evaluations for K times.

    The last step is Heun's method of third order, whose stages lie at 0, 1/3 and 2/3 of it and so never at
    t = 0; one such step leaves the fourth order of the whole (Hairer, Norsett and Wanner, table II.1.1).
    """

    def advance(x_BLP: TokensBLP, step: Step) -> TokensBLP:
        first, second, third, fourth = _velocities(problem, x_BLP, step, (0.0, 1 / 2, 1 / 2, 1.0))
        return x_BLP + _length(problem, step) / 6 * (first + 2 * second + 2 * third + fourth)

    def end(x_BLP: TokensBLP, step: Step) -> TokensBLP:
        first, _, third = _velocities(problem, x_BLP, step, (0.0, 1 / 3, 2 / 3))
        return keep_held(problem, step, x_BLP, x_BLP + _length(problem, step) / 4 * (first + 3 * third))

    return walk_end(problem, end, walk(problem, advance, x_BLP, times_KBR[:-1]), times_KBR)


def _euler_step(problem: Problem, x_BLP: TokensBLP, step: Step) -> TokensBLP:
    return x_BLP + _length(problem, step) * predict(problem, "velocity", x_BLP, step.t_BR)


def _velocities(problem: Problem, x_BLP: TokensBLP, step: Step, nodes: tuple[float, ...]) -> list[TokensBLP]:
    """Evaluate velocities at fractions of the step, each reached from x along the velocity before it."""
    velocities: list[TokensBLP] = []
    for node in nodes:
        t_BR = step.t_BR + node * (step.s_BR - step.t_BR) if node < 1 else step.s_BR
        at_BLP = x_BLP + node * _length(problem, step) * velocities[-1] if node else x_BLP
        velocities.append(predict(problem, "velocity", at_BLP, t_BR))
    return velocities


def _length(problem: Problem, step: Step) -> PerTokenBL1:
    return token_times(problem, step.s_BR - step.t_BR)
