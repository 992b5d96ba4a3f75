"""Edit data by the difference of two velocities, without inversion: FlowEdit (Kulikov et al. 2412.08629).

From the source x, whose prompt is known, to z, that of another prompt: at time t of the linear flow, with fresh noise,

    x_t = (1 - t) x + t eps,    z_t = x_t + z - x,    dz/dt = v(z_t | prompt) - v(x_t | source prompt)       (1)

z begins as x at the highest time. Equal prompts leave the source as it is, to the bit.
"""

from sora_jax.config import check
from sora_jax.diffusion.process import corrupt, linear_flow
from sora_jax.diffusion.solvers.problem import Problem, Step, draw_noise, predict, token_times, walk
from sora_jax.shapes import TimesKBR, TokensBLP


def flow_edit(source: Problem, target: Problem, x_BLP: TokensBLP, times_KBR: TimesKBR) -> TokensBLP:
    """Return the edited tokens, by first-order steps of (1); the noise of a step is that of the target problem.

    Raises:
        UserError: the process is not the linear flow.
    """
    flow = source.process is linear_flow
    check(flow, f"--from-prompt is given; the run's process is {source.process.name}, it must be {linear_flow.name}")

    def advance(z_BLP: TokensBLP, step: Step) -> TokensBLP:
        t_BL1, s_BL1 = token_times(target, step.t_BR), token_times(target, step.s_BR)
        noisy_BLP = corrupt(source.process, x_BLP, draw_noise(target, step), t_BL1)
        moved_BLP = predict(target, "velocity", noisy_BLP + (z_BLP - x_BLP), step.t_BR)
        still_BLP = predict(source, "velocity", noisy_BLP, step.t_BR)
        return z_BLP + (s_BL1 - t_BL1) * (moved_BLP - still_BLP)

    return walk(target, advance, x_BLP, times_KBR)
