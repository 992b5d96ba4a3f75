"""Gaussian noising processes, and the theory that the whole room shares; its equations are cited by number.

**Paths.** Time t runs over [0, 1] for every process: t = 0 is data, t = 1 is noise. With x_0 the data and
eps ~ N(0, I),

    x_t = a(t) x_0 + b(t) eps                                                            (1)

so a process is two functions with a(0) = 1, b(0) = 0, and b / a increasing. What follows from them:

    snr(t) = a(t)^2 / b(t)^2,    lambda(t) = log(a(t) / b(t))                            (2)
    dx_t/dt = a'(t) x_0 + b'(t) eps                                                      (3)

Derivatives come from automatic differentiation, never from a second formula. The expectations of (3) and of eps
given x_t are the velocity of the probability-flow ODE and, up to a factor, the score:

    dx/dt = u(x, t) = E[a' x_0 + b' eps | x_t = x]                                       (4)
    grad log p_t(x) = -E[eps | x_t = x] / b                                              (5)

The solution of (4) from x_1 = noise down to t = 0 has the distribution of the data (Song et al. 2011.13456,
section 4.3; Ma et al. 2401.08740, equation 4).

**Predictions.** What a model predicts, and what it sees, is a linear form in data and noise (`prediction`):

    y = c(t) x_0 + d(t) eps                                                              (6)
    x_0 = (d x_t - b y) / (a d - b c),    eps = (a y - c x_t) / (a d - b c)              (7)

**Steps.** From s to a later t the process goes on by itself, and given x_0 it can be walked back (`posterior`;
Kingma et al. 2107.00630, appendix A; Ho et al. 2006.11239, equations 6 and 7):

    x_t = alpha x_s + sqrt(v) n,    alpha = a_t / a_s,    v = b_t^2 - alpha^2 b_s^2      (8)
    v = b_t^2 g,    g = 1 - snr(t) / snr(s) = 1 - exp(2 lambda(t) - 2 lambda(s))         (9)
    q(x_s | x_t, x_0) = N(m, w),    m = a_s g x_0 + alpha (b_s / b_t)^2 x_t,    w = b_s^2 g   (10)

With a^2 + b^2 = 1 and neighbouring steps of DDPM, v is its beta and w its beta tilde. A model may learn where its
own variance lies between the two (Nichol and Dhariwal 2102.09672, equation 15; DiT 2212.09748, section 3.1):

    log variance = f log v + (1 - f) log w,    f = (1 + output) / 2                      (11)

**The bound.** Up to constants, -log p(x_0) is at most the sum over the steps of (12), in nats; at the first step,
s = 0, the term is the likelihood of x_0 in its bin, 2/255 wide (2006.11239, equations 5 and 13):

    L_t = KL(N(m, w) || N(m_model, variance_model)),    L_first = -log P(bin of x_0)     (12)

**Processes.**

    linear_flow        a = 1 - t,            b = t             rectified flow, Esser et al. 2403.03206       (13)
    trigonometric      a = cos(pi t / 2),    b = sin(pi t / 2) Ma et al. 2401.08740 (their GVP)              (14)
    vp                 a = exp(-beta_0 t / 2 - (beta_1 - beta_0) t^2 / 4), beta 0.1 to 20; 2011.13456        (15)
    vp_linear          a_i^2 = product of (1 - beta_j), j <= i; beta even from 1e-4 to 0.02; 2006.11239      (16)
    vp_scaled_linear   the same, sqrt(beta) even from sqrt(0.00085) to sqrt(0.012); Stable Diffusion         (17)
    vp_cosine          a = cos(f(t)) / cos(f(0)), f = (t + r) / (1 + r) pi / 2, r = 0.008; 2102.09672        (18)
    ..._zero_snr       a -> (a - a(1)) a(t_0) / (a(t_0) - a(1)): no signal at t = 1; Lin et al. 2305.08891   (19)
    edm                a = 1, b = 80 t^7: the noise level sigma = b; Karras et al. 2206.00364                (20)

All but the first and the last preserve variance: a^2 + b^2 = 1. Two processes with equal snr are the same up to
scale: the linear flow reaches the snr of (a, b) at t = b / (a + b). In (20) even times are the spacing rho = 7.

The thousand steps of a discrete process live at

    t_i = (i + 1) / 1000,  i = 0 .. 999                                                  (21)

(after step i the clip has been noised i + 1 times, and t = 0 stays clean). Between the steps of (16) and (17)
log a is a polynomial in t: log(1 - beta) is one to float precision where beta or its root is, and so is its
running sum.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from sora_jax.config import choose

Coefficient = Callable[[Array], Array]

DDPM_STEPS = 1000
DDPM_BETAS = (1e-4, 0.02)
STABLE_DIFFUSION_BETAS = (0.00085, 0.012)
STABLE_DIFFUSION_ROOTS = (math.sqrt(STABLE_DIFFUSION_BETAS[0]), math.sqrt(STABLE_DIFFUSION_BETAS[1]))
VP_SDE_BETAS = (0.1, 20.0)
EDM_SIGMA_MAX = 80.0
EDM_RHO = 7
COSINE_OFFSET = 0.008
COSINE_LAST_BETA = 0.999
_POLYNOMIAL_DEGREE = 8
_BISECTIONS = 48


@dataclasses.dataclass(frozen=True)
class Process:
    """Describe a noising process by the elementwise functions a and b of equation (1)."""

    name: str  # a key of PROCESSES
    a: Coefficient  # scale of the data
    b: Coefficient  # scale of the noise
    # log(a_t / a_s) of (s, t), without cancellation between neighbouring steps; only where variance is preserved.
    log_alpha: Callable[[Array, Array], Array] | None = None
    unit_input: bool = False  # scale x_t to unit variance before a network sees it


def derivatives(process: Process, t: Array) -> tuple[Array, Array]:
    """Return a'(t) and b'(t), shaped like t, by forward-mode differentiation.

    Where b' is infinite, at t = 0 of the discrete processes and of `vp`, return 0, so that a masked token stays
    finite.
    """
    one = jnp.ones_like(t)
    return jax.jvp(process.a, (t,), (one,))[1], jax.jvp(process.b, (t,), (one,))[1]


def half_log_snr(process: Process, t: Array) -> Array:
    """Return lambda = log(a / b) of equation (2), shaped like t; infinite at t = 0, -infinite where a = 0."""
    return jnp.log(process.a(t)) - jnp.log(process.b(t))


def half_log_snr_slope(process: Process, t: Array) -> Array:
    """Return d lambda / dt, shaped like t and negative, by forward-mode differentiation."""
    return jax.jvp(lambda t: half_log_snr(process, t), (t,), (jnp.ones_like(t),))[1]


def time_of_half_log_snr(process: Process, value: Array) -> Array:
    """Return the time at which lambda of equation (2) has this value, by bisection; 0 or 1 beyond the ends."""

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = 0.5 * (low + high)
        later = half_log_snr(process, middle) > value
        return jnp.where(later, middle, low), jnp.where(later, high, middle)

    # zeros_like and ones_like: the loop's carry must have the type of `value`, sharding included.
    return jax.lax.fori_loop(0, _BISECTIONS, halve, (jnp.zeros_like(value), jnp.ones_like(value)))[1]


def corrupt(process: Process, x0: Array, eps: Array, t: Array) -> Array:
    """Return the noised data x_t of equation (1), exactly x0 at t = 0; t has the rank of x0 and broadcasts to it."""
    return process.a(t) * x0 + process.b(t) * eps


def initial(process: Process, eps: Array, t: Array) -> Array:
    """Scale standard normal noise to the variance of x_t: the start of a sampler, sqrt(a^2 + b^2) eps.

    The data are taken to have unit variance. The result is exactly eps where a = 0 and b = 1. Shapes as in `corrupt`.
    """
    return _norm(process, t) * eps


def input_scale(process: Process, t: Array) -> Array:
    """Return the factor on a network's input x_t: 1 / sqrt(sigma^2 + 1) for `edm` (2206.00364, table 1), else 1."""
    return 1.0 / _norm(process, t) if process.unit_input else jnp.ones_like(t)


def lost_snr(process: Process, s: Array, t: Array) -> Array:
    """Return g = 1 - snr(t) / snr(s) of equation (9), for s <= t of one shape.

    It is exactly 1 from s = 0 or to a = 0, and exactly 0 where s = t.
    """
    # Rounding may go beyond either end, and roots of g and of 1 - g are taken.
    if process.log_alpha is not None:
        variance, noise = -jnp.expm1(2.0 * process.log_alpha(s, t)), jnp.square(process.b(t))
        share = jnp.clip(variance / jnp.where(noise > 0, noise, 1.0), 0.0, 1.0)
        # From s = 0 the two are one number by two formulas.
        return jnp.where(s <= 0, (t > 0).astype(t.dtype), share)
    moves = s < t
    fall = half_log_snr(process, jnp.where(moves, t, 1.0)) - half_log_snr(process, jnp.where(moves, s, 0.0))
    return jnp.where(moves, -jnp.expm1(2.0 * jnp.minimum(fall, 0.0)), 0.0)


def transition(process: Process, s: Array, t: Array) -> tuple[Array, Array]:
    """Return (alpha, v) of equation (8) for s <= t of one shape, accurate between neighbouring steps too."""
    if process.log_alpha is not None:
        log_alpha = process.log_alpha(s, t)
        return jnp.exp(log_alpha), -jnp.expm1(2.0 * log_alpha)
    return process.a(t) / process.a(s), jnp.square(process.b(t)) * lost_snr(process, s, t)


@overload
def time_of_step(step: float, steps: int = DDPM_STEPS) -> float: ...
@overload
def time_of_step(step: np.ndarray, steps: int = DDPM_STEPS) -> np.ndarray: ...
@overload
def time_of_step(step: Array, steps: int = DDPM_STEPS) -> Array: ...
def time_of_step(step: ArrayLike, steps: int = DDPM_STEPS) -> ArrayLike:
    """Return the time of a discrete step 0 .. steps - 1 by equation (21)."""
    return (step + 1) / steps


def step_before(t: Array, steps: int = DDPM_STEPS) -> Array:
    """Return the time one discrete step before t; 0 for the first step and for anything earlier."""
    count = t * steps
    whole = jnp.round(count)
    return jnp.maximum(jnp.where(jnp.abs(count - whole) < 1e-3, whole, count) - 1.0, 0.0) / steps


def process_named(name: str) -> Process:
    """Return the process called `name`, a key of PROCESSES.

    Raises:
        UserError: no process has this name.
    """
    return choose("process", name, PROCESSES)


def zero_terminal_snr(process: Process, steps: int = DDPM_STEPS) -> Process:
    """Make a variance-preserving process that ends without signal: equation (19) from the first step t_0 on.

    Before the first step, where (19) would exceed 1, the process stays what it was; the two meet there.
    """
    first, log_alpha_before = time_of_step(0, steps), process.log_alpha
    assert log_alpha_before is not None  # the process preserves variance

    def missing(t: Array) -> Array:
        # 1 - a: with u = b^2 / (1 + a), equation (19) reads u -> (u a_0 - u_0 a_1) / (a_0 - a_1).
        (a_0, b_0), (a_1, _) = _constants(process, first), _constants(process, 1.0)
        u, u_0 = jnp.square(process.b(t)) / (1.0 + process.a(t)), b_0**2 / (1.0 + a_0)
        return (u * a_0 - u_0 * a_1) / (a_0 - a_1)

    def a(t: Array) -> Array:
        a_0, a_1 = _constants(process, first)[0], _constants(process, 1.0)[0]
        # a - a(1) as a(1) (exp(..) - 1): exactly 0 at t = 1, without losing its slope there.
        signal = a_1 * jnp.expm1(-log_alpha_before(t, jnp.ones_like(t))) * a_0 / (a_0 - a_1)
        return jnp.where(t < first, process.a(t), jnp.where(signal > 0.5, 1.0 - missing(t), signal))

    def b(t: Array) -> Array:
        lost = missing(t)
        return jnp.where(t < first, process.b(t), _root(lost * (2.0 - lost)))

    def log_alpha(s: Array, t: Array) -> Array:
        late_s, late_t = jnp.maximum(s, first), jnp.maximum(t, first)
        # The signal that remains at s, a(s) - a(1), as in `a`: 0 from a rounding error before the end.
        left = _constants(process, 1.0)[0] * jnp.expm1(-log_alpha_before(late_s, jnp.ones_like(s)))
        silent = left <= 0
        fall = process.a(late_s) * jnp.expm1(log_alpha_before(late_s, late_t)) / jnp.where(silent, 1.0, left)
        late = jnp.log1p(jnp.where(silent, 0.0, jnp.where(t < 1.0, jnp.maximum(fall, -1.0), -1.0)))
        return log_alpha_before(jnp.minimum(s, first), jnp.minimum(t, first)) + late

    return Process(f"{process.name}_zero_snr", a, b, log_alpha)


@functools.cache
def _constants(process: Process, time: float) -> tuple[float, float]:
    """Compute a and b at one time as numbers, when they are first used: an import must start no device."""
    # A training step forbids transfers, and may be what uses them first.
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
        t = jnp.float32(time)
        return float(process.a(t)), float(process.b(t))


def _norm(process: Process, t: Array) -> Array:
    """Return sqrt(a^2 + b^2), the standard deviation of x_t for data of unit variance."""
    return jnp.sqrt(jnp.square(process.a(t)) + jnp.square(process.b(t)))


def _root(variance: Array) -> Array:
    """Return the square root, with derivative 0 at 0."""
    # Its derivative there is infinite: keep the argument away from 0 in the branch that is not taken, too.
    noisy = variance > 0
    return jnp.where(noisy, jnp.sqrt(jnp.where(noisy, variance, 1.0)), 0.0)


def _gap(s: Array, t: Array) -> Array:
    """Return t - s, without the rounding of two neighbouring steps to float32, 6e-5 of their difference."""
    gap = t - s
    whole = jnp.round(gap * DDPM_STEPS) / DDPM_STEPS
    # The correction is a constant: the derivatives are those of t - s.
    return gap + jax.lax.stop_gradient(jnp.where(jnp.abs(gap - whole) < 1e-7, whole - gap, 0.0))


def _polynomial(name: str, ascending: np.ndarray) -> Process:
    """Make the variance-preserving process with log a^2 = ascending[0] t + ascending[1] t^2 + ..."""
    coefficients = [*map(float, ascending[::-1]), 0.0]

    def log_abar(t: Array) -> Array:
        value = jnp.zeros_like(t)
        for coefficient in coefficients:
            value = value * t + coefficient
        return value

    def log_alpha(s: Array, t: Array) -> Array:
        # p(t) - p(s) = (t - s) q(s), where the coefficients of q are the partial sums of Horner's rule at t.
        value, quotient = jnp.zeros_like(t), jnp.zeros_like(t)
        for coefficient in coefficients[:-1]:
            value = value * t + coefficient
            quotient = quotient * s + value
        return 0.5 * _gap(s, t) * quotient

    return Process(name, lambda t: jnp.exp(0.5 * log_abar(t)), lambda t: _root(-jnp.expm1(log_abar(t))), log_alpha)


def _from_betas(name: str, betas: np.ndarray) -> Process:
    """Make the variance-preserving process that meets every discrete step of a beta schedule: equation (16)."""
    times = time_of_step(np.arange(len(betas)), len(betas))
    powers = times[:, None] ** np.arange(1, _POLYNOMIAL_DEGREE + 1)
    return _polynomial(name, np.linalg.lstsq(powers, np.cumsum(np.log1p(-betas)), rcond=None)[0])


def _quarter_sine(t: Array) -> Array:
    return jnp.sin(0.5 * jnp.pi * t)


def _reversed_quarter_sine(t: Array) -> Array:
    # cos(pi t / 2) in the one form that is exactly 0 at t = 1 in floating point.
    return jnp.sin(0.5 * jnp.pi * (1.0 - t))


def _cosine(name: str) -> Process:
    """Make the process of equation (18), whose last beta is clipped from 1 to 0.999.

    Over the last step a is linear and ends above 0.
    """
    first_angle = 0.5 * math.pi * COSINE_OFFSET / (1.0 + COSINE_OFFSET)
    rate = 0.5 * math.pi / (1.0 + COSINE_OFFSET)
    last = time_of_step(DDPM_STEPS - 2)
    a_last = math.sin(rate * (1.0 - last)) / math.cos(first_angle)
    end = a_last * math.sqrt(1.0 - COSINE_LAST_BETA)

    def a(t: Array) -> Array:
        straight = end + (a_last - end) * (1.0 - t) / (1.0 - last)
        return jnp.where(t > last, straight, jnp.sin(rate * (1.0 - t)) / math.cos(first_angle))

    def b(t: Array) -> Array:
        # 1 - a^2 as a product: cos^2 p - cos^2 q = sin(q - p) sin(q + p).
        variance = jnp.sin(rate * t) * jnp.sin(rate * t + 2.0 * first_angle) / math.cos(first_angle) ** 2
        return _root(jnp.where(t > last, 1.0 - jnp.square(a(t)), variance))

    def log_alpha(s: Array, t: Array) -> Array:
        half_gap, middle = 0.5 * rate * _gap(s, t), first_angle + 0.5 * rate * (s + t)
        fall = 2.0 * jnp.sin(half_gap) * jnp.sin(middle) / math.cos(first_angle)
        inside = jnp.log1p(-jnp.where(t > last, 0.0, fall) / a(s))
        return jnp.where(t > last, jnp.log(a(t) / a(s)), inside)

    return Process(name, a, b, log_alpha)


def _vp_sde(name: str, first: float, last: float) -> Process:
    return _polynomial(name, np.array([-first, 0.5 * (first - last)]))


def _edm(name: str) -> Process:
    return Process(name, jnp.ones_like, lambda t: EDM_SIGMA_MAX * t**EDM_RHO, unit_input=True)


linear_flow = Process("linear_flow", lambda t: 1.0 - t, lambda t: t)
trigonometric = Process("trigonometric", _reversed_quarter_sine, _quarter_sine)
vp = _vp_sde("vp", *VP_SDE_BETAS)
vp_linear = _from_betas("vp_linear", np.linspace(*DDPM_BETAS, DDPM_STEPS))
vp_scaled_linear = _from_betas("vp_scaled_linear", np.linspace(*STABLE_DIFFUSION_ROOTS, DDPM_STEPS) ** 2)
vp_cosine = _cosine("vp_cosine")
vp_linear_zero_snr = zero_terminal_snr(vp_linear)
vp_scaled_linear_zero_snr = zero_terminal_snr(vp_scaled_linear)
edm = _edm("edm")

PROCESSES = {
    process.name: process
    for process in (
        linear_flow, trigonometric, vp, vp_linear, vp_scaled_linear, vp_cosine,
        vp_linear_zero_snr, vp_scaled_linear_zero_snr, edm,
    )
}  # fmt: skip
