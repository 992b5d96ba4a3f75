"""Scale the channels of a latent by what they do to pixels."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.models.first_stage import TrainedConfig
from sora_jax.models.tiling import TilingConfig
from sora_jax.train.streaming import decode_stream

LEAST = 0.01  # of the largest effect: a channel that does nothing stays small
SHARE = 0.3  # of a channel's deviation, by which it is disturbed


def scale_by_effect(
    params: dict,
    config: TrainedConfig,
    latents: Sequence[np.ndarray],
    std_C: np.ndarray,
    tiles: TilingConfig = TilingConfig(),
) -> np.ndarray:
    """Return what to divide the channels by, so that equal noise on each changes the pixels by as much.

    The mean variance of the channels is then 1. A denoiser first decides what is seen most: of a linear codec this is
    the scale of its components, where division by each channel's own deviation makes all of them equal.

    Args:
        params: of the autoencoder.
        config: that of the autoencoder.
        latents: some, (t, h, w, C) each, not normalised.
        std_C: standard deviation of each channel.
        tiles: how large latents are decoded.
    """
    params = jax.tree.map(jnp.asarray, params)  # to the device once, not with every latent
    before = list(decode_stream(params, config, latents, tiles, 1))
    rng, effects = np.random.default_rng(0), []
    for channel, std in enumerate(std_C):
        disturbed = [z.astype(np.float32) for z in latents]
        for z in disturbed:
            z[..., channel] += SHARE * std * rng.standard_normal(z.shape[:-1], np.float32)
        after = decode_stream(params, config, disturbed, tiles, 1)
        squares = [np.square(a - b).mean() for a, b in zip(after, before, strict=True)]
        effects.append(np.sqrt(np.mean(squares)) / (SHARE * std))
    effect_C = np.maximum(effects, LEAST * max(max(effects), 1e-6))
    return (np.sqrt(np.mean(np.square(effect_C * std_C))) / effect_C).astype(np.float32)
