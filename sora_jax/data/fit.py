"""Compute the size and the length of a clip from its native ones; only `fit_frames` and `pad_frames` see pixels.

Length. The autoencoder maps T = 1 + f_t k frames to 1 + k latent frames, so a clip of n frames is given one
of those lengths:

=====  ============================================================================================
cut    the longest 1 + f_t k <= min(n, max_frames); with f_t = 4, 8 frames become 5, 3 become 1
pad    the shortest 1 + f_t k >= n by repeating the last frame; with f_t = 4, 8 become 9, 3 become 5;
       never above the longest 1 + f_t k <= max_frames, to which longer clips are cut
=====  ============================================================================================

A factor that divides n - 1 loses nothing: 8 frames fit f_t = 7 and f_t = 1 as they are. A picture stays a
picture under both rules, and a clip too short for 1 + f_t becomes one when cut.

Size. The aspect ratio stays: a clip is scaled until its area is at most what the rule allows (never enlarged), both
sides are multiples of `multiple`, and only what the rounding of the ratio leaves over is cropped, evenly from both ends
of one axis. The area is bounded by max_pixels, by the tokens that one clip may have, and, where sizes are drawn at
random for each variant of a clip, by that draw.
"""

from dataclasses import dataclass
from itertools import product
from math import sqrt

import numpy as np
from scipy.special import ndtr, ndtri

from sora_jax.config import check_option, check_word

LENGTH_RULES = ("cut", "pad")
RESOLUTIONS = ("largest", "uniform", "navit")
FRAMINGS = ("native", "square")
MAX_PIXELS = 2**40


class FitError(Exception):
    """Report that no size is allowed for a clip, and why."""


@dataclass(frozen=True)
class SizeRule:
    """Return the (height, width) of a clip when called with its native size and length.

    `resolution` "largest" takes the largest size that is allowed. "uniform" and "navit" draw the side of the square of
    equal area between the square roots of min_pixels and of the largest area: from the uniform distribution, or from
    the truncated normal N(-1/2, 1) on [-1, 1], which prefers small sizes (NaViT, 2307.06304, section 3.4).
    """

    multiple: int = 16  # both sides are multiples of it
    max_pixels: int | None = None  # largest height x width
    max_tokens: int | None = None  # most tokens of a clip: a picture may be larger than a video
    time_factor: int = 4  # a token has this many frames of multiple x multiple pixels
    resolution: str = "largest"  # largest, uniform or navit
    min_pixels: int | None = None  # smallest height x width that is drawn (default: four multiples a side)
    framing: str = "native"  # keep the aspect ratio, or crop to a "square" (to measure what that costs)

    def __post_init__(self):
        check_option(self.multiple >= 1, "multiple", self.multiple, "at least 1")
        square, most = self.multiple**2, self.max_tokens
        for name in ("max_pixels", "min_pixels"):
            value = getattr(self, name)
            check_option(value is None or value >= square, name, value, f"at least multiple^2 = {square}")
        check_option(most is None or most >= 1, "max_tokens", most, "at least 1")
        check_word("--resolution", self.resolution, RESOLUTIONS)
        check_word("--framing", self.framing, FRAMINGS)

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Count the tokens of a clip of 1 + f_t k frames."""
        return (1 + (frames - 1) // self.time_factor) * (height // self.multiple) * (width // self.multiple)

    def __call__(self, height: int, width: int, frames: int = 1, draw: float = 1.0) -> tuple[int, int]:
        """Return the (height, width) of a clip of this native size and length; `draw` in [0, 1) is for random sizes.

        Raises FitError if no size is allowed.
        """
        area = min(self._most(frames), height * width)
        if self.resolution != "largest":
            area = self._drawn(area, draw)
        if self.framing == "square":
            height = width = min(height, width)
        return fit_size(height, width, self.multiple, area if area < height * width else None)

    def _most(self, frames: int) -> int:
        """Return the largest number of pixels for each frame of a clip of this length."""
        most = self.max_pixels or MAX_PIXELS
        if self.max_tokens is None:
            return most
        time = 1 + (frames - 1) // self.time_factor
        if time > self.max_tokens:
            raise FitError(
                f"too long: {frames} frames have at least {time} tokens, --max-tokens is {self.max_tokens}; at most "
                f"{1 + self.time_factor * (self.max_tokens - 1)} frames of {self.multiple}x{self.multiple} would fit"
            )
        return min(most, self.max_tokens // time * self.multiple**2)

    def _drawn(self, area: int, draw: float) -> int:
        least = min(self.min_pixels or (4 * self.multiple) ** 2, area)
        if self.resolution == "navit":
            low, high = ndtr(-0.5), ndtr(1.5)  # N(-1/2, 1) cut to [-1, 1]
            draw = 0.5 * (float(ndtri(low + draw * (high - low))) - 0.5 + 1)
        return max(int((sqrt(least) + draw * (sqrt(area) - sqrt(least))) ** 2), least)


def longest_length(time_factor: int, max_frames: int) -> int:
    """Return the longest 1 + f_t k that is at most max_frames (at least 1)."""
    return 1 + time_factor * ((max_frames - 1) // time_factor)


def fit_length(frames: int, time_factor: int, max_frames: int | None = None, rule: str = "cut") -> int:
    """Return the number of frames that a clip of `frames` frames gets, by the rule of the table above."""
    check_word("--length-rule", rule, LENGTH_RULES)
    longest = longest_length(time_factor, frames if rule == "cut" else frames + time_factor - 1)
    return longest if max_frames is None else min(longest, longest_length(time_factor, max_frames))


def fit_size(height: int, width: int, multiple: int = 16, max_pixels: int | None = None) -> tuple[int, int]:
    """Return the (height, width) of a clip of this native size.

    Both are multiples of `multiple`, not above the native sides, with an area of at most `max_pixels` (None:
    the native area). Of the sizes next to the exact one, that which crops least is taken, then the largest.
    Raises FitError if no size is allowed.
    """
    area = height * width
    shrink = min(1.0, sqrt((max_pixels or area) / area))
    sizes = product(_neighbours(height, shrink, multiple), _neighbours(width, shrink, multiple))
    allowed = [size for size in sizes if size[0] * size[1] <= (max_pixels or area)]
    if not allowed:
        limit = "" if max_pixels is None else f" of at most {max_pixels} pixels"
        raise FitError(f"no allowed size: {width}x{height} gives no sides in multiples of {multiple}{limit}")
    return max(allowed, key=lambda size: (round(_kept(height, width, *size), 6), size[0] * size[1]))


def _neighbours(side: int, shrink: float, multiple: int) -> list[int]:
    below = int(side * shrink + 1e-6) // multiple * multiple
    return [n for n in (below, below + multiple) if 0 < n <= side]


def _kept(height: int, width: int, new_height: int, new_width: int) -> float:
    """Return the share of the native picture that stays in view when the new size is cut from its middle."""
    ratio = (new_height * width) / (new_width * height)
    return min(ratio, 1 / ratio)


def crop_box(height: int, width: int, new_height: int, new_width: int) -> tuple[float, float, float, float]:
    """Return the centred (left, top, right, bottom) of the largest part of a picture with the new aspect ratio."""
    scale = max(new_height / height, new_width / width)
    left, top = (width - new_width / scale) / 2, (height - new_height / scale) / 2
    return max(left, 0.0), max(top, 0.0), min(width - left, width), min(height - top, height)


def shrink(frames: np.ndarray, factor: int) -> np.ndarray:
    """Return frames uint8 (T, H, W, 3) of which each pixel is the mean of a square of `factor` x `factor` pixels."""
    if factor == 1:
        return frames
    length, height, width = len(frames), *(side // factor for side in frames.shape[1:3])
    squares = frames[:, : height * factor, : width * factor].reshape(length, height, factor, width, factor, 3)
    return squares.mean((2, 4)).round().astype(np.uint8)


def fit_frames(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale uint8 frames (T, H, W, 3) to cover (height, width) and crop the rest evenly (Lanczos)."""
    from PIL import Image

    if frames.shape[1:3] == tuple(size):
        return frames
    box = crop_box(frames.shape[1], frames.shape[2], *size)
    lanczos = Image.Resampling.LANCZOS
    return np.stack([np.asarray(Image.fromarray(f).resize(size[::-1], lanczos, box)) for f in frames])


def pad_frames(frames: np.ndarray, length: int) -> np.ndarray:
    """Repeat the last frame until there are `length`."""
    return np.concatenate([frames, np.repeat(frames[-1:], length - len(frames), axis=0)])
