"""The interface of what packing reads: a store of clips."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sora_jax.config import check


class ClipStore(Protocol):
    """Clips by index, with what must be known of all of them to plan packs; see `LatentCache` and `Dataset`.

    May be pickled, for worker processes.
    """

    path: Path

    @property
    def digest(self) -> str:
        """Hex digest of which clips it holds, in which order."""

    @property
    def clip_ids(self) -> np.ndarray:
        """Id of each clip (n,) uint32, never 0; the same for all variants of a clip."""

    @property
    def grids(self) -> np.ndarray:
        """Size (t, h, w) of the values of each clip, (n, 3) integers."""

    @property
    def labels(self) -> np.ndarray:
        """Class of each clip (n,) int32, -1 for none."""

    @property
    def weights(self) -> np.ndarray:
        """Mean number of times that each clip comes in an epoch, (n,) floats."""

    @property
    def has_variants(self) -> bool:
        """Return True if some clip is there in several sizes or places."""

    def indices(self, split: str) -> np.ndarray:
        """Return the indices (n,) of the clips of a split; UserError if it has none."""

    def ids(self, indices: Sequence[int]) -> list[str]:
        """Return the names of some clips."""

    def column(self, name: str) -> Any:
        """Return a column of the manifest, an Arrow array: "captions", "kinds", "id"."""

    def item(self, index: int) -> np.ndarray:
        """Return the values (t, h, w, C) of a clip: a latent, or pixels."""


def indices_of_split(split: str, splits: Any, where: str) -> np.ndarray:
    """Return the indices (n,) at which an Arrow array of names has `split`; UserError if it has none.

    where: what the array belongs to, for the message.
    """
    import pyarrow.compute as pc

    found = np.flatnonzero(pc.equal(splits, split).to_numpy(zero_copy_only=False))
    names = ", ".join(sorted(pc.unique(splits).to_pylist()))
    check(len(found), f"config.split is {split!r}; it must be a split of {where}, which has {names}")
    return found
