"""Read a clip of the embedded world from its pixels alone.

The oracle knows the vocabulary (palette and figures), not the renderer. Lengths in a Reading are in short sides of the
frame, x to the right and y down. The oracle is made for generated clips: noise, compression, softness and small shifts
of colour do not disturb it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
from scipy import ndimage

from sora_jax.worlds.captions import COLOURS, KINDS
from sora_jax.worlds.oracle.backdrop import Plane, around, dot, fit_plane, mean_light, read_backdrop
from sora_jax.worlds.oracle.kinds import Likeness, compare, moments, read_turn, unit_area
from sora_jax.worlds.oracle.motion import Motion, Observation, read_motion

# Share of shape in a pixel from which it counts as the shape's.
_INSIDE = 0.4
_CHROMA = 30.0
# Half of the luma is left out of colour comparisons: hue is steadier than light in soft or compressed clips.
_LUMA_LEFT_OUT = 0.5
_SMALLEST = 0.008
# Squared length of a step of one grey level; keeps a colour that is also the background's from dividing by zero.
_ONE_LEVEL = 1.0
# Parts hang together within a frame, also by their corners, and never across time.
_TOUCHING = np.zeros((3, 3, 3), bool)
_TOUCHING[1] = True
# A frame whose likeness to the clip's kind falls this far behind another kind shows another shape.
_LIKENESS_SLACK = 0.05


@dataclass(frozen=True)
class ShapeReading:
    """One shape: words for colour, kind, motion and direction (None in an image), and what was measured.

    diameter: at the first frame. path_T2, diameters_T: NaN in frames where it is not seen in full.
    physics_error: root-mean-square departure from the law of its motion. matched_T: frames that show this same shape.
    """

    colour: str
    kind: str
    motion: str | None
    direction: str | None
    diameter: float
    path_T2: np.ndarray
    diameters_T: np.ndarray
    physics_error: float
    matched_T: np.ndarray


@dataclass(frozen=True)
class Reading:
    """A clip as read: shapes, largest first; count (median over frames); background and camera.

    constancy: mean over frames of (shapes that are the same as in the whole clip) / (shapes there are), in [0, 1].
    physics_error: mean over shapes of the departure from the law of motion, short sides; 0 for an image.
    """

    shapes: tuple[ShapeReading, ...]
    count: int
    style: str
    tone: str
    camera: str | None
    constancy: float
    physics_error: float


@dataclass(frozen=True)
class _Pixels:
    """Every pixel's departure from the background, its colour class (-1: background or mixed), and where shapes are.

    toward_KHW3: what the departure would be under full cover by each colour of the palette.
    """

    departure_THW3: np.ndarray
    toward_KHW3: np.ndarray
    classes_THW: np.ndarray
    inside_THW: np.ndarray


@dataclass(frozen=True)
class Sighting:
    """One colour over a clip: soft masks of its largest part, parts per frame, frames seen and seen in full.

    crossed_T: frames in which it touches another shape. area: median, pixels. least: smallest area while crossed,
    as a share of the usual one.
    """

    colour: str
    masks_THW: np.ndarray
    parts_T: np.ndarray
    seen_T: np.ndarray
    full_T: np.ndarray
    crossed_T: np.ndarray
    area: float
    least: float


def read(frames: np.ndarray) -> Reading:
    """Read a clip, frames (T, H, W, 3): uint8, or floats in [-1, 1]."""
    frames = grey_levels(frames)
    plane = fit_plane(frames)
    sightings, inside_THW = find_colours(frames, plane)
    size = frames.shape[1:3]
    shapes = _crossings([_read_shape(s, size) for s in sightings], sightings)
    style, tone, camera = read_backdrop(frames, plane, ~around(inside_THW))
    parts_T = sum((s.parts_T for s in sightings), np.zeros(len(frames), int))
    errors = [s.physics_error for s in shapes]
    return Reading(
        shapes=tuple(shapes),
        count=int(np.median(parts_T) + 0.5),
        style=style,
        tone=tone,
        camera=camera,
        constancy=_constancy(shapes, parts_T),
        physics_error=float(np.mean(errors)) if errors else 0.0,
    )


def grey_levels(frames: np.ndarray) -> np.ndarray:
    """Convert uint8, or floats in [-1, 1], to float32 in [0, 255]."""
    return frames.astype(np.float32) if frames.dtype == np.uint8 else (frames.astype(np.float32) + 1) * 127.5


def find_colours(frames: np.ndarray, plane: Plane) -> tuple[list[Sighting], np.ndarray]:
    """Find the shape of each colour, largest first, and the pixels (T, H, W) that any shape covers."""
    pixels = _classify(frames, plane)
    seen = [colour for colour in np.unique(pixels.classes_THW).tolist() if colour >= 0]
    sightings = [s for colour in seen if (s := _sight(pixels, colour)) is not None]
    return sorted(sightings, key=lambda s: -s.area), pixels.inside_THW


def _constancy(shapes: list[ShapeReading], parts_T: np.ndarray) -> float:
    if not shapes:
        return 0.0
    matched_T = np.sum([s.matched_T for s in shapes], axis=0)
    return float((matched_T / np.maximum(parts_T, len(shapes))).mean())


def _classify(frames: np.ndarray, plane: Plane) -> _Pixels:
    """Explain each pixel as a mixture of the background and the one colour of the palette that fits best."""
    palette = np.array(list(COLOURS.values()), np.float32)
    toward = palette[:, None, None] - plane.colours_HW3
    departure = frames - plane.colours_HW3
    light = mean_light(departure)[..., None]
    chroma = departure - light
    coloured = np.nonzero(dot(chroma, chroma) > _CHROMA**2)
    # Candidates only, a fifth of the pixels: eight projections of each cost little.
    seen, ideal = departure[coloured], toward[:, coloured[1], coloured[2]]
    steady = seen - _LUMA_LEFT_OUT * light[coloured]
    steady_ideal = ideal - _LUMA_LEFT_OUT * mean_light(ideal)[..., None]
    best = (dot(steady_ideal, steady) / np.sqrt(np.maximum(dot(steady_ideal, steady_ideal), _ONE_LEVEL))).argmax(0)
    chosen = ideal[best, np.arange(len(best))]
    inside = dot(chosen, seen) > _INSIDE * dot(chosen, chosen)
    found = tuple(axis[inside] for axis in coloured)
    classes_THW = np.full(frames.shape[:3], -1)
    classes_THW[found] = best[inside]
    return _Pixels(departure, toward, _settle(classes_THW), classes_THW >= 0)


def _settle(classes_THW: np.ndarray) -> np.ndarray:
    """Give stray pixels their part's main colour: neighbouring hues join it, small minorities are dropped.

    Edges between a shape and the background, or between two shapes, show mixtures that are in nobody's colour.
    """
    parts_THW, number = ndimage.label(classes_THW >= 0, _TOUCHING)
    colours, found = len(COLOURS), np.nonzero(parts_THW)
    part, kind = parts_THW[found], classes_THW[found]
    votes = np.bincount(part * colours + kind, minlength=(number + 1) * colours).reshape(-1, colours)
    main = votes.argmax(1)
    steps = (kind - main[part]) % colours
    kind = np.where((steps == 1) | (steps == colours - 1), main[part], kind)
    minor = votes[part, kind] < 0.15 * votes[part].sum(1)
    settled = np.full(classes_THW.shape, -1)
    settled[found] = np.where(minor, -1, kind)
    return settled


def _sight(pixels: _Pixels, colour: int) -> Sighting | None:
    """Find the shape of one colour over the clip; None if it is too small, in too few frames, or only specks."""
    mine_THW = pixels.classes_THW == colour
    frames, height, width = mine_THW.shape
    least = max(5.0, _SMALLEST * min(height, width) ** 2)
    if (mine_THW.sum((1, 2)) >= least).mean() < 0.4:
        return None
    labels_THW, number = ndimage.label(mine_THW, _TOUCHING)
    sizes_TN = np.stack([np.bincount(frame.ravel(), minlength=number + 1) for frame in labels_THW])
    sizes_TN[:, 0] = 0
    largest_T, area_T = sizes_TN.argmax(1), sizes_TN.max(1)
    seen_T = area_T >= least * 0.6
    if not seen_T.any():
        return None
    parts_T = (sizes_TN >= np.maximum(least * 0.6, 0.3 * area_T)[:, None]).sum(1)
    core_THW = (labels_THW == largest_T[:, None, None]) & mine_THW
    vicinity_THW = around(core_THW)
    others_THW = (pixels.classes_THW >= 0) & ~core_THW
    crossed_T = (vicinity_THW & others_THW & ~mine_THW).sum((1, 2)) >= 3
    toward = pixels.toward_KHW3[colour]
    share_THW = np.clip(dot(pixels.departure_THW3, toward) / np.maximum(dot(toward, toward), _ONE_LEVEL), 0, 1)
    masks_THW = np.where(vicinity_THW & ~others_THW, share_THW, 0.0)
    clear_T = seen_T & ~crossed_T
    usual = np.median(area_T[clear_T]) if clear_T.any() else area_T.max()
    full_T = seen_T & (~crossed_T | (area_T >= 0.88 * usual))
    return Sighting(
        colour=tuple(COLOURS)[colour],
        masks_THW=masks_THW,
        parts_T=parts_T,
        seen_T=seen_T,
        full_T=full_T,
        crossed_T=crossed_T,
        area=float(np.median(area_T)),
        least=float(area_T[crossed_T].min() / usual) if crossed_T.any() else 1.0,
    )


def _read_shape(sighting: Sighting, size: tuple[int, int]) -> ShapeReading:
    frames, short = len(sighting.masks_THW), min(size)
    times = np.linspace(0, 1, frames) if frames > 1 else np.zeros(1)
    full = np.nonzero(sighting.full_T)[0]
    masks = sighting.masks_THW[full]
    mass, centres, radii = moments(masks)
    likeness = compare(masks, centres, radii)
    kind = KINDS[int(likeness.kinds_TK.mean(0).argmax())]
    # Softness leaves the mass of a mask as it is, and hardly any other measure of size.
    diameters = np.sqrt(mass / unit_area(kind)) / short
    motion = Motion(None, None, 0.0)
    if frames > 1:
        turn, gain = read_turn(likeness.scores_TKA[:, KINDS.index(kind)], kind, times[full])
        frame = (size[1] / short, size[0] / short)
        seen = Observation(times[full], centres / short, diameters, turn, gain, kind, frame)
        motion = read_motion(seen)
    path_T2, diameters_T = np.full((frames, 2), np.nan), np.full(frames, np.nan)
    path_T2[full], diameters_T[full] = centres / short, diameters
    return ShapeReading(
        colour=sighting.colour,
        kind=kind,
        motion=motion.name,
        direction=motion.direction,
        diameter=_first_diameter(times[full], diameters),
        path_T2=path_T2,
        diameters_T=diameters_T,
        physics_error=motion.error,
        matched_T=_matched(sighting, full, likeness, kind),
    )


def _first_diameter(times: np.ndarray, diameters: np.ndarray) -> float:
    if len(times) < 3:
        return float(diameters[0])
    _, level = np.polyfit(times, diameters, 1)
    return float(level)


def _matched(sighting: Sighting, full: np.ndarray, likeness: Likeness, kind: str) -> np.ndarray:
    """Mark the frames that show the shape of the clip; one that another shape partly hides counts."""
    matched_T = sighting.crossed_T.copy()
    kinds_TK = likeness.kinds_TK
    matched_T[full] = kinds_TK[:, KINDS.index(kind)] >= kinds_TK.max(1) - _LIKENESS_SLACK
    return matched_T & (sighting.seen_T | sighting.crossed_T)


def _crossings(shapes: list[ShapeReading], sightings: list[Sighting]) -> list[ShapeReading]:
    """Name the pair of a pass: one shape moves along a line, the other lies still and is the more hidden one."""
    for i, j in permutations(range(len(shapes)), 2):
        front, behind = shapes[i], shapes[j]
        straight = front.motion == "move" and " " not in (front.direction or " ")
        together = (sightings[i].crossed_T & sightings[j].crossed_T).any()
        hidden = sightings[j].least < min(0.93, sightings[i].least)
        if straight and behind.motion == "still" and together and hidden:
            shapes[i] = replace(front, motion="pass")
            shapes[j] = replace(behind, motion="behind", direction=None)
            break
    return shapes
