"""Rolling noise levels: a window whose rows are noisier the later they are, and leave it one by one.

A window has rows of history, then n rolling rows, j = 0 .. n - 1. At phase u, from 0 to 1, row j has the base level

    (j + 1 - u) / n                                                                      (1)

At u = 1 row 0 is data. It joins the history, every row moves up by one place, and pure noise enters as the last row
(Rolling Diffusion, 2402.09470; FIFO, 2405.11473). Between two phases a row takes q steps. The grid of an ordinary clip
of n q steps has all levels of (1), so a row is denoised at just the times of that grid, whatever its spacing and shift.

Levels at u = 0 are the ceilings of `Given`: 0 for history, (j + 1) / n for row j. They are data, so that one compiled
program serves all windows.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sora_jax.diffusion.given import Given
from sora_jax.diffusion.history import HISTORY_LEVEL
from sora_jax.diffusion.process import corrupt, initial
from sora_jax.diffusion.solvers import Problem, SolverConfig, solve
from sora_jax.diffusion.solvers.problem import token_times
from sora_jax.shapes import TimesKBR, TokensBLP


def rolling_levels(history: int, rolling: int) -> np.ndarray:
    """Return the base levels of the rows of a window at u = 0, history first: the ceilings of its `Given`."""
    return np.concatenate([np.zeros(history), (1.0 + np.arange(rolling)) / rolling]).astype(np.float32)


def rolling_times(given: Given, times_KBR: TimesKBR, rolling: int) -> Float[Array, "times B R"]:
    """Return the q + 1 times of every row, of the grid of an ordinary clip of n q steps; equation (1)."""
    steps = len(times_KBR) - 1
    substeps, places_K11 = steps // rolling, jnp.arange(steps + 1)[:, None, None]
    first_BR = steps - jnp.round(given.ceiling_BR * steps).astype(jnp.int32)
    # Comparison and sum, not a gather, as in `times.per_token`.
    at = lambda step: jnp.sum(jnp.where(places_K11 == (first_BR + step)[None], times_KBR, 0.0), axis=0)  # noqa: E731
    return jnp.stack([jnp.where(given.ceiling_BR <= 0.0, HISTORY_LEVEL, at(i)) for i in range(substeps + 1)])


def roll(
    solver: SolverConfig,
    problem: Problem,
    given: Given,
    noise: tuple[TokensBLP, TokensBLP],
    times_KBR: TimesKBR,
    begins: Bool[Array, ""],
) -> TokensBLP:
    """Denoise a window from phase 0 to phase 1, in the times of `rolling_times`. The history comes back to the bit.

    given: the clean history, and the rolling rows as the window before left them; where a clip `begins`, they are
    data, which are noised to their levels. The last row is pure noise whatever is there. noise: of the rolling rows,
    and of the history, which the model sees at HISTORY_LEVEL.
    """
    eps_BLP, history_eps_BLP = noise
    level_BL1, t_BL1 = token_times(problem, given.ceiling_BR), token_times(problem, times_KBR[0])
    known_BL1 = level_BL1 <= 0.0
    x_BLP = jnp.where(begins, corrupt(problem.process, given.x0_BLP, eps_BLP, t_BL1), given.x0_BLP)
    x_BLP = jnp.where(level_BL1 >= 1.0, initial(problem.process, eps_BLP, t_BL1), x_BLP)
    shown_BLP = corrupt(problem.process, given.x0_BLP, history_eps_BLP, t_BL1)
    x_BLP = solve(solver, problem, jnp.where(known_BL1, shown_BLP, x_BLP), times_KBR)
    return jnp.where(known_BL1, given.x0_BLP, x_BLP)
