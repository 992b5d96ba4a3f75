"""Condition a model that was trained without given tokens: replacement, with the resampling of RePaint (2201.09865).

All tokens of a clip share the clip's time. Before every call of the model the given tokens are overwritten by
a(t) x_0 + b(t) eps of their known values. The model sees them, but the others do not converge to the conditional
distribution: of two Gaussian frames of correlation 0.9 the second has 0.44 of the first as its mean, not 0.9, however
many steps there are. RePaint repeats every step from t to s: noise is added by the process itself, from s back to t,

    x_t = alpha x_s + sqrt(v) z        (alpha, v of `process.transition`; z is drawn anew)               (1)

For the linear flow alpha is (1 - t) / (1 - s). With 10 repetitions that mean is about 0.87. Each costs as much as the
sample.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sora_jax.config import check
from sora_jax.diffusion.given import Given
from sora_jax.diffusion.process import corrupt, initial, transition
from sora_jax.diffusion.solvers import Problem, SolverConfig, solve
from sora_jax.diffusion.solvers.problem import Step, token_times, walk
from sora_jax.shapes import TimesBR, TimesKBR, TokensBLP


def solve_replacing(
    config: SolverConfig,
    problem: Problem,
    given: Given,
    eps_BLP: TokensBLP,
    times_KBR: TimesKBR,
    resamplings: int = 0,
) -> TokensBLP:
    """Solve from the noise eps_BLP at the first times; given tokens are those of ceiling 0 and come back to the bit.

    times_KBR: those of the clips, for all rows. resamplings: how often each step is repeated. A repeated step is a grid
    of its own, so solvers that use earlier steps, or end otherwise than they begin, have their first or last form.

    Raises:
        UserError: steps are repeated, and the problem has no noise.
    """
    known_BL1 = token_times(problem, given.ceiling_BR) <= 0.0

    def denoise(x_BLP: TokensBLP, t_BR: TimesBR) -> TokensBLP:
        noisy_BLP = corrupt(problem.process, given.x0_BLP, eps_BLP, token_times(problem, t_BR))
        return problem.denoise(jnp.where(known_BL1, noisy_BLP, x_BLP), t_BR)

    replacing = dataclasses.replace(problem, denoise=denoise)
    x_BLP = initial(problem.process, eps_BLP, token_times(problem, times_KBR[0]))
    if resamplings:
        check(problem.noise, "noise is None; with resamplings it must be given")
        advance = functools.partial(_repeat_step, config, replacing, resamplings)
        x_BLP = walk(replacing, advance, x_BLP, times_KBR)
    else:
        x_BLP = solve(config, replacing, x_BLP, times_KBR)
    return jnp.where(known_BL1, given.x0_BLP, x_BLP)


def _repeat_step(config: SolverConfig, problem: Problem, resamplings: int, x_BLP: TokensBLP, step: Step) -> TokensBLP:
    """Take a step once and, after adding its noise again by equation (1), `resamplings` times more."""
    assert problem.noise is not None
    draw, times_KBR = problem.noise, jnp.stack([step.t_BR, step.s_BR])
    alpha_BL1, variance_BL1 = transition(
        problem.process, token_times(problem, step.s_BR), token_times(problem, step.t_BR)
    )

    def turn(number: Int[Array, ""], x_BLP: TokensBLP) -> TokensBLP:
        place = 2 * (step.index * (resamplings + 1) + number)  # of the draws: one for the solver, one for equation (1)
        own = dataclasses.replace(problem, noise=lambda _: draw(place), cut=None)
        reached_BLP = solve(config, own, x_BLP, times_KBR)
        noisy_BLP = alpha_BL1 * reached_BLP + jnp.sqrt(variance_BL1) * draw(place + 1)
        return jnp.where(number < resamplings, noisy_BLP, reached_BLP)

    return jax.lax.fori_loop(0, resamplings + 1, turn, x_BLP)
