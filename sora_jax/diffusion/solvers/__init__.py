"""Solvers, from noise at t = 1 to data at t = 0: the table of solvers, their options, and `solve`."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from sora_jax.config import check, choose
from sora_jax.diffusion.solvers.ancestral import ddim, ddpm
from sora_jax.diffusion.solvers.edm import Churn, edm
from sora_jax.diffusion.solvers.multistep import dpm_sde, dpm_solver, unipc
from sora_jax.diffusion.solvers.ode import euler, heun, midpoint, rk4
from sora_jax.diffusion.solvers.problem import FIXED_VARIANCES, Noise, Problem, clip_x0, predict
from sora_jax.diffusion.solvers.sde import COEFFICIENTS, LAST_STEPS, Noising, euler_sde, heun_sde
from sora_jax.shapes import TimesKBR, TokensBLP

__all__ = [
    "COEFFICIENTS", "FIXED_VARIANCES", "LAST_STEPS", "SOLVERS", "Churn", "Method", "Noise", "Noising", "Problem",
    "SolverConfig", "clip_x0", "ddim", "ddpm", "dpm_sde", "dpm_solver", "edm", "euler", "euler_sde", "evaluations",
    "heun", "heun_sde", "is_stochastic", "midpoint", "predict", "rk4", "solve", "unipc",
]  # fmt: skip

Solver = Callable[[Problem, TokensBLP, TimesKBR], TokensBLP]


@dataclass(frozen=True)
class SolverConfig:
    """Choose a solver and its options; an option of another solver has no effect."""

    name: str = "euler"  # solver of the sampling equation, see docs/sampling.md
    eta: float = 0.0  # of `ddim`: from 0, deterministic, to 1, ancestral (Song et al. 2010.02502, equation 16)
    variance: str = "lower"  # of `ddpm`: the variance of a step, for models that do not predict it
    coefficient: str = "auto"  # of `euler_sde` and `heun_sde`: how much noise is added at each time
    coefficient_scale: float = 1.0  # of `euler_sde` and `heun_sde`: factor on the coefficient
    last_step: str = "tweedie"  # of `euler_sde` and `heun_sde`: what they end with
    noise_first: bool = False  # of `heun_sde`: add the noise before both evaluations, as SiT's code does
    churn: float = 0.0  # of `edm`: S_churn of Karras et al. 2206.00364, over the whole grid; 0 is deterministic
    churn_from: float = 0.0  # of `edm`: S_tmin, the least noise level b / a that gets churn
    churn_to: float = 1e6  # of `edm`: S_tmax, the greatest noise level b / a that gets churn
    churn_noise: float = 1.0  # of `edm`: S_noise, the factor on the standard deviation of the churn; 1 is exact
    lower_order_final: int = 15  # `dpm2`, `dpm3`, `unipc`, `unipc3` end grids of fewer steps with orders 2 and 1
    # Of `dpm3`: give the second derivative of x_0 half its weight, as the authors' code and diffusers do.
    halved_curvature: bool = False

    def __post_init__(self):
        _method(self.name)
        check(0.0 <= self.eta <= 1.0, f"solver.eta is {self.eta}; it must be from 0 to 1")
        choose("solver.variance", self.variance, dict.fromkeys(FIXED_VARIANCES))
        choose("solver.coefficient", self.coefficient, COEFFICIENTS)
        choose("solver.last_step", self.last_step, LAST_STEPS)
        for option in (*_CHURN, *_MULTISTEP, "coefficient_scale"):
            value = getattr(self, option)
            check(0.0 <= value < math.inf, f"solver.{option} is {value}; it must be 0 or more, and finite")


@dataclass(frozen=True)
class Method:
    """Describe a solver: how it is made, its options, and how often it evaluates the model."""

    make: Callable[[SolverConfig], Solver]
    options: tuple[str, ...] = ()  # the fields of SolverConfig that it reads
    each: int = 1  # model evaluations of every step but the last
    last: int = 1  # model evaluations of the last step


def _ddpm(config: SolverConfig) -> Solver:
    return functools.partial(ddpm, variance=config.variance)


def _ddim(config: SolverConfig) -> Solver:
    return functools.partial(ddim, eta=config.eta)


def _dpm2(config: SolverConfig) -> Solver:
    return functools.partial(dpm_solver, order=2, lower_order_final=config.lower_order_final)


def _dpm3(config: SolverConfig) -> Solver:
    scale = 0.5 if config.halved_curvature else 1.0
    return functools.partial(
        dpm_solver, order=3, lower_order_final=config.lower_order_final, second_derivative_scale=scale
    )


def _unipc(order: int, config: SolverConfig) -> Solver:
    return functools.partial(unipc, order=order, lower_order_final=config.lower_order_final)


def _noising(config: SolverConfig) -> Noising:
    return Noising(config.coefficient, config.coefficient_scale, config.last_step)


def _euler_sde(config: SolverConfig) -> Solver:
    return functools.partial(euler_sde, noising=_noising(config))


def _heun_sde(config: SolverConfig) -> Solver:
    return functools.partial(heun_sde, noising=_noising(config), noise_first=config.noise_first)


def _edm(config: SolverConfig) -> Solver:
    churn = Churn(config.churn, config.churn_from, config.churn_to, config.churn_noise)
    return functools.partial(edm, churn=churn)


_CHURN = ("churn", "churn_from", "churn_to", "churn_noise")
_MULTISTEP = ("lower_order_final",)
_SDE = ("coefficient", "coefficient_scale", "last_step")

SOLVERS: dict[str, Method] = {
    "euler": Method(lambda config: euler),
    "heun": Method(lambda config: heun, each=2),
    "midpoint": Method(lambda config: midpoint, each=2, last=2),
    "rk4": Method(lambda config: rk4, each=4, last=3),
    "ddpm": Method(_ddpm, ("variance",)),
    "ddim": Method(_ddim, ("eta",)),
    "dpm1": Method(lambda config: functools.partial(dpm_solver, order=1)),
    "dpm2": Method(_dpm2, _MULTISTEP),
    "dpm3": Method(_dpm3, (*_MULTISTEP, "halved_curvature")),
    "unipc": Method(functools.partial(_unipc, 2), _MULTISTEP),
    "unipc3": Method(functools.partial(_unipc, 3), _MULTISTEP),
    "dpm2_sde": Method(lambda config: dpm_sde),
    "euler_sde": Method(_euler_sde, _SDE),
    "heun_sde": Method(_heun_sde, (*_SDE, "noise_first"), each=2),
    "edm": Method(_edm, _CHURN, each=2),
}


def solve(config: SolverConfig, problem: Problem, x_BLP: TokensBLP, times_KBR: TimesKBR) -> TokensBLP:
    """Solve for the tokens at the last times, from x_BLP at the first, float32 (or x's dtype); a pure function.

    Times descend in every row, or stay: a row held at time 0 keeps its tokens exactly.

    Raises:
        UserError: a stochastic solver has a problem without noise, or there is no step to take.
    """
    count = len(times_KBR)
    check(count >= 2, f"times has {count} of them; there must be at least 2, a start and an end")
    return _method(config.name).make(config)(problem, x_BLP, times_KBR)


def is_stochastic(config: SolverConfig) -> bool:
    """Return True if the solver, with these options, draws from `Problem.noise`."""
    always = config.name in ("ddpm", "dpm2_sde", "euler_sde", "heun_sde")
    return always or (config.name == "ddim" and config.eta > 0) or (config.name == "edm" and config.churn > 0)


def evaluations(config: SolverConfig, steps: int) -> int:
    """Count the model evaluations of a grid of so many steps."""
    method = _method(config.name)
    return method.each * (steps - 1) + method.last


def _method(name: str) -> Method:
    return choose("solver", name, SOLVERS)
