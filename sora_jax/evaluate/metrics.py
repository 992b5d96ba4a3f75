"""Compare clips with their reconstructions, and describe latents, in plain numbers.

Clips are uint8 (T, H, W, 3). Means over clips give every clip the same weight. None stands for what a clip does not
have, such as later frames of an image.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy.ndimage import uniform_filter

from sora_jax.models.first_stage import kl_to_standard_normal

MOST_PSNR = 100.0  # dB, of clips that are equal
WINDOW = 7  # side in pixels of the uniform window of SSIM
STILL = 1  # levels by which a pixel may change from frame to frame and still count as still
DEAD_VARIANCE = 1e-2  # a channel whose posterior mean varies less tells nothing about the clip


def psnr(clip: np.ndarray, other: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB over all pixels and frames, at most MOST_PSNR."""
    error = np.square(clip.astype(np.float64) - other).mean()
    return min(10 * np.log10(255.0**2 / error), MOST_PSNR) if error else MOST_PSNR


def ssim(clip: np.ndarray, other: np.ndarray, data_range: float = 255.0) -> np.ndarray:
    """Return the structural similarity (T,) of each frame, a mean over channels and all positions of the window.

    Wang et al. 2004, equation 13, with a uniform window of 7 x 7 pixels inside the frame, the sample covariance and
    K = .01, .03: the defaults of scikit-image, whose data range for uint8 is 255. In frames whose shorter side is less
    than 7 the window is the largest odd one that fits.
    """
    radius = (min(WINDOW, *clip.shape[1:3]) - 1) // 2
    window = 2 * radius + 1
    inside = np.s_[:, radius : clip.shape[1] - radius, radius : clip.shape[2] - radius]

    def local_mean(x: np.ndarray) -> np.ndarray:
        return uniform_filter(x, window, axes=(1, 2))[inside]

    x, y = clip.astype(np.float64), other.astype(np.float64)
    mean_x, mean_y = local_mean(x), local_mean(y)
    unbiased = window**2 / max(window**2 - 1, 1)
    variances = unbiased * (local_mean(x * x + y * y) - mean_x**2 - mean_y**2)
    covariance = unbiased * (local_mean(x * y) - mean_x * mean_y)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * (2 * covariance + c2) / (variances + c2)).mean((1, 2, 3))


def flicker(clip: np.ndarray, other: np.ndarray) -> tuple[float | None, float | None]:
    """Return errors of the change from frame to frame in 8-bit levels: (of all pixels, of still pixels).

    The first is mean |(x_t - x_{t-1}) - (y_t - y_{t-1})|, None for an image. The second is mean |y_t - y_{t-1}| where
    no channel of x changes by more than STILL, None where there is no such pixel.
    """
    if len(clip) == 1:
        return None, None
    change, decoded = (np.diff(x.astype(np.int16), axis=0) for x in (clip, other))
    still = np.abs(change).max(-1) <= STILL
    return float(np.abs(change - decoded).mean()), float(np.abs(decoded[still]).mean()) if still.any() else None


@dataclasses.dataclass(frozen=True)
class Quality:
    """Report how well clips are reconstructed: values of one clip, or means over several."""

    clips: int
    psnr: float  # dB, as are the next two
    psnr_first: float  # of the first frame
    psnr_rest: float | None  # of the later frames
    ssim: float
    ssim_first: float
    ssim_rest: float | None
    flicker: float | None  # 8-bit levels: see `flicker`
    flicker_still: float | None


def quality(clip: np.ndarray, decoded: np.ndarray) -> Quality:
    """Measure one reconstruction."""
    likeness = ssim(clip, decoded)
    later = len(clip) > 1
    changes, still = flicker(clip, decoded)
    return Quality(
        clips=1,
        psnr=psnr(clip, decoded),
        psnr_first=psnr(clip[:1], decoded[:1]),
        psnr_rest=psnr(clip[1:], decoded[1:]) if later else None,
        ssim=float(likeness.mean()),
        ssim_first=float(likeness[0]),
        ssim_rest=float(likeness[1:].mean()) if later else None,
        flicker=changes,
        flicker_still=still,
    )


def average(qualities: Sequence[Quality]) -> Quality:
    """Return the means over clips, each over the clips that have the value."""
    names = [field.name for field in dataclasses.fields(Quality) if field.name != "clips"]
    means: dict[str, Any] = {name: _mean([getattr(q, name) for q in qualities]) for name in names}
    return Quality(len(qualities), **means)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def average_by_size(
    qualities: Sequence[Quality], sizes: Sequence[tuple[int, int, int]], most: int = 12
) -> dict[str, Quality]:
    """Return the means over clips of each size, "FRAMESxHEIGHTxWIDTH", most frequent first; after `most`: "others"."""
    common = [size for size, _ in Counter(sorted(sizes)).most_common(most)]
    names = ["x".join(map(str, size)) if size in common else "others" for size in sizes]
    order = dict.fromkeys([*("x".join(map(str, size)) for size in common), *names])
    return {name: average([q for q, own in zip(qualities, names, strict=True) if own == name]) for name in order}


def table(rows: dict[str, tuple[Quality, Quality | None]]) -> list[str]:
    """Return lines of text with a header: each row a name, its quality, and that of the linear bound beside it."""
    names = ["PSNR", "first", "rest", "SSIM", "first", "rest", "flicker", "still", "bound"]
    lines = [f"{'':18}{'clips':>6}" + "".join(f"{name:>8}" for name in names)]
    for name, (own, bound) in rows.items():
        decibels = [own.psnr, own.psnr_first, own.psnr_rest]
        cells = [*_cells(decibels, 2), *_cells([own.ssim, own.ssim_first, own.ssim_rest], 3)]
        cells += _cells([own.flicker, own.flicker_still, bound.psnr if bound else None], 2)
        lines.append(f"{name:18}{own.clips:6}" + "".join(f"{cell:>8}" for cell in cells))
    return [*lines, "PSNR and bound in dB; flicker in 8-bit levels, of all pixels and of still ones"]


def _cells(values: Sequence[float | None], digits: int) -> list[str]:
    return ["-" if value is None else f"{value:.{digits}f}" for value in values]


@dataclasses.dataclass(frozen=True)
class LatentStatistics:
    """Describe the posterior of clips; lists have a value for each channel, of latents before normalisation."""

    kl: float  # nats per latent value, a mean over channels
    dead: list[int]  # channels whose posterior mean has a variance below DEAD_VARIANCE (inactive units, 1509.00519)
    kl_by_channel: list[float]  # nats per latent value
    std: list[float]  # of the posterior mean over positions and clips
    posterior_std: list[float]  # root of the mean variance of the posterior
    kurtosis: list[float | None]  # of the posterior mean; 3 for a normal distribution, None where it is constant


def latent_statistics(mean_nC: np.ndarray, logvar_nC: np.ndarray) -> LatentStatistics:
    """Describe the posterior by its mean and log variance at n positions."""
    kl_C = np.asarray(kl_to_standard_normal(jnp.asarray(mean_nC), jnp.asarray(logvar_nC)), np.float64).mean(0)
    centred_nC = mean_nC.astype(np.float64) - mean_nC.mean(0, dtype=np.float64)
    variance_C, fourth_C = np.square(centred_nC).mean(0), np.square(np.square(centred_nC)).mean(0)
    return LatentStatistics(
        kl=float(kl_C.mean()),
        dead=np.flatnonzero(variance_C < DEAD_VARIANCE).tolist(),
        kl_by_channel=kl_C.tolist(),
        std=np.sqrt(variance_C).tolist(),
        posterior_std=np.sqrt(np.exp(logvar_nC.astype(np.float64)).mean(0)).tolist(),
        kurtosis=[float(m4 / m2**2) if m2 > 0 else None for m2, m4 in zip(variance_C, fourth_C, strict=True)],
    )
