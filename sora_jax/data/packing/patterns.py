"""Packs from the histogram of lengths: which lengths make up a pack, and how many packs are made so.

Largest first, as first-fit-decreasing (Johnson 1973), with one look ahead: a pack takes the largest length that is
left, then, where one length or two of those left fill it exactly, these, else the largest that fits. The same pattern
is used until one of its lengths runs out, so a million clips take a few thousand patterns at most.
"""

import numpy as np

Pattern = tuple[np.ndarray, np.ndarray, int]  # lengths, how many of each, packs


def patterns(lengths: np.ndarray, L: int, S: int) -> list[Pattern]:
    """Patterns of at most L tokens and S clips that use up all lengths."""
    counts = np.bincount(lengths, minlength=L + 1)
    made = []
    while len(alive := np.flatnonzero(counts)):
        kinds, each = np.unique(_one_pack(counts, alive, L, S), return_counts=True)
        packs = int((counts[kinds] // each).min())
        counts[kinds] -= each * packs
        made.append((kinds, each, packs))
    return made


def _one_pack(counts: np.ndarray, alive: np.ndarray, room: int, slots: int) -> list[int]:
    left, chosen, length = counts.copy(), [], int(alive[-1])
    while True:
        chosen.append(length)
        left[length] -= 1
        room -= length
        if room < alive[0] or len(chosen) == slots:
            return chosen
        if (length := _next(left, room, slots - len(chosen))) == 0:
            return chosen


def _next(left: np.ndarray, room: int, slots: int) -> int:
    """The length to take next, 0 for none."""
    if left[room]:
        return room
    there = left[: room + 1] > 0
    if slots > 1:
        pairs = there & there[::-1]
        if room % 2 == 0 and left[room // 2] < 2:
            pairs[room // 2] = False
        if len(found := np.flatnonzero(pairs)):
            return int(found[-1])
    return int(np.flatnonzero(there)[-1]) if there.any() else 0


def by_patterns(
    lengths: np.ndarray, texts: np.ndarray, L: int, S: int, M: int, draws: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clips in pack order, the number in each pack, and the clips of packs whose text was over M tokens."""
    shuffled = draws.permutation(len(lengths))
    queue = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    at = np.concatenate([[0], np.cumsum(np.bincount(lengths, minlength=L + 1))])  # where each length begins
    orders, sizes, left = [], [], []
    for kinds, each, packs in patterns(lengths, L, S):
        parts = []
        for kind, count in zip(kinds.tolist(), each.tolist()):
            parts.append(queue[at[kind] : at[kind] + count * packs].reshape(packs, count))
            at[kind] += count * packs
        clips = np.concatenate(parts, axis=1)
        fits = texts[clips].sum(axis=1) <= M
        orders.append(clips[fits].ravel())
        sizes.append(np.full(fits.sum(), clips.shape[1]))
        left.append(clips[~fits].ravel())
    return np.concatenate(orders), np.concatenate(sizes), np.concatenate(left)
