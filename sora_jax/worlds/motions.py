"""Place shapes in a scene: for each motion of the embedded world, a path that stays inside the frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sora_jax.worlds.captions import AXES, COLOURS, DIRECTIONS, SIZES, TURNS
from sora_jax.worlds.figures import FIGURES
from sora_jax.worlds.render import ZOOM, Scene, Shape, centre_bounds, track

GROWTH = 1.8
_LARGEST_GROWING = 0.4
_GAP_PIXELS = 3.0


@dataclass(frozen=True)
class _Stage:
    """Bounds of a centre (low and high corners, in short sides), number of frames, and the directions in use."""

    low: np.ndarray
    high: np.ndarray
    frames: int
    directions: tuple[str, ...]


def turning(kinds: Sequence[str]) -> list[str]:
    """Return the kinds that show a turn about themselves."""
    return [kind for kind in kinds if FIGURES[kind].symmetry]


def size_bands(low: float, high: float) -> list[tuple[float, float]]:
    """Return the parts of the range [low, high] of diameters that have a size word."""
    parts = [(max(low, a), min(high, b)) for a, b in SIZES.values()]
    return [(a, b) for a, b in parts if a <= b]


def draw_diameter(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw a diameter in [low, high] that has a size word, each word with equal probability."""
    bands = size_bands(low, high) or [(low, low)]
    return float(rng.uniform(*bands[rng.integers(len(bands))]))


def largest_zoom(scene: Scene) -> float:
    """Return the greatest magnification that the camera reaches during a clip."""
    return ZOOM if scene.camera == "zoom in" else 1.0


def frame_size(scene: Scene) -> tuple[float, float]:
    """Return width and height of the frame in short sides."""
    return scene.width / scene.short, scene.height / scene.short


def place(
    rng: np.random.Generator,
    scene: Scene,
    kinds: Sequence[str],
    directions: int,
    colour: str,
    motion: str,
    diameter: float,
) -> Shape:
    """Draw a shape of one of `kinds`, somewhere in the frame, on a path that stays inside it."""
    if motion in ("grow", "shrink") and scene.camera.startswith("zoom"):
        motion = "still"  # a zoom changes every size on the screen, and would hide which shape grows
    if motion == "rotate":
        kinds, motion = (turning(kinds), motion) if turning(kinds) else (kinds, "still")
    kind = kinds[int(rng.integers(len(kinds)))]
    largest = diameter * largest_zoom(scene)
    if motion in ("grow", "shrink"):
        diameter = min(diameter, _LARGEST_GROWING)
        largest = diameter * GROWTH
    low, high = centre_bounds(kind, largest, frame_size(scene), spins=motion == "rotate")
    stage = _Stage(low, np.maximum(low, high), scene.frames, tuple(DIRECTIONS)[:directions])
    return _MOVERS[motion](rng, Shape(kind, colour, diameter, motion), stage)


def apart(one: Shape, other: Shape, scene: Scene) -> bool:
    """Return True if two shapes keep clear of each other in every frame."""
    a, b = track(one, scene), track(other, scene)
    reach = a.diameters_T * FIGURES[one.kind].reach + b.diameters_T * FIGURES[other.kind].reach
    gap = np.hypot(*(a.centres_T2 - b.centres_T2).T) - reach
    return bool(gap.min() * scene.short >= _GAP_PIXELS)


def passing(
    rng: np.random.Generator,
    scene: Scene,
    kinds: Sequence[str],
    colours: Sequence[str],
    low: float,
    high: float,
) -> list[Shape]:
    """Draw two shapes, of which the first moves across the frame in front of the second; empty without room for them.

    Their colours are no neighbours in hue, so that they can be distinguished where they touch.
    """
    frame = frame_size(scene)
    # Both ends of the path show most of the shape behind.
    spans = {d: min(high, frame[int(DIRECTIONS[d][0] == 0)] / 3.1 / largest_zoom(scene)) for d in tuple(DIRECTIONS)[:4]}
    ways = [d for d, widest in spans.items() if size_bands(low, widest)]
    pairs = [(a, b) for a in colours for b in colours if _hue_steps(a, b) > 1]
    if not ways or not pairs:
        return []
    direction = ways[rng.integers(len(ways))]
    front, behind = pairs[rng.integers(len(pairs))]
    diameter = draw_diameter(rng, low, spans[direction])
    first, second = (
        Shape(kinds[int(rng.integers(len(kinds)))], colour, diameter, "still") for colour in (front, behind)
    )
    largest = diameter * largest_zoom(scene)
    first_low, first_high = centre_bounds(first.kind, largest, frame)
    stage = _Stage(first_low, first_high, scene.frames, (direction,))
    first = replace(_move(rng, first, stage, (0.95, 1.0)), motion="pass")
    offset = rng.uniform(-0.1, 0.1, 2) * diameter
    middle = np.add(first.start, np.divide(first.travel, 2)) + offset
    middle = np.clip(middle, *centre_bounds(second.kind, largest, frame))
    return [first, replace(second, motion="behind", start=_point(middle))]


def _hue_steps(one: str, other: str) -> int:
    names = tuple(COLOURS)
    steps = abs(names.index(one) - names.index(other))
    return min(steps, len(names) - steps)


def _point(vector: np.ndarray) -> tuple[float, float]:
    return float(vector[0]), float(vector[1])


def _still(rng: np.random.Generator, shape: Shape, stage: _Stage) -> Shape:
    return replace(shape, start=_point(rng.uniform(stage.low, stage.high)))


def _move(rng: np.random.Generator, shape: Shape, stage: _Stage, share: tuple[float, float] = (0.75, 1.0)) -> Shape:
    direction = stage.directions[rng.integers(len(stage.directions))]
    way = np.array(DIRECTIONS[direction])
    travel = way * (stage.high - stage.low)[way != 0].min() * rng.uniform(*share)
    start = rng.uniform(stage.low - np.minimum(travel, 0), stage.high - np.maximum(travel, 0))
    return replace(shape, direction=direction, start=_point(start), travel=_point(travel))


def _bounce(rng: np.random.Generator, shape: Shape, stage: _Stage) -> Shape:
    direction = tuple(AXES)[rng.integers(2)]
    axis, sign = int(direction == "up and down"), int(rng.choice((-1, 1)))
    # Starting near one wall, the shape meets the other one once and comes a good part of the way back.
    behind, length = rng.uniform(0.1, 0.4), rng.uniform(1.3, 1.6)
    start, span = rng.uniform(stage.low, stage.high), (stage.high - stage.low)[axis]
    start[axis] = stage.low[axis] + (behind if sign > 0 else 1 - behind) * span
    travel = np.zeros(2)
    travel[axis] = sign * length * span
    return replace(shape, direction=direction, start=_point(start), travel=_point(travel))


def _orbit(rng: np.random.Generator, shape: Shape, stage: _Stage) -> Shape:
    direction = tuple(TURNS)[rng.integers(2)]
    radius = float((stage.high - stage.low).min() / 2 * rng.uniform(0.8, 1.0))
    hub = rng.uniform(stage.low + radius, stage.high - radius)
    turn = TURNS[direction] * rng.uniform(1.4, 1.8) * np.pi
    phase = float(rng.uniform(0, 2 * np.pi))
    return replace(shape, direction=direction, start=_point(hub), radius=radius, phase=phase, turn=float(turn))


def _rotate(rng: np.random.Generator, shape: Shape, stage: _Stage) -> Shape:
    direction = tuple(TURNS)[rng.integers(2)]
    # Under a third of the figure's symmetry angle a frame, or the turn could be one the other way.
    fastest = (stage.frames - 1) * 2 * np.pi / FIGURES[shape.kind].symmetry / 3.2
    turn = TURNS[direction] * min(fastest, np.pi) * rng.uniform(0.8, 1.0)
    return replace(_still(rng, shape, stage), direction=direction, turn=float(turn))


def _grow(rng: np.random.Generator, shape: Shape, stage: _Stage) -> Shape:
    return replace(_still(rng, shape, stage), growth=GROWTH)


def _shrink(rng: np.random.Generator, shape: Shape, stage: _Stage) -> Shape:
    start = shape.diameter * GROWTH
    named = min((edge for band in size_bands(0, 1) for edge in band), key=lambda edge: abs(edge - start))
    start = start if any(a <= start <= b for a, b in size_bands(0, 1)) else named
    return replace(_still(rng, shape, stage), diameter=start, growth=shape.diameter / start)


_MOVERS = {
    "still": _still,
    "move": _move,
    "bounce": _bounce,
    "orbit": _orbit,
    "rotate": _rotate,
    "grow": _grow,
    "shrink": _shrink,
}
