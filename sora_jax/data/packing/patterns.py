"""Plan from the histogram of lengths, for lengths that windows do not fill.

Largest first, as in first-fit decreasing (Johnson 1973), with a look ahead: a pack takes the largest length that is
left, then the one length or the two lengths that fill it exactly, if there are such, else the largest that fits. The
same pattern is used until one of its lengths runs out, so a million clips take a few thousand patterns at most.
"""

from collections.abc import Callable

import numpy as np

from sora_jax.data.packing.packs import PackingConfig


def by_patterns(
    lengths: np.ndarray,
    texts: np.ndarray,
    config: PackingConfig,
    draws: np.random.Generator,
    by_windows: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
    """Return clips in pack order and the number in each pack, less mixed in size than those of windows.

    by_windows: plans the clips of packs whose text is over the limit.
    """
    shuffled = draws.permutation(len(lengths))
    queue = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    counts = np.bincount(lengths, minlength=config.length + 1)
    starts = np.cumsum(counts) - counts  # of each length in the queue
    orders, sizes, left = [], [], []
    while counts.any():
        kinds, each = np.unique(_pattern(counts.copy(), config.length, config.slots), return_counts=True)
        packs = int((counts[kinds] // each).min())
        parts = [queue[starts[k] : starts[k] + n * packs].reshape(packs, n) for k, n in zip(kinds, each, strict=True)]
        counts[kinds] -= each * packs
        starts[kinds] += each * packs
        clips = np.concatenate(parts, axis=1)
        fits = texts[clips].sum(axis=1) <= config.text_length
        orders.append(clips[fits].ravel())
        sizes.append(np.full(fits.sum(), clips.shape[1]))
        left.append(clips[~fits].ravel())
    rest, rest_sizes = by_windows(draws.permutation(np.concatenate(left)))
    return np.concatenate([*orders, rest]), np.concatenate([*sizes, rest_sizes])


def _pattern(left: np.ndarray, room: int, slots: int) -> list[int]:
    """Return the lengths of one pack, taken out of the counts that are left."""
    chosen: list[int] = []
    length = int(np.flatnonzero(left)[-1])
    while length:
        chosen.append(length)
        left[length] -= 1
        room -= length
        length = _next(left, room, slots - len(chosen))
    return chosen


def _next(left: np.ndarray, room: int, slots: int) -> int:
    """Return the length to take next, 0 for none."""
    if slots and left[room]:
        return room
    fitting = left[: room + 1] > 0
    pairs = fitting & fitting[::-1]
    if room % 2 == 0:
        pairs[room // 2] = left[room // 2] > 1
    candidates = pairs if slots > 1 and pairs.any() else fitting
    return int(np.flatnonzero(candidates).max(initial=0)) if slots else 0
