"""From noise to data: a grid of times, a solver and a guidance rule, put together."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh
from jaxtyping import Array, Int

from sora_jax.config import check, choose
from sora_jax.diffusion.given import Given, limit_times, start
from sora_jax.diffusion.guidance import GuidanceConfig
from sora_jax.diffusion.process import Process, initial
from sora_jax.diffusion.replacement import solve_replacing
from sora_jax.diffusion.solvers import SOLVERS, Problem, SolverConfig, clip_x0, solve
from sora_jax.diffusion.spacing import base_times, count_steps
from sora_jax.diffusion.times import TimesConfig, per_token, sampling_times
from sora_jax.shapes import TimesKBR, TokensBLP

CONDITIONS = ("clean", "replace")


@dataclass(frozen=True)
class SamplingConfig:
    """Configure how a model is sampled."""

    # Number of solver steps; with the spacing `respaced` also "ddim50" or "10,15,20", with `times` a list of times.
    steps: str = "30"
    spacing: str = "even"  # how the steps are spaced over the times, see docs/sampling.md
    solver: SolverConfig = SolverConfig()  # the solver and its options
    guidance: GuidanceConfig = GuidanceConfig()  # classifier-free guidance; requests may have scales of their own
    # How given tokens condition: `clean`, they are at time 0; `replace`, for models trained without given tokens, they
    # are noised to the time of the others (`diffusion/replacement.py`).
    condition: str = "clean"
    resamplings: int = 0  # of `replace`: how often each step is repeated; each time costs as much as the sample
    skipped: tuple[int, ...] = ()  # steps, from 0, at which the blocks do not run: see `generate/skipping.py`
    # Time at which the last step begins: the grid, after its shift by clip size, is stretched to it; 0: it is not.
    # SiT's SDE sampler has 0.04, LTX-Video 0.1 (`shift_terminal` of diffusers).
    last_time: float = 0.0
    # Noise level of the low resolution that a network with `model.low_resolution` reads: more hides more of its faults.
    low_noise: float = 0.0
    # Clip every prediction of x_0 to [-clip_x0, clip_x0], after guidance; 0: no clipping. For models of pixels, which
    # have such bounds.
    clip_x0: float = 0.0

    def __post_init__(self):
        count = count_steps(self.steps, self.spacing)
        last, bound = self.last_time, self.clip_x0
        low = self.low_noise
        check(0 <= low <= 1, f"sampling.low_noise is {low}; it must be from 0 (none) to 1")
        check(0 <= last < 1, f"sampling.last_time is {last}; it must be from 0 (as the spacing has it) to below 1")
        plain = self.spacing != "times" and count > 1
        check(not last or plain, f"sampling.last_time is {last}; with one step, or the spacing 'times', it must be 0")
        check(0 <= bound < math.inf, f"sampling.clip_x0 is {bound}; it must be 0 (none) or above, and finite")
        choose("--condition", self.condition, dict.fromkeys(CONDITIONS))
        check(self.resamplings >= 0, f"--resamplings is {self.resamplings}; it must be 0 or more")
        replaces, w = self.condition == "replace", self.guidance.history
        check(replaces or not self.resamplings, f"--resamplings is {self.resamplings}; it is for --condition=replace")
        check(not replaces or w == 1, f"--history-guidance is {w}; with --condition=replace it must be 1 (none)")
        if self.skipped:
            rising = all(a < b for a, b in zip((0, *self.skipped), (*self.skipped, count)))
            check(rising, f"sampling.skipped is {self.skipped}; it must be rising numbers from 1 to {count - 1}")
            check_skipping(self)


def check_skipping(sampling: SamplingConfig) -> None:
    """Raise a UserError unless every step calls each model exactly once."""
    solver, guidance = sampling.solver, sampling.guidance
    once = [name for name, method in SOLVERS.items() if method.each == method.last == 1]
    check(
        solver.name in once,
        f"--solver is {solver.name}; to skip steps it must be one that calls the model once a step: {', '.join(once)}",
    )
    interval = guidance.start, guidance.end
    always = interval == (0.0, 1.0)
    check(always, f"sampling.guidance.start and end are {interval}; to skip steps they must be 0 and 1")
    w, clean = guidance.history, sampling.condition == "clean"
    check(w == 1, f"--history-guidance is {w}; to skip steps it must be 1 (none)")
    check(clean, f"--condition is {sampling.condition!r}; to skip steps it must be 'clean'")


def sample(
    config: SamplingConfig,
    times: TimesConfig,
    problem: Problem,
    eps_BLP: TokensBLP,
    tokens_BR: Int[Array, "B R"],
    given: Given | None = None,
) -> TokensBLP:
    """Sample data tokens (B, L, P) from standard normal noise; `times` shifts the grid of a row by its clip's size.

    tokens_BR counts the tokens of the clip that a row serves. `given` says which tokens are known: None for none.
    """
    times_KBR = grid_times(config, times, problem.process, tokens_BR)
    problem = clip_x0(problem, config.clip_x0)
    if config.condition == "replace":
        if given is None:  # the steps of a clip are repeated whether or not its company has given tokens
            nothing_BR = jnp.ones_like(times_KBR[0])
            given = Given(jnp.zeros_like(eps_BLP), nothing_BR, nothing_BR)
        return solve_replacing(config.solver, problem, given, eps_BLP, times_KBR, config.resamplings)
    if given is not None:
        times_KBR = limit_times(given, times_KBR)
        x_BLP = start(problem.process, given, eps_BLP, times_KBR[0], problem.rows_BL)
    else:
        start_BL1 = per_token(times_KBR[0], problem.rows_BL)[:, :, None]
        x_BLP = initial(problem.process, eps_BLP, start_BL1)
    return solve(config.solver, problem, x_BLP, times_KBR)


def grid_times(config: SamplingConfig, times: TimesConfig, process: Process, tokens_BR: Int[Array, "B R"]) -> TimesKBR:
    """Return the grid of times of every row, of clips of so many tokens; see `sample`."""
    # The unshifted grid is computed on the host, also when the program is compiled ahead for absent devices.
    with jax.ensure_compile_time_eval(), jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        base_K = np.asarray(base_times(process, config.steps, config.spacing), np.float32)
    if config.spacing == "times":
        return jax.vmap(lambda t: jnp.full_like(tokens_BR, t, jnp.float32))(jnp.asarray(base_K))
    times_KBR = sampling_times(times, jnp.asarray(base_K), tokens_BR, process)
    return _stretch(times_KBR, config.last_time) if config.last_time else times_KBR


def _stretch(times_KBR: TimesKBR, last: float) -> TimesKBR:
    """Stretch the distances of times from 1 so that the last step begins at `last`; 0 stays."""
    # Where a shift has moved all steps to 1, a factor of 0 keeps them there.
    length_1BR = 1.0 - times_KBR[-2:-1]
    factor_1BR = jnp.where(length_1BR > 0, (1.0 - last) / jnp.where(length_1BR > 0, length_1BR, 1.0), 0.0)
    return jnp.where(times_KBR > 0, 1.0 - (1.0 - times_KBR) * factor_1BR, 0.0)
