"""Compare predicted frames with true ones by the metrics of OpenSTL (2306.11249; `openstl/core/metrics.py`).

Clips are (T, H, W, C), values in [0, 1]; for the published tables of Moving MNIST C is 1.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from sora_jax.evaluate.metrics import MOST_PSNR, ssim

# The tables were made with scikit-image up to 0.19, which takes floats to span -1 to 1 where no range is given.
SSIM_RANGE = 2.0


@dataclasses.dataclass(frozen=True)
class PredictionQuality:
    """Hold the errors of predicted clips: means over frames and clips."""

    clips: int
    mse: float  # squared error, summed over the pixels of a frame
    mae: float  # absolute error, summed over the pixels of a frame
    ssim: float  # of the frame clipped to [0, 1]
    psnr: float  # dB, of the frame clipped to [0, 1]
    mse_by_frame: tuple[float, ...]  # of the first predicted frame, the second...


def prediction_quality(predicted: np.ndarray, true: np.ndarray) -> PredictionQuality:
    """Measure one predicted clip. PSNR is at most MOST_PSNR, which a frame without error has."""
    predicted, true = predicted.astype(np.float64), true.astype(np.float64)
    error = predicted - true
    mse_T, mae_T = np.square(error).sum((1, 2, 3)), np.abs(error).sum((1, 2, 3))
    clipped = predicted.clip(0, 1)
    mean_T = np.square(clipped - true).mean((1, 2, 3))
    psnr_T = -10 * np.log10(np.maximum(mean_T, 10 ** (-MOST_PSNR / 10)))
    likeness = float(ssim(clipped, true, SSIM_RANGE).mean())
    return PredictionQuality(1, float(mse_T.mean()), float(mae_T.mean()), likeness, float(psnr_T.mean()), tuple(mse_T))


def average_predictions(qualities: Sequence[PredictionQuality]) -> PredictionQuality:
    """Return the means over clips of one length."""
    weights = [quality.clips for quality in qualities]

    def mean(name: str) -> Any:
        return np.average([getattr(quality, name) for quality in qualities], axis=0, weights=weights).tolist()

    numbers = {name: mean(name) for name in ("mse", "mae", "ssim", "psnr")}
    return PredictionQuality(sum(weights), **numbers, mse_by_frame=tuple(mean("mse_by_frame")))


@dataclasses.dataclass(frozen=True)
class SampleQuality:
    """Describe several samples of each clip; errors are squared and summed over the pixels of a frame."""

    clips: int
    samples: int  # of each clip
    mse: float  # of single samples
    best_mse: float  # of the best sample of each clip
    mean_mse: float  # of the mean of the samples of a clip
    variance: float  # between the samples of a clip, unbiased; of perfect samples half of `mse`


def sample_quality(samples: np.ndarray, true: np.ndarray) -> SampleQuality:
    """Compare samples (n, S, T, H, W, C) of n clips with the clips (n, T, H, W, C); S is at least 2."""
    count, mean = samples.shape[1], samples.mean(1)

    def error(difference: np.ndarray) -> np.ndarray:
        return np.square(difference).sum((-3, -2, -1)).mean(-1)

    single = error(samples - true[:, None])
    return SampleQuality(
        clips=len(true),
        samples=count,
        mse=float(single.mean()),
        best_mse=float(single.min(1).mean()),
        mean_mse=float(error(mean - true).mean()),
        variance=float(error(samples - mean[:, None]).mean()) * count / (count - 1),
    )
