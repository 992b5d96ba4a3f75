"""Compare a clip, as the oracle reads it, with the facts of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np

from sora_jax.worlds.captions import Wanted, WantedShape, parse, size_word
from sora_jax.worlds.oracle.reading import Reading, ShapeReading, read


@dataclass(frozen=True)
class Agreement:
    """Facts of a prompt that a clip shows (True) or not (False); None if the prompt or a single frame leaves them open.

    colour, kind, motion (with its direction) and size are True if they hold for every shape of the prompt. constancy in
    [0, 1] and physics_error (short sides of the frame) are those of the Reading; they do not depend on the prompt.
    """

    colour: bool | None
    kind: bool | None
    motion: bool | None
    count: bool | None
    size: bool | None
    background: bool | None
    camera: bool | None
    constancy: float
    physics_error: float

    @property
    def all(self) -> bool:
        """Return True if colour, kind, motion and count hold, as far as the prompt states them."""
        return all(fact is not False for fact in (self.colour, self.kind, self.motion, self.count))


def agreement(prompt: str, frames: np.ndarray) -> Agreement:
    """Compare a clip, frames (T, H, W, 3) uint8 or floats in [-1, 1], with a prompt in the words of captions."""
    return agree(parse(prompt), read(frames), moving=len(frames) > 1)


def agree(wanted: Wanted, reading: Reading, moving: bool) -> Agreement:
    """Compare a reading with the facts of a prompt; `moving`: the clip has more than one frame."""
    facts = _best_match(wanted.shapes, reading.shapes)
    named = [(w, r) for w, r in ((wanted.style, reading.style), (wanted.tone, reading.tone)) if w is not None]
    return Agreement(
        colour=facts["colour"],
        kind=facts["kind"],
        motion=facts["motion"] if moving else None,
        count=reading.count == len(wanted.shapes) if wanted.shapes else None,
        size=facts["size"],
        background=all(w == r for w, r in named) if named else None,
        camera=_camera(wanted, reading) if moving else None,
        constancy=reading.constancy,
        physics_error=reading.physics_error,
    )


def _camera(wanted: Wanted, reading: Reading) -> bool | None:
    # Over a backdrop without texture a camera cannot be seen to move.
    seen = reading.camera or "still"
    return None if wanted.camera is None else seen == wanted.camera


def _best_match(wanted: tuple[WantedShape, ...], shapes: tuple[ShapeReading, ...]) -> dict[str, bool | None]:
    """Return the facts under the pairing of wanted with read shapes that makes most of them true."""
    seats = list(shapes[:6]) + [None] * len(wanted)
    pairings = {order[: len(wanted)] for order in permutations(range(len(seats)), len(wanted))}
    tried = [[_facts(w, seats[seat]) for w, seat in zip(wanted, order, strict=True)] for order in sorted(pairings)]
    best = max(tried, key=lambda pairs: sum(fact is True for pair in pairs for fact in pair.values()))
    return {name: _every([pair[name] for pair in best]) for name in ("colour", "kind", "motion", "size")}


def _facts(wanted: WantedShape, shape: ShapeReading | None) -> dict[str, bool | None]:
    asked = {
        "colour": wanted.colour,
        "kind": wanted.kind,
        "motion": wanted.motion and (wanted.motion, wanted.direction),
        "size": wanted.size,
    }
    if shape is None:
        return {name: None if value is None else False for name, value in asked.items()}
    shown = {
        "colour": shape.colour,
        "kind": shape.kind,
        "motion": (shape.motion, shape.direction),
        "size": size_word(shape.diameter),
    }
    return {name: None if value is None else value == shown[name] for name, value in asked.items()}


def _every(facts: list[bool | None]) -> bool | None:
    stated = [fact for fact in facts if fact is not None]
    return all(stated) if stated else None
