"""The plan: which clips share a pack in an epoch, decided from their token counts alone.

The shuffled order of an epoch is dealt into windows, and all windows are packed in lock step, one clip each at
a time, so that a step is a handful of NumPy calls whatever the number of clips. A window looks at its next
`LOOKAHEAD` clips and takes, of those after which the pack can still be filled best, the one that has waited
longest. How well a pack can still be filled is a table (slots left, tokens left) -> tokens lost, computed once
from the distinct lengths. Taking the longest waiting keeps packs mixed in size: no window ends with a heap of
clips that fit nowhere. The clips that a window holds when its order is used up go to a later round, so only the
very last packs of an epoch are short.

Windows that see fewer clips than there are lengths, or lengths of which few combinations fill a pack, leave gaps.
Such clips are also packed by `patterns`, and the plan with fewer packs is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial, reduce

import numpy as np

from sora_jax.data.draws import generator
from sora_jax.data.packing.packs import PackingConfig
from sora_jax.data.packing.patterns import by_patterns
from sora_jax.errors import UserError

LOOKAHEAD = 128, 256  # least and most; as many as there are distinct lengths packs well, at a cost
FULL = 0.995  # if a plan is less full, the other method is tried, too
_LOST = 1023  # losses from here on count as equal, so that a score fits 31 bits
_NEVER = np.int32(1 << 30)  # above every score of a clip that fits


@dataclass(frozen=True)
class Plan:
    """The packs of one epoch: pack p holds the clips `order[offsets[p]:offsets[p + 1]]`, also `plan[p]`."""

    order: np.ndarray  # (clips,) int64, every clip once
    offsets: np.ndarray  # (packs + 1,) int64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, pack: int) -> np.ndarray:
        return self.order[self.offsets[pack] : self.offsets[pack + 1]]


def plan(
    seed: int, epoch: int, lengths: np.ndarray, text_lengths: np.ndarray, config: PackingConfig, section: int = 0
) -> Plan:
    """Plan the packs of an epoch, or of one section of it; a pure function of its arguments.

    `lengths` (clips,) are token counts and `text_lengths` (clips,) text token counts. Every clip is in one
    pack, and every pack is within the limits of `config`. Packs come in random order.
    UserError if a clip alone is over `config.length` or `config.text_length`.
    """
    lengths, text_lengths = np.asarray(lengths), np.asarray(text_lengths)
    _check_each("length", lengths, config.length, "token(s)", least=1)
    _check_each("text_length", text_lengths, config.text_length, "text token(s)", least=0)
    draws = generator(seed, "plan", epoch, section)
    if not len(lengths):
        return Plan(np.zeros(0, np.int64), np.zeros(1, np.int64))
    by_windows = partial(_by_windows, _Clips(lengths, text_lengths, config), config.window)
    methods: list[Callable[[], tuple[np.ndarray, np.ndarray]]] = [
        lambda: by_windows(draws.permutation(len(lengths))),
        partial(by_patterns, lengths, text_lengths, config, draws, by_windows),
    ]
    if len(np.unique(lengths)) > LOOKAHEAD[1]:
        methods.reverse()  # a window cannot see all lengths at once
    order, sizes = methods[0]()
    if len(sizes) * config.length * FULL > lengths.sum():
        order, sizes = min((order, sizes), methods[1](), key=lambda made: len(made[1]))
    return _shuffled(order, sizes, draws)


def _by_windows(clips: _Clips, window: int, left: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the clips `left` in pack order and the number in each pack, mixed in size."""
    orders, sizes = [left[:0]], [left[:0]]
    while len(left):
        order, size, left = _Windows(clips, left, window).run()
        orders.append(order)
        sizes.append(size)
    return np.concatenate(orders), np.concatenate(sizes)


def _check_each(option: str, counts: np.ndarray, most: int, unit: str, least: int) -> None:
    wrong = np.flatnonzero((counts > most) | (counts < least))
    if len(wrong):
        raise UserError(
            f"clip {wrong[0]} has {counts[wrong[0]]} {unit} but packing.{option} is {most}: clips of {least} "
            f"to {most} fit ({len(wrong)} of {len(counts)} do not; the largest has {counts.max()})"
        )


def _shuffled(order: np.ndarray, sizes: np.ndarray, draws: np.random.Generator) -> Plan:
    old_starts = np.cumsum(sizes) - sizes
    packs = draws.permutation(len(sizes))
    offsets = np.concatenate([[0], np.cumsum(sizes[packs])])
    shift = np.repeat(old_starts[packs] - offsets[:-1], sizes[packs])
    return Plan(order[np.arange(len(order)) + shift], offsets)


class _Clips:
    """All clips, with one more at the end, the blank, that fits nowhere; and the limits of a pack."""

    def __init__(self, lengths: np.ndarray, texts: np.ndarray, config: PackingConfig):
        self.L, self.S, self.M = config.length, config.slots, config.text_length
        self.blank = len(lengths)
        self.lengths = np.append(lengths, self.L + 1).astype(np.int32)
        self.texts = np.append(texts, 0).astype(np.int32)
        kinds = np.unique(lengths)
        self.lookahead = int(np.clip(len(kinds), *LOOKAHEAD))
        self.losses = _losses(tuple(kinds.tolist()), self.L, self.S)  # flat (S + 1, 2 L + 2) int32
        limits = np.sort(texts)[-self.S :].sum() > self.M
        self.mean_text = max(1.0, texts.mean()) if limits else 0.0  # 0 where no clips can exceed the text limit


@lru_cache(maxsize=8)  # the same in every epoch
def _losses(kinds: tuple[int, ...], L: int, S: int) -> np.ndarray:
    """Score a choice: entry [s, left + L + 1] for s free slots before it and `left` free tokens after it.

    The score is the least number of tokens that stay empty if every distinct length were in endless supply;
    `_NEVER` where left < 0 or s = 0.
    """
    scores = np.full((S + 1, 2 * L + 2), _NEVER, np.int32)
    everything = (1 << (L + 1)) - 1
    left = np.arange(L + 1)
    sums = 1  # bit n is set when n tokens can be made from at most s - 1 clips
    for s in range(1, S + 1):
        bits = np.frombuffer(sums.to_bytes(L // 8 + 1, "little"), np.uint8)
        reached = np.flatnonzero(np.unpackbits(bits, bitorder="little")[: L + 1])
        loss = left - reached[np.searchsorted(reached, left, side="right") - 1]
        scores[s, L + 1 :] = np.minimum(loss, _LOST) << 20
        sums = reduce(int.__or__, [sums << kind for kind in kinds], sums) & everything
    return scores.ravel()


class _Windows:
    """The windows of one round (W of them), each with an open pack and a look-ahead of C clips."""

    def __init__(self, clips: _Clips, left: np.ndarray, window: int):
        count = -(-len(left) // window)
        width = -(-len(left) // count)
        self.clips = clips
        self.last_round = count == 1
        self.stream = np.full((count, width + 1), clips.blank)
        self.stream[:, :width].T.flat[: len(left)] = left  # dealt, so that no window is short by two
        ahead = min(clips.lookahead, width if self.last_round else -(-width // 4))
        self.next = np.full(count, ahead)
        self.ids = self.stream[:, :ahead].copy()
        self.lengths, self.texts = clips.lengths[self.ids], clips.texts[self.ids]
        self.ages = np.tile(np.arange(ahead, dtype=np.int32), (count, 1))
        self.room, self.slots, self.text = (np.full(count, cap) for cap in (clips.L, clips.S, clips.M))
        self.live = np.ones(count, bool)

    def run(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Clips in pack order, the number in each pack, and the clips handed to the next round."""
        chosen, closed, left = [], [], []
        while self.live.any():
            place, fits = self._choose()
            rows = np.flatnonzero(fits)
            chosen.append(np.where(fits, self.ids[np.arange(len(fits)), place], self.clips.blank))
            closed.append(~fits)
            self._take(rows, place[rows])
            left.append(self._close(np.flatnonzero(~fits)))
        return *self._packs(np.stack(chosen, 1), np.stack(closed, 1)), np.concatenate(left)

    def _choose(self) -> tuple[np.ndarray, np.ndarray]:
        """Return for each window the place of the best clip, and whether it fits at all."""
        clips, slots = self.clips, self.slots
        if clips.mean_text:
            # Scarce text runs out before the slots do: look ahead with the slots that the text will last for.
            lasting = np.maximum((self.text / clips.mean_text).astype(slots.dtype), 1)
            slots = np.minimum(slots, lasting)
        base = slots * (2 * clips.L + 2) + self.room + clips.L + 1
        scores = clips.losses.take(base.astype(np.int32)[:, None] - self.lengths)
        if clips.mean_text:
            scores[self.texts > self.text[:, None]] = _NEVER
        scores += self.ages
        place = scores.argmin(1)
        return place, scores[np.arange(len(place)), place] < _NEVER

    def _take(self, rows: np.ndarray, place: np.ndarray) -> None:
        self.room[rows] -= self.lengths[rows, place]
        self.text[rows] -= self.texts[rows, place]
        self.slots[rows] -= 1
        ahead = self.next[rows]
        ids = self.stream[rows, np.minimum(ahead, self.stream.shape[1] - 1)]
        self.ids[rows, place], self.ages[rows, place] = ids, ahead
        self.lengths[rows, place], self.texts[rows, place] = self.clips.lengths[ids], self.clips.texts[ids]
        self.next[rows] = ahead + 1

    def _close(self, rows: np.ndarray) -> np.ndarray:
        """Open new packs in these windows; windows that are used up stop and hand on the clips that they hold."""
        self.room[rows], self.slots[rows], self.text[rows] = self.clips.L, self.clips.S, self.clips.M
        rows = rows[self.live[rows]]
        if self.last_round:
            through = rows[(self.ids[rows] == self.clips.blank).all(1)]
        else:
            through = rows[self.next[rows] >= self.stream.shape[1] - 1]
        self.live[through] = False
        held = self.ids[through]
        self.ids[through], self.lengths[through] = self.clips.blank, self.clips.L + 1
        return held[held != self.clips.blank]

    def _packs(self, chosen: np.ndarray, closed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        real = chosen != self.clips.blank
        number = np.cumsum(closed, axis=1) + np.arange(len(closed))[:, None] * closed.shape[1]
        starts = np.flatnonzero(np.diff(number[real], prepend=-1))
        return chosen[real], np.diff(starts, append=int(real.sum()))
