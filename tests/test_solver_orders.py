"""Every deterministic solver converges at the order of its theory, in float64, under every family of processes.

Grids of different fineness travel in one call, a row each: the coarser ones stand still before they start, which
changes nothing. Between two times away from both ends, since the theory is for a finite lambda; multistep methods
of third order and more start with short steps, so that the lower order of the first two does not cover theirs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures_diffusion import quick_jit
from fixtures_mixtures import PLANE, perfect
from mixture import posterior_means
from scipy import integrate

from sora_jax.diffusion.process import process_named
from sora_jax.diffusion.solvers import SOLVERS, SolverConfig, is_stochastic, solve

ORDERS = {
    "euler": 1, "heun": 2, "midpoint": 2, "rk4": 4, "ddim": 1, "dpm1": 1, "dpm2": 2, "dpm3": 3, "edm": 2,
    "unipc": 3, "unipc3": 4,
}  # fmt: skip
SHORT_START = ("dpm3", "unipc", "unipc3")
TOKENS = 16
# Every solver on both kinds of process, and each family on one more.
CASES = [(name, solver) for solver in ORDERS for name in ("linear_flow", "vp_scaled_linear")]
CASES += [("trigonometric", solver) for solver in ("heun", "rk4")]
CASES += [("edm", solver) for solver in ("dpm2", "unipc3", "edm")]
# Where each process is followed: signal and noise of the same order, a factor of several in their ratio.
STRETCHES = {"linear_flow": (0.8, 0.2), "trigonometric": (0.8, 0.2), "vp_scaled_linear": (0.6, 0.1), "edm": (0.6, 0.4)}
CLOSED = {
    "linear_flow": lambda t: (1 - t, t, -1.0, 1.0),
    "trigonometric": lambda t: (
        np.cos(np.pi * t / 2),
        np.sin(np.pi * t / 2),
        -np.pi / 2 * np.sin(np.pi * t / 2),
        np.pi / 2 * np.cos(np.pi * t / 2),
    ),
    "edm": lambda t: (1.0, 80 * t**7, 0.0, 560 * t**6),
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def starts():
    return np.random.default_rng(0).normal(size=(TOKENS, 2))


def coefficients(name):
    """a, b, a', b' in NumPy where they are one line, else those of the process, whose own tests compare them."""
    if name in CLOSED:
        return CLOSED[name]
    process = process_named(name)

    def evaluate(t):
        pairs = [jax.jvp(f, (jnp.float64(t),), (jnp.float64(1.0),)) for f in (process.a, process.b)]
        return [float(value) for pair in zip(*pairs, strict=True) for value in pair]

    return evaluate


def exact_ends(name, x, start, end):
    """The probability-flow ODE by SciPy's eighth-order Runge-Kutta method."""
    means = jax.jit(lambda a, b, x: posterior_means(PLANE, a, b, x))
    at = coefficients(name)

    def velocity(t, flat):
        a, b, da, db = at(t)
        clean, noise = means(jnp.float64(a), jnp.float64(b), jnp.asarray(flat.reshape(x.shape)))
        return (da * np.asarray(clean) + db * np.asarray(noise)).ravel()

    solved = integrate.solve_ivp(velocity, (start, end), x.ravel(), method="DOP853", rtol=1e-11, atol=1e-12)
    return solved.y[:, -1].reshape(x.shape)


def column(steps, longest, start, end, short_start):
    """Times of one grid, standing still until it has as few steps left as it should take."""
    even = np.linspace(0.0, 1.0, steps + 1)
    shares = np.concatenate([[0.0, steps**-2.0, 2 * steps**-2.0], even[1:]]) if short_start else even
    return start + (end - start) * np.concatenate([np.zeros(longest + 3 - len(shares)), shares])


@pytest.fixture(scope="module")
def wanted():
    found = {}

    def of(name, end):
        if (name, end) not in found:
            start = STRETCHES[name][0]
            a, b, *_ = coefficients(name)(start)
            x = np.hypot(a, b) * starts()
            # The velocity is written with b', which at t = 0 itself may be infinite.
            found[name, end] = x, exact_ends(name, x, start, max(end, 1e-10))
        return found[name, end]

    return of


def errors(config, name, counts, wanted, short_start=False, to_data=False):
    start, end = STRETCHES[name]
    end = 0.0 if to_data else end
    x, ends = wanted(name, end)
    rows_BL = jnp.repeat(jnp.arange(len(counts)), TOKENS)[None]
    columns = [column(n, max(counts), start, end, short_start) for n in counts]
    times_KBR = jnp.asarray(np.stack(columns, axis=1)[:, None, :])
    problem = perfect(name, "v", rows_BL)
    x_BLP = jnp.asarray(np.tile(x, (len(counts), 1))[None])
    found = np.asarray(quick_jit(lambda x, t: solve(config, problem, x, t))(x_BLP, times_KBR))
    return np.sqrt(np.mean((found.reshape(len(counts), *ends.shape) - ends) ** 2, axis=(1, 2)))


def slope(counts, values):
    return -np.polyfit(np.log(counts), np.log(values), 1)[0]


@pytest.mark.parametrize("name, solver", CASES)
def test_order_of_convergence(name, solver, wanted):
    counts = (48, 96, 192)
    config = SolverConfig(solver, lower_order_final=0)
    values = errors(config, name, counts, wanted, short_start=solver in SHORT_START)
    assert abs(slope(counts, values) - ORDERS[solver]) < 0.15, (slope(counts, values), values)


@pytest.mark.parametrize(
    "name, solver, order",
    [
        ("linear_flow", "heun", 2),
        ("linear_flow", "midpoint", 2),
        ("linear_flow", "rk4", 4),
        ("linear_flow", "dpm3", 2),
        ("vp_scaled_linear", "heun", 2),
        ("vp_scaled_linear", "midpoint", 2),
        ("vp_scaled_linear", "dpm2", 1),
    ],
)
def test_order_all_the_way_to_data(name, solver, order, wanted):
    """Even times down to 0: methods in time keep their order; those in lambda end at x_0, off by b^2 of the last step.

    b^2 is of second order in the last step for the linear flow and of first order for the others.
    """
    counts = (24, 48, 96) if order == 4 else (64, 128, 256)
    values = errors(SolverConfig(solver), name, counts, wanted, to_data=True)
    assert abs(slope(counts, values) - order) < 0.15, (slope(counts, values), values)


def test_every_deterministic_solver_is_measured():
    assert set(ORDERS) == {name for name in SOLVERS if not is_stochastic(SolverConfig(name))}


def test_halved_curvature_costs_an_order(wanted):
    """Half the second derivative, as the authors' code and diffusers take it, leaves dpm3 of order 2."""
    counts = (48, 96, 192)
    config = SolverConfig("dpm3", lower_order_final=0, halved_curvature=True)
    values = errors(config, "linear_flow", counts, wanted, short_start=True)
    assert abs(slope(counts, values) - 2) < 0.15, values
