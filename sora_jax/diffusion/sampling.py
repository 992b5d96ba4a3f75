"""From noise to data: a grid of times, a solver and a guidance rule, put together."""

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
from sora_jax.diffusion.solvers import SOLVERS, Problem, SolverConfig, solve
from sora_jax.diffusion.spacing import base_times, count_steps
from sora_jax.diffusion.times import TimesConfig, per_token, sampling_times
from sora_jax.shapes import TimesKBR, TokensBLP

CONDITIONS = ("clean", "replace")


@dataclass(frozen=True)
class SamplingConfig:
    """Configure how a model is sampled."""

    # Number of solver steps; with the spacing `respaced` also "ddim50" or "10,15,20", with `times` a list of times.
    steps: str = "30"
    spacing: str = "even"  # a key of SPACINGS: the table of `diffusion/spacing.py`
    solver: SolverConfig = SolverConfig()  # the solver and its options
    guidance: GuidanceConfig = GuidanceConfig()  # classifier-free guidance; requests may have scales of their own
    # How given tokens condition: `clean`, they are at time 0; `replace`, for models trained without given tokens, they
    # are noised to the time of the others (`diffusion/replacement.py`).
    condition: str = "clean"
    resamplings: int = 0  # of `replace`: how often each step is repeated; each time costs as much as the sample
    skipped: tuple[int, ...] = ()  # steps, from 0, at which the blocks do not run: see `generate/skipping.py`

    def __post_init__(self):
        count = count_steps(self.steps, self.spacing)
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
    return sampling_times(times, jnp.asarray(base_K), tokens_BR, process)
