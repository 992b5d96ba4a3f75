"""The caption of each clip in an epoch, and the tokens of all captions, computed once.

A clip may have captions of several kinds, such as "original" and "synthetic". The mix is how often each kind is
used: DALL-E 3 trains on 95 % synthetic captions (Betker et al. 2023, section 3.2), Stable Diffusion 3 on 50 %
(2403.03206, section 5.2.2). The choice is a function of (seed, epoch, clip).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sora_jax.config import check
from sora_jax.data.draws import uniforms
from sora_jax.data.feeding.tokenizer import NULL, UNKNOWN, Reading, Tokenizer
from sora_jax.data.storing.latents import LatentCache
from sora_jax.data.storing.store import ClipStore
from sora_jax.files import as_path, cache_folder, is_remote, local_copy, read_text, replacing, write_text

MIXES: dict[str, Mapping[str, float] | None] = {
    "first": None,
    "any": {},
    "dalle3": {"synthetic": 0.95, "original": 0.05},
    "sd3": {"synthetic": 0.5, "original": 0.5},
}
CHUNK = 1 << 16  # captions that are tokenized at a time


def parse_mix(text: str) -> Mapping[str, float] | None:
    """Parse a mix into kind -> share: one of `MIXES`, or "KIND=SHARE,KIND=SHARE". UserError names what is allowed.

    None ("first") takes the first caption of a clip, {} ("any") each alike.
    """
    if text in MIXES:
        return MIXES[text]
    shares = {}
    for part in text.split(","):
        kind, _, share = part.partition("=")
        try:
            shares[kind.strip()] = float(share)
        except ValueError:
            shares[kind.strip()] = -1.0
    check(
        min(shares.values()) >= 0 and sum(shares.values()) > 0,
        f"captions is {text!r}; it must be {', '.join(MIXES)}, or shares such as original=1,synthetic=3",
    )
    return shares


class CaptionChoice:
    """`choice(seed, epoch, clips, copies)`: the number of the caption that each clip has in an epoch.

    A clip that lacks some of the kinds of the mix divides its draws among those it has; one with none of them takes
    its first caption.
    """

    def __init__(self, store: ClipStore, mix: str):
        self._store, self._which, self._ends = store, None, np.ones((1, 1))
        shares = parse_mix(mix)
        if shares is None:
            return
        import pyarrow as pa
        import pyarrow.compute as pc

        lists = store.column("kinds").cast(pa.list_(pa.string()))  # the join knows no lists of 64 bits
        joined = pc.binary_join(lists, "\n").dictionary_encode()
        kinds = [text.split("\n") if text else [] for text in joined.dictionary.to_pylist()]
        known = sorted({name for names in kinds for name in names})
        check(
            not shares or set(known) & set(shares),
            f"captions is {mix!r}; it must name a kind of caption of {store.path}: {', '.join(known)}",
        )
        most = max(map(len, kinds), default=0)
        if most > 1:
            self._which = joined.indices.to_numpy()  # row of `_ends` of each clip
            self._ends = np.ones((len(kinds), most))
            for row, names in enumerate(kinds):
                self._ends[row, : len(names)] = np.cumsum(_shares(names, shares))

    def __call__(self, seed: int, epoch: int, clips: np.ndarray, copies: np.ndarray | int = 0) -> np.ndarray:
        if self._which is None:
            return np.zeros(len(clips), np.int64)
        draws = uniforms(seed, "caption", epoch, self._store.clip_ids[clips], copies)
        ends = self._ends[self._which[clips]]
        return np.minimum((draws[:, None] >= ends).sum(1), ends.shape[1] - 1)


def _shares(names: Sequence[str], mix: Mapping[str, float]) -> np.ndarray:
    wanted = np.array([mix.get(name, 0.0) if mix else 1.0 for name in names])
    if names and not wanted.any():
        wanted[0] = 1.0
    return wanted / wanted.sum() if names else wanted


@dataclass(frozen=True)
class CaptionCounts:
    """Numbers of captions, of those that are cut, and of those with unknown pieces; longest: in tokens, uncut."""

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
        """Return a sentence for each loss of text; option: the one that limits captions to `most` tokens."""
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


class CaptionStore:
    """The captions of all clips, as the model takes them; here of a model without text: a null token for each clip."""

    has_text = False

    def most(self, clips: np.ndarray) -> np.ndarray:
        """Return the text tokens of the longest caption of each clip, (n,) int64."""
        return np.ones(len(clips), np.int64)

    def lengths(self, clips: np.ndarray, captions: np.ndarray) -> np.ndarray:
        """Return the text tokens of caption `captions[i]` of clip `clips[i]`, (n,) int64."""
        return np.ones(len(clips), np.int64)

    def ids(self, clip: int, caption: int) -> np.ndarray:
        """Return token ids (m,) int32."""
        return np.array([NULL], np.int32)

    def embedding(self, clip: int, caption: int) -> np.ndarray | None:
        """Return embeddings (m, E), or None where the model learns its own from the ids."""
        return None

    def flush(self) -> None:
        """Write what was computed to the disk, for the next start."""

    def notes(self, clips: np.ndarray) -> list[str]:
        """Return a sentence for each kind of text in the captions of clips that the model does not read."""
        return []


class _WithText(CaptionStore):
    """Captions in a flat list: those of clip i begin at `_starts[i]`, the tokens of caption j end at `_ends[j + 1]`."""

    _starts: np.ndarray
    _ends: np.ndarray
    has_text = True

    def most(self, clips: np.ndarray) -> np.ndarray:
        return np.maximum.reduceat(np.diff(self._ends), self._starts[:-1])[clips]

    def lengths(self, clips: np.ndarray, captions: np.ndarray) -> np.ndarray:
        flat = self._starts[clips] + captions
        return self._ends[flat + 1] - self._ends[flat]


class _Tokens(NamedTuple):
    """The ids of all captions, where those of each end, and its tokens uncut, negative if some are unknown."""

    ids: np.ndarray
    ends: np.ndarray
    uncut: np.ndarray | None  # None in folders of earlier versions


class TokenizedCaptions(_WithText):
    """Captions as ids of a tokenizer, all computed once; `flush` writes them into `folder`, if given.

    Only the `first` process writes into a folder in a bucket; the others write to their own disks.
    """

    def __init__(self, store: ClipStore, tokenizer: Tokenizer, folder: Path | None = None, first: bool = True):
        self._first, self._most, self._starts = first, tokenizer.max_tokens, caption_starts(store)
        self._folder, self._stamp = folder and as_path(folder), _stamp(store, tokenizer)
        self._saved = self._folder if self._folder and _is_saved(self._folder, self._stamp) else None
        self._tokens: _Tokens | None = _load(self._saved) if self._saved else _tokenize(store, tokenizer)

    @property
    def tokens(self) -> _Tokens:
        """The arrays; those on the disk are mapped, once in each process."""
        if self._tokens is None:
            assert self._saved
            self._tokens = _load(self._saved)
        return self._tokens

    def flush(self) -> None:
        folder = self._folder
        if folder is None or self._saved:
            return
        if is_remote(folder) and not self._first:  # a bucket takes one write a second of an object
            folder = cache_folder() / "captions" / self._stamp
        if not _is_saved(folder, self._stamp):
            _save(folder, self.tokens, self._stamp)
        self._saved, self._tokens = folder, None

    def notes(self, clips: np.ndarray) -> list[str]:
        if self.tokens.uncut is None:
            return []
        uncut = self.tokens.uncut[_are_of(clips, self._starts)]
        tokens = np.abs(uncut)
        counts = CaptionCounts(len(uncut), int((tokens > self._most).sum()), int((uncut < 0).sum()), int(tokens.max()))
        return counts.notes("tokenizer.max_tokens", self._most)

    def ids(self, clip: int, caption: int) -> np.ndarray:
        flat, (ids, ends, _) = self._starts[clip] + caption, self.tokens
        return ids[ends[flat] : ends[flat + 1]]

    @property
    def _ends(self) -> np.ndarray:  # type: ignore[override]
        return self.tokens.ends

    def __getstate__(self) -> dict:
        return self.__dict__ | ({"_tokens": None} if self._saved else {})  # workers map the files


class EmbeddedCaptions(_WithText):
    """Captions that a pretrained encoder has embedded, stored in the cache; ids only mark the null caption."""

    def __init__(self, cache: LatentCache):
        import pyarrow.compute as pc

        self._cache, self._starts = cache, caption_starts(cache)
        lengths = cache.column("text_tokens").values.to_numpy()
        self._ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        captions = cache.column("captions")
        given = np.repeat(_counts(captions) > 0, np.diff(self._starts))
        self._null = np.ones(len(given), bool)  # a clip without a caption has the empty one
        blank = pc.equal(pc.utf8_trim_whitespace(captions.values), "")
        self._null[given] = blank.to_numpy(zero_copy_only=False)

    def ids(self, clip: int, caption: int) -> np.ndarray:
        flat = self._starts[clip] + caption
        length = self._ends[flat + 1] - self._ends[flat]
        return np.full(length, NULL if self._null[flat] else UNKNOWN, np.int32)

    def embedding(self, clip: int, caption: int) -> np.ndarray:
        return self._cache.text(clip, caption)

    def notes(self, clips: np.ndarray) -> list[str]:
        assert self._cache.info.text
        most, lengths = self._cache.info.text.max_tokens, np.diff(self._ends)[_are_of(clips, self._starts)]
        full, count = int((lengths >= most).sum()), len(lengths)
        limit = f"the {most} tokens of `data encode --text-tokens`: longer ones are cut"
        return [f"{full:,} of {count:,} captions fill {limit}"] if full else []


def caption_starts(store: ClipStore) -> np.ndarray:
    """Return where the captions of each clip begin in the flat list of all, (n + 1,) int64.

    A clip without a caption has the empty one.
    """
    return np.concatenate([[0], np.cumsum(np.maximum(_counts(store.column("captions")), 1), dtype=np.int64)])


def _are_of(clips: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return which captions of the flat list are those of some clips, (captions,) bool."""
    chosen = np.zeros(len(starts) - 1, bool)
    chosen[clips] = True
    return np.repeat(chosen, np.diff(starts))


def _counts(lists: Any) -> np.ndarray:
    import pyarrow.compute as pc

    return pc.list_value_length(lists).to_numpy()


def captions_in_order(store: ClipStore, clips: np.ndarray | None = None) -> Iterator[str]:
    """Yield all captions of a store, or of some of its clips, in the order of `caption_starts`."""
    column = store.column("captions")
    column = column if clips is None else column.take(clips)
    for start in range(0, len(column), CHUNK):
        for captions in column.slice(start, CHUNK).to_pylist():
            yield from captions or [""]


def _tokenize(store: ClipStore, tokenizer: Tokenizer) -> _Tokens:
    captions = captions_in_order(store)
    ids, lengths, uncut = [np.zeros(0, np.int32)], [np.zeros(1, np.int64)], [np.zeros(0, np.int32)]
    while chunk := list(islice(captions, CHUNK)):
        encoded = tokenizer.encode_all(chunk)
        ids.append(np.concatenate([one.ids for one in encoded]))
        lengths.append(np.array([len(one.ids) for one in encoded]))
        uncut.append(np.array([-one.tokens if one.unknown else one.tokens for one in encoded], np.int32))
    return _Tokens(np.concatenate(ids), np.cumsum(np.concatenate(lengths)), np.concatenate(uncut))


def _stamp(store: ClipStore, tokenizer: Tokenizer) -> str:
    return hashlib.sha256(f"{store.digest}/{tokenizer!r}".encode()).hexdigest()


def _is_saved(folder: Path, stamp: str) -> bool:
    path = folder / "made_of.txt"
    return path.exists() and read_text(path) == stamp


def _load(folder: Path) -> _Tokens:
    names = [name for name in _Tokens._fields if name != "uncut" or (folder / "uncut.npy").exists()]
    arrays: dict[str, Any] = {
        name: np.asarray(np.load(local_copy(folder / f"{name}.npy"), mmap_mode="r")) for name in names
    }
    return _Tokens(**{"uncut": None} | arrays)


def _save(folder: Path, tokens: _Tokens, stamp: str) -> None:
    for name, values in tokens._asdict().items():
        with replacing(folder / f"{name}.npy") as temporary:
            np.save(temporary, values)
    write_text(folder / "made_of.txt", stamp)
