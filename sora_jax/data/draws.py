"""All schemes of chance of the data room: each draw is a function of a seed, a purpose and what it belongs to."""

import hashlib
import zlib

import numpy as np

from sora_jax.errors import UserError


def generator(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """Random numbers that depend on (seed, purpose, index) and on nothing drawn before."""
    if seed < 0:
        raise UserError(f"seed is {seed}; it must be 0 or more")
    # The number of indices is part of it: a SeedSequence takes (a, b) and (a, b, 0) for the same.
    entropy = (seed, zlib.crc32(purpose.encode()), len(index), *index)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


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


def uniform(seed: int, purpose: str, clip_id: str) -> float:
    """A number in [0, 1), the same for the same seed, purpose and clip."""
    key = hashlib.blake2b(f"{seed}/{purpose}/{clip_id}".encode(errors="replace"), digest_size=16).digest()
    return float(np.random.Generator(np.random.Philox(key=int.from_bytes(key))).random())
