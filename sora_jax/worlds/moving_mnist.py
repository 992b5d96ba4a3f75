"""Moving MNIST: handwritten digits that move in straight lines and bounce off the borders of a black frame.

The digits move by the protocol of OpenSTL (2306.11249; Srivastava et al. 1502.04681), or, if `stochastic`, by that of
SVG (Denton and Fergus 1802.07687): at each bounce a digit takes a new random velocity.

A clip is a pure function of (config, images of digits, index). Held-out clips show held-out images of digits only.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from sora_jax.config import check
from sora_jax.worlds.digits import load_digits
from sora_jax.worlds.scenes import split

STEP = 0.1  # of a digit from frame to frame, in parts of the free way
FASTEST = 4  # pixels a frame along each axis, of the stochastic variant
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_STREAM = 0x6D6D6E73


@dataclass(frozen=True)
class MovingMnistConfig:
    """Distribution of the clips; the defaults are OpenSTL's, with 10 frames to give and 10 to predict."""

    name: Literal["moving_mnist"] = "moving_mnist"
    """Name of the world."""
    # Not in `repr`, of which the ids of clips are made: the same digits may lie elsewhere on another machine.
    digits_path: str = field(default="", repr=False)
    """Images of digits: a folder with the idx files of MNIST, one idx file of images, or tfds:mnist."""
    held_out_digits: float = 0.2
    """Share of the images that held-out clips show; of files of training and test digits, these show the latter."""
    digits: int = 2
    """Number of digits in a clip."""
    size: int = 64
    """Height and width of the frame in pixels."""
    frames: int = 20
    """Length in frames."""
    digit_size: int = 28
    """Height and width in pixels that images of digits are scaled to; SVG has 32."""
    stochastic: bool = False
    """Give a digit a new random velocity of whole pixels, up to 4 along each axis, at each bounce."""
    seed: int = 0
    """Seed of all clips, below 2^32."""
    fps: float = 10.0
    """Frames per second."""

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Return the (height, width) of all clips."""
        return ((self.size, self.size),)

    def __post_init__(self):
        rules = {
            "held_out_digits": (0 < self.held_out_digits < 1, "between 0 and 1"),
            "digits": (self.digits >= 1, "at least 1"),
            "digit_size": (self.digit_size >= 1, "at least 1"),
            "size": (self.size > self.digit_size, f"greater than digit_size, {self.digit_size}"),
            "frames": (self.frames >= 1, "at least 1"),
            "seed": (0 <= self.seed < 2**32, "an integer from 0 to 4294967295"),
            "fps": (self.fps > 0, "greater than 0"),
        }
        for rule, (good, allowed) in rules.items():
            check(good, f"world.{rule} is {getattr(self, rule)!r}; it must be {allowed}")


STOCHASTIC = MovingMnistConfig(digit_size=32, stochastic=True)  # that of SVG


class Plan(NamedTuple):
    """Hold what a clip shows: the numbers of its images of digits, and their (top, left) pixels in every frame."""

    numbers_N: np.ndarray
    places_NT2: np.ndarray


def count_of(config: MovingMnistConfig) -> int | None:
    """Return the number of training clips: None, for there is no end of them."""
    return None


def size_of(config: MovingMnistConfig, index: int) -> tuple[int, int, int]:
    """Return (frames, height, width) of a clip without drawing it."""
    return config.frames, config.size, config.size


def draw(config: MovingMnistConfig, index: int) -> np.ndarray:
    """Return the frames (T, H, W, 3) uint8 of clip `index`, grey values in each channel.

    Overlapping digits show their maximum (OpenSTL), or their sum up to white if `stochastic` (SVG).
    """
    images = _digits(config, index).scaled(config.digit_size)
    frames_THW = np.zeros(size_of(config, index), np.uint8)
    planned = plan(config, index)
    for number, places_T2 in zip(planned.numbers_N, planned.places_NT2, strict=True):
        for frame, (top, left) in zip(frames_THW, places_T2, strict=True):
            below = frame[top : top + config.digit_size, left : left + config.digit_size]
            added = below + np.minimum(255 - below, images[number])
            below[:] = added if config.stochastic else np.maximum(below, images[number])
    return np.repeat(frames_THW[..., None], 3, axis=-1)


def captions_of(config: MovingMnistConfig, index: int) -> dict[str, str]:
    """Return the caption of a clip by its kind, such as {"original": "a three and an eight move"}."""
    labels = _digits(config, index).labels
    _, numbers = _chosen(config, index)
    words = ["digit" if labels is None else WORDS[labels[number]] for number in numbers]
    names = [f"{'an' if word == 'eight' else 'a'} {word}" for word in words]
    return {"original": f"{' and '.join(names)} {'moves' if len(names) == 1 else 'move'}"}


def plan(config: MovingMnistConfig, index: int) -> Plan:
    """Plan clip `index` without drawing it; any index from 0 to 2**63 - 1, in any order."""
    rng, numbers_N = _chosen(config, index)
    move, free = (_move_randomly if config.stochastic else _move), config.size - config.digit_size
    return Plan(numbers_N, np.stack([move(rng, config.frames, free) for _ in range(config.digits)]))


def _chosen(config: MovingMnistConfig, index: int) -> tuple[np.random.Generator, np.ndarray]:
    """Return the numbers (N,) of the digits of a clip, and the generator that goes on with their ways."""
    key = np.array([(_STREAM << 32) | config.seed, index], np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key))
    return rng, rng.integers(len(_digits(config, index).images), size=config.digits)


def _digits(config: MovingMnistConfig, index: int):
    return load_digits(config.digits_path, config.held_out_digits)[split(index)]


def _move(rng: np.random.Generator, frames: int, free: int) -> np.ndarray:
    """Return the places (T, 2) of a digit that moves by STEP in a random direction and bounces, as OpenSTL has it."""
    place, angle = rng.random(2), rng.uniform(0, 2 * np.pi)
    velocity, places_T2 = STEP * np.array([np.sin(angle), np.cos(angle)]), np.empty((frames, 2), np.int64)
    for t in range(frames):
        place = place + velocity
        velocity = np.where((place <= 0) | (place >= 1), -velocity, velocity)
        place = place.clip(0, 1)
        places_T2[t] = free * place  # rounded down
    return places_T2


def _move_randomly(rng: np.random.Generator, frames: int, free: int) -> np.ndarray:
    """Return the places (T, 2) of a digit that takes a new velocity, away from the border, where it bounces: SVG."""
    place, velocity = rng.integers(free, size=2), rng.integers(-FASTEST, FASTEST + 1, size=2)
    places_T2 = np.empty((frames, 2), np.int64)
    for t in range(frames):
        for axis in (0, 1):
            if not 0 <= place[axis] < free:
                inwards = 1 if place[axis] < 0 else -1
                velocity = rng.integers(-FASTEST, FASTEST + 1, size=2)
                velocity[axis] = inwards * rng.integers(1, FASTEST + 1)
                place[axis] = 0 if inwards > 0 else free - 1
        places_T2[t] = place
        place = place + velocity
    return places_T2
