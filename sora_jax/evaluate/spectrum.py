"""Measure how the energy of latents and images is spread over frequencies, by the DCT of blocks.

Latents with more energy at high frequencies than the images are harder for a diffusion model (2502.14831).
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.fft import dctn

MOST_BLOCK = 8  # positions on a side


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Report energy by frequency in blocks, lowest frequency first."""

    block: int  # side of the blocks, in latent positions and in pixels
    high_share_latents: float  # share of energy in the upper half of the frequencies; .5 for white noise
    high_share_images: float
    latents: list[float]  # shares of energy by zig-zag index
    images: list[float]


def compare_spectra(latents: Sequence[np.ndarray], clips: Iterable[np.ndarray]) -> Spectrum | None:
    """Measure latents (t, h, w, C) and clips (T, H, W, 3); None if a latent has a side of one position."""
    block = common_block(z.shape for z in latents)
    if block == 1:
        return None
    of_latents, of_images = (block_spectrum(arrays, block) for arrays in (latents, clips))
    return Spectrum(block, high_share(of_latents), high_share(of_images), of_latents.tolist(), of_images.tolist())


def common_block(shapes: Iterable[Sequence[int]]) -> int:
    """Return the side of the blocks for arrays of shapes (T, H, W, C): MOST_BLOCK, or less where a side is shorter."""
    return min([MOST_BLOCK, *(side for shape in shapes for side in shape[1:3])])


def block_spectrum(arrays: Iterable[np.ndarray], block: int) -> np.ndarray:
    """Return the shares of energy (block^2,) of orthonormal DCT coefficients of the frames' blocks, in zig-zag order.

    arrays (T, H, W, C): rows and columns beyond the last whole block are left out. The mean of each channel over all
    blocks is subtracted, so that only the variance between blocks counts for the first share.
    """
    count, total_C, energy = 0, 0.0, np.zeros((block, block))
    for x_THWC in arrays:
        T, H, W, C = x_THWC.shape
        h, w = H // block, W // block
        x = x_THWC[:, : h * block, : w * block].astype(np.float64).reshape(T, h, block, w, block, C)
        coefficients = dctn(x, axes=(2, 4), norm="ortho")
        energy += np.square(coefficients).sum((0, 1, 3, 5))
        total_C = total_C + coefficients[:, :, 0, :, 0].sum((0, 1, 2))
        count += T * h * w
    energy[0, 0] -= np.square(total_C).sum() / count
    energy = np.maximum(energy, 0)  # rounding may leave less than nothing of constant arrays
    shares = energy[tuple(zigzag(block).T)]
    return shares / max(shares.sum(), np.finfo(np.float64).tiny)


def zigzag(block: int) -> np.ndarray:
    """Return the (row, column) frequencies (block^2, 2) from low to high, in the order of JPEG."""
    pairs = [(row, column) for row in range(block) for column in range(block)]
    pairs.sort(key=lambda pair: (sum(pair), pair[sum(pair) % 2 == 0]))
    return np.array(pairs)


def high_share(shares: np.ndarray) -> float:
    """Return the share of energy in the upper half of the zig-zag order, the first coefficient included in the lower.

    White noise has .5; of an odd number of coefficients half the middle one counts.
    """
    half = len(shares) // 2
    middle = shares[half] / 2 if len(shares) % 2 else 0.0
    return float(shares[len(shares) - half :].sum() + middle)


def bands(shares: Sequence[float], count: int = 8) -> list[float]:
    """Sum the shares over `count` equal parts of the zig-zag order, or one for each where there are fewer."""
    return [float(part.sum()) for part in np.array_split(np.asarray(shares), min(count, len(shares)))]
