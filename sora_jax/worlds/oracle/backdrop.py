"""Read the background of a clip: its colour as a plane over the frame, its style and tone, how the camera moves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from sora_jax.worlds.captions import TONES

_SAME_HUE = 45.0
_TEXTURED = 4.5
_SLOPED = 20.0
_PANNED, _ZOOMED = 0.1, 0.09


@dataclass(frozen=True)
class Plane:
    """Background colour as a linear function of place: colours_HW3, and `tone`, its mean (3,)."""

    colours_HW3: np.ndarray
    tone: np.ndarray


def mean_light(colours: np.ndarray) -> np.ndarray:
    """Return the mean of the three channels, on the last axis."""
    return (colours[..., 0] + colours[..., 1] + colours[..., 2]) * np.float32(1 / 3)


def dot(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the inner product of colours, on the last axis."""
    # Sums over an axis of three are many times slower than three products.
    return one[..., 0] * other[..., 0] + one[..., 1] * other[..., 1] + one[..., 2] * other[..., 2]


def around(marks_THW: np.ndarray) -> np.ndarray:
    """Mark these and all pixels within two of them, in each frame."""
    wide = np.pad(marks_THW, ((0, 0), (2, 2), (2, 2)))
    wide = wide[:, 2:-2] | wide[:, 1:-3] | wide[:, 3:-1] | wide[:, :-4] | wide[:, 4:]
    return wide[..., 2:-2] | wide[..., 1:-3] | wide[..., 3:-1] | wide[..., :-4] | wide[..., 4:]


def fit_plane(frames: np.ndarray) -> Plane:
    """Fit a plane to the pixels of the commonest hue, away from shapes; frames (T, H, W, 3) in [0, 255]."""
    height, width = frames.shape[1:3]
    # Shapes never fill half of a frame, so the median is a background colour.
    tone = np.median(frames[:, ::2, ::2].reshape(-1, 3), axis=0)
    departure = frames - tone
    light = mean_light(departure)
    weights = ~around(dot(departure, departure) - 3 * light * light > _SAME_HUE**2)
    if weights.mean() < 0.1:
        return Plane(np.broadcast_to(tone, (height, width, 3)), tone)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    basis = np.stack([np.ones_like(x), x, y], -1).reshape(-1, 3)
    share = weights.sum(0).reshape(-1)
    sums = (weights[..., None] * frames).sum(0).reshape(-1, 3)
    normal = basis.T @ (share[:, None] * basis)
    constants = np.linalg.solve(normal + 1e-3 * np.eye(3), basis.T @ sums)
    return Plane((basis @ constants).reshape(height, width, 3).astype(np.float32), constants[0])


def read_backdrop(frames: np.ndarray, plane: Plane, free_THW: np.ndarray) -> tuple[str, str, str | None]:
    """Return style, tone and camera; the camera is None for an image or a backdrop without texture.

    free_THW marks the pixels without a shape.
    """
    tone = min(TONES, key=lambda name: float(np.abs(np.subtract(TONES[name], plane.tone)).sum()))
    light = mean_light(frames) - mean_light(plane.colours_HW3)
    smooth = ndimage.uniform_filter(light, (0, 3, 3), mode="nearest")
    spread = float(np.sqrt((smooth[free_THW] ** 2).mean())) if free_THW.any() else 0.0
    if spread > _TEXTURED:
        return "textured", tone, _camera(light, free_THW) if len(frames) > 1 else None
    slope = mean_light(plane.colours_HW3)
    return ("gradient" if np.ptp(slope) > _SLOPED else "plain"), tone, None


def _camera(light: np.ndarray, free: np.ndarray) -> str:
    """Read the camera from the flow of the texture: shift and scale per frame pair by least squares (Lucas-Kanade)."""
    short = min(light.shape[1:])
    smooth = ndimage.gaussian_filter(light, (0, 1.0, 1.0))
    middle = (smooth[1:] + smooth[:-1]) / 2
    down, right = np.gradient(middle, axis=(1, 2))
    y, x = np.mgrid[: light.shape[1], : light.shape[2]]
    x, y = x - x.mean(), y - y.mean()
    both = (free[1:] & free[:-1]).astype(np.float32)
    flow = np.stack([right, down, right * x + down * y], -1) * both[..., None]
    flow = flow.reshape(len(both), -1, 3)
    change = ((smooth[:-1] - smooth[1:]) * both).reshape(len(both), -1, 1)
    normal = flow.transpose(0, 2, 1) @ flow + 1e-3 * np.eye(3)
    shift_x, shift_y, scale = np.linalg.solve(normal, flow.transpose(0, 2, 1) @ change)[..., 0].sum(0)
    if abs(scale) > _ZOOMED:
        return "zoom in" if scale > 0 else "zoom out"
    if max(abs(shift_x), abs(shift_y)) < _PANNED * short:
        return "still"
    # What the camera leaves behind slides the other way.
    if abs(shift_x) > abs(shift_y):
        return "pan left" if shift_x > 0 else "pan right"
    return "pan up" if shift_y > 0 else "pan down"
