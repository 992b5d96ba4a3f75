"""Measure by the world's oracle if generated clips show what their prompts say."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sora_jax.data.storing.manifest import Dataset, caption_of
from sora_jax.worlds.oracle import Agreement, agreement, read, read_frames

MOST_SHAPES = 3  # that `in_words` names
FACTS = ("colour", "kind", "motion", "count")


@dataclasses.dataclass(frozen=True)
class Score:
    """Report how well clips agree with their prompts. Rates are in [0, 1], over the prompts that state the fact."""

    clips: int  # number of clips
    triple: float  # rate of clips in which colour, kind and motion are all right
    colour: float
    kind: float
    motion: float  # with its direction
    count: float  # of shapes
    constancy: float  # share of shapes that stay the same from frame to frame, a mean over clips of several frames
    physics_error: float  # in short sides of the frame, a mean over clips of several frames
    shape_constancy: float  # share of clips of several frames of which each, read by itself, shows the same shapes
    edge_error: float  # difference from clean edges, in [0, 1], a mean over clips; see `Cleanness`
    speckle: float  # difference from clean surfaces, in [0, 1], a mean over clips


@dataclasses.dataclass(frozen=True)
class Cleanness:
    """Report how clean a clip looks, whatever its prompt is. Differences are shares of the range of grey levels.

    The clean drawing has the shapes that the oracle reads in a frame, where they fit best; see `oracle.drawing`.
    """

    constant: bool  # every frame, read by itself, shows the same kinds in the same colours, and at least one
    edge_error: float  # mean absolute difference from the drawing within 2 pixels of an outline; NaN without a shape
    speckle: float  # mean absolute difference from the drawing everywhere else


def score(prompts: Sequence[str], clips: Sequence[np.ndarray]) -> Score:
    """Score generated clips, uint8 (T, H, W, 3), against their prompts by the oracle."""
    found = [agreement(prompt, clip) for prompt, clip in zip(prompts, clips, strict=True)]
    rates = {name: _rate([getattr(a, name) for a in found]) for name in FACTS}
    looks = [cleanness(clip) for clip in clips]
    moving = [a for a, clip in zip(found, clips, strict=True) if len(clip) > 1]
    return Score(
        clips=len(found),
        triple=_mean([triple(a) for a in found]),
        constancy=_mean([a.constancy for a in moving]),
        physics_error=_mean([a.physics_error for a in moving]),
        shape_constancy=_mean([look.constant for look, clip in zip(looks, clips, strict=True) if len(clip) > 1]),
        edge_error=_mean([look.edge_error for look in looks if not np.isnan(look.edge_error)]),
        speckle=_mean([look.speckle for look in looks if not np.isnan(look.speckle)]),
        **rates,
    )


def cleanness(clip: np.ndarray) -> Cleanness:
    """Measure how clean a clip looks, uint8 (T, H, W, 3), as the oracle reads each frame by itself."""
    frames = read_frames(clip)
    return Cleanness(
        constant=len({frame.shapes for frame in frames}) == 1 and bool(frames[0].shapes),
        edge_error=_mean([frame.edge_error for frame in frames if not np.isnan(frame.edge_error)]),
        speckle=_mean([frame.speckle for frame in frames if not np.isnan(frame.speckle)]),
    )


def triple(found: Agreement) -> bool:
    """Return True if colour, kind, and motion with its direction are right, as far as the prompt states them."""
    return all(getattr(found, name) is not False for name in ("colour", "kind", "motion"))


def _rate(facts: list[bool | None]) -> float:
    return _mean([fact for fact in facts if fact is not None])


def _mean(values: list) -> float:
    return float(np.mean(values)) if values else float("nan")


def in_words(clip: np.ndarray) -> str:
    """Describe in words the shapes that the oracle reads in a clip."""
    reading = read(clip)
    words = []
    for shape in reading.shapes:
        motion = "" if len(clip) == 1 or shape.motion is None else f", {shape.motion} {shape.direction or ''}".rstrip()
        words.append(f"{shape.colour} {shape.kind}{motion}")
    shown = words[:MOST_SHAPES] + ["..."] * (len(words) > MOST_SHAPES)
    return "; ".join(shown) or "nothing"


def held_out_prompts(dataset: Dataset, count: int) -> list[tuple[str, tuple[int, int, int]]]:
    """Return captions and sizes (T, H, W) of the first held-out moving clips whose caption no training clip has.

    A clip with several captions is asked for by its first.
    """
    known = {caption for row in dataset.rows("train") for caption in row["captions"]}
    found = [
        (caption_of(row), (row["frames"], row["height"], row["width"]))
        for row in dataset.held_out()
        if row["frames"] > 1 and caption_of(row) not in known and "moves" in caption_of(row)
    ]
    return found[:count]
