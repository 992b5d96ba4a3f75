"""Random crops of fixed size from a dataset, for the autoencoder: batch n is a pure function of (seed, n)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sora_jax.data.draws import generator
from sora_jax.data.feeding.feed import Batch, FeedConfig, read_ahead
from sora_jax.data.shard_spec import ShardSpec
from sora_jax.data.storing.manifest import Dataset
from sora_jax.errors import UserError

Size = tuple[int, int, int]  # frames, height, width


@dataclass(frozen=True)
class CropConfig:
    """Crops (pixels) that the autoencoder trains on; a share of the rows are single frames."""

    frames: int = 17
    height: int = 64
    width: int = 64
    batch: int = 8  # rows over all hosts, videos and images together
    image_share: float = 0.0  # of the rows, rounded to whole rows
    further: tuple[tuple[int, int, int], ...] = ()  # other (frames, height, width); each step takes one of all sizes

    def __post_init__(self):
        if self.batch < 1:
            raise UserError(f"batch is {self.batch}; it must be at least 1")
        if min(self.frames, self.height, self.width) < 1:
            raise UserError(f"crop is {self.sizes[0]}; all numbers must be at least 1")
        if any(min(size) < 1 for size in self.further):
            raise UserError(f"crops is {self.further}; all numbers must be at least 1")
        if not 0.0 <= self.image_share <= 1.0:
            raise UserError(f"image_share is {self.image_share}; it must be from 0 to 1")

    @property
    def sizes(self) -> tuple[tuple[int, int, int], ...]:
        """All sizes (frames, height, width) of crops."""
        return ((self.frames, self.height, self.width), *self.further)

    @property
    def images(self) -> int:
        """Rows of a batch that are single frames."""
        return round(self.batch * self.image_share)


class CropBatches:
    """Batches of crops: `batches[step]` is batch `step` (this host's rows), made by `crop_batches`."""

    def __init__(
        self,
        dataset: Dataset | Sequence,
        config: CropConfig,
        seed: int,
        sizes: np.ndarray,
        clips: np.ndarray,
        share: ShardSpec,
    ):
        self.dataset, self.config, self.seed = dataset, config, seed
        self.sizes, self.clips = sizes, clips
        self.rows = {"videos": share.rows(config.batch - config.images), "images": share.rows(config.images)}
        crops = [self._size(name, size) for size in config.sizes for name, rows in self.rows.items() if len(rows)]
        self.eligible = {crop: self._large_enough(crop) for crop in crops}

    @staticmethod
    def _size(name: str, size: Size) -> Size:
        return (1, *size[1:]) if name == "images" else size

    def __getitem__(self, step: int) -> Batch:
        batch: Batch = {}
        sizes = self.config.sizes
        # With one size nothing is drawn: the draws of the crops are those of configs that have a single one.
        size = sizes[generator(self.seed, "crop size", step, 0).integers(len(sizes))] if len(sizes) > 1 else sizes[0]
        for name, rows in self.rows.items():
            if len(rows):
                crops = [self._crop(name, self._size(name, size), step, row) for row in rows]
                batch[f"{name}_BTHW3"] = np.stack([pixels for _, pixels in crops])
                batch[f"{name}_clips_B"] = np.array([clip for clip, _ in crops], np.int32)
                batch[f"{name}_rows_B"] = np.array(rows, np.int32)
        return batch

    def stream(self, start: int = 0, feed: FeedConfig = FeedConfig()) -> Iterator[Batch]:
        """`self[start]`, `self[start + 1]`, ... without end, read ahead."""
        return read_ahead(self.__getitem__, start, feed)

    def _crop(self, name: str, crop: Size, step: int, row: int) -> tuple[int, np.ndarray]:
        draws = generator(self.seed, f"crop {name}", step, row)
        clip = int(draws.choice(self.eligible[crop]))
        t, y, x = draws.integers(0, self.sizes[clip] - np.array(crop) + 1)
        pixels = self.dataset[clip].frames
        return clip, pixels[t : t + crop[0], y : y + crop[1], x : x + crop[2]]

    def _large_enough(self, crop: Size) -> np.ndarray:
        found = self.clips[(self.sizes[self.clips] >= crop).all(axis=1)]
        if not len(found):
            largest = " x ".join(str(side) for side in self.sizes[self.clips].max(axis=0, initial=0))
            raise UserError(
                f"crop is {' x '.join(map(str, crop))} (frames x height x width) but no clip is that large; "
                f"the largest frames, height and width among {len(self.clips)} clips are {largest}"
            )
        return found


def crop_batches(
    dataset: Dataset | Sequence,
    config: CropConfig,
    seed: int,
    sizes: np.ndarray | None = None,
    clips: np.ndarray | None = None,
    share: ShardSpec = ShardSpec(),
) -> CropBatches:
    """Random crops of clips, anywhere in space and time, drawn with replacement for each (seed, step, row).

    `dataset[i].frames` is uint8 (T, H, W, 3); `sizes` (N, 3) are their (T, H, W), read from the clips when
    not given; `clips` are the indices to draw from, default all (`sizes_and_clips` reads both from a dataset
    folder). Clips smaller than the crop in any side are never padded or scaled: a row draws from the clips
    that are large enough. A batch has videos_BTHW3 and images_BTHW3 (T = 1), each with ..._clips_B (index in
    the dataset) and ..._rows_B (row in the batch of all hosts), absent where it would have no row. Pixels stay uint8, a
    quarter of the bytes to the device.
    UserError if no clip is large enough.
    """
    if sizes is None:
        sizes = [dataset[index].frames.shape[:3] for index in range(len(dataset))]
    sizes = np.asarray(sizes, np.int64).reshape(-1, 3)
    clips = np.arange(len(sizes)) if clips is None else np.asarray(clips)
    return CropBatches(dataset, config, seed, sizes, clips, share)


def sizes_and_clips(dataset: Dataset, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Sizes (N, 3) of all clips of a dataset folder and the indices (n,) of a split, from its manifest."""
    sizes = np.stack([dataset.table[side].to_numpy() for side in ("frames", "height", "width")], axis=1)
    return sizes, np.flatnonzero(np.array(dataset.table["split"].to_pylist()) == split)
