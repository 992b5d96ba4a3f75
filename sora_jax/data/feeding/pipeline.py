"""Batches of packs for the denoiser: batch n is a pure function of (seed, n), read ahead by Grain."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sora_jax.config import check
from sora_jax.data.draws import uniforms
from sora_jax.data.feeding.epochs import SECTION, ClipIndex, Epochs, Planned, Position, section_count
from sora_jax.data.feeding.feed import Batch, FeedConfig, read_ahead
from sora_jax.data.feeding.texts import CaptionChoice, CaptionStore, EmbeddedCaptions, TokenizedCaptions
from sora_jax.data.feeding.tokenizer import NoText, Tokenizer
from sora_jax.data.guides import counts_of
from sora_jax.data.packing.advice import POOR, advise
from sora_jax.data.packing.packs import (
    Layout,
    PackingConfig,
    add_guides,
    check_fits,
    grid_of,
    layout_of,
    pack_batch,
)
from sora_jax.data.packing.planning import plan
from sora_jax.data.shard_spec import ShardSpec
from sora_jax.data.storing.latents import LatentCache
from sora_jax.data.storing.store import ClipStore
from sora_jax.errors import UserError

COPY = np.uint32(0x9E3779B9)  # between the ids of copies: odd, so that 2^32 copies have as many ids


@dataclass(frozen=True)
class PackReport:
    """The fill of the packs of a section, which for small data sets is an epoch.

    notes: sentences on limits that leave packs empty, and on text that the model does not read.
    """

    clips: int
    packs: int
    tokens: int
    length: int
    notes: tuple[str, ...] = ()

    @property
    def padding(self) -> float:
        """Share of the packed tokens that are padding."""
        return 1.0 - self.tokens / max(1, self.packs * self.length)

    def __str__(self) -> str:
        mean = self.clips / max(1, self.packs)
        packs = f"{self.packs} packs of {self.length} tokens, {mean:.1f} clips a pack, padding {self.padding:.2%}"
        return "\n".join([f"{self.clips} clips in {packs}", *self.notes])


@dataclass(frozen=True)
class PackingShares:
    """Fractions of the clips that are packed without their beginning, or with guides."""

    headless: float = 0.0  # without their first token frame
    key_frames: float = 0.0  # with key frames as guides
    sketches: float = 0.0  # with sketches as guides

    @property
    def guides(self) -> float:
        """Fraction of the clips with guides."""
        return self.key_frames + self.sketches


class StoredItem(NamedTuple):
    """A `PackItem` whose values are read when it is packed, so that one clip at a time is in memory.

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
        """Read the values (t, h, w, C)."""
        return self.store.item(self.clip)[self.cut :]

    @property
    def low(self) -> np.ndarray:
        """Read the clip at half its rows and columns (t, h / 2, w / 2, C)."""
        assert isinstance(self.store, LatentCache)
        return self.store.low(self.clip)[self.cut :]


class PackedBatches:
    """Batches of packs of the clips of a split: `batches[step]` is batch `step`, the rows of this host.

    A clip comes twice in a batch where its weight is above 1, or where an epoch ends and the next one begins. Further
    copies have ids of their own there, since ids key the draws of a step: noise, times, dropout, what is given.

    batch: packs over all hosts. tokenizer: None for the embeddings of a latent cache, NoText for no captions.
    captions: the mix, see `texts.parse_mix`. folder: for the tokens of all captions, which the next start reads.
    section: the most clips that are planned at once. first: True in one process, which alone writes to a folder in a
    bucket. shares: of clips without their beginning or with guides; guides need a latent cache that has some.
    UserError if a clip or a caption is over the size of a pack, a latent does not divide into patches, or the split is
    empty.
    """

    def __init__(
        self,
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
    ):
        check(batch >= 1, f"batch is {batch}; it must be at least 1")
        assert config.patch is not None  # the model sets it
        self.store, self.config, self.patch, self.shares = store, config, config.patch, shares
        if isinstance(tokenizer, NoText):
            self.captions = CaptionStore()
        elif tokenizer is not None:
            self.captions = TokenizedCaptions(store, tokenizer, folder, first)
        else:
            assert isinstance(store, LatentCache)
            self.captions = EmbeddedCaptions(store)
        self.choice = CaptionChoice(store, captions)
        self.batch, self.seed, self.split, self.share, self.section = batch, seed, split, share, section
        self._rows = share.rows(batch)
        self._read_columns()
        self._check()
        self._epochs = Epochs(section_count(len(self.clip_index), section), self._plan)

    def _read_columns(self) -> None:
        """Read from the manifest what is not pickled; UserError if a clip of the split cannot be packed."""
        self.clip_index = ClipIndex.of(self.store, self.split)
        rows, patch = self.clip_index.rows, np.array(self.patch, np.int32)
        grids, rest = np.divmod(self.store.grids[rows], patch)
        wrong = np.flatnonzero(((grids < 1) | (rest > 0)).any(1))
        if len(wrong):
            grid_of(self.store.grids[rows[wrong[0]]], self.patch)
        tokens = grids.prod(1)
        check_fits(grids[tokens.argmax()], self.config.length)
        self._tokens = np.zeros(len(self.store), np.int32)
        self._tokens[rows] = tokens + self.config.margin(grids)
        self._frames = self.store.grids[:, 0] // patch[0]

    def _check(self) -> None:
        """Raise UserError, before the first step, for what would end the run in some later epoch."""
        rows, config = self.clip_index.rows, self.config
        if config.low:
            assert isinstance(self.store, LatentCache)
            self.store.check_low()
        frames = int(self._frames[rows].max())
        check(
            not 2 < config.rows_per_clip <= frames,
            f"packing.rows_per_clip is {config.rows_per_clip}; it must be at least {frames + 1}: a row for each of the "
            f"{frames} token frames of a clip, and one for what is given",
        )
        text = f"the tokens of a caption of clip %r, or tokenizer.max_tokens at most {config.text_length}"
        for option, counts, what in (
            ("length", self._lengths(rows, 0, self._most_guides(rows)), "for clip %r and its guides"),
            ("text_length", self.captions.most(rows), text),
        ):
            most, given = int(counts.max()), getattr(config, option)
            if most > given:
                name = self.store.ids([rows[counts.argmax()]])[0]
                raise UserError(f"packing.{option} is {given}; it must be at least {most}, {what % name}")
        expected = self.clip_index.weights.sum(dtype=np.float64)
        check(expected >= 1, f"the weights of the sources give an epoch of {expected:.2g} clips; make them larger")

    def __getstate__(self) -> dict:
        columns = ("_tokens", "_frames", "clip_index")
        return {name: value for name, value in self.__dict__.items() if name not in columns}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._read_columns()

    def __getitem__(self, step: int) -> Batch:
        batch = pack_batch([self._items(step * self.batch + row) for row in self._rows], self.config)
        batch["clip_ids_BS"] += self._copies(step)[self._rows] * COPY
        return batch

    def clips(self, row: int) -> list[int]:
        """Return the clips of a row, by their indices in the store."""
        planned, place = self._epochs.locate(row)
        return planned.clips[planned.plan[place]].tolist()

    def _copies(self, step: int) -> np.ndarray:
        """Return the number of each copy of a clip in a batch of all hosts, (batch, S) uint32, in stream order."""
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
        """Return the epoch that the first row of a step belongs to, from 0."""
        return self._epochs.epoch(step * self.batch)

    def position(self, step: int) -> Position:
        """Return where in the stream a step begins, for `stream`; see `epochs`."""
        return self._epochs.position(step * self.batch)

    def stream(
        self, start: int = 0, feed: FeedConfig = FeedConfig(), position: Position = Position()
    ) -> Iterator[tuple[Batch, Position]]:
        """Yield `self[start]`, `self[start + 1]`, ... without end, read ahead, each with its position.

        position: of this or an earlier step, so that a late start need not count the packs of all epochs before.
        """
        self.captions.flush()
        self._epochs.seek(position)
        return read_ahead(self._at, start, feed)

    def _at(self, step: int) -> tuple[Batch, Position]:
        return self[step], self.position(step)

    def report(self) -> PackReport:
        """Report the fill of the first section."""
        planned = self._plan(0, 0)
        lengths = self._lengths(planned.clips, planned.cuts, planned.guides)
        texts = self.captions.lengths(planned.clips, planned.captions)
        if not self.captions.has_text:
            texts = np.zeros_like(texts)  # as many as there are slots: no limit of their own
        grids = self.store.grids[planned.clips] // np.array(self.patch)
        grids[:, 0] -= planned.cuts
        tokens = int(lengths.sum() - self.config.margin(grids).sum())
        report = PackReport(len(planned.clips), len(planned.plan), tokens, self.config.length)
        advice = advise(lengths, texts, self.config) if report.padding > POOR else ""
        notes = self.captions.notes(self.clip_index.rows)
        return replace(report, notes=(*([f"padding {report.padding:.0%}: {advice}"] if advice else []), *notes))

    def _plan(self, epoch: int, section: int) -> Planned:
        clips, copies = self.clip_index.section(self.seed, epoch, section, self.section)
        captions = self.choice(self.seed, epoch, clips, copies)
        text = self.captions.lengths(clips, captions)
        cuts, guides = self._cuts(epoch, clips, copies), self._guides(epoch, clips, copies)
        lengths = self._lengths(clips, cuts, guides)
        return Planned(clips, captions, cuts, guides, plan(self.seed, epoch, lengths, text, self.config, section))

    def _lengths(self, clips: np.ndarray, cuts: np.ndarray | int, guides: np.ndarray) -> np.ndarray:
        """Count the tokens of clips without the frames that are cut, with those of guides."""
        frames = self._frames[clips].astype(np.int64)
        return self._tokens[clips] // frames * (frames - cuts + np.abs(guides))

    def _cuts(self, epoch: int, clips: np.ndarray, copies: np.ndarray) -> np.ndarray:
        """Draw the clips that lose their first token frame, by (seed, epoch, clip); images keep theirs.

        So a model learns clips that begin later than the first frame, as continuations and loops do.
        """
        drawn = self._draws("headless", epoch, clips, copies) < self.shares.headless
        return (drawn & (self._frames[clips] > 1)).astype(np.int64)

    def _guides(self, epoch: int, clips: np.ndarray, copies: np.ndarray) -> np.ndarray:
        """Draw the number of guides of clips, by (seed, epoch, clip): of key frames, or, negative, of sketches.

        Half of the clips with sketches have that of the first frame alone.
        """
        if not self.shares.guides:
            return np.zeros(len(clips), np.int64)
        u, v = (self._draws(purpose, epoch, clips, copies) for purpose in ("guides", "guide number"))
        key_frames, sketches = self._stored_guides(clips)
        some_sketches = np.where(v < 0.5, 1, 1 + np.floor((2 * v - 1) * sketches).astype(np.int64))
        of_sketches = np.where(sketches > 0, -some_sketches, 0)
        of_key_frames = np.where(key_frames > 0, 1 + np.floor(v * key_frames).astype(np.int64), 0)
        return np.where(u < self.shares.key_frames, of_key_frames, np.where(u < self.shares.guides, of_sketches, 0))

    def _draws(self, purpose: str, epoch: int, clips: np.ndarray, copies: np.ndarray) -> np.ndarray:
        return uniforms(self.seed, purpose, epoch, self.store.clip_ids[clips], copies)

    def _stored_guides(self, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of key frames and of sketches that the cache has of clips."""
        assert isinstance(self.store, LatentCache)
        return counts_of(self.store.info.guides, self.store.frames[clips])

    def _most_guides(self, clips: np.ndarray) -> np.ndarray:
        """Return the largest number of guides that each clip is packed with."""
        if not self.shares.guides:
            return np.zeros(len(clips), np.int64)
        key_frames, sketches = self._stored_guides(clips)
        return np.maximum(key_frames * (self.shares.key_frames > 0), sketches * (self.shares.sketches > 0))

    def _item(self, clip: int, caption: int, cut: int, guides: int) -> StoredItem:
        t, h, w = self.store.grids[clip].tolist()
        latents = cut * self.patch[0]
        size = (t - latents, h, w)
        grid, rows = grid_of(size, self.patch), self.config.rows_per_clip
        layout, pictures = layout_of(grid, rows, cut), None
        if guides:
            assert isinstance(self.store, LatentCache)
            kind, times, pictures = self.store.guides(clip, guides)
            layout = add_guides(layout, grid, kind, times, rows - 1)
        text = self.captions.ids(clip, caption), self.captions.embedding(clip, caption)
        clip_id, label = int(self.store.clip_ids[clip]), int(self.store.labels[clip])
        return StoredItem(self.store, clip, size, clip_id, *text, label, layout, latents, pictures)


def _numbered(ids: np.ndarray) -> np.ndarray:
    """Count for each id its occurrences before."""
    different, which, counts = np.unique(ids, return_inverse=True, return_counts=True)
    numbers = np.zeros(len(ids), np.uint32)
    if len(different) < len(ids):
        numbers[np.argsort(which, kind="stable")] = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    return numbers
