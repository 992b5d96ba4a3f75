"""EDM's sampler (Karras et al. 2206.00364, algorithm 2), for every process.

It solves dz/dsigma = eps for z = x / a and sigma = b / a by Heun's method, after raising the noise level of each step
by fresh noise ("churn"). It is written in terms of x, so that a process may end in a(1) = 0.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp

from sora_jax.diffusion.process import half_log_snr, time_of_half_log_snr
from sora_jax.diffusion.solvers.problem import (
    Problem,
    Step,
    ddim_step,
    draw_noise,
    predict_x0_and_eps,
    token_times,
    walk,
    walk_end,
)
from sora_jax.shapes import TimesBR, TimesKBR, TokensBLP


class Churn(NamedTuple):
    """Configure the fresh noise of `edm`: S_churn, S_tmin, S_tmax and S_noise of Karras et al."""

    amount: float = 0.0  # over the whole grid; 0: none, the solver is deterministic
    first: float = 0.0  # least noise level b / a of a step that gets some
    last: float = math.inf  # greatest noise level b / a of a step that gets some
    noise: float = 1.0  # standard deviation of what is added, as a multiple; 1 is exact


def edm(problem: Problem, x_BLP: TokensBLP, times_KBR: TimesKBR, churn: Churn = Churn()) -> TokensBLP:
    """Solve by second-order steps in sigma; 2 K - 3 evaluations for K times, and K - 1 draws unless churn is 0.

    Every step from sigma in [churn.first, churn.last] starts at sigma (1 + min(churn.amount / (K - 1), sqrt(2) - 1)),
    reached by fresh noise. Where a = 0, sigma is infinite: no noise is added and the step is of first order.
    """
    gamma = min(churn.amount / (len(times_KBR) - 1), math.sqrt(2.0) - 1.0)

    def add_churn(x_BLP: TokensBLP, step: Step) -> tuple[TokensBLP, Step]:
        if gamma == 0:
            return x_BLP, step
        raised_BR = _raised_times(problem, step, gamma, churn)
        return _renoise(problem, x_BLP, step, raised_BR, churn.noise), step._replace(t_BR=raised_BR)

    def advance(x_BLP: TokensBLP, step: Step) -> TokensBLP:
        return _heun_step(problem, *add_churn(x_BLP, step))

    x_BLP = walk(problem, advance, x_BLP, times_KBR[:-1])
    return walk_end(problem, lambda x_BLP, step: ddim_step(problem, *add_churn(x_BLP, step)), x_BLP, times_KBR)


def _raised_times(problem: Problem, step: Step, gamma: float, churn: Churn) -> TimesBR:
    """Return the times of noise level sigma (1 + gamma), or t itself where no noise is added."""
    level_BR = half_log_snr(problem.process, step.t_BR)
    sigma_BR = jnp.exp(-level_BR)
    inside_BR = (sigma_BR >= churn.first) & (sigma_BR <= churn.last)
    churned_BR = inside_BR & jnp.isfinite(level_BR) & (step.s_BR < step.t_BR)
    raised_BR = time_of_half_log_snr(problem.process, level_BR - math.log1p(gamma))
    return jnp.where(churned_BR, jnp.maximum(raised_BR, step.t_BR), step.t_BR)


def _renoise(problem: Problem, x_BLP: TokensBLP, step: Step, raised_BR: TimesBR, scale: float) -> TokensBLP:
    """Add noise to x_BLP to carry it from the times of the step to the raised ones."""
    a, b = problem.process.a, problem.process.b
    t_BL1, raised_BL1 = token_times(problem, step.t_BR), token_times(problem, raised_BR)
    shrink_BL1 = a(raised_BL1) / jnp.where(a(t_BL1) > 0, a(t_BL1), 1.0)
    variance_BL1 = jnp.square(b(raised_BL1)) - jnp.square(shrink_BL1 * b(t_BL1))
    new_BLP = shrink_BL1 * x_BLP + scale * jnp.sqrt(jnp.maximum(variance_BL1, 0.0)) * draw_noise(problem, step)
    return jnp.where(raised_BL1 > t_BL1, new_BLP, x_BLP)


def _heun_step(problem: Problem, x_BLP: TokensBLP, step: Step) -> TokensBLP:
    a, b = problem.process.a, problem.process.b
    t_BL1, s_BL1 = token_times(problem, step.t_BR), token_times(problem, step.s_BR)
    clean_BLP, first_BLP = predict_x0_and_eps(problem, x_BLP, step.t_BR)
    reached_BLP = a(s_BL1) * clean_BLP + b(s_BL1) * first_BLP
    second_BLP = predict_x0_and_eps(problem, reached_BLP, step.s_BR)[1]
    a_BL1 = jnp.where(a(t_BL1) > 0, a(t_BL1), 1.0)
    climb_BL1 = jnp.where(a(t_BL1) > 0, b(s_BL1) - a(s_BL1) / a_BL1 * b(t_BL1), 0.0)
    return reached_BLP + 0.5 * climb_BL1 * (second_BLP - first_BLP)
