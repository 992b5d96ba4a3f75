"""From data to the noise that makes them: DDIM inversion (Song et al. 2010.02502, section 4.3).

A step of `ddim` goes from x_t to x_s along the path a x_0 + b eps that the model's prediction at x_t gives. To go back
from x_s, that prediction is needed at the x_t that is sought. The path with the velocity u = a'(t) x_0 + b'(t) eps
through x_s is

    (x_0, eps) = (b'(t) x_s - b(s) u, a(s) u - a'(t) x_s) / (a(s) b'(t) - b(s) a'(t))     (1)

u is first the model's at (x_s, t): then the error of the whole falls as 1 / steps. Repeated with the x_t that (1) gives
(fixed-point iteration, Pan et al. 2309.04907), x_t becomes that from which `ddim` steps to x_s, whatever the number of
steps, where the iteration converges: where steps are short against the change of the velocity with x.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sora_jax.config import check
from sora_jax.diffusion.process import derivatives, initial
from sora_jax.diffusion.sampling import SamplingConfig, grid_times
from sora_jax.diffusion.solvers.problem import Problem, Step, clip_x0, predict, token_times, walk
from sora_jax.diffusion.times import TimesConfig
from sora_jax.shapes import TokensBLP


def invert(
    config: SamplingConfig,
    times: TimesConfig,
    problem: Problem,
    x0_BLP: TokensBLP,
    tokens_BR: Int[Array, "B R"],
    iterations: int = 1,
) -> TokensBLP:
    """Return the noise from which `sample`, with the same arguments and the solver `ddim`, makes data tokens x0_BLP.

    A guidance scale other than 1 makes the velocity change faster with x, so the error grows with it. tokens_BR counts
    the tokens of the clip that a row serves. iterations: evaluations of the model for each step.

    Raises:
        UserError: the grid has fewer than two steps, or iterations is below 1.
    """
    check(iterations >= 1, f"iterations is {iterations}; it must be 1 or more")
    times_KBR = grid_times(config, times, problem.process, tokens_BR)
    check(len(times_KBR) > 2, f"sampling.steps is {config.steps}; to invert them there must be 2 or more")
    problem = clip_x0(problem, config.clip_x0)

    def advance(x_BLP: TokensBLP, step: Step) -> TokensBLP:
        def refine(_: Array, reached_BLP: TokensBLP) -> TokensBLP:
            return _rise(problem, step, x_BLP, predict(problem, "velocity", reached_BLP, step.s_BR))

        return jax.lax.fori_loop(0, iterations, refine, x_BLP)

    x_BLP = walk(problem, advance, x0_BLP, times_KBR[::-1])
    start_BL1 = token_times(problem, times_KBR[0])
    return x_BLP / initial(problem.process, jnp.ones_like(start_BL1), start_BL1)


def _rise(problem: Problem, step: Step, x_BLP: TokensBLP, velocity_BLP: TokensBLP) -> TokensBLP:
    """Return the end of the path of equation (1), from the time t of the step, below, to its time s, above."""
    process = problem.process
    low_BL1, high_BL1 = token_times(problem, step.t_BR), token_times(problem, step.s_BR)
    slope_a_BL1, slope_b_BL1 = derivatives(process, high_BL1)
    a_BL1, b_BL1 = process.a(low_BL1), process.b(low_BL1)
    scale_BL1 = 1.0 / (a_BL1 * slope_b_BL1 - b_BL1 * slope_a_BL1)
    x0_BLP = scale_BL1 * (slope_b_BL1 * x_BLP - b_BL1 * velocity_BLP)
    eps_BLP = scale_BL1 * (a_BL1 * velocity_BLP - slope_a_BL1 * x_BLP)
    return process.a(high_BL1) * x0_BLP + process.b(high_BL1) * eps_BLP
