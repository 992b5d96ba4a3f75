"""The endless stream of packs: which clips are in pack r, for any r, without a list of all.

An epoch has every clip of a split once (a clip of weight w on average w times). Its shuffled order is cut into
*sections* of at most `SECTION` clips, and each section is planned by itself (`planning.plan`), so the plan, and what is
computed before the first batch, do not grow with the data set: at 10^9 clips an epoch is 954 sections, the order is a
permutation that is computed and not stored (`shuffle.Permutation`), and a plan takes about a second. The packs of all
sections of all epochs are laid end to end. (Columns of the manifest, such as sizes and uids, are still held whole, some
60 bytes a clip: past 10^8 clips they want memory-mapped files.)

How many packs a section has is known only once it is planned. So a position in the stream is kept beside the step:
the number of a section and the first row of it (`Position`). It is a hint that saves time and changes nothing:
without it the sections are counted from the first.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sora_jax.data.draws import uniforms
from sora_jax.data.feeding.shuffle import Permutation
from sora_jax.data.packing.planning import Plan

SECTION = 1 << 20
KEPT = 3  # plans: of a batch across a border, and the next one


class Position(NamedTuple):
    """A place in the stream: section `section`, counted over all epochs, begins at row `row`."""

    section: int = 0
    row: int = 0


class Planned(NamedTuple):
    """A planned section. Item i is caption `captions[i]` of clip `clips[i]`; pack p holds the items `plan[p]`.

    cuts[i]: the token frames that item i leaves out at its beginning, 0 or 1. guides[i]: the key frames that it has
    as guides, or, negative, the sketches.
    """

    clips: np.ndarray
    captions: np.ndarray
    cuts: np.ndarray
    guides: np.ndarray
    plan: Plan


@dataclass(frozen=True)
class ClipIndex:
    """The clips of a split, each with its variants.

    rows: (rows,) their places in the manifest, the variants of a clip next to each other; starts: (n + 1,) where each
    clip begins; uids (n,); weights (n,).
    """

    rows: np.ndarray
    starts: np.ndarray
    clip_ids: np.ndarray
    weights: np.ndarray

    @staticmethod
    def of(rows: np.ndarray, ids, clip_ids: np.ndarray, weights: np.ndarray) -> "ClipIndex":
        """From the rows of a split, ids (an Arrow array; None where no clip has variants), uids, weights."""
        if ids is None:
            return ClipIndex(rows, np.arange(len(rows) + 1), clip_ids, weights)
        codes = ids.dictionary_encode().indices.to_numpy()
        order = np.argsort(codes, kind="stable")
        starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
        first = order[starts]
        return ClipIndex(rows[order], np.append(starts, len(rows)), clip_ids[first], weights[first])

    def __len__(self) -> int:
        return len(self.clip_ids)

    def section(self, seed: int, epoch: int, number: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Manifest rows of the clips of a section, and which copy of its clip each is (0 but for weights above 1)."""
        places = np.arange(*section_bounds(len(self), size, number))
        clips = Permutation.of(len(self), seed, "order", epoch).order(places)
        whole = np.floor(self.weights[clips])
        again = whole + (uniforms(seed, "weight", epoch, self.clip_ids[clips]) < self.weights[clips] - whole)
        copies = again.astype(np.int64)
        clips = np.repeat(clips, copies)
        copy = np.arange(len(clips)) - np.repeat(np.cumsum(copies) - copies, copies)
        return self.rows[self.starts[clips] + self._variants(seed, epoch, clips, copy)], copy

    def _variants(self, seed: int, epoch: int, clips: np.ndarray, copy: np.ndarray) -> np.ndarray:
        """Each epoch takes the next variant of a clip, from a first one that belongs to the clip."""
        count = self.starts[clips + 1] - self.starts[clips]
        first = (uniforms(seed, "variant", 0, self.clip_ids[clips]) * count).astype(np.int64)
        return (first + epoch + copy) % count


def section_count(clips: int, size: int = SECTION) -> int:
    """Into how many sections an epoch of so many clips is cut."""
    return max(1, -(-clips // size))


def section_bounds(clips: int, size: int, number: int) -> tuple[int, int]:
    """First place of a section and first place after it; sections differ by at most one clip."""
    count = section_count(clips, size)
    return number * clips // count, (number + 1) * clips // count


class Epochs:
    """`locate(row)` in the stream; plans are made when they are needed, and one ahead in the background."""

    def __init__(self, sections: int, plan_of: Callable[[int, int], Planned]):
        self.sections, self._plan_of = sections, plan_of
        self._lock = threading.RLock()
        self._plans: dict[int, Future] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._base, self._starts = 0, [0]  # first row of section `_base + i`

    def __getstate__(self) -> dict:
        return {"sections": self.sections, "plan_of": self._plan_of, "position": self.position(self._starts[0])}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["sections"], state["plan_of"])
        self.seek(state["position"])

    def seek(self, position: Position) -> None:
        """Count from here on; rows before are counted from the first section again."""
        with self._lock:
            self._base, self._starts = position.section, [position.row]

    def locate(self, row: int) -> tuple[Planned, int]:
        """The planned section that a row is in, and its place there."""
        with self._lock:
            section = self._section(row)
            place = row - self._starts[section - self._base]
        return self._planned(section), place

    def position(self, row: int) -> Position:
        """The section that a row is in."""
        with self._lock:
            if row == self._starts[0]:
                return Position(self._base, row)
            section = self._section(row)
            return Position(section, self._starts[section - self._base])

    def epoch(self, row: int) -> int:
        """The epoch that a row is in, from 0."""
        with self._lock:
            return self._section(row) // self.sections

    def _section(self, row: int) -> int:
        if row < self._starts[0]:
            self.seek(Position())
        while self._starts[-1] <= row:
            last = self._base + len(self._starts) - 1
            self._starts.append(self._starts[-1] + len(self._planned(last).plan))
        return self._base + int(np.searchsorted(self._starts, row, side="right")) - 1

    def _planned(self, section: int) -> Planned:
        with self._lock:
            found = self._plan(section)
            self._plan(section + 1)  # so that a section that ends finds the next one ready
            while len(self._plans) > KEPT:
                self._plans.pop(next(iter(self._plans)))
        return found.result()

    def _plan(self, section: int) -> Future:
        found = self._plans.pop(section, None)
        if found is None:
            self._pool = self._pool or ThreadPoolExecutor(1, "plan")
            found = self._pool.submit(self._plan_of, *divmod(section, self.sections))
        self._plans[section] = found  # at the end: the one that was asked for last
        return found
