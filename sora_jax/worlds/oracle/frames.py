"""Read every frame of a clip by itself: its shapes, and how clean they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sora_jax.worlds.captions import KINDS
from sora_jax.worlds.oracle.backdrop import fit_plane
from sora_jax.worlds.oracle.drawing import fit_drawing
from sora_jax.worlds.oracle.kinds import compare, moments, period, unit_area
from sora_jax.worlds.oracle.reading import Sighting, find_colours, grey_levels

# Pixels on either side of an outline that count as its edge.
_EDGE = 2.0


@dataclass(frozen=True)
class FrameReading:
    """One frame, read without the others.

    shapes: (colour, kind, number of its parts) of each, sorted. edge_error: mean absolute difference from the clean
    drawing that fits best, as a share of the range of grey levels, over the pixels within 2 of an outline; NaN where
    no shape is read. speckle: the same over all other pixels; texture of a background counts, too.
    """

    shapes: tuple[tuple[str, str, int], ...]
    edge_error: float
    speckle: float


def read_frames(frames: np.ndarray) -> list[FrameReading]:
    """Read each of the frames (T, H, W, 3), uint8 or floats in [-1, 1], from itself alone."""
    frames = grey_levels(frames)
    found = [find_colours(frame[None], fit_plane(frame[None]))[0] for frame in frames]
    kinds, places = _figures([sighting for frame in found for sighting in frame])
    readings: dict[int, FrameReading] = {}
    ends = np.cumsum([0, *map(len, found)])
    per_frame = [tuple(kinds[a:b]) for a, b in zip(ends, ends[1:], strict=False)]
    for group in set(per_frame):
        chosen = [t for t, own in enumerate(per_frame) if own == group]
        first = np.stack([places[ends[t] : ends[t + 1]] for t in chosen])
        drawing = fit_drawing(frames[chosen], group, first)
        off = drawing.off_NP / 255
        edge = (np.abs(drawing.distances_NKP) <= _EDGE).any(1)
        for i, t in enumerate(chosen):
            shapes = sorted((s.colour, kind, int(s.parts_T[0])) for s, kind in zip(found[t], group, strict=True))
            readings[t] = FrameReading(tuple(shapes), _mean(off[i][edge[i]]), _mean(off[i][~edge[i]]))
    return [readings[t] for t in range(len(frames))]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


def _figures(sightings: list[Sighting]) -> tuple[list[str], np.ndarray]:
    """Return kinds, and places (n, 4) as `fit_drawing` takes them, of sightings in single frames."""
    if not sightings:
        return [], np.zeros((0, 4))
    masks = np.concatenate([s.masks_THW for s in sightings])
    mass, centres, radii = moments(masks)
    likeness = compare(masks, centres, radii)
    chosen = likeness.kinds_TK.argmax(1)
    turns = likeness.scores_TKA[np.arange(len(masks)), chosen].argmax(-1) / likeness.scores_TKA.shape[-1]
    kinds = [KINDS[k] for k in chosen]
    area = np.array([unit_area(kind) for kind in kinds])
    angles = turns * [period(kind) for kind in kinds]
    return kinds, np.column_stack([centres, np.sqrt(mass / area), angles])
