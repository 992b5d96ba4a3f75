"""Solvers of the probability-flow ODE, from noise at t = 1 to data at t = 0.

A solver walks down a grid of times with one column per noise-level row, so clips on different schedules share
a pack; a row that stays at time 0 keeps its tokens exactly. It sees the model only through `predict`, which
answers in whichever kind the solver's formula is written.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sora_jax.diffusion.prediction import Denoise, convert
from sora_jax.diffusion.process import Process
from sora_jax.diffusion.times import per_token
from sora_jax.errors import UserError
from sora_jax.shapes import TimesBR, TokensBLP

TimesKBR = Float[Array, "K B R"]


@dataclass(frozen=True)
class Problem:
    """What is to be solved: a denoise function, the kind it predicts, its process, and every token's row."""

    denoise: Denoise
    kind: str
    process: Process
    rows_BL: Int[Array, "B L"]


Solver = Callable[[Problem, TokensBLP, TimesKBR], TokensBLP]


def predict(problem: Problem, kind: str, x_BLP: TokensBLP, t_BR: TimesBR) -> TokensBLP:
    """The model's prediction at x_BLP and t_BR, converted to `kind`, float32."""
    y_BLP = problem.denoise(x_BLP, t_BR).astype(jnp.float32)
    return convert(problem.process, problem.kind, kind, y_BLP, x_BLP, _token_times(problem, t_BR))


def euler(problem: Problem, x_BLP: TokensBLP, times_KBR: TimesKBR) -> TokensBLP:
    """First-order steps along the velocity; K - 1 evaluations for K times."""

    def step(x_BLP: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        return _euler_step(problem, x_BLP, *pair), None

    return jax.lax.scan(step, x_BLP, (times_KBR[:-1], times_KBR[1:]))[0]


def heun(problem: Problem, x_BLP: TokensBLP, times_KBR: TimesKBR) -> TokensBLP:
    """Second-order steps: the mean of the velocities at both ends; 2 K - 3 evaluations for K times.

    The last step is Euler's, since at t = 0 the velocity of some predictions is undefined; one step of first
    order leaves the second order of the whole (Karras et al. 2206.00364, algorithm 1).
    """

    def step(x_BLP: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        return _heun_step(problem, x_BLP, *pair), None

    x_BLP = jax.lax.scan(step, x_BLP, (times_KBR[:-2], times_KBR[1:-1]))[0]
    return _euler_step(problem, x_BLP, times_KBR[-2], times_KBR[-1])


SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun}


def solver_named(name: str) -> Solver:
    """The solver called `name`, one of the keys of SOLVERS.

    Raises:
        UserError: no solver has this name.
    """
    if name not in SOLVERS:
        raise UserError(f"solver must be one of {', '.join(SOLVERS)}, not {name!r}.")
    return SOLVERS[name]


def _euler_step(problem: Problem, x_BLP: Array, t_BR: Array, next_BR: Array) -> Array:
    return x_BLP + _token_times(problem, next_BR - t_BR) * predict(problem, "velocity", x_BLP, t_BR)


def _heun_step(problem: Problem, x_BLP: Array, t_BR: Array, next_BR: Array) -> Array:
    h_BL1 = _token_times(problem, next_BR - t_BR)
    first_BLP = predict(problem, "velocity", x_BLP, t_BR)
    second_BLP = predict(problem, "velocity", x_BLP + h_BL1 * first_BLP, next_BR)
    return x_BLP + h_BL1 * 0.5 * (first_BLP + second_BLP)


def _token_times(problem: Problem, t_BR: Array) -> Array:
    return per_token(t_BR, problem.rows_BL)[:, :, None]
