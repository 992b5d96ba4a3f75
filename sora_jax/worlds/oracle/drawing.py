"""Fit a clean drawing to each frame of a clip, to measure how far its pixels are from it.

A drawing has figures with straight, anti-aliased edges, each in one colour, over a background whose colour is a plane.
All of it is fitted: place, size and turn of each figure, its colour and that of the background. The fit is robust, so
that specks count for what they are and do not tint the drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np

from sora_jax.worlds.figures import FIGURES
from sora_jax.worlds.oracle.backdrop import mean_light

# Of centre x, centre y (pixels), logarithm of the diameter and angle (radians): the differences that derivatives are
# taken over, and the longest step of an iteration.
_DIFFERENCES = (0.1, 0.1, 0.01, 0.01)
_LONGEST = np.array([1.0, 1.0, 0.15, 0.2], np.float32)
_DAMPING = 1e-2
_RIDGE = 1e-6
# Grey levels, a mean over channels: differences above it count linearly and no more by their squares (Huber's loss).
# One iteration for each; large ones first, as an edge that is still out of place differs as much as a speck.
_ASTRAY = (64.0, 32.0, 16.0, 8.0, 4.0)


@dataclass(frozen=True)
class Drawing:
    """Drawings of N frames by themselves, each of the same K kinds of figures.

    places_NK4: centre x and y and diameter, pixels; angle, radians clockwise. colours_NM3: of the figures, then of the
    background's middle and its two slopes. residual_NP3: pixels less drawing, grey levels. distances_NKP: signed
    distance of each pixel from each outline, pixels, negative inside. shares_NMP: what each pixel has of each colour.
    weights_N1P: of the pixels in the fit that gave the colours.
    """

    places_NK4: np.ndarray
    colours_NM3: np.ndarray
    residual_NP3: np.ndarray
    distances_NKP: np.ndarray
    shares_NMP: np.ndarray
    weights_N1P: np.ndarray

    @property
    def off_NP(self) -> np.ndarray:
        """Absolute difference of pixels and drawing, a mean over the channels, grey levels."""
        return mean_light(np.abs(self.residual_NP3))


def fit_drawing(frames: np.ndarray, kinds: Sequence[str], places_NK4: np.ndarray) -> Drawing:
    """Fit a drawing to each of the frames (N, H, W, 3) in [0, 255], from a first guess of the places.

    Kinds in front come first. Source: Gauss-Newton iteration with the colours eliminated (variable projection: Golub
    and Pereyra 1973, as simplified by Kaufman 1975) and the pixels reweighted for Huber's loss.
    """
    size, pixels_NP3, places_NK4 = frames.shape[1:3], frames.reshape(len(frames), -1, 3), places_NK4.astype(np.float32)
    best = drawing = _draw(pixels_NP3, kinds, places_NK4, np.ones_like(pixels_NP3[:, None, :, 0]), size)
    for astray in _ASTRAY:
        weights_N1P = (astray / np.maximum(drawing.off_NP, astray))[:, None]
        places_NK4 = _improved(drawing, weights_N1P, kinds, size) if kinds else places_NK4
        drawing = _draw(pixels_NP3, kinds, places_NK4, weights_N1P, size)
        best = _better(drawing, best)
    return best


def _draw(
    pixels_NP3: np.ndarray, kinds: Sequence[str], places_NK4: np.ndarray, weights_N1P: np.ndarray, size: tuple[int, int]
) -> Drawing:
    """Draw figures at these places in the colours of weighted least squares."""
    found = [_distances(kind, places_NK4[:, k], size) for k, kind in enumerate(kinds)]
    distances_NKP = np.stack(found, 1) if found else np.zeros((len(pixels_NP3), 0, size[0] * size[1]), np.float32)
    shares_NMP = _shares(distances_NKP, size)
    colours_NM3 = _regress(shares_NMP, weights_N1P, pixels_NP3)
    residual_NP3 = pixels_NP3 - shares_NMP.swapaxes(1, 2) @ colours_NM3
    return Drawing(places_NK4, colours_NM3, residual_NP3, distances_NKP, shares_NMP, weights_N1P)


def _better(one: Drawing, other: Drawing) -> Drawing:
    """Take for each frame the drawing with the smaller error."""
    better_N11 = (one.off_NP.sum(1) < other.off_NP.sum(1))[:, None, None]
    return Drawing(*(np.where(better_N11, getattr(one, f.name), getattr(other, f.name)) for f in fields(Drawing)))


@lru_cache(maxsize=16)
def _grid(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return pixel centres x and y, (P,), and the plane functions 1, x and y scaled to [-1, 1], (3, P)."""
    y, x = np.mgrid[: size[0], : size[1]].reshape(2, -1).astype(np.float32) + np.float32(0.5)
    across, down = 2 * x / size[1] - 1, 2 * y / size[0] - 1
    return x, y, np.stack([np.ones_like(x), across, down])


def _distances(kind: str, places_N4: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    x, y, _ = _grid(size)
    centre_x, centre_y, diameter, angle = places_N4.T[:, :, None]
    across, down = (x - centre_x) / diameter, (y - centre_y) / diameter
    cos, sin = np.cos(angle), np.sin(angle)
    return FIGURES[kind].distance(cos * across + sin * down, cos * down - sin * across) * diameter


def _cover(distances: np.ndarray) -> np.ndarray:
    return np.clip(0.5 - distances, 0.0, 1.0)


def _shares(distances_NKP: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    plane_3P = _grid(size)[2]
    left_NP, shares = np.ones_like(distances_NKP, shape=(len(distances_NKP), plane_3P.shape[1])), []
    for distances_NP in distances_NKP.swapaxes(0, 1):
        shares.append(left_NP * _cover(distances_NP))
        left_NP = left_NP - shares[-1]
    return np.concatenate([*(share[:, None] for share in shares), left_NP[:, None] * plane_3P], 1)


def _regress(shares_NMP: np.ndarray, weights_N1P: np.ndarray, values_NPX: np.ndarray) -> np.ndarray:
    """Return the coefficients (N, M, X) of weighted least squares of the values on the shares."""
    weighted_NMP = shares_NMP * weights_N1P
    # The ridge keeps it regular where no pixel shows a figure.
    ridge = _RIDGE * shares_NMP.shape[2] * np.eye(shares_NMP.shape[1], dtype=np.float32)
    return np.linalg.solve(weighted_NMP @ shares_NMP.swapaxes(1, 2) + ridge, weighted_NMP @ values_NPX)


def _improved(drawing: Drawing, weights_N1P: np.ndarray, kinds: Sequence[str], size: tuple[int, int]) -> np.ndarray:
    """Return the places (N, K, 4) after one step of Gauss and Newton."""
    slopes_NPQ3 = _slopes(drawing, kinds, size)
    number, pixels, measures, _ = slopes_NPQ3.shape
    slopes_NPX, shares_NMP = slopes_NPQ3.reshape(number, pixels, -1), drawing.shares_NMP
    # The colours follow every move, so only what they cannot make up for counts.
    slopes_NPX = slopes_NPX - shares_NMP.swapaxes(1, 2) @ _regress(shares_NMP, weights_N1P, slopes_NPX)
    slopes_NQX = slopes_NPX.reshape(slopes_NPQ3.shape).swapaxes(1, 2).reshape(number, measures, -1)
    weighted_NQX = slopes_NQX * weights_N1P.repeat(3, axis=2)
    normal_NQQ = weighted_NQX @ slopes_NQX.swapaxes(1, 2)
    diagonal_NQ = np.einsum("nqq->nq", normal_NQQ)
    damping = _DAMPING * np.eye(measures) * (diagonal_NQ + diagonal_NQ.max(1, keepdims=True) * _RIDGE + 1)[:, None]
    step_NQ1 = np.linalg.solve(normal_NQQ + damping, weighted_NQX @ drawing.residual_NP3.reshape(number, -1, 1))
    step_NK4 = np.clip(step_NQ1.reshape(number, -1, 4), -_LONGEST, _LONGEST)
    return _moved(drawing.places_NK4, step_NK4)


def _moved(places: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Add a step (..., 4) to places (..., 4)."""
    x, y, diameter, angle = np.moveaxis(places, -1, 0)
    size = np.maximum(diameter * np.exp(step[..., 2]), 1.0)
    return np.stack([x + step[..., 0], y + step[..., 1], size, angle + step[..., 3]], -1).astype(np.float32)


def _slopes(drawing: Drawing, kinds: Sequence[str], size: tuple[int, int]) -> np.ndarray:
    """Return the derivatives (N, P, Q, 3) of the drawing by the four measures of each figure, Q = 4 K.

    Behind every figure is the background: a second one there is left out.
    """
    behind_NP3 = _grid(size)[2].T @ drawing.colours_NM3[:, -3:]
    left_NP, slopes = np.ones_like(behind_NP3[..., 0]), []
    for k, kind in enumerate(kinds):
        contrast_NP3 = left_NP[..., None] * (drawing.colours_NM3[:, k, None] - behind_NP3)
        cover_NP = _cover(drawing.distances_NKP[:, k])
        for measure, difference in enumerate(_DIFFERENCES):
            step = np.zeros(4)
            step[measure] = difference
            moved_NP = _cover(_distances(kind, _moved(drawing.places_NK4[:, k], step), size))
            slopes.append(((moved_NP - cover_NP) / difference)[..., None] * contrast_NP3)
        left_NP = left_NP - left_NP * cover_NP
    return np.stack(slopes, 2)
