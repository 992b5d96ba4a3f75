"""Random order without a list: any place of a permutation of n things, and draws that belong to a thing.

A permutation of 10^9 clips would take 8 GB; a Feistel network computes the clip at a place, and the place of a clip,
from a few keys (Luby and Rackoff, 1988). It permutes the numbers of 2 b bits; those that are not below n are sent
through it again until they are ("cycle walking", Black and Rogaway, 2002), on average less than four times.
"""

from dataclasses import dataclass

import numpy as np

from sora_jax.data.planning import generator

ROUNDS = 6


def mix64(values: np.ndarray) -> np.ndarray:
    """Well-mixed uint64 of uint64, one to one (the finaliser of SplitMix64; Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def uniforms(seed: int, purpose: str, epoch: int, names: np.ndarray, copies: np.ndarray | int = 0) -> np.ndarray:
    """Numbers in [0, 1), each a function of (seed, purpose, epoch, name, copy) alone; float64."""
    key = generator(seed, purpose, epoch).integers(0, 2**64, dtype=np.uint64)
    names = np.asarray(names, np.uint64) ^ (np.asarray(copies, np.uint64) << np.uint64(40))
    return (mix64(mix64(names + np.uint64(1)) ^ key) >> np.uint64(11)) * 2.0**-53


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
