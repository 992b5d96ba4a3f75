"""Compose the scenes of the embedded world: captioned clips of moving shapes, a pure function of (config, index).

`scene(config, index)` plans a clip (its size, frames and caption are known without drawing it), `clip` renders it.
Training clips have the indices 0, 1, 2, ...; held-out clips HELD_OUT, HELD_OUT + 1, ... (see `split`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np

from sora_jax.config import check, check_word
from sora_jax.worlds import captions
from sora_jax.worlds.captions import (
    CAMERAS,
    COLOURS,
    DESCRIPTIONS,
    KINDS,
    LEVELS,
    MOTIONS,
    SIZES,
    STYLES,
    TONES,
    Wanted,
    WantedShape,
)
from sora_jax.worlds.motions import (
    apart,
    draw_diameter,
    largest_zoom,
    passing,
    place,
    size_bands,
    turning,
)
from sora_jax.worlds.render import ZOOM, Backdrop, Scene, Shape, render

HELD_OUT = 1 << 40
# A smaller figure cannot be told from another kind on the pixel grid.
MIN_PIXELS = 8.5
# With fewer frames a bounce or a turn cannot be seen.
MIN_FRAMES = 5
# Diameters allowed with one, two and three shapes in the frame, in short sides.
_CROWD = (SIZES["large"][1], 0.36, 0.28)
_TRIES = 40
_STREAM = 0x776F726C

T = TypeVar("T")


@dataclass(frozen=True)
class WorldConfig:
    """Distribution of the clips of the world; the defaults are its simplest form: one shape that moves or stays still.

    Values are drawn with equal probability from each tuple; one that is in it twice is twice as frequent.
    """

    seed: int = 0
    """Seed of all clips, below 2^32."""
    sizes: tuple[tuple[int, int], ...] = ((24, 24), (24, 40), (40, 24), (32, 32))
    """Sizes of the frame: (height, width) in pixels, both at least 24."""
    frames: tuple[int, ...] = (5, 9)
    """Lengths in frames, each 1 (an image) or at least 5."""
    image_share: float = 0.2
    """Probability that a clip is an image, whatever `frames` is."""
    max_shapes: int = 1
    """Largest number of shapes in a clip, 1 to 3; a small frame holds fewer."""
    shapes: tuple[str, ...] = KINDS
    """Kinds of figures."""
    colours: tuple[str, ...] = tuple(COLOURS)
    """Colours of shapes."""
    motions: tuple[str, ...] = ("move", "still")
    """Motions of shapes."""
    directions: int = 4
    """Number of directions of a move: 4, or 8 with diagonals."""
    cameras: tuple[str, ...] = ("still",)
    """Camera moves."""
    backgrounds: tuple[str, ...] = ("plain", "gradient")
    """Styles of the background."""
    tones: tuple[str, ...] = tuple(TONES)
    """Tones of the background."""
    scale: tuple[float, float] = (0.35, 0.5)
    """Range of diameters, in short sides of the frame; growing shapes end larger."""
    caption_levels: tuple[str, ...] = ("sentence",)
    """Levels of the first caption of a clip, which is of kind original."""
    fps: float = 8.0
    """Frames per second."""
    name: Literal["shapes"] = field(default="shapes", repr=False)
    """The name that tells this world from others in files."""
    # Not in `repr`, of which the ids of clips are made: captions do not change the pixels of a clip.
    extra_captions: tuple[str, ...] = field(default=(), repr=False)
    """Levels of further captions of every clip, each of a kind with the name of its level."""

    def __post_init__(self):
        for name, known in _VOCABULARIES.items():
            words = getattr(self, name)
            check(words and not isinstance(words, str), f"world.{name} is {words!r}; it must be one or more words")
            for word in words:
                check_word(f"world.{name}", word, known)
        low, high = self.scale[0], self.scale[-1]
        rules = {
            "seed": (0 <= self.seed < 2**32, "an integer from 0 to 4294967295"),
            "sizes": (_sizes_allowed(self.sizes), "one or more (height, width) with both sides at least 24"),
            "frames": (
                bool(self.frames) and all(n == 1 or n >= MIN_FRAMES for n in self.frames),
                f"one or more lengths, each 1 or at least {MIN_FRAMES}",
            ),
            "image_share": (0.0 <= self.image_share <= 1.0, "from 0 to 1"),
            "max_shapes": (self.max_shapes in (1, 2, 3), "1, 2 or 3"),
            "directions": (self.directions in (4, 8), "4 or 8"),
            "scale": (
                len(self.scale) == 2 and bool(size_bands(low, high)),
                f"a range that meets one of {SIZES}",
            ),
            "fps": (self.fps > 0, "greater than 0"),
            "extra_captions": (
                set(self.extra_captions) <= set(LEVELS) and len(set(self.extra_captions)) == len(self.extra_captions),
                f"some of {', '.join(LEVELS)}, each once",
            ),
        }
        for rule, (good, allowed) in rules.items():
            check(good, f"world.{rule} is {getattr(self, rule)!r}; it must be {allowed}")
        self._check_together(low)

    def _check_together(self, low: float) -> None:
        short = min(min(size) for size in self.sizes)
        visible = size_bands(max(low, MIN_PIXELS / short), self.scale[1])
        check(
            visible,
            f"world.scale is {self.scale!r}; with frames of {short} pixels shapes must have {MIN_PIXELS} or more",
        )
        textured = set(self.cameras) == {"still"} or "textured" in self.backgrounds
        check(
            textured, f"world.backgrounds is {self.backgrounds!r}; it must have 'textured', or no camera move is seen"
        )
        partner = "pass" not in self.motions or (self.max_shapes > 1 and self.motions != ("pass",))
        needs = "'pass' needs a max_shapes of 2 or 3 and another motion beside it"
        check(partner, f"world.motions is {self.motions!r}; {needs}")
        turns = not set(self.motions) <= {"rotate"} or turning(self.shapes)
        check(
            turns, f"world.shapes is {self.shapes!r}; for the motion 'rotate' alone it must have one that is not round"
        )


_VOCABULARIES = {
    "shapes": KINDS,
    "colours": tuple(COLOURS),
    "motions": MOTIONS,
    "cameras": tuple(CAMERAS),
    "backgrounds": STYLES,
    "tones": tuple(TONES),
    "caption_levels": LEVELS,
}


def _sizes_allowed(sizes: tuple) -> bool:
    return bool(sizes) and all(len(size) == 2 and min(size) >= 24 for size in sizes)


# Everything the world can show; for frames of about 48 pixels and more.
FULL_WORLD = WorldConfig(
    sizes=((48, 48), (48, 80), (80, 48), (64, 64)),
    frames=(9, 17),
    max_shapes=3,
    motions=MOTIONS,
    directions=8,
    cameras=("still",) * 6 + tuple(CAMERAS)[1:],
    backgrounds=STYLES,
    scale=(0.2, 0.5),
    caption_levels=DESCRIPTIONS,
)


def split(index: int) -> str:
    """Return the split of a clip, "train" or "held-out"; their ranges of indices do not overlap."""
    return "held-out" if index >= HELD_OUT else "train"


def clip(config: WorldConfig, index: int) -> tuple[np.ndarray, str]:
    """Return frames (T, H, W, 3) uint8 and caption of clip `index`, the same on every call and every machine."""
    planned = scene(config, index)
    return render(planned), planned.caption


def scene(config: WorldConfig, index: int) -> Scene:
    """Return the contents of clip `index` without drawing it; any index from 0 to 2**63 - 1, in any order."""
    key = np.array([(_STREAM << 32) | config.seed, index], np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key))
    height, width = _pick(rng, config.sizes)
    frames = 1 if rng.random() < config.image_share else _pick(rng, config.frames)
    camera = _pick(rng, config.cameras) if frames > 1 else "still"
    style = "textured" if camera != "still" else _pick(rng, config.backgrounds)
    angle, *phases = rng.uniform(0, 2 * np.pi, 3)
    level = _pick(rng, config.caption_levels)
    backdrop = Backdrop(style, _pick(rng, config.tones), float(angle), (float(phases[0]), float(phases[1])))
    empty = Scene(height, width, frames, config.fps, (), backdrop, camera, level, caption="")
    shapes = _cast(config, rng, empty)
    caption = captions.write(_facts(shapes, empty), level)
    return Scene(height, width, frames, config.fps, shapes, backdrop, camera, level, caption)


def captions_of(config: WorldConfig, planned: Scene) -> dict[str, str]:
    """Return the captions of a scene, kind -> text: its "original" one first, then one of each extra level."""
    facts = wanted(planned)
    extra = {level: captions.write(facts, level) for level in config.extra_captions}
    return {"original": planned.caption} | extra


def wanted(planned: Scene) -> Wanted:
    """Return all facts of a scene that captions can state."""
    return _facts(planned.shapes, planned)


def _facts(shapes: tuple[Shape, ...], planned: Scene) -> Wanted:
    moving = planned.frames > 1
    words = tuple(
        WantedShape(s.colour, s.kind, captions.size_word(s.diameter), s.motion if moving else None, s.direction)
        for s in shapes
    )
    return Wanted(words, planned.backdrop.style, planned.backdrop.tone, planned.camera if moving else None)


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _cast(config: WorldConfig, rng: np.random.Generator, empty: Scene) -> tuple[Shape, ...]:
    """Draw the shapes of a scene, at least one; a shape without a path clear of the earlier ones is left out."""
    spans = [_range(config, empty, crowd) for crowd in range(1, config.max_shapes + 1)]
    fitting = [crowd for crowd, span in enumerate(spans, 1) if size_bands(*span)]
    number = min(_pick(rng, fitting or [1]), len(config.colours))
    low, high = spans[number - 1]
    motions = [_pick(rng, config.motions) if empty.frames > 1 else "still" for _ in range(number)]
    shapes: list[Shape] = []
    if "pass" in motions and number > 1:
        shapes += passing(rng, empty, config.shapes, config.colours, low, high)
    others = [motion for motion in config.motions if motion != "pass"]
    colours = [c for c in rng.permutation(config.colours).tolist() if c not in {s.colour for s in shapes}]
    for motion, colour in zip(motions[len(shapes) :], colours, strict=False):
        motion = _pick(rng, others) if motion == "pass" else motion
        for _ in range(_TRIES):
            diameter = draw_diameter(rng, low, high)
            shape = place(rng, empty, config.shapes, config.directions, colour, motion, diameter)
            if all(apart(shape, other, empty) for other in shapes):
                shapes.append(shape)
                break
    return tuple(shapes)


def _range(config: WorldConfig, empty: Scene, crowd: int) -> tuple[float, float]:
    """Return the range of diameters for a number of shapes, in short sides: none is ever too small or too large."""
    smallest = MIN_PIXELS / empty.short * (ZOOM if empty.camera == "zoom out" else 1.0)
    return max(config.scale[0], smallest), min(config.scale[1] / largest_zoom(empty), _CROWD[crowd - 1])
