"""Small idx files of drawn figures in the place of MNIST's digits."""

import gzip
from pathlib import Path

import numpy as np


def drawn_digits(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images (count, 28, 28) uint8, each another pair of bars, and labels 0 to 9."""
    rng = np.random.default_rng(7)
    images = np.zeros((count, 28, 28), np.uint8)
    for number, image in enumerate(images):
        top, left = rng.integers(4, 20, 2)
        image[top : top + 4, 4:24] = 120 + number
        image[4:24, left : left + 4] = 255 - number
    return images, (np.arange(count) % 10).astype(np.uint8)


def write_idx(path: Path, values: np.ndarray) -> None:
    """Write an idx file of unsigned bytes, gzipped where the name ends in .gz."""
    data = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
