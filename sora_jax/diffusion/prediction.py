"""What a model predicts, and how any prediction becomes any other: equations (6) and (7) of `process`.

Every kind of prediction y is a linear form c x_0 + d eps, and so is the model's input a x_0 + b eps:

    kind        c        d
    x0          1        0
    eps         0        1
    v          -b        a        Salimans and Ho 2202.00512; a rotation of (x_0, eps) when a^2 + b^2 = 1
    velocity    a'       b'       dx/dt along the path; eps - x_0 for the linear flow
    score       0       -1 / b    equation (5)
    edm         b / r   -a / r    r^2 = a^2 + b^2; the network output of Karras et al. 2206.00364, equation 7, for
                                  data of unit variance

A conversion solves (1) and (6) for (x_0, eps) and writes the wanted form of the solution. Where (1) and (6) say the
same, both halves are given their means for data of unit variance, (a, b) x_t / (a^2 + b^2): x_0 from eps or score is 0
where a = 0 (t = 1 of linear_flow, trigonometric and the processes without terminal signal), eps from x_0 is 0 where
b = 0 (t = 0). The kinds v, edm and velocity lose nothing at either end, except velocity at t = 0 where b' is 0 (edm)
or infinite (the discrete processes, vp): there x_0 is x_t and eps is 0.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from sora_jax.diffusion.process import Process, derivatives, process_named
from sora_jax.errors import UserError
from sora_jax.shapes import TimesBR, TokensBLP

# A model with everything but its input and noise levels bound: (x_BLP, t_BR) -> prediction_BLP, x_BLP being x_t
# itself. Where it learns its variance the output is twice as wide: the prediction, then the variance values.
Denoise = Callable[[TokensBLP, TimesBR], TokensBLP]
Form = Callable[[Process, Array], tuple[Array, Array]]

# The determinant of two forms of unit size under which they are taken for parallel: there the rounding of x_t alone
# (6e-8) would be magnified to more than half a per cent.
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


def check_kind(kind: str) -> str:
    """`kind` itself when it is a key of FORMS.

    Raises:
        UserError: no prediction kind has this name.
    """
    if kind not in FORMS:
        raise UserError(f"prediction must be one of {', '.join(FORMS)}, not {kind!r}.")
    return kind


def check_pair(process_name: str, kind: str) -> None:
    """Whether a model that predicts this kind can be trained on and sampled from this process.

    Raises:
        UserError: an unknown name, or a pair that cannot work: eps or score where the process is made to begin without
            signal, so that the first step down from t = 1 would know nothing of x_0, and velocity and score of `edm`,
            whose sizes, 7 sigma / t and 1 / sigma, span nine decades and more than float32 has.
    """
    process_named(process_name), check_kind(kind)
    if kind in ("eps", "score") and process_name.endswith("_zero_snr"):
        allowed = ", ".join(other for other in FORMS if other not in ("eps", "score"))
        raise UserError(f"prediction must be one of {allowed} with the process {process_name}, not {kind!r}.")
    if kind in ("velocity", "score") and process_name == "edm":
        allowed = ", ".join(other for other in FORMS if other not in ("velocity", "score"))
        raise UserError(f"prediction must be one of {allowed} with the process edm, not {kind!r}.")


def express(process: Process, kind: str, x0: Array, eps: Array, t: Array) -> Array:
    """The prediction of this kind that a perfect model would make: equation (6).

    x0 and eps have one shape; t has their rank and broadcasts to it.
    """
    c, d = FORMS[check_kind(kind)](process, t)
    return c * x0 + d * eps


def solve(process: Process, kind: str, y: Array, x_t: Array, t: Array) -> tuple[Array, Array]:
    """(x_0, eps) from a prediction y at x_t: equation (7). Shapes as in `express`; always finite."""
    a, b = process.a(t), process.b(t)
    c, d = FORMS[check_kind(kind)](process, t)
    # The form of y at unit size, so that one threshold serves all kinds. It vanishes where velocity is given as 0.
    size = jnp.abs(c) + jnp.abs(d)
    known = size > 0
    scale = jnp.where(known, 1.0 / jnp.where(known, size, 1.0), 0.0)
    c, d, unit_y = c * scale, d * scale, y * scale
    determinant = a * d - b * c
    singular = jnp.abs(determinant) < _SINGULAR * (a + b)
    inverse = 1.0 / jnp.where(singular, 1.0, determinant)
    mean = x_t / (a * a + b * b)
    x0 = y if kind == "x0" else jnp.where(singular, a * mean, (d * x_t - b * unit_y) * inverse)
    eps = y if kind == "eps" else jnp.where(singular, b * mean, (a * unit_y - c * x_t) * inverse)
    return x0, eps


def convert(process: Process, source: str, target: str, y: Array, x_t: Array, t: Array) -> Array:
    """A prediction of kind `source` at x_t, as the kind `target`. Shapes as in `express`."""
    if check_kind(source) == check_kind(target):
        return y
    return express(process, target, *solve(process, source, y, x_t, t), t)
