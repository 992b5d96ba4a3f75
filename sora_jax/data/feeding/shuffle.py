"""Random order without a list: any place of a permutation of n things, and draws that belong to a thing.

A permutation of 10^9 clips would take 8 GB; a Feistel network computes the clip at a place, and the place of a clip,
from a few keys (Luby and Rackoff, 1988). It permutes the numbers of 2 b bits; those that are not below n are sent
through it again until they are ("cycle walking", Black and Rogaway, 2002), on average less than four times.
"""

from dataclasses import dataclass

import numpy as np

from sora_jax.data.draws import generator, mix64

ROUNDS = 6


@dataclass(frozen=True)
class Permutation:
    """A random order of n things: `order(places)` are the things there, `place(things)` the inverse; int64."""

    n: int
    keys: tuple[int, ...]

    @staticmethod
    def of(n: int, seed: int, purpose: str, *index: int) -> "Permutation":
        """One of the orders of n things, by seed, purpose and index."""
        keys = generator(seed, purpose, *index).integers(0, 2**64, ROUNDS, dtype=np.uint64)
        return Permutation(n, tuple(int(key) for key in keys))

    @property
    def bits(self) -> int:
        """b: half the bits of the numbers that the network permutes."""
        return max(1, -(-(self.n - 1).bit_length() // 2))

    def order(self, places: np.ndarray) -> np.ndarray:
        return self._walk(places, self._forward)

    def place(self, things: np.ndarray) -> np.ndarray:
        return self._walk(things, self._backward)

    def _walk(self, start: np.ndarray, step) -> np.ndarray:
        values = step(np.asarray(start, np.uint64))
        outside = np.flatnonzero(values >= self.n)
        while len(outside):
            values[outside] = step(values[outside])
            outside = outside[values[outside] >= self.n]
        return values.astype(np.int64)

    def _forward(self, values: np.ndarray) -> np.ndarray:
        low, high = self._halves(values)
        for key in self.keys:
            low, high = high, low ^ self._hashed(high, key)
        return (high << np.uint64(self.bits)) | low

    def _backward(self, values: np.ndarray) -> np.ndarray:
        low, high = self._halves(values)
        for key in self.keys[::-1]:
            low, high = high ^ self._hashed(low, key), low
        return (high << np.uint64(self.bits)) | low

    def _halves(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return values & np.uint64((1 << self.bits) - 1), values >> np.uint64(self.bits)

    def _hashed(self, half: np.ndarray, key: int) -> np.ndarray:
        return mix64(half + np.uint64(key)) >> np.uint64(64 - self.bits)
