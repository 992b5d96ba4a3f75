"""What a solver is given, what it may ask of the model, and the walk down a grid of times.

A grid of times has one column per noise-level row, so clips on different schedules share a pack. Every solver
keeps two rules, here, in one place: a step of zero length changes nothing, to the bit, so that a row held at
time 0 keeps its tokens; and a step that ends at time 0 does not evaluate the model there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sora_jax.diffusion.prediction import Denoise, convert, solve
from sora_jax.diffusion.process import Process
from sora_jax.diffusion.times import per_token
from sora_jax.errors import UserError
from sora_jax.shapes import TimesBR, TokensBLP

TimesKBR = Float[Array, "K B R"]
Noise = Callable[[Int[Array, ""]], TokensBLP]
State = TypeVar("State")

FIXED_VARIANCES = ("lower", "upper")
VARIANCES = (*FIXED_VARIANCES, "learned")


@dataclass(frozen=True)
class Problem:
    """What is to be solved: a denoise function, the kind it predicts, its process, and every token's row.

    `noise(step)` gives the standard normal draw of step 0 .. K - 2 to solvers that draw; keyed by clip, it keeps
    packed equal to alone. `variance` is that of ancestral steps: `lower` and `upper` are the variance of the
    posterior for data known exactly and for data of unit variance, `learned` lies between them where the second
    half of the model's output says; None leaves it to the solver's option.
    """

    denoise: Denoise
    kind: str
    process: Process
    rows_BL: Int[Array, "B L"]
    noise: Noise | None = None
    variance: str | None = None

    def __post_init__(self):
        if self.variance is not None and self.variance not in VARIANCES:
            raise UserError(f"variance must be one of {', '.join(VARIANCES)}, not {self.variance!r}.")


class Step(NamedTuple):
    """One step of the grid, from times t to times s <= t; index counts from 0."""

    index: Int[Array, ""]
    t_BR: TimesBR
    s_BR: TimesBR


def walk(problem: Problem, advance: Callable[[State, Step], State], state: State, times_KBR: TimesKBR) -> State:
    """The state after advancing it over every interval of the grid, in one `lax.scan`; K = 1 takes no step.

    The state is a tree of arrays (B, L, anything): tokens whose step has no length keep all of theirs.
    """

    def body(state, step):
        return jax.tree.map(lambda old, new: keep_held(problem, step, old, new), state, advance(state, step)), None

    return jax.lax.scan(body, state, intervals(times_KBR))[0]


def intervals(times_KBR: TimesKBR) -> Step:
    """The K - 1 steps of a grid, stacked."""
    return Step(jnp.arange(len(times_KBR) - 1), times_KBR[:-1], times_KBR[1:])


def last_interval(times_KBR: TimesKBR) -> Step:
    """The last step of a grid."""
    return jax.tree.map(lambda values: values[-1], intervals(times_KBR))


def keep_held(problem: Problem, step: Step, old: Array, new: Array) -> Array:
    """`new` (B, L, anything), but `old` exactly for tokens whose step has no length."""
    return jnp.where(token_times(problem, step.t_BR) == token_times(problem, step.s_BR), old, new)


def token_times(problem: Problem, t_BR: TimesBR) -> Float[Array, "B L 1"]:
    """The time of every token."""
    return per_token(t_BR, problem.rows_BL)[:, :, None]


def evaluate(problem: Problem, x_BLP: TokensBLP, t_BR: TimesBR) -> tuple[TokensBLP, Float[Array, "B L V"]]:
    """The model's prediction and its variance values (V = P, or 0 where it learns none), in x's dtype."""
    y_BLP = problem.denoise(x_BLP, t_BR).astype(x_BLP.dtype)
    width = x_BLP.shape[-1]
    return y_BLP[..., :width], y_BLP[..., width:]


def predict(problem: Problem, kind: str, x_BLP: TokensBLP, t_BR: TimesBR) -> TokensBLP:
    """The model's prediction at x_BLP and t_BR, converted to `kind`, in x's dtype."""
    y_BLP = evaluate(problem, x_BLP, t_BR)[0]
    return convert(problem.process, problem.kind, kind, y_BLP, x_BLP, token_times(problem, t_BR))


def predict_ends(problem: Problem, x_BLP: TokensBLP, t_BR: TimesBR) -> tuple[TokensBLP, TokensBLP]:
    """The model's x_0 and eps at x_BLP and t_BR from one evaluation."""
    y_BLP = evaluate(problem, x_BLP, t_BR)[0]
    return solve(problem.process, problem.kind, y_BLP, x_BLP, token_times(problem, t_BR))


def first_order(problem: Problem, x_BLP: TokensBLP, step: Step) -> TokensBLP:
    """a(s) x_0 + b(s) eps: the exact step for a prediction that stays as it is (DDIM), x_0 itself at s = 0.

    Its error is of second order in the length, and at s = 0 of second order in b(t), however fine the data: it is
    how solvers end whose formulas do not reach s = 0.
    """
    x0_BLP, eps_BLP = predict_ends(problem, x_BLP, step.t_BR)
    s_BL1 = token_times(problem, step.s_BR)
    new_BLP = problem.process.a(s_BL1) * x0_BLP + problem.process.b(s_BL1) * eps_BLP
    return keep_held(problem, step, x_BLP, new_BLP)


def draw(problem: Problem, step: Step) -> TokensBLP:
    """The standard normal noise of a step.

    Raises:
        UserError: the problem has no noise to give.
    """
    if problem.noise is None:
        raise UserError("noise must be given to a solver that draws, not None.")
    return problem.noise(step.index)
