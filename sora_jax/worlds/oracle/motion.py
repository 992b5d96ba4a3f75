"""Read the motion of a shape from its path: fit each law of motion, and measure the error of the best one.

Lengths are in short sides of the frame; clip time u runs from 0 to 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sora_jax.worlds.captions import DIRECTIONS
from sora_jax.worlds.figures import FIGURES

# A path that stays within this is standing still.
_STILL = 0.11
_GROWN = 1.42
_LEAST_TURN = 0.6
_LEAST_GAIN = 0.012
# A straight path strays from its line by less than this share of its length.
_STRAIGHT = 0.09


@dataclass(frozen=True)
class Observation:
    """Measurements of one shape in the n frames that show it in full.

    times_n: clip times. path_n2: centres. diameters_n. turn: radians turned over the clip, turn_gain: the evidence
    for it. kind: its figure. frame: (width, height).
    """

    times_n: np.ndarray
    path_n2: np.ndarray
    diameters_n: np.ndarray
    turn: float
    turn_gain: float
    kind: str
    frame: tuple[float, float]


@dataclass(frozen=True)
class Motion:
    """A motion in the words of captions, and the root-mean-square departure from its law, in short sides."""

    name: str | None
    direction: str | None
    error: float


def read_motion(seen: Observation) -> Motion:
    """Return the motion that explains an observation; fewer than three frames give it no name, or "move" or "still"."""
    if len(seen.times_n) < 3:
        return _too_short(seen)
    start, end, size_error = _line(seen.times_n, seen.diameters_n[:, None])
    ratio = float(end[0] / max(start[0], 1e-6))
    steady, moved = seen.path_n2 - seen.path_n2.mean(0), np.ptp(seen.path_n2, axis=0)
    if moved.max() > _STILL:
        name, direction, error = _moving(seen, float(moved.max()))
    elif ratio > _GROWN or ratio < 1 / _GROWN:
        name, direction, error = ("grow" if ratio > 1 else "shrink"), None, _rms(steady)
    elif abs(seen.turn) > _LEAST_TURN and seen.turn_gain > _LEAST_GAIN:
        name, direction, error = "rotate", _turn_word(seen.turn), _rms(steady)
    else:
        name, direction, error = "still", None, _rms(steady)
    return Motion(name, direction, float(np.hypot(error, size_error / 2)))


def _too_short(seen: Observation) -> Motion:
    if len(seen.times_n) < 2:
        return Motion(None, None, 0.0)
    step = seen.path_n2[-1] - seen.path_n2[0]
    return Motion("move", _direction(step), 0.0) if np.abs(step).max() > _STILL else Motion("still", None, 0.0)


def _moving(seen: Observation, extent: float) -> tuple[str, str | None, float]:
    start, end, straight = _line(seen.times_n, seen.path_n2)
    if straight < _STRAIGHT * extent:
        return "move", _direction(end - start), straight
    turn, round_error = _circle(seen.times_n, seen.path_n2)
    axis, bounce_error = _bounce(seen)
    fits = {"move": straight, "orbit": round_error, "bounce": bounce_error}
    # A circle has one constant more than a bounce to fit with, and a line is a bounce that never meets a wall.
    name = min(fits, key=lambda law: fits[law] * (1.0 if law != "move" else 1.5))
    words = {"move": _direction(end - start), "orbit": _turn_word(turn), "bounce": axis}
    return name, words[name], fits[name]


def _rms(residual: np.ndarray) -> float:
    return float(np.sqrt((residual**2).sum(-1).mean()))


def _turn_word(turn: float) -> str:
    return "clockwise" if turn > 0 else "counterclockwise"


def _direction(vector: np.ndarray) -> str:
    names = list(DIRECTIONS)
    ways = np.array([np.divide(DIRECTIONS[name], np.hypot(*DIRECTIONS[name])) for name in names])
    return names[int((ways @ vector).argmax())]


def _line(times: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the values at u = 0 and u = 1 of the line of least squares, and the root-mean-square residual."""
    basis = np.stack([1 - times, times], -1)
    ends = np.linalg.lstsq(basis, values, rcond=None)[0]
    return ends[0], ends[1], _rms(values - basis @ ends)


def _circle(times: np.ndarray, path: np.ndarray) -> tuple[float, float]:
    """Fit z(u) = hub + A exp(i turn u), linear in hub and A for each turn; return the best turn and its residual."""
    z = path[:, 0] + 1j * path[:, 1]
    turns = np.concatenate([-np.linspace(1.1, 2.1, 21), np.linspace(1.1, 2.1, 21)]) * np.pi
    waves = np.exp(1j * turns[:, None] * times)
    waves, centred = waves - waves.mean(1, keepdims=True), z - z.mean()
    amplitude = (waves.conj() @ centred) / (np.abs(waves) ** 2).sum(1)
    errors = np.sqrt((np.abs(centred - amplitude[:, None] * waves) ** 2).mean(1))
    return float(turns[errors.argmin()]), float(errors.min())


def _bounce(seen: Observation) -> tuple[str, float]:
    """Fit a flight between the walls of the frame, which the edges of the figure touch; return axis and residual."""
    figure, axis = FIGURES[seen.kind], int(np.ptp(seen.path_n2[:, 1]) > np.ptp(seen.path_n2[:, 0]))
    near, far = ((figure.left, figure.right), (figure.up, figure.down))[axis]
    diameter = float(np.median(seen.diameters_n))
    low, high = near * diameter, seen.frame[axis] - far * diameter
    span, along, across = max(high - low, 1e-3), seen.path_n2[:, axis], seen.path_n2[:, 1 - axis]
    speeds = np.linspace(0.9, 2.0, 34) * span
    speeds = np.concatenate([-speeds, speeds])[:, None, None]
    starts = (along[0] + np.linspace(-0.06, 0.06, 9))[:, None]
    flight = starts + speeds * seen.times_n
    flight = low + span - np.abs((flight - low) % (2 * span) - span)
    square = ((flight - along) ** 2).mean(-1).min() + across.var()
    return ("left and right", "up and down")[axis], float(np.sqrt(square))
