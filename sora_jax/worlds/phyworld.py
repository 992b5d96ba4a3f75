"""Draw the worlds of Phyworld: balls that move by a law of mechanics, a pure function of (config, index).

A world is 10 wide and 10 high, x to the right and y up. A clip has 32 frames, 0.1 seconds apart; the first is 0.01
seconds after the start. Source: Kang et al. 2411.02385 (ICML 2025); all ranges are those of the published generator,
github.com/phyworld/phyworld, whose text differs from its code in some of them. Its engine, Box2D, makes hits with a
relative speed below 1 inelastic; here all are elastic.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np

from sora_jax.config import check, check_word
from sora_jax.worlds.discs import draw_area, draw_published
from sora_jax.worlds.scenes import HELD_OUT

WORLD = 10.0  # width and height of the world
STEP, STRIDE = 0.01, 10  # seconds of a step of the simulation, and steps from frame to frame
GRAVITY = -2.5
MARGIN = 0.5  # between ball and floor or ceiling at the start
INSIDE_FRAMES = 24  # in which one ball stays inside, if it can
CLEAR_FRAMES = 8  # before and after a hit
# Of the published protocol: frames of a clip, and those that a model is given.
FRAMES, GIVEN_FRAMES = 32, 3

SCENARIOS = ("uniform", "parabola", "collision")
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}
FIGURES = ("ball", "square")
ATTRIBUTES = ("colour", "size", "velocity", "shape")
CONFLICTS = tuple(f"{a}-{b}" for i, a in enumerate(ATTRIBUTES) for b in ATTRIBUTES[i + 1 :])
SPEEDS = (1.0, 4.0)
RADII = {"uniform": (0.7, 1.4), "parabola": (0.7, 1.4), "collision": (0.5, 1.5)}
OUTER_SPEEDS = ((0.0, 0.8), (4.5, 6.0))
OUTER_RADII = {
    "uniform": ((0.3, 0.6), (1.5, 2.0)),
    "parabola": ((0.3, 0.6), (1.5, 2.0)),
    "collision": ((0.3, 0.4), (1.7, 2.0)),
}
# Points of the training grids: velocities and radii of each ball.
LEVELS = {
    "30K": {"one": (300, 100), "two": (21, 8)},
    "300K": {"one": (1000, 300), "two": (41, 14)},
    "3M": {"one": (3000, 1000), "two": (71, 26)},
}
# Values of the first ball, then of the second, that held-out clips have outside the ranges of training.
RANGES = {
    "in": "",
    "velocity": "v",
    "radius": "r",
    "both": "rv",
    "radii": "rR",
    "velocities": "vV",
    "all": "rRvV",
}
ONE_BALL = ("in", "velocity", "radius", "both")
_STREAM = 0x70687977
_TRIES = 1000


@dataclass(frozen=True)
class PhyworldConfig:
    """Distribution of the clips of a world of Phyworld; the defaults are uniform motion at the smallest data level."""

    name: Literal["phyworld"] = "phyworld"
    """Tells this world from others in files."""
    scenario: Literal["uniform", "parabola", "collision"] = "uniform"
    """Law of motion: a constant velocity, gravity, or two balls that meet head-on."""
    size: int = 32
    """Height and width of the frames, in pixels."""
    zooms: tuple[int, ...] = ()
    """More sizes of the frames, which training clips have in turn with `size`; held-out clips have `size` alone."""
    frames: int = FRAMES
    """Number of frames; a clip of more is that of fewer, continued. Errors are measured on the first 32."""
    level: Literal["30K", "300K", "3M"] = "30K"
    """Number of training clips: one for each point of a grid of velocities and radii."""
    ranges: Literal["in", "velocity", "radius", "both", "radii", "velocities", "all"] = "in"
    """What held-out clips have outside the ranges of training. In a collision: velocity, radius or both of the first
    ball; the velocities or radii of both balls; or all."""
    velocities: tuple[tuple[float, float], ...] = (SPEEDS,)
    """Ranges, within 1 to 4, of the velocities that training clips have; held-out clips have them from 1 to 4."""
    both_ways: bool = False
    """Mirror half of the training clips, so that balls move right or left."""
    conflict: str = ""
    """Two attributes that go together in training and not in held-out clips, such as "colour-size". In training
    a ball that is red, small, slow or round in one of them is so in the other; else blue, large, fast or square."""
    drawing: Literal["area", "published"] = "area"
    """How balls are drawn: "area" colours a pixel by the share that is covered; "published" draws 256 x 256 pixels with
    a softened edge, as the published generator does, and averages them down to `size`, a divisor of 256."""
    seed: int = 0
    """Seed of all clips, below 2^32."""
    fps: float = 10.0
    """Frames per second."""

    def __post_init__(self):
        one = self.scenario != "collision"
        check_word("world.scenario", self.scenario, SCENARIOS)
        check_word("world.level", self.level, LEVELS)
        check_word("world.ranges", self.ranges, ONE_BALL if one else RANGES)
        check_word("world.conflict", self.conflict, ("", *CONFLICTS))
        check_word("world.drawing", self.drawing, ("area", "published"))
        sizes = {"size": (self.size,), "zooms": self.zooms}
        drawable = {
            name: all(size >= 8 and (self.drawing == "area" or 256 % size == 0) for size in each)
            for name, each in sizes.items()
        }
        low, high = SPEEDS
        within = self.velocities and all(len(r) == 2 and low <= r[0] <= r[1] <= high for r in self.velocities)
        plain = self.scenario == "uniform" and self.ranges == "in" and self.velocities == (SPEEDS,)
        rules = {
            "size": (drawable["size"], "at least 8, and with the published drawing a divisor of 256"),
            "zooms": (drawable["zooms"], "sizes of at least 8, and with the published drawing divisors of 256"),
            "frames": (self.frames >= 2, "at least 2"),
            "velocities": (within, f"one or more ranges (low, high) from {low} to {high}"),
            "both_ways": (one or not self.both_ways, "False in a collision"),
            "conflict": (plain or not self.conflict, "left out but for uniform motion with all velocities, in range"),
            "seed": (0 <= self.seed < 2**32, "an integer from 0 to 4294967295"),
            "fps": (self.fps > 0, "greater than 0"),
        }
        for rule, (good, allowed) in rules.items():
            check(good, f"world.{rule} is {getattr(self, rule)!r}; it must be {allowed}")
        if not self.conflict:
            check(len(_points(self)) > 0, f"world.velocities is {self.velocities!r}; no point of the grid is in it")

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """The sizes (height, width) of clips."""
        return tuple((size, size) for size in (self.size, *self.zooms))

    @property
    def balls(self) -> int:
        """The number of balls."""
        return 2 if self.scenario == "collision" else 1


@dataclass(frozen=True)
class Ball:
    """A ball, or a square with this half side. Speeds to the left are below 0, but not that of a second ball."""

    radius: float
    speed: float
    colour: str = "red"
    figure: str = "ball"


@dataclass(frozen=True)
class Truth:
    """What happens in a clip of T frames with N balls, in the units of the world.

    positions_TN2: centres (x, y). velocities_TN2: at the time of each frame. hit: the first frame after the balls have
    met; None for one ball.
    """

    balls: tuple[Ball, ...]
    positions_TN2: np.ndarray
    velocities_TN2: np.ndarray
    hit: int | None = None

    @property
    def radii_N(self) -> np.ndarray:
        """The radius of each ball."""
        return np.array([ball.radius for ball in self.balls])

    @property
    def inside_T(self) -> np.ndarray:
        """True for the frames in which all balls are wholly inside."""
        low, high = self.positions_TN2 - self.radii_N[:, None], self.positions_TN2 + self.radii_N[:, None]
        return ((low >= 0) & (high <= WORLD)).all((1, 2))


def count_of(config: PhyworldConfig) -> int:
    """Return the number of training clips: points of the grid. Later indices have its points again, started anew."""
    return len(_points(config))


def size_of(config: PhyworldConfig, index: int) -> tuple[int, int, int]:
    """Return (frames, height, width) of a clip without drawing it."""
    height, width = config.sizes[index % len(config.sizes) if index < HELD_OUT else 0]
    return config.frames, height, width


def captions_of(config: PhyworldConfig, index: int) -> dict[str, str]:
    """Return the captions of a clip, kind -> text."""
    balls, _ = _cast(config, index)
    first = f"a {balls[0].colour} {balls[0].figure}"
    if len(balls) > 1:
        return {"original": f"{first} and a {balls[1].colour} {balls[1].figure} collide"}
    way = "left" if balls[0].speed < 0 else "right"
    return {"original": f"{first} {'is thrown' if config.scenario == 'parabola' else 'moves'} {way}"}


def draw(config: PhyworldConfig, index: int) -> np.ndarray:
    """Draw clip `index`, uint8 (T, H, W, 3), the same on every call and every machine."""
    found = truth(config, index)
    painter = draw_area if config.drawing == "area" else draw_published
    colours = [COLOURS[ball.colour] for ball in found.balls]
    squares = [ball.figure == "square" for ball in found.balls]
    size = size_of(config, index)[1]
    return painter(found.positions_TN2 / WORLD, found.radii_N / WORLD, colours, squares, size)


def truth(config: PhyworldConfig, index: int) -> Truth:
    """Return what happens in clip `index`; any index from 0 to 2**63 - 1, in any order."""
    balls, rng = _cast(config, index)
    return _collide(balls, rng, config.frames) if len(balls) > 1 else _move(config, balls[0], rng)


# Which balls


def _cast(config: PhyworldConfig, index: int) -> tuple[tuple[Ball, ...], np.random.Generator]:
    """Return the balls of a clip, and the generator of the numbers that say where they start."""
    key = np.array([(_STREAM << 32) | config.seed, index], np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key))
    balls = _held_out(config, rng) if index >= HELD_OUT else _trained(config, index, rng)
    if config.both_ways and rng.random() < 0.5:
        balls = tuple(replace(ball, speed=-ball.speed) for ball in balls)
    return balls, rng


def _trained(config: PhyworldConfig, index: int, rng: np.random.Generator) -> tuple[Ball, ...]:
    """Return the balls of a point of the grid."""
    points, axes = _points(config), _axes(config)
    place = np.unravel_index(points[index % len(points)], tuple(map(len, axes)))
    values = [float(axis[i]) for axis, i in zip(axes, place, strict=True)]
    if config.balls == 2:
        return Ball(values[0], values[2]), Ball(values[1], values[3], "blue")
    radius, speed = values
    high = _high(config, radius, speed, bool(rng.random() < 0.5))
    return (_dressed(config, radius, speed, high, high),)


def _held_out(config: PhyworldConfig, rng: np.random.Generator) -> tuple[Ball, ...]:
    """Draw the balls of a held-out clip, until there is room for their motion."""
    if config.conflict:
        high = bool(rng.random() < 0.5)
        first, second = config.conflict.split("-")
        whole = {"size": RADII[config.scenario], "velocity": SPEEDS}
        for name, bit in ((first, high), (second, not high)):
            if name in whole:
                whole[name] = _halves(whole[name])[bit]
        radius, speed = (float(rng.uniform(*whole[name])) for name in ("size", "velocity"))
        return (_dressed(config, radius, speed, high, not high),)
    outside = RANGES[config.ranges]
    for _ in range(_TRIES):
        spans = [_span(config, letter, letter in outside, rng) for letter in "rRvV"]
        r1, r2, v1, v2 = (float(rng.uniform(low, high)) for low, high in spans)
        if config.balls == 1:
            return (Ball(r1, v1),)
        if _room(r1, r2, v1, v2):
            break
    return Ball(r1, v1), Ball(r2, v2, "blue")


def _span(config: PhyworldConfig, letter: str, outside: bool, rng: np.random.Generator) -> tuple[float, float]:
    high = int(rng.random() < 0.5)
    if letter in "rR":
        return OUTER_RADII[config.scenario][high] if outside else RADII[config.scenario]
    return OUTER_SPEEDS[high] if outside else SPEEDS


def _halves(span: tuple[float, float]) -> tuple[tuple[float, float], tuple[float, float]]:
    middle = sum(span) / 2
    return (span[0], middle), (middle, span[1])


def _high(config: PhyworldConfig, radius: float, speed: float, drawn: bool) -> bool:
    """Return which of its two values the attributes in conflict have; `drawn` where radius and speed leave it open."""
    if "size" in config.conflict:
        return radius > sum(RADII[config.scenario]) / 2
    return speed > sum(SPEEDS) / 2 if "velocity" in config.conflict else drawn


def _dressed(config: PhyworldConfig, radius: float, speed: float, first: bool, second: bool) -> Ball:
    """Return a ball with the colour and the figure that the values of the two attributes in conflict say."""
    values = dict(zip(config.conflict.split("-"), (first, second), strict=False))
    colour = tuple(COLOURS)[values.get("colour", False)]
    return Ball(radius, speed, colour, FIGURES[values.get("shape", False)])


def _axes(config: PhyworldConfig) -> tuple[np.ndarray, ...]:
    """Return the values of the grid of training: radii and speeds, of each ball."""
    speeds, radii = LEVELS[config.level]["two" if config.balls == 2 else "one"]
    radius, speed = np.linspace(*RADII[config.scenario], radii), np.linspace(*SPEEDS, speeds)
    return (radius, speed) if config.balls == 1 else (radius, radius, speed, speed)


@lru_cache(maxsize=8)
def _points(config: PhyworldConfig) -> np.ndarray:
    """Return the flat indices of the points of the grid that are trained on: in range, with room for the motion.

    Their order is random, so that any part of the training clips is like the whole.
    """
    values = np.meshgrid(*_axes(config), indexing="ij", sparse=True)
    speeds = values[config.balls :]
    good = np.ones(np.broadcast_shapes(*(v.shape for v in values)), bool)
    for speed in speeds:
        good &= _within(speed, config.velocities)
    if config.balls == 2:
        good &= _room(*values)
    if config.conflict == "size-velocity":
        good &= (values[0] > sum(RADII[config.scenario]) / 2) == (values[1] > sum(SPEEDS) / 2)
    rng = np.random.Generator(np.random.Philox(key=np.array([_STREAM, config.seed], np.uint64)))
    return rng.permutation(np.flatnonzero(good).astype(np.int32))


def _within(speed: np.ndarray, spans: Iterable[tuple[float, float]]) -> np.ndarray:
    return np.logical_or.reduce([(low <= speed) & (speed <= high) for low, high in spans])


def _room(r1, r2, v1, v2):
    """Return True where balls inside the frame can be as far apart as they move in the frames before a hit."""
    return CLEAR_FRAMES * STEP * STRIDE * (v1 + v2) <= WORLD - 2 * (r1 + r2)


# How they move


def _steps(frames: int) -> np.ndarray:
    """Return the number of steps of the simulation before each frame."""
    return STRIDE * np.arange(frames) + 1.0


def _move(config: PhyworldConfig, ball: Ball, rng: np.random.Generator) -> Truth:
    """Start one ball where it stays inside for 24 frames, if it can, and move it."""
    radius, speed, thrown = ball.radius, abs(ball.speed), config.scenario == "parabola"
    latest = WORLD - (INSIDE_FRAMES * STEP * STRIDE * speed + radius)
    latest = radius + rng.uniform(0, 0.5) if latest < radius else latest
    start = rng.uniform(radius, latest)
    top = WORLD - MARGIN - radius
    height = rng.uniform(top - 1.0 if thrown else radius + MARGIN, top)
    steps, gravity = _steps(config.frames), GRAVITY * thrown
    # Velocities first, then positions, as engines integrate: y falls by g dt^2 n (n + 1) / 2.
    x, y = start + speed * STEP * steps, height + gravity * STEP**2 * steps * (steps + 1) / 2
    positions = np.stack([WORLD - x if ball.speed < 0 else x, y], -1)
    velocities = np.stack([np.full_like(x, ball.speed), gravity * STEP * steps], -1)
    return Truth((ball,), positions[:, None], velocities[:, None])


def _collide(balls: tuple[Ball, ...], rng: np.random.Generator, frames: int) -> Truth:
    """Start two balls on one height so that they meet head-on, with at least 8 frames before and after, and move them.

    A light ball leaves the frame soon after the hit; it has the longer way out where one ball is twice as large.
    """
    r1, v1, r2, v2 = balls[0].radius, balls[0].speed, balls[1].radius, balls[1].speed
    second, both = STEP * STRIDE * (v1 + v2), r1 + r2
    near = CLEAR_FRAMES * second + both
    far = min((FRAMES - CLEAR_FRAMES) * second + both, WORLD - both)
    unequal = max(r1, r2) > 2 * min(r1, r2)
    distance = rng.uniform(near, max(near, min(far, 1.25 * near) if unequal else far))
    left, right = r1, WORLD - r2 - distance
    if unequal:
        left, right = (left, min(left + MARGIN, right)) if r1 > r2 else (max(left, right - MARGIN), right)
    x1 = rng.uniform(left, max(left, right))
    height = rng.uniform(max(r1, r2) + MARGIN, WORLD - MARGIN - max(r1, r2))
    time = STEP * _steps(frames)
    meet = (distance - both) / (v1 + v2) if v1 + v2 > 0 else math.inf
    m1, m2 = r1**2, r2**2
    before = np.array([v1, -v2])
    after = 2 * (m1 * v1 - m2 * v2) / (m1 + m2) - before  # an elastic hit turns velocities over in the centre of mass
    met = (time > meet)[:, None]
    x = np.array([x1, x1 + distance]) + np.where(
        met, before * meet + after * (time[:, None] - meet), before * time[:, None]
    )
    positions = np.stack([x, np.full_like(x, height)], -1)
    velocities = np.stack([np.where(met, after, before), np.zeros_like(x)], -1)
    return Truth(balls, positions, velocities, int(np.searchsorted(time, meet, side="right")))
