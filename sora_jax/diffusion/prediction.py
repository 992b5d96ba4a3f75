"""Convert any prediction of a model into any other: equations (6) and (7) of `process`.

Every prediction y is a linear form c x_0 + d eps, and so is the model's input a x_0 + b eps:

    type        c        d
    x0          1        0
    eps         0        1
    v          -b        a        Salimans and Ho 2202.00512; a rotation of (x_0, eps) when a^2 + b^2 = 1
    velocity    a'       b'       dx/dt along the path; eps - x_0 for the linear flow
    score       0       -1 / b    equation (5)
    edm         b / r   -a / r    r^2 = a^2 + b^2; the network output of Karras et al. 2206.00364, equation 7, for
                                  data of unit variance

A conversion solves (1) and (6) for (x_0, eps) and forms the wanted prediction of the solution. Where the two equations
are singular, x_0 and eps take their means for data of unit variance, (a, b) x_t / (a^2 + b^2): x_0 from eps or score is
0 where a = 0 (t = 1 of linear_flow, trigonometric and the processes without terminal signal), eps from x_0 is 0 where
b = 0 (t = 0). Predictions v, edm and velocity lose nothing at either end, except velocity at t = 0 where b' is 0 (edm)
or infinite (the discrete processes, vp): there x_0 is x_t and eps is 0.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from sora_jax.config import check, choose
from sora_jax.diffusion.process import Process, derivatives, process_named
from sora_jax.shapes import TimesBR, TokensBLP

# A model with everything but its input and noise levels bound: (x_BLP, t_BR) -> prediction_BLP, x_BLP being x_t
# itself. Where it learns its variance the output is twice as wide: the prediction, then the variance values.
Denoise = Callable[[TokensBLP, TimesBR], TokensBLP]
Form = Callable[[Process, Array], tuple[Array, Array]]

# Two forms of unit size with a determinant below this count as parallel: there the rounding of x_t alone (6e-8) would
# be magnified to more than half a per cent.
_SINGULAR = 1e-5


def _score(process: Process, t: Array) -> tuple[Array, Array]:
    b = process.b(t)
    return jnp.zeros_like(t), jnp.where(b > 0, -1.0 / jnp.where(b > 0, b, 1.0), 0.0)


def _edm(process: Process, t: Array) -> tuple[Array, Array]:
    a, b = process.a(t), process.b(t)
    norm = jnp.sqrt(a * a + b * b)
    return b / norm, -a / norm


FORMS: dict[str, Form] = {
    "x0": lambda process, t: (jnp.ones_like(t), jnp.zeros_like(t)),
    "eps": lambda process, t: (jnp.zeros_like(t), jnp.ones_like(t)),
    "v": lambda process, t: (-process.b(t), process.a(t)),
    "velocity": derivatives,
    "score": _score,
    "edm": _edm,
}


def form_of(prediction_type: str) -> Form:
    """Return the linear form (c, d) of a prediction, a function of process and time.

    Raises:
        UserError: no prediction has this name.
    """
    return choose("prediction", prediction_type, FORMS)


def check_pair(process_name: str, prediction_type: str) -> None:
    """Check that a model with this prediction can be trained on and sampled from this process.

    Raises:
        UserError: an unknown name, or a pair that cannot work: eps or score on a process that ends without signal,
            where the first step down from t = 1 would know nothing of x_0; velocity or score of `edm`, whose sizes,
            7 sigma / t and 1 / sigma, span nine decades, more than float32 can resolve.
    """
    process_named(process_name), form_of(prediction_type)
    refused: tuple[str, ...] = ()
    if process_name.endswith("_zero_snr"):
        refused = ("eps", "score")
    if process_name == "edm":
        refused = ("velocity", "score")
    check(
        prediction_type not in refused,
        f"prediction is {prediction_type!r}; with the process {process_name} it must be one of "
        f"{', '.join(name for name in FORMS if name not in refused)}",
    )


def from_x0_and_eps(process: Process, prediction_type: str, x0: Array, eps: Array, t: Array) -> Array:
    """Return the prediction that a perfect model would make: equation (6).

    x0 and eps have one shape; t has their rank and broadcasts to it.
    """
    c, d = form_of(prediction_type)(process, t)
    return c * x0 + d * eps


def to_x0_and_eps(process: Process, prediction_type: str, y: Array, x_t: Array, t: Array) -> tuple[Array, Array]:
    """Solve a prediction y at x_t for (x_0, eps): equation (7). Shapes as in `from_x0_and_eps`; always finite."""
    a, b = process.a(t), process.b(t)
    c, d = form_of(prediction_type)(process, t)
    # The form of y at unit size: one threshold serves all predictions. It vanishes where velocity is given as 0.
    size = jnp.abs(c) + jnp.abs(d)
    known = size > 0
    scale = jnp.where(known, 1.0 / jnp.where(known, size, 1.0), 0.0)
    c, d, unit_y = c * scale, d * scale, y * scale
    determinant = a * d - b * c
    singular = jnp.abs(determinant) < _SINGULAR * (a + b)
    inverse = 1.0 / jnp.where(singular, 1.0, determinant)
    mean = x_t / (a * a + b * b)
    x0 = y if prediction_type == "x0" else jnp.where(singular, a * mean, (d * x_t - b * unit_y) * inverse)
    eps = y if prediction_type == "eps" else jnp.where(singular, b * mean, (a * unit_y - c * x_t) * inverse)
    return x0, eps


def convert(process: Process, source: str, target: str, y: Array, x_t: Array, t: Array) -> Array:
    """Convert a prediction y at x_t from the type `source` to the type `target`. Shapes as in `from_x0_and_eps`."""
    if form_of(source) is form_of(target):
        return y
    return from_x0_and_eps(process, target, *to_x0_and_eps(process, source, y, x_t, t), t)
