"""Gaussian noising processes: how data becomes noise.

Time t runs over [0, 1] for every process: t = 0 is data, t = 1 is noise. With x_0 the data and eps ~ N(0, I),

    x_t = a(t) x_0 + b(t) eps                                                            (1)

so a process is two functions with a(0) = 1, b(0) = 0 and a decreasing, b increasing. What follows from them:

    snr(t) = a(t)^2 / b(t)^2                                                             (2)
    dx_t/dt = a'(t) x_0 + b'(t) eps                                                      (3)

The expectation of (3) given x_t is the velocity field u(x, t) of the probability-flow ODE dx/dt = u(x, t),
whose solution from x_1 ~ N(0, I) down to t = 0 has the distribution of the data (Song et al. 2011.13456,
section 4.3; Ma et al. 2401.08740, equation 4). Derivatives come from automatic differentiation, never from a
second formula. The processes:

    linear_flow   a = 1 - t,            b = t              rectified flow, Esser et al. 2403.03206    (4)
    cosine        a = cos(pi t / 2),    b = sin(pi t / 2)  variance preserving: a^2 + b^2 = 1         (5)
    vp_linear     a = sqrt(abar(t)),    b = sqrt(1 - abar(t))                                         (6)

In (6) abar is the DDPM product of (1 - beta_i) for 1000 linear beta_i (Ho et al. 2006.11239, section 4),
carried to real t by (7). Two processes with equal snr are the same up to scale: the linear flow reaches the
snr of (a, b) at t = b / (a + b).

The thousand discrete steps live at

    t_i = (i + 1) / 1000,  i = 0 .. 999                                                  (7)

(after step i the clip has been noised i + 1 times, and t = 0 stays clean). Between the steps log abar is a
polynomial in t: log(1 - beta) is one to float precision where beta is, and so is its running sum.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from sora_jax.errors import UserError

Coefficient = Callable[[Array], Array]

DDPM_STEPS = 1000
DDPM_BETAS = (1e-4, 0.02)
_POLYNOMIAL_DEGREE = 8


@dataclass(frozen=True)
class Process:
    """A noising process: its name and the elementwise functions a and b of equation (1)."""

    name: str
    a: Coefficient
    b: Coefficient


def derivatives(process: Process, t: Array) -> tuple[Array, Array]:
    """a'(t) and b'(t), shaped like t, by forward-mode differentiation.

    b' of `vp_linear` is infinite at t = 0 and is given there as 0, so that a masked token stays finite.
    """
    one = jnp.ones_like(t)
    return jax.jvp(process.a, (t,), (one,))[1], jax.jvp(process.b, (t,), (one,))[1]


def snr(process: Process, t: Array) -> Array:
    """Signal-to-noise ratio a^2 / b^2 of equation (2), shaped like t; infinite at t = 0."""
    return jnp.square(process.a(t) / process.b(t))


def corrupt(process: Process, x0: Array, eps: Array, t: Array) -> Array:
    """Noised data x_t of equation (1); t has the rank of x0 and broadcasts to it. Exactly x0 at t = 0."""
    return process.a(t) * x0 + process.b(t) * eps


def time_of_step(step: ArrayLike, steps: int = DDPM_STEPS) -> ArrayLike:
    """Time of a discrete step 0 .. steps - 1 by equation (7)."""
    return (step + 1) / steps


def process_named(name: str) -> Process:
    """The process called `name`, one of the keys of PROCESSES.

    Raises:
        UserError: no process has this name.
    """
    if name not in PROCESSES:
        raise UserError(f"process must be one of {', '.join(PROCESSES)}, not {name!r}.")
    return PROCESSES[name]


def _quarter_sine(t: Array) -> Array:
    return jnp.sin(0.5 * jnp.pi * t)


def _reversed_quarter_sine(t: Array) -> Array:
    # cos(pi t / 2) in the one form that is exactly 0 at t = 1 in floating point.
    return jnp.sin(0.5 * jnp.pi * (1.0 - t))


def _from_betas(name: str, betas: np.ndarray) -> Process:
    """The variance-preserving process that meets every discrete step of a polynomial beta schedule."""
    times = time_of_step(np.arange(len(betas)), len(betas))
    powers = times[:, None] ** np.arange(1, _POLYNOMIAL_DEGREE + 1)
    ascending = np.linalg.lstsq(powers, np.cumsum(np.log1p(-betas)), rcond=None)[0]
    coefficients = [*map(float, ascending[::-1]), 0.0]

    def log_abar(t: Array) -> Array:
        value = jnp.zeros_like(t)
        for coefficient in coefficients:
            value = value * t + coefficient
        return value

    def a(t: Array) -> Array:
        return jnp.exp(0.5 * log_abar(t))

    def b(t: Array) -> Array:
        # The square root has no derivative at 0: keep its argument away from 0 also in the branch not taken.
        variance = -jnp.expm1(log_abar(t))
        noisy = variance > 0
        return jnp.where(noisy, jnp.sqrt(jnp.where(noisy, variance, 1.0)), 0.0)

    return Process(name, a, b)


linear_flow = Process("linear_flow", lambda t: 1.0 - t, lambda t: t)
cosine = Process("cosine", _reversed_quarter_sine, _quarter_sine)
vp_linear = _from_betas("vp_linear", np.linspace(*DDPM_BETAS, DDPM_STEPS))

PROCESSES = {process.name: process for process in (linear_flow, cosine, vp_linear)}
