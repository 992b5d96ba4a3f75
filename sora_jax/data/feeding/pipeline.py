"""Batches of packs for the denoiser: batch n is a pure function of (seed, n), read ahead by Grain."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sora_jax.data.draws import uniforms
from sora_jax.data.feeding.epochs import SECTION, ClipIndex, Epochs, Planned, Position, section_count
from sora_jax.data.feeding.feed import Batch, FeedConfig, read_ahead
from sora_jax.data.feeding.texts import CaptionChoice, EmbeddedTexts, NullTexts, Texts, TokenTexts
from sora_jax.data.feeding.tokenizer import NoText, Tokenizer
from sora_jax.data.guides import counts_of
from sora_jax.data.packing.advice import POOR, PackSizes, advise
from sora_jax.data.packing.packs import (
    Layout,
    PackingConfig,
    add_guides,
    check_fits,
    grid_of,
    layout_of,
    pack,
    pack_batch,
)
from sora_jax.data.packing.planning import plan
from sora_jax.data.shard_spec import ShardSpec
from sora_jax.data.storing.store import ClipStore
from sora_jax.errors import UserError

COPY = np.uint32(0x9E3779B9)  # between the ids of copies: odd, so that 2^32 copies have as many ids


@dataclass(frozen=True)
class PackReport:
    """Describe how well the packs of a section (of a small set: of an epoch) are filled.

    notes: sentences on what leaves packs empty, and on what is not read of captions.
    """

    clips: int
    packs: int
    tokens: int
    length: int
    notes: tuple[str, ...] = ()

    @property
    def fill(self) -> float:
        """Share of the packed tokens that are real."""
        return self.tokens / max(1, self.packs * self.length)

    @property
    def padding(self) -> float:
        """Share of the packed tokens that are padding."""
        return 1.0 - self.fill

    def __str__(self) -> str:
        line = (
            f"{self.clips} clips in {self.packs} packs of {self.length} tokens, "
            f"{self.clips / max(1, self.packs):.1f} clips a pack, padding {self.padding:.2%}"
        )
        return "\n".join([line, *self.notes])


@dataclass(frozen=True)
class PackingShares:
    """Hold the fractions of the clips that are packed without their beginning, or with guides beside them."""

    headless: float = 0.0  # without their first token frame
    key_frames: float = 0.0  # with key frames as guides
    sketches: float = 0.0  # with sketches as guides


class StoredItem(NamedTuple):
    """A `PackItem` whose values, but not its guides, are read when they are asked for: those of one clip at a time.

    size: without the first `cut` latent frames, which the item leaves out. guides: their latents.
    """

    store: ClipStore
    clip: int
    size: tuple[int, int, int]
    clip_id: int
    text: np.ndarray
    embedding: np.ndarray | None
    label: int
    layout: Layout
    cut: int
    guides: np.ndarray | None

    @property
    def values(self) -> np.ndarray:
        return self.store.item(self.clip)[self.cut :]


class PackedBatches:
    """Batches of packs: `batches[step]` is batch `step` (this host's rows), made by `packed_batches`.

    A clip comes twice in a batch where its weight is above 1, or where an epoch ends and the next one begins. Further
    copies have ids of their own there, since ids key the draws of a step: noise, times, dropout, what is given.
    """

    def __init__(
        self,
        store: ClipStore,
        texts: Texts,
        choice: CaptionChoice,
        config: PackingConfig,
        batch: int,
        seed: int,
        split: str,
        share: ShardSpec,
        section: int = SECTION,
        shares: PackingShares = PackingShares(),
    ):
        self.shares = shares
        self.store, self.texts, self.choice, self.config = store, texts, choice, config
        self.batch, self.seed, self.split, self.share, self.section = batch, seed, split, share, section
        self._rows = share.rows(batch)
        self._prepare()
        self._check()
        self._epochs = Epochs(section_count(len(self.subjects), section), self._plan)

    def _prepare(self) -> None:
        """What is read off the manifest: it is not pickled."""
        store, rows = self.store, self.store.indices(self.split)
        self.tokens = _token_counts(store.grids, self.config, rows)
        self.frames = store.grids[:, 0] // self.config.patch[0]
        self.labels = store.labels
        ids = store.column("id").take(rows) if store.has_variants else None
        self.subjects = ClipIndex.of(rows, ids, store.clip_ids[rows], store.weights[rows])

    def _check(self) -> None:
        """UserError, before the first step, for what would end the run in some later epoch."""
        rows = self.subjects.rows
        rows_per_clip, frames = self.config.rows_per_clip, int(self.frames[rows].max())
        if 2 < rows_per_clip <= frames:
            raise UserError(
                f"packing.rows_per_clip is {rows_per_clip}; a clip has {frames} token frames: set it to at least "
                f"{frames + 1}, a row for each and one for what is given"
            )
        lengths, length = self._lengths(rows, 0, self._most_guides(rows)), self.config.length
        if (most := int(lengths.max())) > length:
            name = self.store.ids(rows[[lengths.argmax()]])[0]
            raise UserError(
                f"packing.length is {length}; it must be at least {most}, the tokens of clip {name!r} with its guides"
            )
        words = self.texts.most(rows)
        if words.max() > self.config.text_length:
            longest = self.store.ids(rows[[words.argmax()]])[0]
            raise UserError(
                f"packing.text_length is {self.config.text_length}; a caption of clip {longest!r} has {words.max()} "
                f"text tokens: set it to at least that, or tokenizer.max_tokens to at most {self.config.text_length}"
            )
        if (expected := self.subjects.weights.sum()) < 1:
            raise UserError(f"the sources' weights give an epoch of {expected:.2g} clips; make them larger")

    def __getstate__(self) -> dict:
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("tokens", "frames", "labels", "subjects")
        }

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._prepare()

    def __getitem__(self, step: int) -> Batch:
        batch = pack_batch([self._items(step * self.batch + row) for row in self._rows], self.config)
        batch["clip_ids_BS"] += self._copies(step)[self._rows] * COPY
        return batch

    def row(self, row: int) -> Batch:
        """One pack: row `row` of the endless stream that all hosts share."""
        step, place = divmod(row, self.batch)
        made = pack(self._items(row), self.config)
        made["clip_ids_S"] += self._copies(step)[place] * COPY
        return made

    def clips(self, row: int) -> list[int]:
        """The clips of a row, by their places in the store."""
        planned, place = self._epochs.locate(row)
        return planned.clips[planned.plan[place]].tolist()

    def _copies(self, step: int) -> np.ndarray:
        """Number the copies of each clip in a batch of all hosts, (batch, S) uint32, in the order of the stream."""
        row, end, ids, counts = step * self.batch, (step + 1) * self.batch, [], []
        while row < end:
            planned, place = self._epochs.locate(row)
            offsets = planned.plan.offsets[place : place + end - row + 1]
            items = planned.plan.order[offsets[0] : offsets[-1]]
            ids.append(self.store.clip_ids[planned.clips[items]])
            counts.append(np.diff(offsets))
            row += len(offsets) - 1
        clips = np.concatenate(counts)
        copies = np.zeros((self.batch, self.config.slots), np.uint32)
        copies[np.arange(self.config.slots) < clips[:, None]] = _numbered(np.concatenate(ids))
        return copies

    def _items(self, row: int) -> list[StoredItem]:
        planned, place = self._epochs.locate(row)
        items = planned.plan[place]
        columns = (planned.clips, planned.captions, planned.cuts, planned.guides)
        return [self._item(*item) for item in zip(*(column[items].tolist() for column in columns))]

    def epoch(self, step: int) -> int:
        """The epoch that the first row of a step belongs to, from 0."""
        return self._epochs.epoch(step * self.batch)

    def position(self, step: int) -> Position:
        """Where in the stream a step begins: a hint for `stream`, see `epochs`."""
        return self._epochs.position(step * self.batch)

    def stream(
        self, start: int = 0, feed: FeedConfig = FeedConfig(), position: Position = Position()
    ) -> Iterator[tuple[Batch, Position]]:
        """`self[start]`, `self[start + 1]`, ... without end, read ahead, each with its position.

        position: of this or an earlier step, so that a late start need not count the packs of all epochs before.
        """
        self.texts.keep()
        self._epochs.seek(position)
        return read_ahead(self._at, start, feed)

    def _at(self, step: int) -> tuple[Batch, Position]:
        return self[step], self.position(step)

    def report(self) -> PackReport:
        """Fill of the first section."""
        planned = self._plan(0, 0)
        lengths = self._lengths(planned.clips, planned.cuts, planned.guides)
        texts = self.texts.lengths(planned.clips, planned.captions)
        if isinstance(self.texts, NullTexts):
            texts = np.zeros_like(texts)  # their number is that of the slots
        sizes = PackSizes(self.config.length, self.config.slots, self.config.text_length, self.config.window)
        report = PackReport(len(planned.clips), len(planned.plan), int(lengths.sum()), self.config.length)
        advice = advise(lengths, texts, sizes) if report.padding > POOR else ""
        notes = ([f"padding {report.padding:.0%}: {advice}"] if advice else []) + self.texts.notes(
            self.store.indices(self.split)
        )
        return replace(report, notes=tuple(notes))

    def _plan(self, epoch: int, section: int) -> Planned:
        clips, copies = self.subjects.section(self.seed, epoch, section, self.section)
        captions = self.choice(self.seed, epoch, clips, copies)
        text = self.texts.lengths(clips, captions)
        sizes = (self.config.length, self.config.slots, self.config.text_length, self.config.window)
        cuts, guides = self._cuts(epoch, clips, copies), self._guides(epoch, clips, copies)
        lengths = self._lengths(clips, cuts, guides)
        return Planned(clips, captions, cuts, guides, plan(self.seed, epoch, lengths, text, *sizes, section=section))

    def _lengths(self, clips: np.ndarray, cuts: np.ndarray | int, guides: np.ndarray) -> np.ndarray:
        """Count the tokens of clips without the frames that are cut, with those of guides."""
        return self.tokens[clips] // self.frames[clips] * (self.frames[clips] - cuts + np.abs(guides))

    def _cuts(self, epoch: int, clips: np.ndarray, copies: np.ndarray) -> np.ndarray:
        """Draw the clips that are trained without their first token frame, by (seed, epoch, clip); images keep theirs.

        So a model learns clips that begin later than the first frame, as continuations and loops do.
        """
        if not self.shares.headless:
            return np.zeros(len(clips), np.int64)
        drawn = uniforms(self.seed, "headless", epoch, self.store.clip_ids[clips], copies) < self.shares.headless
        return (drawn & (self.frames[clips] > 1)).astype(np.int64)

    def _guides(self, epoch: int, clips: np.ndarray, copies: np.ndarray) -> np.ndarray:
        """Draw the guides of clips, by (seed, epoch, clip): so many key frames, or, negative, sketches.

        Half of the clips with sketches have that of the first frame alone.
        """
        if not (self.shares.key_frames or self.shares.sketches):
            return np.zeros(len(clips), np.int64)
        u, v = (uniforms(self.seed, p, epoch, self.store.clip_ids[clips], copies) for p in ("guides", "guide number"))
        key_frames, sketches = self._stored_guides(clips)
        some = lambda most, v: 1 + np.floor(v * most).astype(np.int64)  # noqa: E731
        drawn = np.where(v < 0.5, 1, some(sketches, 2 * v - 1))
        of_sketches = np.where(sketches > 0, -drawn, 0)
        of_key_frames = np.where(key_frames > 0, some(key_frames, v), 0)
        first, both = self.shares.key_frames, self.shares.key_frames + self.shares.sketches
        return np.where(u < first, of_key_frames, np.where(u < both, of_sketches, 0))

    def _stored_guides(self, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Count the key frames and the sketches that the store holds of clips."""
        return counts_of(self.store.info.guides, self.store.column("frames").to_numpy()[clips])

    def _most_guides(self, clips: np.ndarray) -> np.ndarray:
        """Count the guides at most that a clip is packed with."""
        if not (self.shares.key_frames or self.shares.sketches):
            return np.zeros(len(clips), np.int64)
        key_frames, sketches = self._stored_guides(clips)
        return np.maximum(key_frames * (self.shares.key_frames > 0), sketches * (self.shares.sketches > 0))

    def _item(self, clip: int, caption: int, cut: int, guides: int) -> StoredItem:
        t, h, w = self.store.grids[clip].tolist()
        clip_id = int(self.store.clip_ids[clip])
        said = self.texts.ids(clip, caption), self.texts.embedding(clip, caption)
        latents = cut * self.config.patch[0]
        size = (t - latents, h, w)
        grid, rows = grid_of(size, self.config.patch), self.config.rows_per_clip
        layout, pictures = layout_of(grid, rows, cut), None
        if guides:
            kind, times, pictures = self.store.guides(clip, guides)
            layout = add_guides(layout, grid, kind, times, rows - 1)
        return StoredItem(self.store, clip, size, clip_id, *said, int(self.labels[clip]), layout, latents, pictures)


def packed_batches(
    store: ClipStore,
    tokenizer: Tokenizer | NoText | None,
    config: PackingConfig,
    batch: int,
    seed: int,
    split: str = "train",
    share: ShardSpec = ShardSpec(),
    captions: str = "first",
    folder: Path | None = None,
    section: int = SECTION,
    first: bool = True,
    shares: PackingShares = PackingShares(),
) -> PackedBatches:
    """Pack the clips of a split of a store, `batch` packs over all hosts; epochs follow each other.

    tokenizer: None takes the embeddings that a latent cache holds, NoText leaves all captions out. captions: the mix,
    see `captions.parse_mix`. folder: keeps the tokens of all captions for the next start. section: clips that are
    planned at once at most. first: of all processes, whatever their shares; it alone writes to a folder in a bucket.
    shares: of clips that are packed otherwise than they are; guides need a latent cache that holds some.
    UserError if a clip or a caption is over the pack's size, a latent does not divide into patches, or the split is
    empty.
    """
    if batch < 1:
        raise UserError(f"batch is {batch}; it must be at least 1")
    if isinstance(tokenizer, NoText):
        texts = NullTexts()
    else:
        texts = EmbeddedTexts(store) if tokenizer is None else TokenTexts(store, tokenizer, folder, first)
    return PackedBatches(
        store, texts, CaptionChoice(store, captions), config, batch, seed, split, share, section, shares
    )


def _numbered(ids: np.ndarray) -> np.ndarray:
    """Say of each id how often it comes before."""
    different, which, counts = np.unique(ids, return_inverse=True, return_counts=True)
    numbers = np.zeros(len(ids), np.uint32)
    if len(different) < len(ids):
        numbers[np.argsort(which, kind="stable")] = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    return numbers


def _token_counts(sizes_N3: np.ndarray, config: PackingConfig, rows: np.ndarray) -> np.ndarray:
    """Tokens (N,) of latents of these sizes (t, h, w); UserError where one of `rows` cannot be packed."""
    t, h, w = sizes_N3[rows].T
    _, first, which = np.unique(t << 40 | h << 20 | w, return_index=True, return_inverse=True)
    grids = [grid_of(size, config.patch) for size in sizes_N3[rows[first]]]
    check_fits(max(grids, key=math.prod), config.length)  # what fits depends on the number of tokens alone
    tokens = np.zeros(len(sizes_N3), np.int64)
    tokens[rows] = np.prod(grids, axis=1)[which]
    return tokens
