"""A few padded shapes for clips of many sizes, so that few programs are compiled."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

Size = tuple[int, int, int]


def choose_padded_shapes(sizes: Iterable[Size] | Mapping[Size, int], most: int) -> list[Size]:
    """Choose at most `most` shapes (frames, height, width), smallest first, such that each size fits into one of them.

    sizes: of all clips, or the number of clips of each. From one shape for each size, the two are merged that add least
    volume to the clips in them, until few enough are left.
    """
    counts = Counter(sizes)
    shapes = np.array(list(counts), np.int64).reshape(-1, 3)
    clips = np.array(list(counts.values()), np.float64)
    cost = np.stack([_costs(shapes, clips, i) for i in range(len(shapes))]) if len(shapes) > most else np.empty((0, 0))
    while len(shapes) > most:
        one, other = sorted(divmod(int(cost.argmin()), len(shapes)))
        shapes[one] = np.maximum(shapes[one], shapes[other])
        clips[one] += clips[other]
        shapes, clips = np.delete(shapes, other, 0), np.delete(clips, other)
        cost = np.delete(np.delete(cost, other, 0), other, 1)
        cost[one] = cost[:, one] = _costs(shapes, clips, one)
    merged = sorted({(frames, height, width) for frames, height, width in shapes.tolist()}, key=math.prod)
    return [shape for shape in merged if any(padded_shape_of(size, merged) == shape for size in counts)]


def _costs(shapes: np.ndarray, clips: np.ndarray, one: int) -> np.ndarray:
    """Return the volume added by merging shape `one` with each; infinite with itself."""
    merged = np.maximum(shapes, shapes[one]).prod(1)
    added = clips * (merged - shapes.prod(1)) + clips[one] * (merged - shapes[one].prod())
    added[one] = np.inf
    return added


def padded_shape_of(size: Size, padded_shapes: Iterable[Size]) -> Size:
    """Return the smallest of the shapes that holds a clip of this size."""
    return min((c for c in padded_shapes if all(np.greater_equal(c, size))), key=math.prod)
