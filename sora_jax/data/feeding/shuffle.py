"""Random orders that are computed and not stored.

A stored order of 10^8 clips takes 0.8 GB and must be drawn whole before its first clip is known. A Feistel network
computes the clip at a place from a few keys (Luby and Rackoff, 1988). It permutes the numbers of 2 b bits; those that
are not below n are sent through it again until they are ("cycle walking", Black and Rogaway, 2002), on average less
than four times.
"""

import numpy as np

from sora_jax.data.draws import generator, mix64

ROUNDS = 6


class Permutation:
    """A random order of the numbers below n: `permutation(places)` are the numbers at these places, int64."""

    def __init__(self, n: int, seed: int, purpose: str, *index: int):
        self.n, self.keys = n, generator(seed, purpose, *index).integers(0, 2**64, ROUNDS, dtype=np.uint64)
        self.bits = max(1, -(-(n - 1).bit_length() // 2))  # half of those of the numbers that the network permutes

    def __call__(self, places: np.ndarray) -> np.ndarray:
        values = self._network(np.asarray(places, np.uint64))
        outside = np.flatnonzero(values >= self.n)
        while len(outside):
            values[outside] = self._network(values[outside])
            outside = outside[values[outside] >= self.n]
        return values.astype(np.int64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        bits = np.uint64(self.bits)
        low, high = values & ((np.uint64(1) << bits) - np.uint64(1)), values >> bits
        for key in self.keys:
            low, high = high, low ^ (mix64(high + key) >> np.uint64(64 - self.bits))
        return (high << bits) | low
