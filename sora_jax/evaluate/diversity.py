"""Measure how different clips of one prompt are, against the world's own clips of the same caption.

Clips that do not show what the prompt says are left out: paths in all directions are errors, not diversity.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from sora_jax.config import check
from sora_jax.evaluate.world import triple
from sora_jax.worlds import HELD_OUT, WorldConfig, clip, scene, wanted
from sora_jax.worlds.captions import LEVELS, Wanted, facts_at, parse
from sora_jax.worlds.oracle import agree, read
from sora_jax.worlds.oracle.kinds import unit_area

FIRST = HELD_OUT + (1 << 32)  # far behind the held-out clips of any dataset
TRIES = 2000  # scenes that are looked at for each clip that is wanted
LEAST = 0.005  # in short sides; a smaller spread is an error of measurement


@dataclasses.dataclass(frozen=True)
class Spread:
    """Report the standard deviations over clips of one prompt, in short sides; NaN where fewer than two count."""

    start: float  # of the centre in the first frame: the root of the summed variances of x and y
    size: float  # of the square root of the shape's area
    path: float  # of the vector from the first centre to the last, as for `start`
    counted: float  # share of the clips that count: those in which the oracle reads what the prompt says


@dataclasses.dataclass(frozen=True)
class Diversity:
    """Report the spread of clips over the world's own: 1 is as diverse as the world, 0 always the same.

    NaN where the world's own clips do not differ, as in the path of a shape that stays still.
    """

    start: float
    size: float
    path: float
    counted: float  # share of the clips that count: those in which the oracle reads what the prompt says


def spread(clips: Sequence[np.ndarray], prompt: str = "") -> Spread:
    """Measure the spread of the largest shape in clips, uint8 (T, H, W, 3) of one size, that show the prompt."""
    facts, readings = parse(prompt), [(read(frames), len(frames) > 1) for frames in clips]
    shapes = [found.shapes[0] for found, moving in readings if found.shapes and triple(agree(facts, found, moving))]
    paths = [shape.path_T2[np.isfinite(shape.path_T2).all(1)] for shape in shapes]
    # Of the area and not the diameter: a kind that is misread would change what the diameter is.
    sizes = [shape.diameter * np.sqrt(unit_area(shape.kind)) for shape in shapes]
    return Spread(
        start=_deviation([path[0] for path in paths]),
        size=_deviation(sizes),
        path=_deviation([path[-1] - path[0] for path in paths]),
        counted=len(shapes) / max(len(clips), 1),
    )


def _deviation(values: Sequence) -> float:
    return float(np.sqrt(np.var(values, axis=0, ddof=1).sum())) if len(values) > 1 else float("nan")


def diversity(clips: Sequence[np.ndarray], real: Sequence[np.ndarray], prompt: str = "") -> Diversity:
    """Compare the spread of clips of one prompt with that of the world's own clips of that caption and size.

    Without the prompt every clip counts in which a shape is read.
    """
    found, own = spread(clips, prompt), spread(real, prompt)
    ratios = {
        name: getattr(found, name) / getattr(own, name) if getattr(own, name) >= LEAST else float("nan")
        for name in ("start", "size", "path")
    }
    return Diversity(counted=found.counted, **ratios)


def mean_diversity(found: Sequence[Diversity]) -> Diversity:
    """Average over prompts, each measure over those that have it."""
    values = {
        f.name: [v for d in found if not np.isnan(v := getattr(d, f.name))] for f in dataclasses.fields(Diversity)
    }
    return Diversity(**{name: float(np.mean(v)) if v else float("nan") for name, v in values.items()})


def world_clips(world: WorldConfig, caption: str, size: tuple[int, int, int], count: int) -> list[np.ndarray]:
    """Draw the world's own clips of a size (T, H, W) and a caption of any level: those of its first such scenes.

    Raises:
        UserError: the world has no clip of this caption.
    """
    facts, found = parse(caption), []
    narrow = _narrowed(world, facts, size)
    for index in range(FIRST, FIRST + TRIES * count):
        shown = wanted(scene(narrow, index))
        if facts.shapes and any(facts_at(shown, level) == facts for level in LEVELS):
            found.append(clip(narrow, index)[0])
            if len(found) == count:
                break
    wanting = f"the world has {len(found)} clips of {caption!r} among {TRIES * count}; {count} are needed"
    check(len(found) == count, wanting)
    return found


def _narrowed(world: WorldConfig, facts: Wanted, size: tuple[int, int, int]) -> WorldConfig:
    """Leave only what the caption names. Words are drawn independently, so this is rejection by them, without waste."""
    frames, height, width = size
    world = dataclasses.replace(
        world, sizes=((height, width),), frames=(frames,), image_share=float(frames == 1), caption_levels=("sentence",)
    )
    if world.max_shapes > 1 or len(facts.shapes) != 1:
        return world
    shape = facts.shapes[0]
    changes = {"colours": shape.colour, "shapes": shape.kind, "motions": shape.motion, "tones": facts.tone}
    changes |= {"backgrounds": facts.style} if set(world.cameras) == {"still"} else {}
    kept: dict[str, Any] = {name: (word,) for name, word in changes.items() if word in getattr(world, name)}
    return dataclasses.replace(world, **kept)
