"""All schemes of chance of the data room: each draw is a function of a seed, a purpose and what it belongs to.

`generator`: many draws for one thing, such as a plan or a crop; about 20 microseconds to make.
`uniforms`: one draw for each of many clips, by clip id, in NumPy calls: weights, variants, captions of a section.
`uniform`: one draw for one clip by its string id, while a dataset is built and clip ids may still collide.
Datasets, runs and caches depend on the values: no scheme may change.
"""

import hashlib
import zlib

import numpy as np

from sora_jax.config import check


def generator(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """Return a generator of random numbers that depend on (seed, purpose, index) alone."""
    check(seed >= 0, f"seed is {seed}; it must be at least 0")
    # The number of indices is included, as a SeedSequence does not distinguish (a, b) from (a, b, 0).
    entropy = (seed, zlib.crc32(purpose.encode()), len(index), *index)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


def mix64(values: np.ndarray) -> np.ndarray:
    """Mix the bits of uint64 values, one to one (the finaliser of SplitMix64; Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def uniforms(seed: int, purpose: str, epoch: int, clip_ids: np.ndarray, copies: np.ndarray | int = 0) -> np.ndarray:
    """Return numbers in [0, 1), float64, each a function of (seed, purpose, epoch, clip id, copy) alone."""
    key = generator(seed, purpose, epoch).integers(0, 2**64, dtype=np.uint64)
    values = np.asarray(clip_ids, np.uint64) ^ (np.asarray(copies, np.uint64) << np.uint64(40))
    return (mix64(mix64(values + np.uint64(1)) ^ key) >> np.uint64(11)) * 2.0**-53


def uniform(seed: int, purpose: str, name: str) -> float:
    """Return a number in [0, 1) that is a function of (seed, purpose, name of a clip) alone."""
    key = hashlib.blake2b(f"{seed}/{purpose}/{name}".encode(errors="replace"), digest_size=16).digest()
    return float(np.random.Generator(np.random.Philox(key=int.from_bytes(key))).random())
