"""The endless stream of packs: the clips of pack r, for any r, without a list of all packs.

An epoch has every clip of a split once (a clip of weight w on average w times). Its shuffled order is cut into
*sections* of at most `SECTION` clips, and each section is planned by itself (`planning.plan`), so the time to the first
batch does not grow with a plan of all clips: the order is a permutation that is computed and not stored
(`shuffle.Permutation`), and the plan of a section takes about a second. The packs of all sections of all epochs follow
each other. The limit is memory, for the columns of the manifest: 60 bytes a clip, 95 while they are read, and 500 while
captions of 32 tokens are tokenized at the first start (measured by experiments/bench/feed.py). So a host of 64 GiB is
enough for 10^8 clips.

The number of packs of a section is known only once it is planned. So a position in the stream is saved with the step:
the number of a section and its first row (`Position`). It saves time and changes nothing: without it the sections are
counted from the first.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from sora_jax.data.draws import uniforms
from sora_jax.data.feeding.shuffle import Permutation
from sora_jax.data.packing.planning import Plan
from sora_jax.data.storing.store import ClipStore

SECTION = 1 << 20
CACHED = 3  # plans: two for a batch across a border, and the next one


class Position(NamedTuple):
    """A known point of the stream: section `section`, counted over all epochs, begins at row `row`."""

    section: int = 0
    row: int = 0


class Planned(NamedTuple):
    """A planned section. Item i is caption `captions[i]` of clip `clips[i]`; pack p holds the items `plan[p]`.

    cuts[i]: the token frames that item i leaves out at its beginning, 0 or 1. guides[i]: the number of its key frames
    that are guides, or, negative, of its sketches.
    """

    clips: np.ndarray
    captions: np.ndarray
    cuts: np.ndarray
    guides: np.ndarray
    plan: Plan


@dataclass(frozen=True)
class ClipIndex:
    """The clips of a split, each with its variants.

    rows: (rows,) of the manifest, the variants of a clip next to each other; starts: (n + 1,) where each clip begins,
    None where each has one row; clip_ids (n,); weights (n,). 32 bits each, as there may be 10^8.
    """

    rows: np.ndarray
    starts: np.ndarray | None
    clip_ids: np.ndarray
    weights: np.ndarray

    @staticmethod
    def of(store: ClipStore, split: str) -> "ClipIndex":
        """Read the clips of a split from the manifest."""
        rows = store.indices(split).astype(np.int32)
        if not store.has_variants:
            return ClipIndex(rows, None, store.clip_ids[rows], store.weights[rows])
        codes = store.column("id").take(rows).dictionary_encode().indices.to_numpy()
        order = np.argsort(codes, kind="stable")
        rows, starts = rows[order], np.flatnonzero(np.diff(codes[order], prepend=-1))
        first = rows[starts]
        return ClipIndex(rows, np.append(starts, len(rows)), store.clip_ids[first], store.weights[first])

    def __len__(self) -> int:
        return len(self.clip_ids)

    def section(self, seed: int, epoch: int, number: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of the clips of a section, and the number of each copy (0, but for weights above 1)."""
        places = np.arange(*section_bounds(len(self), size, number))
        clips = Permutation(len(self), seed, "order", epoch)(places)
        weights = self.weights[clips].astype(np.float64)
        more = uniforms(seed, "weight", epoch, self.clip_ids[clips]) < weights % 1
        copies = weights.astype(np.int64) + more
        clips = np.repeat(clips, copies)
        copy = np.arange(len(clips)) - np.repeat(np.cumsum(copies) - copies, copies)
        if self.starts is not None:  # the next variant in each epoch, from a first one that is drawn for the clip
            count = self.starts[clips + 1] - self.starts[clips]
            first = (uniforms(seed, "variant", 0, self.clip_ids[clips]) * count).astype(np.int64)
            clips = self.starts[clips] + (first + epoch + copy) % count
        return self.rows[clips], copy


def section_count(clips: int, size: int = SECTION) -> int:
    """Return the number of sections of an epoch of so many clips."""
    return max(1, -(-clips // size))


def section_bounds(clips: int, size: int, number: int) -> tuple[int, int]:
    """Return the first place of a section and the first after it; sections differ by at most one clip."""
    count = section_count(clips, size)
    return number * clips // count, (number + 1) * clips // count


class Epochs:
    """The sections of all epochs, end to end; plans are made when they are needed, and one ahead in the background."""

    def __init__(self, sections: int, plan_of: Callable[[int, int], Planned], position: Position = Position()) -> None:
        self.sections, self._plan_of = sections, plan_of
        self._lock = threading.RLock()
        self._pool = ThreadPoolExecutor(1, "plan")
        self._plan = lru_cache(CACHED)(self._submit)
        self.seek(position)

    def __reduce__(self) -> tuple:
        return Epochs, (self.sections, self._plan_of, self.position(self._starts[0]))

    def seek(self, position: Position) -> None:
        """Count from here on; rows before are counted from the first section again."""
        with self._lock:
            self._base, self._starts = position.section, [position.row]  # first row of section `_base + i`

    def locate(self, row: int) -> tuple[Planned, int]:
        """Return the planned section that a row is in, and its place there."""
        with self._lock:
            section = self._section(row)
            place = row - self._starts[section - self._base]
        return self._planned(section), place

    def position(self, row: int) -> Position:
        """Return the section that a row is in."""
        with self._lock:
            section = self._base if row == self._starts[0] else self._section(row)
            return Position(section, self._starts[section - self._base])

    def epoch(self, row: int) -> int:
        """Return the epoch that a row is in, from 0."""
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
        return found.result()

    def _submit(self, section: int) -> Future:
        return self._pool.submit(self._plan_of, *divmod(section, self.sections))
