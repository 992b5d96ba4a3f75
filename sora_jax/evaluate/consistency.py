"""Measure if clips of the embedded world stay what they are: agreement, constancy and permanence, by the oracle.

Curves and permanence come from frames that are read by themselves, so nothing is inferred from other frames. The axes
that need no oracle are those of `evaluate.looks`.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from sora_jax.evaluate.looks import Looks, looks
from sora_jax.evaluate.world import triple
from sora_jax.worlds.captions import LEVELS, Wanted, WantedShape, parse, write
from sora_jax.worlds.oracle import Agreement, FrameReading, read, read_frames
from sora_jax.worlds.oracle.agreement import agree
from sora_jax.worlds.oracle.backdrop import around, fit_plane
from sora_jax.worlds.oracle.reading import Sighting, find_colours, grey_levels

FACTS = ("colour", "kind", "motion", "count", "background", "camera")
COVERED = 0.8  # a shape of which a frame shows less than this share of what the first frame shows is covered in it


@dataclasses.dataclass(frozen=True)
class Measured:
    """Hold what was measured of one clip; what needs the oracle is None where the prompt is not in the world's words.

    agreement_T: share of the shapes in the prompt that a frame shows, in colour and kind. identity_T: share of the
    first frame's shapes that a frame shows, in colour and kind. shape_T: 1 where a frame shows exactly the first
    frame's shapes, in as many parts. shapes: number that is read in the clip. passes: the prompt says that one shape
    passes in front of another. covered: a shape is seen whole, then covered. same: the last frame shows that shape in
    the colour and kind of the first.
    """

    looks: Looks
    still_camera: bool
    agreement: Agreement | None = None
    agreement_T: np.ndarray | None = None
    identity_T: np.ndarray | None = None
    shape_T: np.ndarray | None = None
    shapes: int = 0
    passes: bool = False
    covered: bool = False
    same: bool = False


@dataclasses.dataclass(frozen=True)
class Consistency:
    """Average over clips; values are None where no clip has them, and without the oracle those that need it.

    agreement: rates of clips. constancy: of identity (clip read as a whole), identity and shapes frame by frame,
    physics error in short sides. permanence: see `permanence`. looks: fields of `Looks`. curves: means over the clips
    without a pass, a value for each frame. Flicker leaves out clips whose prompt says that the camera moves.
    """

    clips: int
    agreement: dict[str, float | None]
    constancy: dict[str, float | None]
    permanence: dict[str, float | None]
    looks: dict[str, float | None]
    curves: dict[str, list[float]]


def in_worlds_words(caption: str) -> bool:
    """Return True if the oracle can compare clips with a caption: the embedded world writes the very same."""
    facts = parse(caption)
    return bool(facts.shapes) and any(write(facts, level) == caption for level in LEVELS)


def measure(prompt: str, clip: np.ndarray, oracle: bool = True) -> Measured:
    """Measure a uint8 clip (T, H, W, 3) of several frames against its prompt, with the oracle or without."""
    if not oracle:
        return Measured(looks(clip), still_camera=True)
    facts, frames, reading = parse(prompt), read_frames(clip), read(clip)
    grey = grey_levels(clip)
    inside_THW = find_colours(grey, fit_plane(grey))[1]
    passes = any(shape.motion == "pass" for shape in facts.shapes)
    covered, same = permanence(clip, frames) if passes else (False, False)
    return Measured(
        looks=looks(clip, inside_THW, ~around(inside_THW)),
        still_camera=facts.camera in (None, "still"),
        agreement=agree(facts, reading, moving=len(clip) > 1),
        agreement_T=agreement_curve(facts, frames),
        identity_T=identity_curve(frames),
        shape_T=np.array([bool(frame.shapes) and frame.shapes == frames[0].shapes for frame in frames], float),
        shapes=len(reading.shapes),
        passes=passes,
        covered=covered,
        same=same,
    )


def agreement_curve(facts: Wanted, frames: Sequence[FrameReading]) -> np.ndarray:
    """Return for each frame (T,) the share of the prompt's shapes that it shows in their colour and kind."""
    shown = [_looks_of(frame) for frame in frames]
    # A shape whose colour the prompt leaves open is shown in any.
    hits = [[any(_fits(shape, look) for look in looks) for shape in facts.shapes] for looks in shown]
    return np.array(hits, float).mean(1)


def _fits(shape: WantedShape, look: tuple[str, str]) -> bool:
    return shape.kind == look[1] and shape.colour in (None, look[0])


def identity_curve(frames: Sequence[FrameReading]) -> np.ndarray:
    """Return for each frame (T,) the share of the first frame's shapes that it shows; 0 if that shows none."""
    first = _looks_of(frames[0])
    return np.array([len(first & _looks_of(frame)) / max(len(first), 1) for frame in frames])


def permanence(clip: np.ndarray, frames: Sequence[FrameReading]) -> tuple[bool, bool]:
    """Follow the shape of the first frame of which a later frame shows least, uint8 (T, H, W, 3) and its readings.

    Returns (covered, same). Covered: a frame between the first and the last shows it beside another shape, with less
    than COVERED of its first area, or does not show it after it was beside one. Same: the last frame shows a shape of
    the colour and kind that it has in the first.
    """
    if len(clip) < 3:
        return False, False
    seen = [_sightings(frame) for frame in clip]
    shares = {(colour, kind): _least_seen(colour, seen) for colour, kind in _looks_of(frames[0]) if colour in seen[0]}
    if not shares:
        return False, False
    least = min(shares, key=lambda look: shares[look])
    return shares[least] < COVERED, least in _looks_of(frames[-1])


def _looks_of(frame: FrameReading) -> set[tuple[str, str]]:
    return {(colour, kind) for colour, kind, _ in frame.shapes}


def _sightings(frame: np.ndarray) -> dict[str, Sighting]:
    """Find the shape of each colour in one frame (H, W, 3)."""
    grey = grey_levels(frame[None])
    return {sighting.colour: sighting for sighting in find_colours(grey, fit_plane(grey))[0]}


def _least_seen(colour: str, seen: Sequence[dict[str, Sighting]]) -> float:
    """Return the least share of its first area that frames between the first and the last show of a shape.

    Frames count in which it touches another shape, or is not seen after it has touched one: a shape that vanishes far
    from others is not covered. 1 where there are none.
    """
    first, least = seen[0][colour], 1.0
    touches = bool(first.crossed_T[0])
    for frame in seen[1:-1]:
        later = frame.get(colour)
        touches = touches if later is None else bool(later.crossed_T[0])
        if touches:
            least = min(least, 0.0 if later is None else later.area / first.area)
    return least


def average(found: Sequence[Measured]) -> Consistency:
    """Average what was measured of clips, each measure over the clips that have it."""
    known = [m for m in found if m.agreement is not None]
    whole = [m for m in known if not m.passes]
    passing = [m for m in known if m.passes]
    covered = [m for m in passing if m.covered]
    looks = {field.name: _mean(getattr(m.looks, field.name) for m in found) for field in dataclasses.fields(Looks)}
    looks["flicker"] = _mean(m.looks.flicker for m in found if m.still_camera)
    return Consistency(
        clips=len(found),
        agreement=_agreement(known),
        constancy=_constancy(known, whole),
        permanence={
            "prompts": float(len(passing)),
            "covered": _mean(m.covered for m in passing),
            "same_after": _mean(m.same for m in covered),
        },
        looks=looks,
        curves={
            name: mean_curve([getattr(m, f"{name}_T") for m in whole]) for name in ("agreement", "identity", "shape")
        },
    )


def _agreement(known: Sequence[Measured]) -> dict[str, float | None]:
    facts = [m.agreement for m in known if m.agreement is not None]
    rates = {name: _mean(v for a in facts if (v := getattr(a, name)) is not None) for name in FACTS}
    return rates | {"all": _mean(triple(a) for a in facts)}


def _constancy(known: Sequence[Measured], whole: Sequence[Measured]) -> dict[str, float | None]:
    facts = [m.agreement for m in known if m.agreement is not None]
    return {
        "identity": _mean(a.constancy for a in facts),
        "identity_by_frame": _mean(m.identity_T[1:].mean() for m in whole if m.identity_T is not None),
        "identity_last": _mean(m.identity_T[-1] for m in whole if m.identity_T is not None),
        "shape": _mean(float(m.shape_T.all()) for m in whole if m.shape_T is not None),
        # The oracle gives 0 to a clip in which it reads no shape.
        "physics_error": _mean(m.agreement.physics_error for m in known if m.agreement is not None and m.shapes),
    }


def mean_curve(curves: Sequence[np.ndarray | None]) -> list[float]:
    """Average curves (T,) of several lengths frame by frame, each frame over the clips that are so long."""
    known = [curve for curve in curves if curve is not None]
    length = max(map(len, known), default=0)
    padded = [np.pad(curve, (0, length - len(curve)), constant_values=np.nan) for curve in known]
    return [float(value) for value in np.nanmean(padded, axis=0)] if padded else []


def _mean(values: Iterable[float]) -> float | None:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else None
