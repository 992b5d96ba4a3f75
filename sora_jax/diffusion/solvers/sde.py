"""Solvers of reverse-time stochastic equations that share the marginals of the probability-flow ODE.

For every w(t) >= 0 (Ma et al. 2401.08740, equation 5)

    dx = (u(x, t) - w(t) / 2 * score(x, t)) dt + sqrt(w(t)) dW,  t from 1 down to 0,  score = -eps / b     (1)

The coefficient w is free even after training: `sigma` b, `sine` sin(pi t)^2, `linear` t, `constant` 1, `decreasing`
sin(pi t / 2)^4, or `reverse` 2 b b' - 2 b^2 a' / a, that of the process's own reversal (Song et al. 2011.13456,
equation 6), taken as 0 where a = 0 makes it infinite; each times a scale. `auto` is `reverse` for `edm` and `sigma` for
the others. For a quarter of its time `edm` has b below 1/100; there the others are so large beside b^2 that Euler's
steps overshoot and lose variance: for normal data of variance 0.36, 50 steps of Karras et al. give samples of variance
0.18 by `sigma`, of 0.365 by `reverse`.

SiT's code (`willisma/SiT`, transport) calls w / 2 the diffusion: its sigma, increasing-decreasing, linear, constant and
decreasing are `sigma`, `sine`, `linear`, `constant` and `decreasing` with scale 2, its SBDM is `reverse` with scale 1.

The last step adds no noise and is of first order, since (1) has no score at t = 0. It ends at the prediction of x_0
(`tweedie`), or follows the drift of (1) (`mean`, SiT's default, after a last time of 0.04) or that of the ODE (`euler`;
for the linear flow the same as `tweedie`).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from sora_jax.diffusion.prediction import from_x0_and_eps
from sora_jax.diffusion.process import Process, derivatives
from sora_jax.diffusion.solvers.problem import (
    Problem,
    Step,
    ddim_step,
    draw_noise,
    keep_held,
    predict_x0_and_eps,
    token_times,
    walk,
    walk_end,
)
from sora_jax.shapes import PerTokenBL1, TimesBR, TimesKBR, TokensBLP


def _reverse(process: Process, t: Array) -> Array:
    a, b = process.a(t), process.b(t)
    da, db = derivatives(process, t)
    return jnp.where(a > 0, 2.0 * b * (db - b * da / jnp.where(a > 0, a, 1.0)), 0.0)


COEFFICIENTS: dict[str, Callable[[Process, Array], Array]] = {
    "sigma": lambda process, t: process.b(t),
    "sine": lambda process, t: jnp.square(jnp.sin(jnp.pi * t)),
    "linear": lambda process, t: t,
    "constant": lambda process, t: jnp.ones_like(t),
    "decreasing": lambda process, t: jnp.sin(0.5 * jnp.pi * t) ** 4,
    "reverse": _reverse,
    "auto": lambda process, t: _reverse(process, t) if process.name == "edm" else process.b(t),
}


class Noising(NamedTuple):
    """Choose the noise of (1) and the last step."""

    coefficient: str = "auto"  # a key of COEFFICIENTS
    scale: float = 1.0  # factor on the coefficient
    last_step: str = "tweedie"  # a key of LAST_STEPS


def euler_sde(problem: Problem, x_BLP: TokensBLP, times_KBR: TimesKBR, noising: Noising = Noising()) -> TokensBLP:
    """Solve (1) by the Euler-Maruyama method, of weak order 1; K - 1 evaluations and K - 2 draws for K times."""

    def advance(x_BLP: TokensBLP, step: Step) -> TokensBLP:
        spread_BL1 = jnp.sqrt(-_length(problem, step) * _coefficient(problem, noising, step.t_BR))
        return _follow_drift(problem, noising, x_BLP, step) + spread_BL1 * draw_noise(problem, step)

    x_BLP = walk(problem, advance, x_BLP, times_KBR[:-1])
    return walk_end(problem, functools.partial(LAST_STEPS[noising.last_step], problem, noising), x_BLP, times_KBR)


def heun_sde(
    problem: Problem,
    x_BLP: TokensBLP,
    times_KBR: TimesKBR,
    noising: Noising = Noising(),
    noise_first: bool = False,
) -> TokensBLP:
    """Solve (1) by Heun's method, of weak order 2; 2 K - 3 evaluations and K - 2 draws for K times.

    A step averages the drift over both ends; its one draw has the mean variance (Kloeden and Platen 1992, section
    15.1, for noise that does not depend on x). With noise_first the draw has the variance of the start and both drifts
    see it, as in SiT's code: of weak order 1.
    """

    def advance(x_BLP: TokensBLP, step: Step) -> TokensBLP:
        h_BL1, w_BL1 = _length(problem, step), _coefficient(problem, noising, step.t_BR)
        if not noise_first:
            w_BL1 = 0.5 * (w_BL1 + _coefficient(problem, noising, step.s_BR))
        noisy_BLP = x_BLP + jnp.sqrt(-h_BL1 * w_BL1) * draw_noise(problem, step)
        first_BLP = _drift(problem, noising, noisy_BLP if noise_first else x_BLP, step.t_BR)
        second_BLP = _drift(problem, noising, noisy_BLP + h_BL1 * first_BLP, step.s_BR)
        return noisy_BLP + h_BL1 * 0.5 * (first_BLP + second_BLP)

    x_BLP = walk(problem, advance, x_BLP, times_KBR[:-1])
    return walk_end(problem, functools.partial(LAST_STEPS[noising.last_step], problem, noising), x_BLP, times_KBR)


def _follow_drift(problem: Problem, noising: Noising, x_BLP: TokensBLP, step: Step) -> TokensBLP:
    new_BLP = x_BLP + _length(problem, step) * _drift(problem, noising, x_BLP, step.t_BR)
    return keep_held(problem, step, x_BLP, new_BLP)


def _follow_velocity(problem: Problem, noising: Noising, x_BLP: TokensBLP, step: Step) -> TokensBLP:
    return _follow_drift(problem, noising._replace(scale=0.0), x_BLP, step)


LAST_STEPS: dict[str, Callable[[Problem, Noising, TokensBLP, Step], TokensBLP]] = {
    "tweedie": lambda problem, noising, x_BLP, step: ddim_step(problem, x_BLP, step),
    "mean": _follow_drift,
    "euler": _follow_velocity,
}


def _drift(problem: Problem, noising: Noising, x_BLP: TokensBLP, t_BR: TimesBR) -> TokensBLP:
    t_BL1 = token_times(problem, t_BR)
    x0_BLP, eps_BLP = predict_x0_and_eps(problem, x_BLP, t_BR)
    b_BL1 = problem.process.b(t_BL1)
    pull_BL1 = 0.5 * _coefficient(problem, noising, t_BR) / jnp.where(b_BL1 > 0, b_BL1, 1.0)
    return from_x0_and_eps(problem.process, "velocity", x0_BLP, eps_BLP, t_BL1) + pull_BL1 * eps_BLP


def _coefficient(problem: Problem, noising: Noising, t_BR: TimesBR) -> Array:
    return noising.scale * COEFFICIENTS[noising.coefficient](problem.process, token_times(problem, t_BR))


def _length(problem: Problem, step: Step) -> PerTokenBL1:
    return token_times(problem, step.s_BR - step.t_BR)
