"""Draw a scene of the embedded world: closed-form tracks, analytic anti-aliasing, all frames at once.

Lengths are in short sides of the frame, x to the right and y down from the upper left corner; clip time u runs from
0 at the first frame to 1 at the last.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sora_jax.worlds.captions import COLOURS, TONES
from sora_jax.worlds.figures import FIGURES, coverage

ZOOM = 1.3
PAN = 0.3
_GRADIENT = 22.0
_TEXTURE = 17.0
_WAVELENGTH = 0.42


@dataclass(frozen=True)
class Shape:
    """One shape and the constants of its motion.

    `start`: centre at u = 0, or the hub of an orbit. `travel`: vector covered by u = 1 (unfolded, where it bounces).
    `radius`, `phase`: of the orbit. `turn`: radians turned by u = 1, about itself or on its orbit; clockwise on the
    screen is positive. `growth`: diameter at u = 1 over diameter at u = 0.
    """

    kind: str
    colour: str
    diameter: float
    motion: str
    direction: str | None = None
    start: tuple[float, float] = (0.0, 0.0)
    travel: tuple[float, float] = (0.0, 0.0)
    radius: float = 0.0
    phase: float = 0.0
    turn: float = 0.0
    growth: float = 1.0


@dataclass(frozen=True)
class Backdrop:
    """Style and tone of the background; `angle` of its gradient or texture and `phases` of the texture, radians."""

    style: str
    tone: str
    angle: float = 0.0
    phases: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Scene:
    """Contents of a clip, known without drawing it. Later shapes of the tuple lie behind earlier ones."""

    height: int
    width: int
    frames: int
    fps: float
    shapes: tuple[Shape, ...]
    backdrop: Backdrop
    camera: str
    level: str
    caption: str

    @property
    def short(self) -> int:
        return min(self.height, self.width)


@dataclass(frozen=True)
class Track:
    """Hold where a shape is in each frame: centres (T, 2) as (x, y), diameters (T,), angles (T,) clockwise, radians."""

    centres_T2: np.ndarray
    diameters_T: np.ndarray
    angles_T: np.ndarray


def clip_time(frames: int) -> np.ndarray:
    """Return the times of the frames, (T,): from 0 at the first to 1 at the last."""
    return np.linspace(0.0, 1.0, frames) if frames > 1 else np.zeros(1)


def zoom_factor(camera: str, times_T: np.ndarray) -> np.ndarray:
    """Magnification at each time, (T,): from 1 to ZOOM or 1 / ZOOM, geometric so that its rate looks constant."""
    return ZOOM ** ({"zoom in": 1.0, "zoom out": -1.0}.get(camera, 0.0) * times_T)


def centre_bounds(kind: str, diameter: float, frame: tuple[float, float], spins: bool = False) -> np.ndarray:
    """Return the bounds of centres of figures inside the frame (width, height): [[x0, y0], [x1, y1]]."""
    figure = FIGURES[kind]
    near, far = (figure.left, figure.up), (figure.right, figure.down)
    if spins:
        near = far = (figure.reach, figure.reach)
    return np.array([np.multiply(near, diameter), np.subtract(frame, np.multiply(far, diameter))])


def reflect(position: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return the position of a body that is reflected by two walls, from its position without them."""
    span = np.maximum(high - low, 1e-9)
    return low + span - np.abs((position - low) % (2 * span) - span)


def track(shape: Shape, scene: Scene) -> Track:
    """Return centres, diameters and angles of a shape over a clip, from the closed form of its motion."""
    times = clip_time(scene.frames)
    centres = np.add(shape.start, times[:, None] * np.asarray(shape.travel))
    if shape.motion == "bounce":
        frame = (scene.width / scene.short, scene.height / scene.short)
        largest = shape.diameter * zoom_factor(scene.camera, times).max()
        centres = reflect(centres, *centre_bounds(shape.kind, largest, frame))
    if shape.motion == "orbit":
        angles = shape.phase + shape.turn * times
        centres = centres + shape.radius * np.stack([np.cos(angles), np.sin(angles)], -1)
    growth = 1 + (shape.growth - 1) * times
    spin = shape.turn * times if shape.motion == "rotate" else np.zeros_like(times)
    return Track(centres, shape.diameter * growth * zoom_factor(scene.camera, times), spin)


def _grid(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    x = ((np.arange(scene.width) + 0.5) / scene.short).astype(np.float32)
    y = ((np.arange(scene.height) + 0.5) / scene.short).astype(np.float32)
    return x, y[:, None]


def paint_backdrop(scene: Scene) -> np.ndarray:
    """Draw the background alone: float32 (T, H, W, 3) in [0, 255]; T is 1 if it does not change."""
    backdrop, (x, y) = scene.backdrop, _grid(scene)
    tone = np.array(TONES[backdrop.tone], np.float32)
    x, y = x - x.mean(), y - y.mean()
    cos, sin = np.float32(np.cos(backdrop.angle)), np.float32(np.sin(backdrop.angle))
    if backdrop.style == "plain":
        light = np.zeros((1, scene.height, scene.width), np.float32)
    elif backdrop.style == "gradient":
        ramp = cos * x + sin * y
        light = _GRADIENT * (ramp / np.abs(ramp).max())[None]
    else:
        light = _texture(scene, x, y, cos, sin)
    return tone + light[..., None]


def _texture(scene: Scene, x: np.ndarray, y: np.ndarray, cos: np.float32, sin: np.float32) -> np.ndarray:
    times = clip_time(scene.frames if scene.camera != "still" else 1).astype(np.float32)[:, None, None]
    zoom = zoom_factor(scene.camera, times).astype(np.float32)
    ways = {"pan left": (-1, 0), "pan right": (1, 0), "pan up": (0, -1), "pan down": (0, 1)}
    pan_x, pan_y = ways.get(scene.camera, (0, 0))
    x, y = x / zoom + PAN * pan_x * times, y / zoom + PAN * pan_y * times
    wave = np.float32(2 * np.pi / _WAVELENGTH)
    first, second = scene.backdrop.phases
    return _TEXTURE * np.sin(wave * (cos * x + sin * y) + first) * np.sin(wave * (cos * y - sin * x) + second)


def render(scene: Scene) -> np.ndarray:
    """Draw the frames of a scene, uint8 (T, H, W, 3)."""
    x, y = _grid(scene)
    canvas = np.broadcast_to(paint_backdrop(scene), (scene.frames, scene.height, scene.width, 3)).copy()
    for shape in reversed(scene.shapes):
        alpha = _alpha(shape.kind, track(shape, scene), x, y, scene.short)[..., None]
        canvas += alpha * (np.array(COLOURS[shape.colour], np.float32) - canvas)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def _alpha(kind: str, path: Track, x: np.ndarray, y: np.ndarray, short: int) -> np.ndarray:
    column = (slice(None), None, None)
    diameter = path.diameters_T.astype(np.float32)[column]
    across = (x - path.centres_T2[:, 0].astype(np.float32)[column]) / diameter
    down = (y - path.centres_T2[:, 1].astype(np.float32)[column]) / diameter
    if path.angles_T.any():
        cos = np.cos(path.angles_T).astype(np.float32)[column]
        sin = np.sin(path.angles_T).astype(np.float32)[column]
        across, down = cos * across + sin * down, cos * down - sin * across
    return coverage(kind, across, down, 1 / (short * diameter))
