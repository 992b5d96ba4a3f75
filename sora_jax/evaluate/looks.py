"""Measure the look of a clip over time without knowing what it shows: consistency, flicker, smoothness and motion.

The axes are those of VBench (Huang et al. 2024, 2311.17982), computed without networks: features are histograms where
VBench takes DINO and CLIP, and motion comes from matching small windows where it takes RAFT and AMT. So the values
compare clips with each other, not with published ones. Clips that stand still score high in all but motion.
"""

import dataclasses

import numpy as np
from scipy.ndimage import uniform_filter

from sora_jax.worlds.oracle.backdrop import mean_light

COLOUR_BINS = 8  # bins of each colour channel
DIRECTION_BINS = 8  # bins of the direction of a gradient
SIDE = 64  # pixels; motion is measured on frames whose shorter side is pooled to less than twice this
SEARCH_RADIUS = 6  # pixels of such a frame: the largest displacement that is looked for
WINDOW = 5  # pixels: side of the window that is matched
STILL = 2.0  # grey levels by which a displacement must match better than none
EXPLAINED = 0.5  # share of the difference at the same place that a displacement leaves at most
FASTEST = 0.05  # share of the pixels of a frame whose displacement counts: the fastest
DYNAMIC = 6 / 256  # in short sides: displacement from which a pair of frames counts as moving


@dataclasses.dataclass(frozen=True)
class Looks:
    """Report one clip; NaN where it has no such pixels or too few frames."""

    subject: float  # consistency of the subject in [0, 1]: mean of the similarities to previous and to first frame
    background: float  # the same of the background
    flicker: float  # 1 - mean absolute difference of adjacent frames / 255, over the background
    smoothness: float  # 1 - mean absolute error / 255 of every second frame, interpolated from its neighbours
    motion: float  # displacement from frame to frame of the fastest 5 % of the pixels, in short sides, mean over pairs
    dynamic: float  # 1 for a clip that moves (see `is_dynamic`), else 0; the dynamic degree is its mean over clips


def looks(clip: np.ndarray, subject_THW: np.ndarray | None = None, background_THW: np.ndarray | None = None) -> Looks:
    """Measure a uint8 clip (T, H, W, 3) of at least two frames; the masks say where subject and background are.

    Without a mask the whole frame counts.
    """
    whole = np.ones(clip.shape[:3], bool)
    subject_THW = whole if subject_THW is None else subject_THW
    background_THW = whole if background_THW is None else background_THW
    frames = clip.astype(np.float32)
    small = _pooled(frames)
    speeds = _speeds(small[:-1], small[1:])
    return Looks(
        subject=consistency(frames, subject_THW),
        background=consistency(frames, background_THW),
        flicker=flicker(frames, background_THW),
        smoothness=_smoothness(small),
        motion=float(np.mean(speeds)),
        dynamic=float(is_dynamic(speeds)),
    )


def consistency(frames: np.ndarray, mask_THW: np.ndarray) -> float:
    """Return the mean over later frames of (similarity to the previous + similarity to the first) / 2.

    Similarity is the cosine of features; 0 for a frame without such pixels. NaN if the first frame has none.
    """
    if not mask_THW[0].any():
        return float("nan")
    found_TF = features(frames, mask_THW)
    previous, first = (found_TF[1:] * found_TF[:-1]).sum(1), found_TF[1:] @ found_TF[0]
    return float(((previous + first) / 2).mean())


def features(frames: np.ndarray, mask_THW: np.ndarray) -> np.ndarray:
    """Return features (T, 3 COLOUR_BINS + DIRECTION_BINS) of length 1 of the pixels in the mask, wherever they are.

    Without any they are 0. They are the histograms of the three colours, and that of the directions of gradients
    weighted by their strength.
    """
    found = [np.concatenate([_colours(f[m]), _gradients(f, m)]) for f, m in zip(frames, mask_THW, strict=True)]
    found_TF = np.stack(found)
    return found_TF / np.maximum(np.linalg.norm(found_TF, axis=1, keepdims=True), 1e-9)


def _colours(pixels_n3: np.ndarray) -> np.ndarray:
    """Return histograms (3 COLOUR_BINS,) of the channels, each of sum 1; a value between two bins counts in both."""
    place = pixels_n3 / 255 * (COLOUR_BINS - 1)
    low = np.minimum(place.astype(int), COLOUR_BINS - 2)
    high_share = place - low
    counts = np.zeros((3, COLOUR_BINS))
    for channel, count in enumerate(counts):
        bins, share = low[:, channel], high_share[:, channel]
        count += np.bincount(bins, 1 - share, COLOUR_BINS) + np.bincount(bins + 1, share, COLOUR_BINS)
    return counts.ravel() / max(len(pixels_n3), 1)


def _gradients(frame: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """Return the histogram (DIRECTION_BINS,) of the directions of gradients, of sum 1 or 0."""
    down, right = np.gradient(frame.mean(-1))
    strength = np.hypot(down, right)[mask_HW]
    place = np.arctan2(down, right)[mask_HW] / (2 * np.pi) * DIRECTION_BINS
    low = np.floor(place).astype(int)
    share = place - low
    counts = np.bincount(low % DIRECTION_BINS, strength * (1 - share), DIRECTION_BINS)
    counts = counts + np.bincount((low + 1) % DIRECTION_BINS, strength * share, DIRECTION_BINS)
    return counts / max(counts.sum(), 1e-9)


def flicker(frames: np.ndarray, mask_THW: np.ndarray) -> float:
    """Return 1 - mean |x_t - x_{t-1}| / 255 over the pixels that are in the mask in both frames; NaN without any."""
    both = mask_THW[1:] & mask_THW[:-1]
    changes = np.abs(np.diff(frames, axis=0))[both]
    return float(1 - changes.mean() / 255) if changes.size else float("nan")


def is_dynamic(speeds: np.ndarray) -> bool:
    """Return True if a quarter of the pairs of frames moves faster than DYNAMIC (VBench: 4 pairs of 16)."""
    return bool((speeds > DYNAMIC).sum() >= max(round(len(speeds) / 4), 1))


def _pooled(frames: np.ndarray) -> np.ndarray:
    """Average squares of pixels so that the shorter side is from SIDE to less than twice that; small frames stay."""
    step = max(min(frames.shape[1:3]) // SIDE, 1)
    T, H, W, _ = frames.shape
    cut = frames[:, : H - H % step, : W - W % step]
    return cut.reshape(T, H // step, step, W // step, step, 3).mean((2, 4))


def _displacements() -> list[tuple[int, int]]:
    """List all displacements (down, right), the shortest first."""
    sides = range(-SEARCH_RADIUS, SEARCH_RADIUS + 1)
    return sorted(((y, x) for y in sides for x in sides), key=lambda move: move[0] ** 2 + move[1] ** 2)


def _moved(frames: np.ndarray, down: int, right: int) -> np.ndarray:
    """Return frames (n, H, W, 3) at (y + down, x + right), with the border repeated beyond it."""
    H, W = frames.shape[1:3]
    rows, columns = np.clip(np.arange(H) + down, 0, H - 1), np.clip(np.arange(W) + right, 0, W - 1)
    return frames[:, rows[:, None], columns]


def _cost(one: np.ndarray, other: np.ndarray, moves: bool) -> np.ndarray:
    """Return the difference of frames in the window around each pixel (n, H, W), grey levels; more if one moves."""
    difference = mean_light(np.abs(one - other))
    return uniform_filter(difference, WINDOW, mode="nearest", axes=(1, 2)) + STILL * moves


def _speeds(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the mean displacement (n,), in short sides, of the fastest pixels between pairs of frames (n, H, W, 3)."""
    n, H, W, _ = one.shape
    # What is uncovered or enters the frame matches nothing: only a displacement that explains the change counts.
    best_nHW, distance_nHW = EXPLAINED * _cost(one, other, False), np.zeros((n, H, W))
    for down, right in _displacements():
        cost_nHW = _cost(one, _moved(other, down, right), bool(down or right))
        distance_nHW[cost_nHW < best_nHW] = np.hypot(down, right)
        best_nHW = np.minimum(cost_nHW, best_nHW)
    count = max(round(FASTEST * H * W), 1)
    return np.sort(distance_nHW.reshape(n, -1), axis=1)[:, -count:].mean(1) / min(H, W)


def _smoothness(frames: np.ndarray) -> float:
    """Return 1 - the mean absolute error / 255 of the odd frames that have two neighbours; NaN without one."""
    dropped = frames[1:-1:2]
    if not len(dropped):
        return float("nan")
    made = interpolate(frames[:-2:2], frames[2::2])
    return float(1 - np.abs(dropped - made).mean() / 255)


def interpolate(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return the frames (n, H, W, 3) half-way between two, each pixel from where the windows around it match best."""
    best_nHW, middle = np.full(before.shape[:3], np.inf), np.zeros_like(before)
    for down, right in _displacements():
        one, other = _moved(before, -down, -right), _moved(after, down, right)
        cost_nHW = _cost(one, other, bool(down or right))
        better_nHW = cost_nHW < best_nHW
        middle[better_nHW] = (one[better_nHW] + other[better_nHW]) / 2
        best_nHW = np.minimum(cost_nHW, best_nHW)
    return middle
