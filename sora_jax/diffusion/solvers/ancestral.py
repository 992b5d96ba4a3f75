"""Solvers that sample the posterior of the process: ancestral DDPM sampling and DDIM.

Both hold for every process and s < t. They keep a part of the noise and draw the rest anew:

    x_s = a(s) x_0 + sqrt(b(s)^2 - sigma^2) eps + sigma z                                (1)
    sigma = eta b(s) sqrt(1 - snr(t) / snr(s))                                           (2)

(Song et al. 2010.02502, equations 12 and 16, for any a and b.) For eta = 1, (2) is the lower bound of the
posterior's variance and (1) the ancestral step; for eta = 0 nothing is drawn.
"""

import jax.numpy as jnp
from jaxtyping import Array

from sora_jax.diffusion.posterior import learned_log_variance, log_variance_bounds, posterior_mean
from sora_jax.diffusion.prediction import to_x0_and_eps
from sora_jax.diffusion.process import lost_snr
from sora_jax.diffusion.solvers.problem import (
    Problem,
    Step,
    draw_noise,
    evaluate,
    predict_x0_and_eps,
    token_times,
    walk,
)
from sora_jax.shapes import TimesKBR, TokensBLP


def ddpm(problem: Problem, x_BLP: TokensBLP, times_KBR: TimesKBR, variance: str = "lower") -> TokensBLP:
    """Solve by ancestral sampling (Ho et al. 2006.11239, algorithm 2); K - 1 evaluations and draws for K times.

    The variance is `problem.variance`, or `variance` where that is None. The step to time 0 is the mean alone, which
    is the model's x_0.
    """

    def advance(x_BLP: TokensBLP, step: Step) -> TokensBLP:
        s_BL1, t_BL1 = token_times(problem, step.s_BR), token_times(problem, step.t_BR)
        y_BLP, values_BLP = evaluate(problem, x_BLP, step.t_BR)
        x0_BLP, _ = to_x0_and_eps(problem.process, problem.prediction_type, y_BLP, x_BLP, t_BL1)
        mean_BLP = posterior_mean(problem.process, x0_BLP, x_BLP, s_BL1, t_BL1)
        deviation = jnp.exp(0.5 * _log_variance(problem, problem.variance or variance, values_BLP, s_BL1, t_BL1))
        return mean_BLP + jnp.where(s_BL1 > 0, deviation, 0.0) * draw_noise(problem, step)

    return walk(problem, advance, x_BLP, times_KBR)


def ddim(problem: Problem, x_BLP: TokensBLP, times_KBR: TimesKBR, eta: float = 0.0) -> TokensBLP:
    """Solve by steps of equation (1); K - 1 evaluations for K times, and as many draws unless eta is 0.

    With eta = 0 this is Euler's method for x / a in b / a, the form of Karras et al. (2206.00364).
    """

    def advance(x_BLP: TokensBLP, step: Step) -> TokensBLP:
        s_BL1, t_BL1 = token_times(problem, step.s_BR), token_times(problem, step.t_BR)
        x0_BLP, eps_BLP = predict_x0_and_eps(problem, x_BLP, step.t_BR)
        clean_BLP, b_BL1 = problem.process.a(s_BL1) * x0_BLP, problem.process.b(s_BL1)
        if eta == 0:
            return clean_BLP + b_BL1 * eps_BLP
        fresh_BL1 = eta**2 * lost_snr(problem.process, s_BL1, t_BL1)
        drawn_BLP = b_BL1 * jnp.sqrt(fresh_BL1) * draw_noise(problem, step)
        return clean_BLP + b_BL1 * jnp.sqrt(1.0 - fresh_BL1) * eps_BLP + drawn_BLP

    return walk(problem, advance, x_BLP, times_KBR)


def _log_variance(problem: Problem, variance: str, values_BLP: Array, s_BL1: Array, t_BL1: Array) -> Array:
    if variance == "learned":
        return learned_log_variance(problem.process, values_BLP, s_BL1, t_BL1)
    lower, upper = log_variance_bounds(problem.process, s_BL1, t_BL1)
    return lower if variance == "lower" else upper
