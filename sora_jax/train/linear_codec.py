"""Fit the best linear autoencoder of a dataset: principal component analysis of its blocks of pixels.

Its quality is a lower bound for an autoencoder of the same compression, and its matrices are a start for one. Host
code: NumPy arrays in and out.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator

import numpy as np
from scipy import linalg

from sora_jax.config import check

MOST_VALUES = 4096  # of a block whose covariance is held; larger blocks are fitted on as many blocks, drawn at random
SMALLEST_STD = 1e-3  # of the largest channel


@dataclasses.dataclass(frozen=True)
class LinearCodec:
    """Encode every block of a clip by z = (x - mean) V / std, and decode by x' = z std V^T + mean.

    P = pt ph pw 3 is the number of values of a block, in the channel order of `nn.conv.space_to_depth`; pixels are in
    [-1, 1].
    """

    block: tuple[int, int, int]  # (pt, ph, pw)
    mean_P: np.ndarray  # float32, of the values of a block
    components_PC: np.ndarray  # V, float32, orthonormal columns, that of the largest variance first
    std_C: np.ndarray  # float32, positive, standard deviation of each channel over the fitted blocks

    def encode(self, clip_THWC: np.ndarray) -> np.ndarray:
        """Encode a uint8 clip into latents (t, h, w, C) float32, normalised."""
        return (clip_to_blocks(clip_THWC, self.block) - self.mean_P) @ (self.components_PC / self.std_C)

    def decode(self, z_thwC: np.ndarray) -> np.ndarray:
        """Decode latents into a clip (T, H, W, 3) float32, about [-1, 1], not clipped."""
        return blocks_to_clip(z_thwC @ (self.components_PC * self.std_C).T + self.mean_P, self.block)


def clip_to_blocks(clip_THWC: np.ndarray, block: tuple[int, int, int]) -> np.ndarray:
    """Move blocks of a uint8 clip into channels, in [-1, 1]: (1 + pt (t - 1), ph h, pw w, C) -> (t, h, w, pt ph pw C).

    Copies of the first frame fill the first block. The channels run block time, height, width, then C, as those of
    `nn.conv.space_to_depth`.
    """
    pt, ph, pw = block
    T, H, W, C = clip_THWC.shape
    fits = (T - 1) % pt == 0 and H % ph == 0 and W % pw == 0
    check(fits, f"a clip has {T}x{H}x{W} pixels; blocks of {pt}x{ph}x{pw} need 1 + {pt}k frames and whole blocks")
    x = np.concatenate([clip_THWC[:1]] * (pt - 1) + [clip_THWC])
    t, h, w = len(x) // pt, H // ph, W // pw
    x = x.reshape(t, pt, h, ph, w, pw, C).transpose(0, 2, 4, 1, 3, 5, 6)
    return x.reshape(t, h, w, pt * ph * pw * C).astype(np.float32) / 127.5 - 1.0


def blocks_to_clip(x_thwP: np.ndarray, block: tuple[int, int, int]) -> np.ndarray:
    """Invert `clip_to_blocks`, but for the type of the pixels: of the first block only the last frame is kept."""
    pt, ph, pw = block
    t, h, w, P = x_thwP.shape
    C = P // math.prod(block)
    x = x_thwP.reshape(t, h, w, pt, ph, pw, C).transpose(0, 3, 1, 4, 2, 5, 6)
    return x.reshape(t * pt, h * ph, w * pw, C)[pt - 1 :]


def fit_linear_codec(
    clips: Iterable[np.ndarray],
    block: tuple[int, int, int],
    channels: int,
    most_blocks: int = 400_000,
    seed: int = 0,
) -> LinearCodec:
    """Fit a linear codec to uint8 clips (T, H, W, 3) of any sizes that `block` divides.

    Clips are read until `most_blocks` blocks have been seen. The codec is exact for them, except for blocks of more
    than MOST_VALUES values: then it is fitted on MOST_VALUES of these blocks, drawn by `seed`.

    Raises:
        UserError: there are fewer blocks, or fewer values in a block, than channels; or a clip has another size.
    """
    values = 3 * math.prod(block)
    check(
        0 < channels <= values,
        f"channels is {channels}; a block of {block} has {values} values, so it must be from 1 to {values}",
    )
    blocks = _blocks(clips, block, most_blocks)
    if values <= MOST_VALUES:
        mean_P, variances_C, components_PC = _exact(blocks, values, channels)
    else:
        mean_P, variances_C, components_PC = _sampled(blocks, values, channels, seed)
    std_C = np.sqrt(np.maximum(variances_C, 0))
    std_C = np.maximum(std_C, SMALLEST_STD * max(std_C.max(), 1e-3))
    # The sign of a component is free: the largest entry is positive, so that a fit can be repeated.
    largest_C = np.take_along_axis(components_PC, np.abs(components_PC).argmax(0)[None], 0)[0]
    parts = mean_P, components_PC * np.where(largest_C < 0, -1, 1), std_C
    return LinearCodec(block, *(part.astype(np.float32) for part in parts))


def _blocks(clips: Iterable[np.ndarray], block: tuple[int, int, int], most: int) -> Iterator[np.ndarray]:
    """Yield the blocks (n, P) of each clip, float32, in all at most `most`."""
    for clip in clips:
        x_nP = clip_to_blocks(clip, block).reshape(-1, 3 * math.prod(block))[:most]
        most -= len(x_nP)
        yield x_nP
        if most == 0:
            return


def _exact(blocks: Iterable[np.ndarray], values: int, channels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean, the largest variances and their directions, by the covariance of all blocks."""
    count, total_P, products_PP = 0, np.zeros(values), np.zeros((values, values))
    for x_nP in blocks:
        x_nP = x_nP.astype(np.float64)
        count, total_P = count + len(x_nP), total_P + x_nP.sum(0)
        products_PP += x_nP.T @ x_nP
    _check_count(count, channels)
    mean_P = total_P / count
    covariance_PP = products_PP / count - np.outer(mean_P, mean_P)
    variances_C, components_PC = linalg.eigh(covariance_PP, subset_by_index=(values - channels, values - 1))
    return mean_P, variances_C[::-1], components_PC[:, ::-1]


def _check_count(count: int, channels: int) -> None:
    check(count >= channels, f"the clips have {count} blocks; a linear codec of {channels} channels needs as many")


def _sampled(
    blocks: Iterable[np.ndarray], values: int, channels: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what `_exact` does, of MOST_VALUES blocks, by their inner products: the covariance would be too large."""
    rng, count = np.random.default_rng(seed), 0
    held_NP = np.empty((MOST_VALUES, values), np.float32)
    for x_nP in blocks:
        # Algorithm R (Vitter 1985): block i takes the place of a held one with probability MOST_VALUES / (i + 1).
        i_n = np.arange(count, count + len(x_nP))
        place_n = np.where(i_n < MOST_VALUES, i_n, rng.integers(0, i_n + 1))
        chosen = place_n < MOST_VALUES
        held_NP[place_n[chosen]] = x_nP[chosen]
        count += len(x_nP)
    _check_count(count, channels)
    held_NP = held_NP[:count]
    number = len(held_NP)
    mean_P = held_NP.mean(0, dtype=np.float64)
    held_NP -= mean_P.astype(np.float32)
    largest = (number - channels, number - 1)
    variances_C, inner_NC = linalg.eigh((held_NP @ held_NP.T).astype(np.float64) / number, subset_by_index=largest)
    # Directions of variance 0 are not determined by inner products; QR makes these orthonormal to the others.
    components_PC, _ = linalg.qr(held_NP.T @ inner_NC[:, ::-1], mode="economic")
    return mean_P, variances_C[::-1], components_PC
