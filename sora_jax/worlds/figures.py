"""Define the six plane figures of the embedded world: signed distances, extents and symmetry, at unit diameter.

The origin is the centroid, x goes right and y down. Figures stand upright at angle 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_HALF_SIDE = 0.46
_TRIANGLE = 0.62
_ARM, _ARM_HALF_WIDTH = 0.54, 0.16
_RING, _RING_HALF_WIDTH = 0.40, 0.12
_STAR, _STAR_WAIST = 0.62, 0.26


@dataclass(frozen=True)
class Figure:
    """A figure of unit diameter.

    `distance(x, y)` is negative inside. `left`, `right`, `up`, `down` are the upright figure's extents from the
    centroid, `reach` the greatest distance of any point from it. `symmetry` is the order of rotation, 0 if round.
    """

    distance: Callable[[np.ndarray, np.ndarray], np.ndarray]
    left: float
    right: float
    up: float
    down: float
    reach: float
    symmetry: int


def _circle(x, y):
    return np.sqrt(x * x + y * y) - 0.5


def _ring(x, y):
    return np.abs(np.sqrt(x * x + y * y) - _RING) - _RING_HALF_WIDTH


def _square(x, y):
    return np.maximum(np.abs(x), np.abs(y)) - _HALF_SIDE


def _triangle(x, y):
    slope = np.abs(x) * np.float32(np.sqrt(3) / 2) - y * np.float32(0.5)
    return np.maximum(slope, y) - _TRIANGLE / 2


def _cross(x, y):
    long, short = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    return np.maximum(long - _ARM, short - _ARM_HALF_WIDTH)


def _star(x, y):
    # One edge, from a tip to the next waist, serves all ten once the angle is folded into its wedge.
    wedge = np.float32(np.pi / 5)
    angle = np.abs((np.arctan2(x, -y) + wedge) % (2 * wedge) - wedge)
    radius = np.sqrt(x * x + y * y)
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    edge = np.array([_STAR_WAIST * np.cos(wedge) - _STAR, _STAR_WAIST * np.sin(wedge)])
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    return (along - _STAR) * np.float32(normal[0]) + across * np.float32(normal[1])


def _even(half: float) -> tuple[float, float, float, float]:
    return half, half, half, half


_TRIANGLE_SIDE, _TIP_SIDE = _TRIANGLE * np.sqrt(3) / 2, _STAR * np.sin(2 * np.pi / 5)
FIGURES = {
    "circle": Figure(_circle, *_even(0.5), reach=0.5, symmetry=0),
    "square": Figure(_square, *_even(_HALF_SIDE), reach=_HALF_SIDE * np.sqrt(2), symmetry=4),
    "triangle": Figure(
        _triangle, _TRIANGLE_SIDE, _TRIANGLE_SIDE, _TRIANGLE, _TRIANGLE / 2, reach=_TRIANGLE, symmetry=3
    ),
    "cross": Figure(_cross, *_even(_ARM), reach=float(np.hypot(_ARM, _ARM_HALF_WIDTH)), symmetry=4),
    "ring": Figure(_ring, *_even(_RING + _RING_HALF_WIDTH), reach=_RING + _RING_HALF_WIDTH, symmetry=0),
    "star": Figure(_star, _TIP_SIDE, _TIP_SIDE, _STAR, _STAR * np.cos(np.pi / 5), reach=_STAR, symmetry=5),
}


def coverage(kind: str, x: np.ndarray, y: np.ndarray, pixel: np.ndarray | float) -> np.ndarray:
    """Return the share of each pixel that the figure covers, in [0, 1]; x, y and the side `pixel` are in diameters."""
    return np.clip(0.5 - FIGURES[kind].distance(x, y) / pixel, 0.0, 1.0)
