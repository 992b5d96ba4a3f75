"""Classify figures by templates: every kind, turn and softness in one bank.

A soft mask is brought to a canonical grid by its own centroid and root-mean-square radius, so that place and scale
drop out; what is left is compared with the bank by correlation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

from sora_jax.worlds.captions import KINDS
from sora_jax.worlds.figures import FIGURES, coverage

_GRID = 20
_SPAN = 2.0
_FINE, _FINE_SPAN = 80, 1.0
_TURNS_PER_PERIOD = 16
# Width of the softening, in root-mean-square radii: from a sharp large figure to a blurred one of 8 pixels.
_SOFTNESS = (0.07, 0.16, 0.26, 0.36)


@dataclass(frozen=True)
class Likeness:
    """Similarity of the mask of each frame to each kind at each turn.

    scores_TKA: correlation in [-1, 1], for the kinds in the order of KINDS and turns of A equal parts of the kind's
    symmetry angle (all equal for round kinds).
    """

    scores_TKA: np.ndarray

    @property
    def kinds_TK(self) -> np.ndarray:
        return self.scores_TKA.max(-1)


def unit_area(kind: str) -> float:
    """Return the area of a figure of unit diameter."""
    return _unit_areas()[kind]


@lru_cache(maxsize=1)
def _unit_areas() -> dict[str, float]:
    x, y = _fine_grid()
    cell = (2 * _FINE_SPAN / _FINE) ** 2
    return {kind: float(coverage(kind, x, y, 2 * _FINE_SPAN / _FINE).sum() * cell) for kind in KINDS}


def _fine_grid() -> tuple[np.ndarray, np.ndarray]:
    line = (np.arange(_FINE) + 0.5) / _FINE * 2 * _FINE_SPAN - _FINE_SPAN
    return line[None, :].repeat(_FINE, 0), line[:, None].repeat(_FINE, 1)


def period(kind: str) -> float:
    """Return the symmetry angle of a figure in radians; 0 for a round one."""
    return 2 * np.pi / FIGURES[kind].symmetry if FIGURES[kind].symmetry else 0.0


@lru_cache(maxsize=1)
def _bank() -> np.ndarray:
    """Return templates (softness, kind, turn, grid cells), each of zero mean and unit length."""
    x, y = _fine_grid()
    entries = []
    for softness in _SOFTNESS:
        for kind in KINDS:
            turns = np.arange(_TURNS_PER_PERIOD) / _TURNS_PER_PERIOD * period(kind)
            # A round figure looks the same at every turn.
            images = [_turned(kind, x, y, a) for a in (turns if period(kind) else turns[:1])]
            templates = [_template(image, softness) for image in images]
            entries.append(templates if period(kind) else templates * _TURNS_PER_PERIOD)
    bank = np.array(entries, np.float32)
    return bank.reshape(len(_SOFTNESS), len(KINDS), _TURNS_PER_PERIOD, _GRID * _GRID)


def _turned(kind: str, x: np.ndarray, y: np.ndarray, angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return coverage(kind, cos * x + sin * y, cos * y - sin * x, 2 * _FINE_SPAN / _FINE)


def _template(image: np.ndarray, softness: float) -> np.ndarray:
    sharp = moments(image[None])
    soft = ndimage.gaussian_filter(image, softness * sharp[2][0], mode="constant")
    return canonical(soft[None], *moments(soft[None])[1:])[0]


def moments(masks_THW: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mass (T,), centroid (T, 2) as (x, y) and root-mean-square radius (T,) of soft masks, in pixels."""
    y, x = (np.arange(n) + 0.5 for n in masks_THW.shape[1:])
    rows, columns = masks_THW.sum(2), masks_THW.sum(1)
    mass = rows.sum(1)
    safe = np.maximum(mass, 1e-6)
    cx, cy = columns @ x / safe, rows @ y / safe
    square = (columns @ (x * x) + rows @ (y * y)) / safe - cx * cx - cy * cy
    return mass, np.stack([cx, cy], -1), np.sqrt(np.maximum(square, 1e-6))


def canonical(masks_THW: np.ndarray, centres_T2: np.ndarray, radii_T: np.ndarray) -> np.ndarray:
    """Resample masks to the canonical grid, (T, cells): zero mean and unit length, free of place and scale."""
    line = ((np.arange(_GRID) + 0.5) / _GRID * 2 - 1) * _SPAN
    x = centres_T2[:, 0, None] + radii_T[:, None] * line - 0.5
    y = centres_T2[:, 1, None] + radii_T[:, None] * line - 0.5
    frame = np.arange(len(masks_THW))[:, None, None]
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    fx, fy = (x - x0)[:, None, :], (y - y0)[:, :, None]
    # A margin of zeros stands for everything outside the frame.
    padded = np.pad(masks_THW, ((0, 0), (1, 2), (1, 2)))
    xi = np.clip(x0 + 1, 0, padded.shape[2] - 2)[:, None, :]
    yi = np.clip(y0 + 1, 0, padded.shape[1] - 2)[:, :, None]
    top = padded[frame, yi, xi] * (1 - fx) + padded[frame, yi, xi + 1] * fx
    bottom = padded[frame, yi + 1, xi] * (1 - fx) + padded[frame, yi + 1, xi + 1] * fx
    cells = (top * (1 - fy) + bottom * fy).reshape(len(masks_THW), -1)
    cells = cells - cells.mean(1, keepdims=True)
    return cells / np.maximum(np.linalg.norm(cells, axis=1, keepdims=True), 1e-6)


def compare(masks_THW: np.ndarray, centres_T2: np.ndarray, radii_T: np.ndarray) -> Likeness:
    """Compare the soft mask of each frame (values in [0, 1]) with every kind at every turn."""
    cells = canonical(masks_THW, centres_T2, radii_T).astype(np.float32)
    # One small product per kind and softness: BLAS would put threads on the whole, which takes longer than the work.
    scores = cells @ _bank().swapaxes(-1, -2)
    return Likeness(scores.max(0).swapaxes(0, 1))


def read_turn(scores_TA: np.ndarray, kind: str, times_T: np.ndarray) -> tuple[float, float]:
    """Return the radians turned over the clip at a steady rate, clockwise positive, and the gain over standing still.

    Rates that would alias (half the symmetry angle a frame) are left out. Source: maximum likelihood over a grid.
    """
    if not period(kind) or len(times_T) < 3:
        return 0.0, 0.0
    fastest = min(1.1 * np.pi, 0.45 * period(kind) / np.diff(times_T).max())
    rates = np.linspace(-fastest, fastest, 65)
    first = np.arange(_TURNS_PER_PERIOD)
    steps = rates[:, None] * times_T * _TURNS_PER_PERIOD / period(kind)
    place = steps[:, None, :] + first[:, None]
    low = np.floor(place).astype(int)
    share, frame = place - low, np.arange(len(times_T))
    at = scores_TA[frame, low % _TURNS_PER_PERIOD], scores_TA[frame, (low + 1) % _TURNS_PER_PERIOD]
    likely = (at[0] * (1 - share) + at[1] * share).mean(-1).max(-1)
    best = int(likely.argmax())
    return float(rates[best]), float(likely[best] - likely[len(rates) // 2])
