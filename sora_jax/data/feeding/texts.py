"""Which of its captions a clip has in an epoch, and the tokens of all captions, made once.

A clip may have captions of several kinds, such as "original" and "synthetic". The mix says how often each kind is
taken: DALL-E 3 trains on 95 % synthetic captions (Betker et al. 2023, section 3.2), Stable Diffusion 3 on 50 %
(2403.03206, section 5.2.2). The choice is a function of (seed, epoch, clip).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from sora_jax.data.draws import uniforms
from sora_jax.data.feeding.tokenizer import NULL, UNKNOWN, Reading, Tokenizer
from sora_jax.data.storing.latents import LatentCache
from sora_jax.data.storing.store import ClipStore
from sora_jax.errors import UserError
from sora_jax.files import as_path, cache_folder, is_remote, local_copy, read_text, replacing, write_text

PRESETS = {
    "dalle3": {"synthetic": 0.95, "original": 0.05},
    "sd3": {"synthetic": 0.5, "original": 0.5},
}
CHUNK = 1 << 16  # captions that are tokenized at a time


def parse_mix(text: str) -> Mapping[str, float] | None:
    """Kind -> share of a mix: "first" (None), "any" ({}), a preset, or "KIND=SHARE,KIND=SHARE".

    "first" takes the first caption of a clip, "any" each alike. UserError names what is allowed.
    """
    if text == "first":
        return None
    if text == "any":
        return {}
    if text in PRESETS:
        return PRESETS[text]
    shares = {}
    for part in text.split(","):
        kind, _, share = part.partition("=")
        try:
            shares[kind.strip()] = float(share)
        except ValueError:
            shares[kind.strip()] = -1.0
    if min(shares.values()) < 0 or sum(shares.values()) <= 0:
        raise UserError(
            f"captions is {text!r}; allowed: first, any, {', '.join(PRESETS)}, or shares such as original=1,synthetic=3"
        )
    return shares


class CaptionChoice:
    """`choice(seed, epoch, clips, copies)`: the number of the caption that each clip has in an epoch.

    A clip that lacks some of the kinds of the mix divides its draws among those it has; one with none of them takes
    its first caption.
    """

    def __init__(self, cache: ClipStore, mix: str):
        import pyarrow as pa
        import pyarrow.compute as pc

        kinds = cache.column("kinds").cast(pa.list_(pa.string()))  # the join knows no lists of 64 bits
        joined = pc.binary_join(kinds, "\n").dictionary_encode()
        kinds = [text.split("\n") if text else [] for text in joined.dictionary.to_pylist()]
        self._which = joined.indices.to_numpy()
        shares = parse_mix(mix)
        there = {name for names in kinds for name in names}
        if shares and not there & set(shares):
            have = ", ".join(sorted(there)) or "none"
            raise UserError(f"captions is {mix!r}, but no clip of {cache.path} has such a kind; there are: {have}")
        self._single = shares is None or max(map(len, kinds), default=0) <= 1
        self._ends = np.ones((len(kinds), max(map(len, kinds), default=0) or 1))
        for row, names in enumerate(kinds):
            self._ends[row, : len(names)] = np.cumsum(_shares(names, shares))
        self._clip_ids = cache.clip_ids

    def __call__(self, seed: int, epoch: int, clips: np.ndarray, copies: np.ndarray | int = 0) -> np.ndarray:
        if self._single:
            return np.zeros(len(clips), np.int64)
        draws = uniforms(seed, "caption", epoch, self._clip_ids[clips], copies)
        ends = self._ends[self._which[clips]]
        return np.minimum((draws[:, None] >= ends).sum(1), ends.shape[1] - 1)


def _shares(names: Sequence[str], mix: Mapping[str, float] | None) -> np.ndarray:
    if not names:
        return np.zeros(0)
    wanted = np.array([1.0 if mix == {} else (mix or {}).get(name, 0.0) for name in names])
    if wanted.sum() == 0:
        wanted = np.eye(len(names))[0]
    return wanted / wanted.sum()


@dataclass(frozen=True)
class CaptionCounts:
    """Count captions, those that are cut, and those with unknown pieces; longest: in tokens, uncut."""

    captions: int = 0
    cut: int = 0
    unknown: int = 0
    longest: int = 0

    def plus(self, texts: Sequence[Reading], most: int) -> CaptionCounts:
        """Return the counts with those of more captions, of which at most so many tokens are read."""
        return CaptionCounts(
            self.captions + len(texts),
            self.cut + sum(text.is_cut for text in texts),
            self.unknown + sum(bool(text.unknown) for text in texts),
            max([self.longest, *(text.tokens for text in texts)]),
        )

    def notes(self, option: str, most: int) -> list[str]:
        """Return a sentence for what a model does not read; option: sets the `most` tokens that it reads."""
        found = []
        if self.cut:
            found.append(
                f"{self.cut:,} of {self.captions:,} captions are cut at {option} = {most}; "
                f"the longest has {self.longest} tokens: {self.longest} would hold them all"
            )
        if self.unknown:
            found.append(
                f"{self.unknown:,} of {self.captions:,} captions have letters that the tokenizer does not know; all "
                "of them become the same token"
            )
        return found


class Texts(Protocol):
    """The text of every caption of a cache, as the model takes it."""

    def most(self, clips: np.ndarray) -> np.ndarray:
        """Text tokens of the longest caption of each clip, (n,) int64."""

    def lengths(self, clips: np.ndarray, captions: np.ndarray) -> np.ndarray:
        """Text tokens of caption `captions[i]` of clip `clips[i]`, (n,) int64."""

    def ids(self, clip: int, caption: int) -> np.ndarray:
        """Token ids (m,) int32."""

    def embedding(self, clip: int, caption: int) -> np.ndarray | None:
        """Embeddings (m, E), or None where the model learns its own from the ids."""

    def keep(self) -> None:
        """Put what was made for it on the disk, for the next start."""

    def notes(self, clips: np.ndarray) -> list[str]:
        """Return a sentence for each thing that the captions of clips say and the model does not read."""


class TokenTexts:
    """Texts of a tokenizer: the tokens of all captions, made once; `keep` puts them into `folder`, if there is one.

    Into a folder in a bucket the `first` process alone; the others keep them on their own disks.
    """

    def __init__(self, cache: ClipStore, tokenizer: Tokenizer, folder: Path | None = None, first: bool = True):
        self._first = first
        self._starts = caption_starts(cache)
        self._folder, self._stamp = folder and as_path(folder), _stamp(cache, tokenizer)
        self._kept, self._most = folder is not None and _is_made(self._folder, self._stamp), tokenizer.max_tokens
        self._ids, self._ends, self._uncut = _load(self._folder) if self._kept else _tokenize(cache, tokenizer)

    def keep(self):
        if not self._folder or self._kept:
            return
        if is_remote(self._folder) and not self._first:  # a bucket takes one write a second of an object
            self._folder = cache_folder() / "captions" / self._stamp
        if not _is_made(self._folder, self._stamp):
            _save(self._folder, (self._ids, self._ends, self._uncut), self._stamp)
        self._kept, (self._ids, self._ends, self._uncut) = True, _load(self._folder)

    def notes(self, clips):
        if self._uncut is None:
            return []
        uncut = self._uncut[_flat(self._starts, clips)]
        tokens = np.abs(uncut)
        counts = CaptionCounts(len(uncut), int((tokens > self._most).sum()), int((uncut < 0).sum()), int(tokens.max()))
        return counts.notes("tokenizer.max_tokens", self._most)

    def most(self, clips):
        return np.maximum.reduceat(np.diff(self._ends), self._starts[:-1])[clips]

    def lengths(self, clips, captions):
        flat = self._starts[clips] + captions
        return self._ends[flat + 1] - self._ends[flat]

    def ids(self, clip, caption):
        flat = self._starts[clip] + caption
        return self._ids[self._ends[flat] : self._ends[flat + 1]]

    def embedding(self, clip, caption):
        return None

    def __getstate__(self):
        return self.__dict__ | (
            {"_ids": None, "_ends": None, "_uncut": None} if self._kept else {}
        )  # to workers a file goes by name

    def __setstate__(self, state):
        self.__dict__.update(state)
        if self._kept:
            self._ids, self._ends, self._uncut = _load(self._folder)


class EmbeddedTexts:
    """Texts that a pretrained encoder has embedded, kept in the cache; ids only mark the null caption."""

    def __init__(self, cache: LatentCache):
        import pyarrow.compute as pc

        self._cache, self._starts = cache, caption_starts(cache)
        self._lengths = cache.column("text_tokens").values.to_numpy().astype(np.int64)
        given = np.repeat(np.diff(self._starts) * (_counts(cache) > 0), np.diff(self._starts)) > 0
        self._null = np.ones(len(given), bool)  # a clip without a caption has the empty one
        blank = pc.equal(pc.utf8_trim_whitespace(cache.column("captions").values), "")
        self._null[given] = blank.to_numpy(zero_copy_only=False)

    def most(self, clips):
        return np.maximum.reduceat(self._lengths, self._starts[:-1])[clips]

    def lengths(self, clips, captions):
        return self._lengths[self._starts[clips] + captions]

    def ids(self, clip, caption):
        flat = self._starts[clip] + caption
        return np.full(self._lengths[flat], NULL if self._null[flat] else UNKNOWN, np.int32)

    def embedding(self, clip, caption):
        return self._cache.text(clip, caption)

    def keep(self):
        pass

    def notes(self, clips):
        most, lengths = self._cache.info.text.max_tokens, self._lengths[_flat(self._starts, clips)]
        full, count = int((lengths >= most).sum()), len(lengths)
        kept = f"the {most} tokens that `data encode --text-tokens` has kept: longer ones are cut"
        return [f"{full:,} of {count:,} captions fill {kept}"] if full else []


class NullTexts:
    """Texts of a model that reads none: one null token for each clip."""

    def most(self, clips):
        return np.ones(len(clips), np.int64)

    def lengths(self, clips, captions):
        return np.ones(len(clips), np.int64)

    def ids(self, clip, caption):
        return np.array([NULL], np.int32)

    def embedding(self, clip, caption):
        return None

    def keep(self):
        pass

    def notes(self, clips):
        return []


def caption_starts(cache: ClipStore) -> np.ndarray:
    """Where the captions of each clip begin in the flat list, (n + 1,); a clip without any has one, the empty."""
    return np.concatenate([[0], np.cumsum(np.maximum(_counts(cache), 1), dtype=np.int64)])


def _flat(starts: np.ndarray, clips: np.ndarray) -> np.ndarray:
    """Return the places of all captions of some clips in the flat list."""
    counts = starts[clips + 1] - starts[clips]
    ends = np.cumsum(counts)
    return np.arange(counts.sum()) + np.repeat(starts[clips] - (ends - counts), counts)


def _counts(cache: ClipStore) -> np.ndarray:
    import pyarrow.compute as pc

    return pc.list_value_length(cache.column("captions")).to_numpy()


def captions_in_order(cache: ClipStore, clips: np.ndarray | None = None) -> Iterator[str]:
    """All captions of a cache, or of some of its clips, in the order of `caption_starts`."""
    column = cache.column("captions")
    column = column if clips is None else column.take(clips)
    for start in range(0, len(column), CHUNK):
        for captions in column.slice(start, CHUNK).to_pylist():
            yield from captions or [""]


def _tokenize(cache: ClipStore, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the ids of all captions, where those of each end, and its tokens uncut, negative if some are unknown."""
    ids, lengths, uncut, chunk = [], [], [], []

    def flush():
        encoded = tokenizer.encode_all(chunk)
        ids.append(np.concatenate([one.ids for one in encoded]) if encoded else np.zeros(0, np.int32))
        lengths.extend(len(one.ids) for one in encoded)
        uncut.extend(-one.tokens if one.unknown else one.tokens for one in encoded)
        chunk.clear()

    for caption in captions_in_order(cache):
        chunk.append(caption)
        if len(chunk) == CHUNK:
            flush()
    flush()
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return np.concatenate(ids), ends, np.array(uncut, np.int32)


def _stamp(cache: ClipStore, tokenizer: Tokenizer) -> str:
    return hashlib.sha256(f"{cache.digest}/{tokenizer!r}".encode()).hexdigest()


def _is_made(folder: Path, stamp: str) -> bool:
    path = folder / "made_of.txt"
    return path.exists() and read_text(path) == stamp


def _load(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Read what `_save` wrote; earlier versions did not keep the uncut lengths."""
    uncut = np.load(local_copy(folder / "uncut.npy"), mmap_mode="r") if (folder / "uncut.npy").exists() else None
    return np.load(local_copy(folder / "ids.npy"), mmap_mode="r"), np.load(local_copy(folder / "ends.npy")), uncut


def _save(folder: Path, arrays: Sequence[np.ndarray], stamp: str) -> None:
    for name, values in zip(("ids.npy", "ends.npy", "uncut.npy"), arrays, strict=True):
        with replacing(folder / name) as temporary:
            np.save(temporary, values)
    write_text(folder / "made_of.txt", stamp)
