"""Solvers, from noise at t = 1 to data at t = 0: which there are, their options, and `solve`."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from sora_jax.diffusion.solvers.ancestral import ddim, ddpm
from sora_jax.diffusion.solvers.edm import edm
from sora_jax.diffusion.solvers.multistep import dpm_solver, unipc
from sora_jax.diffusion.solvers.ode import euler, heun, midpoint, rk4
from sora_jax.diffusion.solvers.problem import FIXED_VARIANCES, Noise, Problem, TimesKBR, predict
from sora_jax.diffusion.solvers.sde import COEFFICIENTS, euler_sde, heun_sde
from sora_jax.errors import UserError
from sora_jax.shapes import TokensBLP

__all__ = [
    "COEFFICIENTS", "FIXED_VARIANCES", "SOLVERS", "Method", "Noise", "Problem", "SolverConfig", "TimesKBR", "ddim",
    "ddpm", "dpm_solver", "draws", "edm", "euler", "euler_sde", "evaluations", "heun", "heun_sde", "midpoint",
    "predict", "rk4", "solve", "solver_named", "unipc",
]  # fmt: skip

Solver = Callable[..., TokensBLP]


@dataclass(frozen=True)
class SolverConfig:
    """Which solver, and the options of those that have some.

    eta: `ddim`'s share of noise drawn anew, 0 none to 1 ancestral. variance: of `ddpm`, one of FIXED_VARIANCES, where
    the problem does not say (`Problem.variance`). coefficient: of `euler_sde` and `heun_sde`, a key of COEFFICIENTS.
    churn ..: those of `edm`, of the whole grid, and the noise levels b / a it is confined to.
    lower_order_final: `dpm2`, `dpm3`, `unipc` and `unipc3` end grids of fewer steps than this with orders 2 and 1.
    halved_curvature: `dpm3` as in the authors' code and diffusers.
    """

    name: str = "euler"
    eta: float = 0.0
    variance: str = "lower"
    coefficient: str = "auto"
    churn: float = 0.0
    churn_from: float = 0.0
    churn_to: float = 1e6
    churn_noise: float = 1.0
    lower_order_final: int = 15
    halved_curvature: bool = False

    def __post_init__(self):
        _method(self.name)
        if not 0.0 <= self.eta <= 1.0:
            raise UserError(f"eta must be between 0 and 1, not {self.eta}.")
        if self.variance not in FIXED_VARIANCES:
            raise UserError(f"variance must be one of {', '.join(FIXED_VARIANCES)}, not {self.variance!r}.")
        if self.coefficient not in COEFFICIENTS:
            raise UserError(f"coefficient must be one of {', '.join(COEFFICIENTS)}, not {self.coefficient!r}.")
        for option in (*_CHURN, *_MULTISTEP):
            if not 0.0 <= getattr(self, option) < math.inf:
                raise UserError(f"{option} must be 0 or more and finite, not {getattr(self, option)}.")


@dataclass(frozen=True)
class Method:
    """A solver, the fields of SolverConfig that are its options, and its model evaluations: each step, last step."""

    solver: Solver
    options: tuple[str, ...] = ()
    each: int = 1
    last: int = 1


_CHURN = ("churn", "churn_from", "churn_to", "churn_noise")
_MULTISTEP = ("lower_order_final",)

SOLVERS: dict[str, Method] = {
    "euler": Method(euler),
    "heun": Method(heun, each=2),
    "midpoint": Method(midpoint, each=2, last=2),
    "rk4": Method(rk4, each=4, last=3),
    "ddpm": Method(ddpm, ("variance",)),
    "ddim": Method(ddim, ("eta",)),
    "dpm1": Method(functools.partial(dpm_solver, order=1)),
    "dpm2": Method(functools.partial(dpm_solver, order=2), _MULTISTEP),
    "dpm3": Method(functools.partial(dpm_solver, order=3), (*_MULTISTEP, "halved_curvature")),
    "unipc": Method(functools.partial(unipc, order=2), _MULTISTEP),
    "unipc3": Method(functools.partial(unipc, order=3), _MULTISTEP),
    "euler_sde": Method(euler_sde, ("coefficient",)),
    "heun_sde": Method(heun_sde, ("coefficient",), each=2),
    "edm": Method(edm, _CHURN, each=2),
}


def solve(config: SolverConfig, problem: Problem, x_BLP: TokensBLP, times_KBR: TimesKBR) -> TokensBLP:
    """The tokens at the last times, from x_BLP at the first, float32 (or x's dtype); a pure function.

    Times descend in every row, or stay: a row held at time 0 keeps its tokens exactly.

    Raises:
        UserError: the solver draws noise and the problem has none, or there is no step to take.
    """
    if len(times_KBR) < 2:
        raise UserError(f"times must be at least 2, a start and an end, not {len(times_KBR)}.")
    method = _method(config.name)
    return method.solver(problem, x_BLP, times_KBR, **{name: getattr(config, name) for name in method.options})


def draws(config: SolverConfig) -> bool:
    """Whether the solver, with these options, asks for `Problem.noise`."""
    always = config.name in ("ddpm", "euler_sde", "heun_sde")
    return always or (config.name == "ddim" and config.eta > 0) or (config.name == "edm" and config.churn > 0)


def evaluations(config: SolverConfig, steps: int) -> int:
    """How often the model is called for a grid of so many steps."""
    method = _method(config.name)
    return method.each * (steps - 1) + method.last


def solver_named(name: str) -> Callable[[Problem, TokensBLP, TimesKBR], TokensBLP]:
    """The solver called `name`, one of the keys of SOLVERS, with its default options.

    Raises:
        UserError: no solver has this name.
    """
    return functools.partial(solve, SolverConfig(name))


def _method(name: str) -> Method:
    if name not in SOLVERS:
        raise UserError(f"solver must be one of {', '.join(SOLVERS)}, not {name!r}.")
    return SOLVERS[name]
