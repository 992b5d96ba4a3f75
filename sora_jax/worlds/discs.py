"""Draw discs and squares on a white ground, all frames at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_PUBLISHED = 256  # pixels of a side of the published frames
_EDGE = 0.03  # of the squared radius, over which the edge of the published balls fades


def draw_area(
    centres_TN2: np.ndarray, radii_N: np.ndarray, colours: Sequence, squares: Sequence[bool], size: int
) -> np.ndarray:
    """Colour every pixel by the share of it that is covered: uint8 (T, size, size, 3).

    centres_TN2: (x, y), y up, in widths of the frame; radii_N, the half sides of squares, too. Figures may touch but
    not overlap. The sum of a colour over all pixels is that of the area of its figure, at any resolution.
    """
    edges = np.arange(size + 1) / size
    canvas = np.full((len(centres_TN2), size, size, 3), 255, np.float32)
    for (x, y), radius, square, colour in zip(centres_TN2.transpose(1, 2, 0), radii_N, squares, colours, strict=True):
        cover = square_cover if square else disc_cover
        share = cover(edges - x[:, None], 1 - edges - y[:, None], radius)
        for channel in np.flatnonzero(np.array(colour) < 255):
            canvas[..., channel] += share * np.float32(colour[channel] - 255)
    return np.clip(canvas + np.float32(0.5), 0, 255).astype(np.uint8)


def draw_published(
    centres_TN2: np.ndarray, radii_N: np.ndarray, colours: Sequence, squares: Sequence[bool], size: int
) -> np.ndarray:
    """Draw as the published generator does, at 256 x 256, and average down to `size`; arguments as `draw_area`.

    Its pixels are at 0, 1/255, ..., 1, so that a reader who takes them for those of 256 columns finds all lengths
    short by 1/256; and its ball fades over the outer 3 % of the squared radius.
    """
    canvas = np.full((len(centres_TN2), _PUBLISHED, _PUBLISHED, 3), 255, np.uint8)
    places = np.linspace(0, 1, _PUBLISHED)
    for frame, centres_N2 in zip(canvas, centres_TN2, strict=True):
        for (x, y), radius, square, colour in zip(centres_N2, radii_N, squares, colours, strict=True):
            rows, columns = _window(1 - y, radius), _window(x, radius)
            across, down = places[columns] - x, (places[rows] - (1 - y))[:, None]
            if square:
                share = ((np.abs(across) <= radius) & (np.abs(down) <= radius)).astype(np.float64)
            else:
                share = np.clip((radius**2 - across**2 - down**2) / (_EDGE * radius**2), 0, 1)
            part = frame[rows, columns]
            part[:] = part + share[..., None] * (np.array(colour, np.float64) - part)
    block = _PUBLISHED // size
    if block == 1:
        return canvas
    # Sums of slices are many times faster than a mean over two axes of a view.
    tall = np.add.reduce([canvas[:, i::block].astype(np.uint16) for i in range(block)])
    sums = np.add.reduce([tall[:, :, i::block] for i in range(block)])
    return ((sums + block**2 // 2) // block**2).astype(np.uint8)


def _window(centre: float, radius: float) -> slice:
    """Return the published pixels that a figure may touch along one side."""
    last = _PUBLISHED - 1
    return slice(max(0, int((centre - radius) * last)), max(0, int((centre + radius) * last) + 2))


def disc_cover(x_edges: np.ndarray, y_edges: np.ndarray, radius: float) -> np.ndarray:
    """Return the share of each pixel that a disc around the origin covers: (..., W + 1), (..., H + 1) -> (..., H, W).

    Edges rise in x and fall in y. The share is exact: a difference of areas of the disc left of and below a point.
    """
    x, y = np.clip(x_edges / radius, -1, 1)[..., None, :], np.clip(y_edges / radius, -1, 1)[..., :, None]
    # Area of the unit disc left of x, and below y.
    left, below = (z * np.sqrt(1 - z * z) + np.arcsin(z) + np.pi / 2 for z in (x, y))
    both = left + below
    beyond = np.where((x < 0) == (y < 0), np.where(x < 0, 0.0, both - np.pi), np.minimum(left, below))
    area = np.where(x * x + y * y < 1, both / 2 + x * y - np.pi / 4, beyond)
    pixel = np.abs(np.diff(x_edges[..., :2]) * np.diff(y_edges[..., :2]))[..., None]
    return -np.diff(np.diff(area, axis=-1), axis=-2) * radius**2 / pixel


def square_cover(x_edges: np.ndarray, y_edges: np.ndarray, half: float) -> np.ndarray:
    """Return the share of each pixel that a square around the origin covers; as `disc_cover`."""
    x, y = np.diff(np.clip(x_edges, -half, half)), -np.diff(np.clip(y_edges, -half, half))
    pixel = np.abs(np.diff(x_edges[..., :2]) * np.diff(y_edges[..., :2]))[..., None]
    return y[..., :, None] * x[..., None, :] / pixel
