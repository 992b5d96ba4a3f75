"""Find the clips of a split."""

from typing import Any

import numpy as np

from sora_jax.config import check


def indices_of_split(split: str, splits: Any, where: str) -> np.ndarray:
    """Return the indices (n,) at which an Arrow array of names has `split`; UserError if it has none.

    where: what the array belongs to, for the message.
    """
    import pyarrow.compute as pc

    found = np.flatnonzero(pc.equal(splits, split).to_numpy(zero_copy_only=False))
    names = ", ".join(sorted(pc.unique(splits).to_pylist()))
    check(len(found), f"config.split is {split!r}; it must be a split of {where}, which has {names}")
    return found
