"""Random crops of fixed size from a dataset, for the autoencoder: batch n is a pure function of (seed, n)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sora_jax.config import check
from sora_jax.data.draws import generator
from sora_jax.data.feeding.feed import Batch, FeedConfig, read_ahead
from sora_jax.data.shard_spec import ShardSpec
from sora_jax.data.storing.store import ClipStore
from sora_jax.errors import UserError

Size = tuple[int, int, int]  # frames, height, width


@dataclass(frozen=True)
class CropConfig:
    """Crops (pixels) that the autoencoder trains on; a share of the rows are single frames."""

    frames: int = 17  # of a crop
    height: int = 64  # of a crop
    width: int = 64  # of a crop
    batch: int = 8  # rows over all hosts, videos and images together
    image_share: float = 0.0  # of the rows, rounded to whole rows
    further: tuple[Size, ...] = ()  # other sizes; each step uses one of all sizes

    def __post_init__(self) -> None:
        check(self.batch >= 1, f"batch is {self.batch}; it must be at least 1")
        check(min(self.sizes[0]) >= 1, f"crop is {self.sizes[0]}; all numbers must be at least 1")
        check(all(min(size) >= 1 for size in self.further), f"crops is {self.further}; all numbers must be at least 1")
        check(0.0 <= self.image_share <= 1.0, f"image_share is {self.image_share}; it must be from 0 to 1")

    @property
    def sizes(self) -> tuple[Size, ...]:
        """All sizes of crops."""
        return ((self.frames, self.height, self.width), *self.further)

    @property
    def images(self) -> int:
        """Rows of a batch that are single frames."""
        return round(self.batch * self.image_share)


class CropBatches:
    """Batches of crops of a split, drawn with replacement for each (seed, step, row): `batches[step]`.

    A batch has videos_BTHW3 and images_BTHW3 (T = 1), each with ..._clips_B (index in the dataset) and ..._rows_B (row
    in the batch of all hosts), absent where it would have no row. Pixels stay uint8, a quarter of the bytes to the
    device. Clips smaller than the crop in any side are never padded or scaled: a row draws from the clips that are
    large enough. UserError if no clip is.
    """

    def __init__(
        self, dataset: ClipStore, config: CropConfig, seed: int, split: str = "train", share: ShardSpec = ShardSpec()
    ):
        self.dataset, self.config, self.seed = dataset, config, seed
        self._sizes, self.clips = dataset.grids, dataset.indices(split)
        self._rows = {"videos": share.rows(config.batch - config.images), "images": share.rows(config.images)}
        crops = [_size_of(name, size) for size in config.sizes for name, rows in self._rows.items() if len(rows)]
        self._eligible = {crop: self._large_enough(crop) for crop in crops}

    def __getitem__(self, step: int) -> Batch:
        batch: Batch = {}
        sizes = self.config.sizes
        # With one size nothing is drawn: the draws of the crops are those of configs that have a single one.
        size = sizes[generator(self.seed, "crop size", step, 0).integers(len(sizes))] if len(sizes) > 1 else sizes[0]
        for name, rows in self._rows.items():
            if len(rows):
                crops = [self._crop(name, _size_of(name, size), step, row) for row in rows]
                batch[f"{name}_BTHW3"] = np.stack([pixels for _, pixels in crops])
                batch[f"{name}_clips_B"] = np.array([clip for clip, _ in crops], np.int32)
                batch[f"{name}_rows_B"] = np.array(rows, np.int32)
        return batch

    def stream(self, start: int = 0, feed: FeedConfig = FeedConfig()) -> Iterator[Batch]:
        """Yield `self[start]`, `self[start + 1]`, ... without end, read ahead."""
        return read_ahead(self.__getitem__, start, feed)

    def _crop(self, name: str, crop: Size, step: int, row: int) -> tuple[int, np.ndarray]:
        draws = generator(self.seed, f"crop {name}", step, row)
        clip = int(draws.choice(self._eligible[crop]))
        t, y, x = draws.integers(0, self._sizes[clip] - np.array(crop) + 1)
        return clip, self.dataset.item(clip)[t : t + crop[0], y : y + crop[1], x : x + crop[2]]

    def _large_enough(self, crop: Size) -> np.ndarray:
        sizes = self._sizes[self.clips]
        found = self.clips[(sizes >= crop).all(axis=1)]
        if not len(found):
            largest = " x ".join(str(side) for side in sizes.max(axis=0))
            raise UserError(
                f"crop is {' x '.join(map(str, crop))} (frames x height x width) but no clip is that large; "
                f"the largest frames, height and width among {len(self.clips)} clips are {largest}"
            )
        return found


def _size_of(name: str, size: Size) -> Size:
    return (1, *size[1:]) if name == "images" else size
