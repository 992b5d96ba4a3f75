"""Count what model FLOPs are made of: weights by what they are applied to, and the lengths of clips and captions."""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np

from sora_jax.nn.params import ParamSpec


def weights(specs: dict, user: Callable[[Sequence[str]], str]) -> list[tuple[str, int]]:
    """List every weight that takes part in a product: (what it is applied to, size); user: says the first by the path.

    A weight of stacked layers counts with all of them.
    """
    found = []

    def visit(path, spec):
        names = [str(getattr(entry, "key", entry)) for entry in path]
        if names[-1] == "weight":
            found.append((user(names), math.prod(spec.shape)))

    jax.tree_util.tree_map_with_path(visit, specs, is_leaf=lambda x: isinstance(x, ParamSpec))
    return found


def used_rows(batch: dict, lengths_BS: np.ndarray) -> np.ndarray:
    """Return which rows of the conditioning table serve a clip, bool (B, R); lengths_BS: tokens of each clip."""
    return np.take_along_axis(lengths_BS > 0, batch["row_slots_BR"], axis=1)


def text_lengths(batch: dict, slots: int) -> np.ndarray:
    """Count the text tokens of each clip of a host batch, (B, slots) int64."""
    segments = batch["text_segments_BM"]
    return np.stack([(segments == slot).sum(-1) for slot in range(1, slots + 1)], axis=-1).astype(np.int64)
