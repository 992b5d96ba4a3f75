"""Measure what the best linear autoencoder of the same rate keeps of a dataset: a trained one that is below is broken.

Every block of pixels that a latent position stands for is encoded on its own, by principal component analysis.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from sora_jax.models.first_stage import FirstStageConfig, block_of
from sora_jax.train.autoencoder import to_uint8
from sora_jax.train.linear_codec import LinearCodec, fit_linear_codec

MOST_CLIPS = 200  # that a codec is fitted to
MOST_BLOCKS = 100_000  # of these clips: more take minutes where blocks are large


def choose_clips(rows: Sequence[dict], seed: int = 0, most: int = MOST_CLIPS) -> list[int]:
    """Choose at most so many clips of a manifest's rows; return their indices in random order."""
    return [rows[place]["index"] for place in np.random.default_rng(seed).permutation(len(rows))[:most]]


def fit_bound(config: FirstStageConfig, clips: Iterable[np.ndarray], seed: int = 0) -> LinearCodec:
    """Fit a linear codec of an autoencoder's compression and channels to uint8 training clips.

    Raises:
        UserError: the clips have fewer blocks than the autoencoder has channels.
    """
    block = block_of(config)
    most = 3 * math.prod(block)  # with one channel for each value of a block it is exact
    return fit_linear_codec(clips, block, min(config.latent_channels, most), MOST_BLOCKS, seed)


def reconstruct(codec: LinearCodec, clips: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the reconstruction of each uint8 clip, as uint8."""
    for clip in clips:
        yield to_uint8(codec.decode(codec.encode(clip)))
