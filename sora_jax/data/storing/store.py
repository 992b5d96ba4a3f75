"""Say what packing is fed by: anything with clips."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np


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
        """Size (t, h, w) of the values of each clip, (n, 3) int64."""

    @property
    def labels(self) -> np.ndarray:
        """Class of each clip (n,) int32, -1 for none."""

    @property
    def weights(self) -> np.ndarray:
        """Give how often each clip comes in an epoch, on average, (n,) float64."""

    @property
    def has_variants(self) -> bool:
        """True if some clip is there in several sizes or places."""

    def indices(self, split: str) -> np.ndarray:
        """Return the indices (n,) of the clips of a split; UserError if it has none."""

    def ids(self, indices: Sequence[int]) -> list[str]:
        """Return the names of some clips."""

    def column(self, name: str) -> Any:
        """Return a column of the manifest, an Arrow array: "captions", "kinds", "id"."""

    def item(self, index: int) -> np.ndarray:
        """Return the values (t, h, w, C) of a clip: a latent, or pixels."""
