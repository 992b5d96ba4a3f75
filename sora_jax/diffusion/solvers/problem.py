"""The problem that a solver solves, the predictions it may ask of the model, and the scan over a grid of times.

A grid of times has one column per noise-level row, so clips on different schedules share a pack. Every solver obeys two
rules. A step of zero length changes nothing, to the bit: a row held at time 0 keeps its tokens (`keep_held`, here for
all). A step that ends at time 0 does not evaluate the model there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sora_jax.config import check, choose
from sora_jax.diffusion.prediction import Denoise, convert, to_x0_and_eps
from sora_jax.diffusion.process import Process
from sora_jax.diffusion.times import per_token
from sora_jax.shapes import PerTokenBL1, RowsBL, TimesBR, TimesKBR, TokensBLP

Noise = Callable[[Int[Array, ""]], TokensBLP]
State = TypeVar("State")

FIXED_VARIANCES = ("lower", "upper")
VARIANCES = (*FIXED_VARIANCES, "learned")


@dataclass(eq=False)
class Cut:
    """Take a part of the steps of a grid, so that a solve can be watched, and ended, between two calls of one program.

    first, last: the step that the part begins with, and the one behind it, traced. before: the state of the walk that
    the part before left; it does not matter for the first. after: where `walk` leaves its state. Without `first`, no
    step is taken, and `after` is the state that a walk begins with.
    """

    first: Int[Array, ""] | None = None
    last: Int[Array, ""] | None = None
    before: Any = None
    after: Any = None


@dataclass(frozen=True)
class Problem:
    """Define a sampling problem: a model, its process, and the layout of its tokens."""

    denoise: Denoise
    prediction_type: str  # what `denoise` predicts: a key of `prediction.FORMS`
    process: Process
    rows_BL: RowsBL
    # Standard normal noise of step 0 .. K - 2, for stochastic solvers; keyed by clip, it keeps packed equal to alone.
    noise: Noise | None = None
    # Of ancestral steps: `lower` and `upper` are the variance of the posterior for data known exactly and for data of
    # unit variance, `learned` lies between them where the second half of the model's output says; None: the solver's.
    variance: str | None = None
    cut: Cut | None = None  # the part of the grid that is walked; None: all of it

    def __post_init__(self):
        if self.variance is not None:
            choose("variance", self.variance, dict.fromkeys(VARIANCES))


class Step(NamedTuple):
    """Describe one step of the grid, from times t to times s <= t."""

    index: Int[Array, ""]  # type: ignore[assignment]  # from 0; hides `tuple.index`, which nothing calls on a step
    t_BR: TimesBR
    s_BR: TimesBR


def walk(problem: Problem, advance: Callable[[State, Step], State], state: State, times_KBR: TimesKBR) -> State:
    """Advance a state over every interval of the grid, in one `lax.scan`; K = 1 takes no step.

    The state is a tree of arrays (B, L, anything): tokens whose step has no length keep all of theirs.
    """

    def body(state: State, step: Step) -> tuple[State, None]:
        return jax.tree.map(lambda old, new: keep_held(problem, step, old, new), state, advance(state, step)), None

    steps, cut = intervals(times_KBR), problem.cut
    if cut is None:
        return jax.lax.scan(body, state, steps)[0]
    if cut.first is not None and cut.last is not None:
        begins, end = cut.first == 0, jnp.minimum(cut.last, len(times_KBR) - 1)
        state = jax.tree.map(lambda new, before: jnp.where(begins, new, before), state, cut.before)
        at = lambda i: jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), steps)  # noqa: E731
        if len(times_KBR) > 1:  # of a grid of one step, which a solver takes by `walk_end`, nothing is walked
            state = jax.lax.fori_loop(cut.first, end, lambda i, state: body(state, at(i))[0], state)
    cut.after = state
    return state


def walk_end(
    problem: Problem, end: Callable[[TokensBLP, Step], TokensBLP], x_BLP: TokensBLP, times_KBR: TimesKBR
) -> TokensBLP:
    """Take the last step of the grid by `end`, behind a `walk` over the others."""
    cut, step = problem.cut, last_interval(times_KBR)
    if cut is None:
        return end(x_BLP, step)
    if cut.last is None:
        return x_BLP
    return jax.lax.cond(cut.last >= len(times_KBR) - 1, end, lambda x_BLP, _: x_BLP, x_BLP, step)


def intervals(times_KBR: TimesKBR) -> Step:
    """Return the K - 1 steps of a grid, stacked."""
    return Step(jnp.arange(len(times_KBR) - 1), times_KBR[:-1], times_KBR[1:])


def last_interval(times_KBR: TimesKBR) -> Step:
    """Return the last step of a grid."""
    return jax.tree.map(lambda values: values[-1], intervals(times_KBR))


def keep_held(problem: Problem, step: Step, old: Array, new: Array) -> Array:
    """Return `new` (B, L, anything), but exactly `old` for tokens whose step has no length."""
    return jnp.where(token_times(problem, step.t_BR) == token_times(problem, step.s_BR), old, new)


def token_times(problem: Problem, t_BR: TimesBR) -> PerTokenBL1:
    """Return the time of every token."""
    return per_token(t_BR, problem.rows_BL)[:, :, None]


def evaluate(problem: Problem, x_BLP: TokensBLP, t_BR: TimesBR) -> tuple[TokensBLP, Float[Array, "B L V"]]:
    """Return the model's prediction and its variance values (V = P, or 0 where it learns none), in x's dtype."""
    y_BLP = problem.denoise(x_BLP, t_BR).astype(x_BLP.dtype)
    width = x_BLP.shape[-1]
    return y_BLP[..., :width], y_BLP[..., width:]


def clip_x0(problem: Problem, bound: float) -> Problem:
    """Return the problem whose predictions of x_0 are clipped to [-bound, bound]; `problem` itself if it is 0.

    Its model predicts x_0, so every solver and every other prediction, such as eps, follows the clipped one.
    """
    if bound == 0:
        return problem

    def denoise(x_BLP: TokensBLP, t_BR: TimesBR) -> Array:
        y_BLP, values_BLV = evaluate(problem, x_BLP, t_BR)
        source, t_BL1 = problem.prediction_type, token_times(problem, t_BR)
        x0_BLP = convert(problem.process, source, "x0", y_BLP, x_BLP, t_BL1)
        return jnp.concatenate([jnp.clip(x0_BLP, -bound, bound), values_BLV], axis=-1)

    return replace(problem, denoise=denoise, prediction_type="x0")


def predict(problem: Problem, prediction_type: str, x_BLP: TokensBLP, t_BR: TimesBR) -> TokensBLP:
    """Return the model's prediction at x_BLP and t_BR, converted to `prediction_type`, in x's dtype."""
    y_BLP = evaluate(problem, x_BLP, t_BR)[0]
    return convert(problem.process, problem.prediction_type, prediction_type, y_BLP, x_BLP, token_times(problem, t_BR))


def predict_x0_and_eps(problem: Problem, x_BLP: TokensBLP, t_BR: TimesBR) -> tuple[TokensBLP, TokensBLP]:
    """Return the model's x_0 and eps at x_BLP and t_BR from one evaluation."""
    y_BLP = evaluate(problem, x_BLP, t_BR)[0]
    return to_x0_and_eps(problem.process, problem.prediction_type, y_BLP, x_BLP, token_times(problem, t_BR))


def ddim_step(problem: Problem, x_BLP: TokensBLP, step: Step) -> TokensBLP:
    """Step to a(s) x_0 + b(s) eps: exact for a prediction that does not change on the way, x_0 itself at s = 0.

    The error is of second order in the length of the step, and at s = 0 of second order in b(t), however fine the data.
    Solvers whose formulas do not reach s = 0 end with this step.
    """
    x0_BLP, eps_BLP = predict_x0_and_eps(problem, x_BLP, step.t_BR)
    s_BL1 = token_times(problem, step.s_BR)
    new_BLP = problem.process.a(s_BL1) * x0_BLP + problem.process.b(s_BL1) * eps_BLP
    return keep_held(problem, step, x_BLP, new_BLP)


def draw_noise(problem: Problem, step: Step) -> TokensBLP:
    """Draw the standard normal noise of a step.

    Raises:
        UserError: the problem has no noise.
    """
    check(problem.noise, "noise is None; with a stochastic solver it must be given")
    assert problem.noise is not None
    return problem.noise(step.index)
