"""Keep what a run is trained on in its folder: the sizes of its clips and the words of its captions.

A model makes noise of sizes and words that are far from these, so a sampler compares what it is asked for.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sora_jax.config import read_json
from sora_jax.data.feeding.texts import captions_in_order
from sora_jax.data.packing.packs import grid_of
from sora_jax.data.storing.store import ClipStore
from sora_jax.files import as_path, write_json

FILE = "seen.json"
MOST_CLIPS = 100_000  # whose captions are looked at, evenly spread: a second or two
MOST_WORDS = 20_000  # that are kept, the most frequent
FAR = 2.0  # a size of so many times the largest of training, or of the smallest divided by it, is far
_NO_BLANKS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"  # scripts without blanks: by letter
_WORD = re.compile(rf"[{_NO_BLANKS}]|[^\W{_NO_BLANKS}]+")


class ClipSize(NamedTuple):
    """Measure a clip: tokens, frames, and height and width in pixels."""

    tokens: int
    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Seen:
    """Hold the least and most of each measure of the clips of a run, and the words of its captions.

    aspect: width / height. clips: those whose captions were looked at, of `of`. left_out: rarer words, not in `words`.
    dropped: some clips are trained on without their captions, which guidance needs. example: the caption of a clip, its
    frames, height and width; () where it has none.
    """

    tokens: tuple[int, int]
    frames: tuple[int, int]
    height: tuple[int, int]
    width: tuple[int, int]
    aspect: tuple[float, float]
    clips: int
    of: int
    words: tuple[str, ...]
    left_out: int = 0
    dropped: bool = True
    example: tuple[Any, ...] = ()

    def plus(self, other: Seen) -> Seen:
        """Return what both have seen: a run and the one whose weights it began with."""
        measures = (*ClipSize._fields, "aspect")
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in measures}
        ranges: dict[str, Any] = {name: (min(a[0], b[0]), max(a[1], b[1])) for name, (a, b) in pairs.items()}
        sums = {name: getattr(self, name) + getattr(other, name) for name in ("clips", "of", "left_out")}
        words = tuple(sorted({*self.words, *other.words}))
        dropped, example = self.dropped or other.dropped, self.example or other.example
        return Seen(**ranges, **sums, words=words, dropped=dropped, example=example)

    def distance(self, size: ClipSize) -> float:
        """Return the times that a size is larger or smaller than all of training, by its worst measure; 1: within."""
        pairs = [(getattr(self, name), value) for name, value in size._asdict().items()]
        pairs.append((self.aspect, size.width / size.height))
        return max(1.0, *(max(value / most, least / value) for (least, most), value in pairs))

    def is_far(self, size: ClipSize) -> bool:
        """Return True if a size is far outside those of training."""
        return self.distance(size) >= FAR

    @property
    def sizes(self) -> str:
        """Describe the sizes."""
        tokens, frames, height, width = map(_range, (self.tokens, self.frames, self.height, self.width))
        return f"{tokens} tokens (frames {frames}, heights {height}, widths {width})"

    def new_words(self, text: str) -> list[str]:
        """Return the words of a text that are not known from captions."""
        return [word for word in dict.fromkeys(words_of(text)) if word not in self._known]

    @cached_property
    def _known(self) -> set[str]:
        return set(self.words)

    @property
    def captions(self) -> str:
        """Say which captions have none of the new words."""
        if self.left_out:
            return f"the {len(self.words):,} most frequent words of the captions of training are without"
        looked = "" if self.clips == self.of else f" of {self.clips:,} clips that were looked at"
        return f"no caption of training{looked} has"


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case; of scripts that have no blanks, the letters."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def look(store: ClipStore, split: str, patch: tuple[int, int, int]) -> Seen:
    """Measure the clips of a split and collect the words of their captions, from columns alone."""
    rows = store.indices(split)
    frames, height, width = (store.column(name).to_numpy()[rows] for name in ("frames", "height", "width"))
    grids = [grid_of(size, patch) for size in np.unique(store.grids[rows], axis=0)]
    tokens = np.prod(grids, axis=1)
    some = rows[:: -(-len(rows) // MOST_CLIPS)]
    counts = Counter(word for caption in captions_in_order(store, some) for word in words_of(caption))
    words = sorted(word for word, _ in counts.most_common(MOST_WORDS))
    measures = zip((*ClipSize._fields, "aspect"), (tokens, frames, height, width, width / height), strict=True)
    ranges: dict[str, Any] = {name: (values.min().item(), values.max().item()) for name, values in measures}
    left_out = len(counts) - len(words)
    caption = " ".join(next(captions_in_order(store, rows[:1])).split())
    example = (caption, int(frames[0]), int(height[0]), int(width[0])) if caption else ()
    about: dict[str, Any] = dict(words=tuple(words), left_out=left_out, dropped=False, example=example)
    return Seen(**ranges, clips=len(some), of=len(rows), **about)


def save_seen(seen: Seen, folder: Path) -> None:
    """Write into a run folder what the run is trained on."""
    write_json(as_path(folder) / FILE, asdict(seen))


def read_seen(folder: str | Path) -> Seen | None:
    """Read what a run is trained on; None for runs of earlier versions and converted weights."""
    file = as_path(folder) / FILE
    if not file.exists():
        return None
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in read_json(file).items()}
    return Seen(**values)


def _range(values: tuple[int, int]) -> str:
    least, most = values
    return f"{least}" if least == most else f"{least} to {most}"
