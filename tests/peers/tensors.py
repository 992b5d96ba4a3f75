"""Tensors of random values that are the same wherever and whenever they are made, so that no file need hold them."""

import zlib

import numpy as np


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 values of zero mean and unit variance, a pure function of the name: a hash of each value's place.

    NumPy's own generators may change what they draw from one version to the next.
    """
    places = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64)
    bits = places * np.uint64(0x9E3779B97F4A7C15) + np.uint64(zlib.crc32(name.encode()))
    for factor, shift in ((0xBF58476D1CE4E5B9, 30), (0x94D049BB133111EB, 27), (1, 31)):  # splitmix64's mixing steps
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    values = (bits >> np.uint64(40)).astype(np.float64) / 2**24  # in [0, 1)
    return ((2 * values - 1) * 3**0.5).astype(np.float32).reshape(shape)


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A value for every tensor of a network in PyTorch's layout: none is zero, and activations keep their size.

    Matrices and kernels (outputs, inputs, ...) have variance 1 / inputs; gains of norms, which alone are called weight
    and have one axis, and variances are near 1; all else is near 0.
    """
    return {name: _weight(name, tuple(shape)) for name, shape in shapes.items()}


def _weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = uniform(name, shape)
    if len(shape) > 1:
        return values / np.float32(np.prod(shape[1:]) ** 0.5)
    return 1 + values / 4 if name.endswith(("weight", "running_var", "var")) else values / 4
