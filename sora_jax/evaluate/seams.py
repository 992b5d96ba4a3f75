"""Measure seams of clips: how much the picture changes where parts were joined, against what it changes elsewhere.

The change between two frames is the mean absolute difference of levels, over pixels and colours, after a blur over
3 x 3 pixels. A seam ratio is the change at the join over the median change of the other neighbours: 1 where the join is
like any other pair.
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import uniform_filter

STILL = 0.5  # of 255 levels: a clip whose median change is below has no ratio


@dataclass(frozen=True)
class Seam:
    """Report a join; NaN for a clip that hardly moves."""

    ratio: float  # change at the join over the median change elsewhere
    quarter: float  # the largest of the four ratios of the quarters of the picture that move
    jolt: float  # change of velocity at the join over its median elsewhere
    motion: float  # median change elsewhere, of 255 levels


def seam(clip: np.ndarray, join: int) -> Seam:
    """Measure the join before frame `join` of a uint8 clip (T, H, W, 3), 0 < join < T."""
    return _seam(_blurred(clip), join - 1)


def closure(clip: np.ndarray) -> Seam:
    """Measure the join of a loop: from the last frame of a uint8 clip (T, H, W, 3) to its first."""
    frames = _blurred(clip)
    return _seam(np.concatenate([frames, frames[:2]]), len(frames) - 1)


def _blurred(clip: np.ndarray) -> np.ndarray:
    return uniform_filter(clip.astype(np.float32), (0, 3, 3, 0))


def _seam(frames: np.ndarray, at: int) -> Seam:
    steps = np.abs(np.diff(frames, axis=0))
    jolts = np.abs(np.diff(frames, 2, axis=0)).mean((1, 2, 3))
    ratio, motion = _ratio(steps.mean((1, 2, 3)), [at])
    middle = steps.shape[1] // 2, steps.shape[2] // 2
    rows, columns = (slice(None, middle[0]), slice(middle[0], None)), (slice(None, middle[1]), slice(middle[1], None))
    quarters = [_ratio(steps[:, y, x].mean((1, 2, 3)), [at])[0] for y in rows for x in columns]
    moving = [quarter for quarter in quarters if not np.isnan(quarter)]
    return Seam(ratio, max(moving, default=np.nan), _ratio(jolts, [at - 1, at], 0.0)[0], motion)


def _ratio(changes: np.ndarray, joins: list[int], least: float = STILL) -> tuple[float, float]:
    """Return the largest change at the joins over the median of the others, and that median."""
    inside = np.delete(changes, [join for join in joins if 0 <= join < len(changes)])
    there = [changes[join] for join in joins if 0 <= join < len(changes)]
    usual = float(np.median(inside)) if len(inside) else 0.0
    return (float(max(there)) / usual if there and usual > least else float("nan")), usual
