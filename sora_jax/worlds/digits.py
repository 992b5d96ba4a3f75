"""Read images of digits, from MNIST's idx files or from TFDS, and split them for training and held-out clips."""

import gzip
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from sora_jax.errors import UserError
from sora_jax.files import as_path

BYTES = b"\x00\x00\x08"  # what an idx file of unsigned bytes begins with
PARTS = ("train", "t10k")  # what the names of MNIST's files of training and of test digits begin with
ALLOWED = "a folder with idx files of MNIST (train-images-idx3-ubyte, gzipped or not), such a file, or tfds:mnist"


@dataclass(frozen=True, eq=False)
class Digits:
    """Hold images (n, side, side) uint8, white on black, and their digits (n,); None where these are not known."""

    images: np.ndarray
    labels: np.ndarray | None

    def take(self, which: np.ndarray) -> "Digits":
        """Return some of the images."""
        return Digits(self.images[which], None if self.labels is None else self.labels[which])

    def scaled(self, side: int) -> np.ndarray:
        """Return the images (n, side, side) uint8, scaled bilinearly, and keep them for the next call."""
        if side not in self._scaled:
            self._scaled[side] = _scale(self.images, side)
        return self._scaled[side]

    @cached_property
    def _scaled(self) -> dict[int, np.ndarray]:
        return {self.images.shape[1]: self.images}


@lru_cache(maxsize=4)
def load_digits(path: str, held_out: float) -> dict[str, Digits]:
    """Return the images of "train" and "held-out" clips.

    Held out are the test digits where there are training digits, too; else a share, spread evenly over the images.

    Raises:
        UserError: there are no images at `path`.
    """
    try:
        parts = list(_read_tfds(path) if path.startswith("tfds:") else _read_files(as_path(path))) if path else []
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"world.digits_path is {path!r}; it must be {ALLOWED}: {error}") from error
    if not parts:
        raise UserError(f"world.digits_path is {path!r}; it must be {ALLOWED}")
    if len(parts) == 2:
        return {"train": parts[0], "held-out": parts[1]}
    (whole,) = parts
    share = np.floor(np.arange(len(whole.images) + 1) * held_out)
    kept = np.diff(share) > 0
    if kept.all() or not kept.any():
        raise UserError(
            f"world.held_out_digits is {held_out:g}; of {len(kept)} digits it must leave some for each split"
        )
    return {"train": whole.take(~kept), "held-out": whole.take(kept)}


def read_idx(path: Path) -> np.ndarray:
    """Read an idx file of unsigned bytes, gzipped or not.

    Raises:
        ValueError: it is none.
    """
    data = path.read_bytes()
    data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    if data[:3] != BYTES:
        raise ValueError(f"{path.name} is no idx file of bytes")
    shape = np.frombuffer(data, ">u4", data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def _read_files(path: Path) -> Iterator[Digits]:
    """Yield the training and the test digits of a folder, or the digits of a file."""
    if path.is_dir():
        found = [sorted(path.glob(f"{part}-images?idx3-ubyte*"))[:1] for part in PARTS]
        files = [file for files in found for file in files]
    else:
        files = [path]
    for file in files:
        name = file.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
        beside = [file.with_name(name + ending) for ending in ("", ".gz")]
        labels = next((read_idx(label) for label in beside if label.is_file() and label != file), None)
        yield Digits(read_idx(file), labels)


def _read_tfds(name: str) -> Iterator[Digits]:
    """Yield the training and the test digits of a dataset that TFDS has prepared as ArrayRecord."""
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    folder = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    builder = builder_from_files(name.removeprefix("tfds:"), data_dir=os.path.expanduser(folder))
    for part in ("train", "test"):
        if part in builder.info.splits:
            examples = list(builder.as_data_source(part))
            images = np.stack([example["image"][..., 0] for example in examples])
            yield Digits(images, np.array([example["label"] for example in examples]))


def _scale(images: np.ndarray, side: int) -> np.ndarray:
    """Scale square images bilinearly, pixels being areas whose centres have the values."""
    before = images.shape[1]
    centres = ((np.arange(side) + 0.5) * before / side - 0.5).clip(0, before - 1)
    low = np.minimum(centres.astype(int), max(before - 2, 0))
    weights = np.zeros((side, before))
    np.add.at(weights, (np.arange(side), low), 1 - (centres - low))
    np.add.at(weights, (np.arange(side), np.minimum(low + 1, before - 1)), centres - low)
    return np.rint(weights @ images @ weights.T).astype(np.uint8)
