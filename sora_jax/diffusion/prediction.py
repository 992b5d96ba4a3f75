"""What a model predicts, and how any prediction becomes any other.

Every kind of prediction y is a linear form in the clean data and the noise, and so is the model's input:

    x_t = a x_0 + b eps                                                                  (1)
    y   = c x_0 + d eps                                                                  (2)

    kind        c     d
    x0          1     0
    eps         0     1
    v          -b     a     Salimans and Ho 2202.00512; a rotation of (x_0, eps) when a^2 + b^2 = 1
    velocity    a'    b'    dx/dt along the path; eps - x_0 for the linear flow

A conversion solves (1) and (2) for (x_0, eps) and writes the wanted form of the solution:

    x_0 = (d x_t - b y) / (a d - b c),    eps = (a y - c x_t) / (a d - b c)              (3)

Where (3) has no solution the unknown half is given as 0, its mean for normalised data: x_0 from eps where
a = 0 (t = 1 of linear_flow and cosine), eps from x_0 where b = 0 (t = 0). The kinds v and velocity lose
nothing at either end, except velocity under vp_linear at t = 0, where b' is infinite.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from sora_jax.diffusion.process import Process, derivatives
from sora_jax.errors import UserError
from sora_jax.shapes import TimesBR, TokensBLP

# A model with everything but its input and noise levels bound: (x_BLP, t_BR) -> prediction_BLP.
Denoise = Callable[[TokensBLP, TimesBR], TokensBLP]
Form = Callable[[Process, Array], tuple[Array, Array]]

# Below this determinant the rounding of x_t alone (6e-8) would be magnified to more than half a per cent.
_SINGULAR = 1e-5

FORMS: dict[str, Form] = {
    "x0": lambda process, t: (jnp.ones_like(t), jnp.zeros_like(t)),
    "eps": lambda process, t: (jnp.zeros_like(t), jnp.ones_like(t)),
    "v": lambda process, t: (-process.b(t), process.a(t)),
    "velocity": derivatives,
}


def check_kind(kind: str) -> str:
    """`kind` itself when it is a key of FORMS.

    Raises:
        UserError: no prediction kind has this name.
    """
    if kind not in FORMS:
        raise UserError(f"prediction must be one of {', '.join(FORMS)}, not {kind!r}.")
    return kind


def express(process: Process, kind: str, x0: Array, eps: Array, t: Array) -> Array:
    """The prediction of this kind that a perfect model would make: equation (2).

    x0 and eps have one shape; t has their rank and broadcasts to it.
    """
    c, d = FORMS[check_kind(kind)](process, t)
    return c * x0 + d * eps


def solve(process: Process, kind: str, y: Array, x_t: Array, t: Array) -> tuple[Array, Array]:
    """(x_0, eps) from a prediction y at x_t: equation (3). Shapes as in `express`; always finite."""
    a, b = process.a(t), process.b(t)
    c, d = FORMS[check_kind(kind)](process, t)
    determinant = a * d - b * c
    x0 = y if kind == "x0" else _divide(d * x_t - b * y, determinant)
    eps = y if kind == "eps" else _divide(a * y - c * x_t, determinant)
    return x0, eps


def convert(process: Process, source: str, target: str, y: Array, x_t: Array, t: Array) -> Array:
    """A prediction of kind `source` at x_t, as the kind `target`. Shapes as in `express`."""
    if check_kind(source) == check_kind(target):
        return y
    return express(process, target, *solve(process, source, y, x_t, t), t)


def _divide(numerator: Array, determinant: Array) -> Array:
    singular = jnp.abs(determinant) < _SINGULAR
    return jnp.where(singular, 0.0, numerator / jnp.where(singular, 1.0, determinant))
