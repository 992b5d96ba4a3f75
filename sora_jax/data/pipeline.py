"""Streams of batches for training: batch n is a pure function of (seed, n), read ahead by Grain's threads.

Nothing is stored and advanced: to go on after step n, ask for step n + 1. Hosts share a global batch by rows:
how many hosts there are changes who reads a row, not which rows there are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from sora_jax.data.latents import LatentCache
from sora_jax.data.manifest import Dataset
from sora_jax.data.packing import PackingConfig, PackItem, check_fits, grid_of, pack, stack
from sora_jax.data.planning import Plan, generator, plan
from sora_jax.data.tokenizer import Tokenizer
from sora_jax.errors import UserError

_END = 1 << 62  # of the endless range of steps
Batch = dict[str, np.ndarray]


def read_ahead(batch_at: Callable[[int], Batch], start: int, threads: int, ahead: int) -> Iterator[Batch]:
    """Batches `start`, `start + 1`, ... in order, up to `ahead` of them made early by `threads` threads.

    The batches do not depend on `threads`; 0 makes each one when it is asked for.
    """
    import grain

    steps = grain.MapDataset.range(start, _END).map(batch_at)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)))


@dataclass(frozen=True)
class HostShare:
    """This host's part of every global batch: host `index` of `count`, consecutive rows."""

    index: int = 0
    count: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise UserError(f"process_index is {self.index}; it must be 0 to {self.count - 1}")

    def rows(self, total: int) -> range:
        """Rows of a global batch of `total`; UserError if hosts would get unequal shares."""
        if total % self.count:
            raise UserError(f"a batch of {total} rows cannot be shared by {self.count} processes evenly")
        each = total // self.count
        return range(self.index * each, (self.index + 1) * each)


# ----------------------------------------------------------------------------------------------------------
# Packs of latents, for the denoiser
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackReport:
    """How well the packs of an epoch are filled."""

    clips: int
    packs: int
    tokens: int
    length: int

    @property
    def fill(self) -> float:
        """Share of the packed tokens that are real."""
        return self.tokens / (self.packs * self.length)

    @property
    def padding(self) -> float:
        """Share of the packed tokens that are padding."""
        return 1.0 - self.fill

    def __str__(self) -> str:
        return (
            f"{self.clips} clips in {self.packs} packs of {self.length} tokens, "
            f"{self.clips / self.packs:.1f} clips a pack, padding {self.padding:.2%}"
        )


@dataclass
class _Epochs:
    """Plans of successive epochs laid end to end; row r of the stream is a pack of some epoch."""

    plan_of: Callable[[int], Plan]
    starts: list[int] = field(default_factory=lambda: [0])  # first row of each epoch that was counted
    plans: dict[int, Plan] = field(default_factory=dict)  # the last few, for batches across a border
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __getstate__(self) -> dict:
        return {"plan_of": self.plan_of, "starts": self.starts, "plans": {}}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, lock=threading.Lock())

    def locate(self, row: int) -> tuple[int, np.ndarray]:
        """Epoch and clips of a row; counts the epochs before it, once."""
        with self.lock:
            while self.starts[-1] <= row:
                self.starts.append(self.starts[-1] + len(self.plan(len(self.starts) - 1)))
            epoch = int(np.searchsorted(self.starts, row, side="right")) - 1
            return epoch, self.plan(epoch)[row - self.starts[epoch]]

    def plan(self, epoch: int) -> Plan:
        """The plan of an epoch, made when it is not among the last three that were asked for."""
        found = self.plans.pop(epoch, None) or self.plan_of(epoch)
        self.plans[epoch] = found
        while len(self.plans) > 3:
            self.plans.pop(next(iter(self.plans)))
        return found


class PackedBatches:
    """Batches of packs: `batches[step]` is batch `step` (this host's rows), made by `packed_batches`."""

    def __init__(
        self,
        cache: LatentCache,
        texts: Sequence[np.ndarray],
        config: PackingConfig,
        batch: int,
        seed: int,
        clips: np.ndarray,
        share: HostShare,
    ):
        self.cache, self.texts, self.config = cache, texts, config
        self.batch, self.seed, self.clips, self.share = batch, seed, clips, share
        self.lengths = _token_counts(cache.grids[clips], config)
        self.text_lengths = np.array([len(texts[clip]) for clip in clips])
        self._rows = share.rows(batch)
        self._epochs = _Epochs(self._plan)

    def __getitem__(self, step: int) -> Batch:
        return stack([self.row(step * self.batch + row) for row in self._rows])

    def row(self, row: int) -> Batch:
        """One pack: row `row` of the endless stream that all hosts share."""
        _, members = self._epochs.locate(row)
        return pack([self._item(clip) for clip in self.clips[members]], self.config)

    def epoch(self, step: int) -> int:
        """The epoch that the first row of a step belongs to, from 0."""
        return self._epochs.locate(step * self.batch)[0]

    def stream(self, start: int = 0, threads: int = 2, ahead: int = 4) -> Iterator[Batch]:
        """`self[start]`, `self[start + 1]`, ... without end, read ahead."""
        return read_ahead(self.__getitem__, start, threads, ahead)

    def report(self) -> PackReport:
        """Fill of the first epoch."""
        packs = len(self._epochs.plan(0))
        return PackReport(len(self.clips), packs, int(self.lengths.sum()), self.config.length)

    def _plan(self, epoch: int) -> Plan:
        sizes = (self.config.length, self.config.slots, self.config.text_length, self.config.window)
        return plan(self.seed, epoch, self.lengths, self.text_lengths, *sizes)

    def _item(self, clip: int) -> PackItem:
        return PackItem(self.cache[clip], int(self.cache.uids[clip]), self.texts[clip])


def packed_batches(
    cache: LatentCache,
    tokenizer: Tokenizer,
    config: PackingConfig,
    batch: int,
    seed: int,
    split: str = "train",
    process_index: int = 0,
    process_count: int = 1,
) -> PackedBatches:
    """Packed batches of a split of a latent cache, `batch` packs over all hosts; epochs follow each other.

    `[step]` needs the plans of all epochs up to that step's (about a microsecond a clip and epoch).
    UserError if a clip or a caption is over the pack's size, a latent does not divide into patches, or the
    split is empty.
    """
    if batch < 1:
        raise UserError(f"batch is {batch}; it must be at least 1")
    share = HostShare(process_index, process_count)
    texts = tokenizer.encode_all(cache.captions)
    return PackedBatches(cache, texts, config, batch, seed, cache.indices(split), share)


def _token_counts(sizes_N3: np.ndarray, config: PackingConfig) -> np.ndarray:
    """Tokens (N,) of latents of these sizes (t, h, w); UserError for one that cannot be packed."""
    kinds, which = np.unique(sizes_N3, axis=0, return_inverse=True)
    grids = [grid_of(size, config.patch) for size in kinds]
    for grid in grids:
        check_fits(grid, config.length)
    return np.prod(grids, axis=1)[which.ravel()]


# ----------------------------------------------------------------------------------------------------------
# Crops of fixed size, for the autoencoder
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CropConfig:
    """Crops (pixels) that the autoencoder trains on; a share of the rows are single frames."""

    frames: int = 17
    height: int = 64
    width: int = 64
    batch: int = 8  # rows over all hosts, videos and images together
    image_share: float = 0.0  # of the rows, rounded to whole rows

    def __post_init__(self):
        for name in ("frames", "height", "width", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"crop.{name} is {getattr(self, name)}; it must be at least 1")
        if not 0.0 <= self.image_share <= 1.0:
            raise UserError(f"crop.image_share is {self.image_share}; it must be 0 to 1")

    @property
    def images(self) -> int:
        """Rows of a batch that are single frames."""
        return round(self.batch * self.image_share)


class CropBatches:
    """Batches of crops: `batches[step]` is batch `step` (this host's rows), made by `crop_batches`."""

    def __init__(
        self,
        dataset: Sequence,
        config: CropConfig,
        seed: int,
        sizes: np.ndarray,
        clips: np.ndarray,
        share: HostShare,
    ):
        self.dataset, self.config, self.seed = dataset, config, seed
        self.sizes, self.clips = sizes, clips
        self.groups = [
            ("videos", config.frames, share.rows(config.batch - config.images)),
            ("images", 1, share.rows(config.images)),
        ]
        self.eligible = {frames: self._large_enough(frames) for _, frames, rows in self.groups if len(rows)}

    def __getitem__(self, step: int) -> Batch:
        batch: Batch = {}
        for name, frames, rows in self.groups:
            if len(rows):
                crops = [self._crop(name, frames, step, row) for row in rows]
                batch[f"{name}_BTHW3"] = np.stack([pixels for _, pixels in crops])
                batch[f"{name}_clips_B"] = np.array([clip for clip, _ in crops], np.int32)
        return batch

    def stream(self, start: int = 0, threads: int = 2, ahead: int = 4) -> Iterator[Batch]:
        """`self[start]`, `self[start + 1]`, ... without end, read ahead."""
        return read_ahead(self.__getitem__, start, threads, ahead)

    def _crop(self, name: str, frames: int, step: int, row: int) -> tuple[int, np.ndarray]:
        draws = generator(self.seed, f"crop {name}", step, row)
        clip = int(draws.choice(self.eligible[frames]))
        crop = np.array([frames, self.config.height, self.config.width])
        t, y, x = draws.integers(0, self.sizes[clip] - crop + 1)
        pixels = self.dataset[clip].frames
        return clip, pixels[t : t + crop[0], y : y + crop[1], x : x + crop[2]]

    def _large_enough(self, frames: int) -> np.ndarray:
        crop = (frames, self.config.height, self.config.width)
        found = self.clips[(self.sizes[self.clips] >= crop).all(axis=1)]
        if not len(found):
            largest = " x ".join(str(side) for side in self.sizes[self.clips].max(axis=0, initial=0))
            raise UserError(
                f"crop is {' x '.join(map(str, crop))} (frames x height x width) but no clip is that large; "
                f"the largest frames, height and width among {len(self.clips)} clips are {largest}"
            )
        return found


def crop_batches(
    dataset: Sequence,
    config: CropConfig,
    seed: int,
    sizes: np.ndarray | None = None,
    clips: np.ndarray | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> CropBatches:
    """Random crops of clips, anywhere in space and time, drawn with replacement for each (seed, step, row).

    `dataset[i].frames` is uint8 (T, H, W, 3); `sizes` (N, 3) are their (T, H, W), read from the clips when
    not given; `clips` are the indices to draw from, default all (`sizes_and_clips` reads both from a dataset
    folder). Clips smaller than the crop in any side are never padded or scaled: a row draws from the clips
    that are large enough. A batch has videos_BTHW3 and images_BTHW3 (T = 1), each with ..._clips_B (index in
    the dataset), absent where it would have no row. Pixels stay uint8, a quarter of the bytes to the device.
    UserError if no clip is large enough.
    """
    if sizes is None:
        sizes = [dataset[index].frames.shape[:3] for index in range(len(dataset))]
    sizes = np.asarray(sizes, np.int64).reshape(-1, 3)
    clips = np.arange(len(sizes)) if clips is None else np.asarray(clips)
    return CropBatches(dataset, config, seed, sizes, clips, HostShare(process_index, process_count))


def sizes_and_clips(dataset: Dataset, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Sizes (N, 3) of all clips of a dataset folder and the indices (n,) of a split, from its manifest."""
    sizes = np.stack([dataset.table[side].to_numpy() for side in ("frames", "height", "width")], axis=1)
    return sizes, np.flatnonzero(np.array(dataset.table["split"].to_pylist()) == split)
