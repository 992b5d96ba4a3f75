"""Read clips by index, with columns of what is known of each: the base of datasets and latent caches."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax.config import check
from sora_jax.errors import UserError
from sora_jax.files import as_path, local_copy, read_text


class ClipStore(ABC):
    """A folder of clips: `len`, `item(i)`, and the columns of its manifest. May be pickled and forked."""

    info_file = ""  # JSON with the format, the number of clips and the digest of the rows
    format = 0
    missing = ""  # message where there is no such file, of the path
    sides: Sequence[str] = ()  # columns of the size of an item

    def __init__(self, path: str | Path):
        self.path = as_path(path)
        self.header = self.read_header(self.path)
        self._columns: dict[str, Any] = {}

    @classmethod
    def read_header(cls, path: Path) -> dict:
        """Read the file that makes the folder valid; UserError if the folder has none of this format."""
        try:
            header = json.loads(read_text(path / cls.info_file))
        except (OSError, ValueError) as error:
            raise UserError(cls.missing.format(path=path)) from error
        found = header.get("format")
        check(found == cls.format, f"{str(path)!r} has format {found}; it must be {cls.format}: make it again")
        return header

    def __len__(self) -> int:
        return self.header["clips"]

    def __reduce__(self) -> tuple:
        return type(self), (self.path,)

    @abstractmethod
    def item(self, index: int) -> np.ndarray:
        """Return the values (t, h, w, C) of a clip."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Return the digest of what is in the store, and how it was made."""

    def column(self, name: str) -> Any:
        """Read a column of the manifest, an Arrow array; it is not kept, as captions of many clips are large."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pq.read_table(local_copy(self.path / "manifest.parquet"), columns=[name])
        column = table[name].combine_chunks()
        return column.chunk(0) if isinstance(column, pa.ChunkedArray) else column

    def kept(self, name: str) -> Any:
        """Return a column that stays in memory: numbers as a NumPy array, lists of them as an Arrow array."""
        if name not in self._columns:
            column = self.column(name)
            self._columns[name] = column if hasattr(column, "offsets") else column.to_numpy()
        return self._columns[name]

    def ids(self, indices: Sequence[int]) -> list[str]:
        """Return the ids of some clips."""
        return self.column("id").take(np.asarray(indices, np.int64)).to_pylist()

    def indices(self, split: str) -> np.ndarray:
        """Return the indices (n,) of the clips of a split; UserError, naming the splits there are, if it has none."""
        import pyarrow.compute as pc

        splits = self.column("split")
        found = np.flatnonzero(pc.equal(splits, split).to_numpy(zero_copy_only=False))
        names = ", ".join(sorted(pc.unique(splits).to_pylist()))
        check(len(found), f"config.split is {split!r}; it must be a split of {self.path}, which has {names}")
        return found

    @property
    def splits(self) -> dict[str, int]:
        """Return the number of clips of each split."""
        import pyarrow.compute as pc

        counts = pc.value_counts(self.column("split")).to_pylist()
        return {each["values"]: each["counts"] for each in sorted(counts, key=lambda each: -each["counts"])}

    @cached_property
    def grids(self) -> np.ndarray:
        """Return the size of the item of each clip (n, 3) int32: t, h, w."""
        return np.stack([self.column(side).to_numpy() for side in self.sides], axis=1)

    @property
    def clip_ids(self) -> np.ndarray:
        """Return the id of each clip (n,) uint32, the same for all variants of a clip."""
        return self.kept("uid")

    @property
    def labels(self) -> np.ndarray:
        """Return the class of each clip (n,) int32, -1 for none."""
        return self.kept("label")

    @property
    def weights(self) -> np.ndarray:
        """Return the mean number of times that each clip comes in an epoch, (n,) float32."""
        return self.kept("weight")

    @property
    def has_variants(self) -> bool:
        """Return True if some clip is there in several sizes or places."""
        return bool(self.column("variant").to_numpy().any())
