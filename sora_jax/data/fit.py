"""Which size and length a clip gets: pure functions of the native size, no pixels but in `fit_frames`.

Length. The autoencoder maps T = 1 + f_t k frames to 1 + k latent frames, so a clip of n frames is given one
of those lengths:

=====  ============================================================================================
cut    the longest 1 + f_t k <= min(n, max_frames); with f_t = 4, 8 frames become 5, 3 become 1
pad    the shortest 1 + f_t k >= n by repeating the last frame; with f_t = 4, 8 become 9, 3 become 5;
       never above the longest 1 + f_t k <= max_frames, to which longer clips are cut
=====  ============================================================================================

A factor that divides n - 1 loses nothing: 8 frames fit f_t = 7 and f_t = 1 as they are. A picture stays a
picture under both rules, and a clip too short for 1 + f_t becomes one when cut.

Size. The aspect ratio stays: a clip is scaled until its area is at most max_pixels (never enlarged), both
sides are multiples of `multiple`, and only what the rounding of the ratio leaves over is cropped, evenly
from both ends of one axis.
"""

from dataclasses import dataclass
from itertools import product
from math import sqrt

import numpy as np

from sora_jax.errors import UserError

LENGTH_RULES = ("cut", "pad")


class FitError(Exception):
    """The clip cannot be given an allowed size; the text says why."""


@dataclass(frozen=True)
class SizeRule:
    """The options of `fit_size`: both sides are multiples of `multiple`, the area is at most `max_pixels`."""

    multiple: int = 16
    max_pixels: int | None = None

    def __post_init__(self):
        if self.multiple < 1:
            raise UserError(f"multiple={self.multiple} is not allowed: a whole number of at least 1 is.")
        if self.max_pixels is not None and self.max_pixels < self.multiple**2:
            raise UserError(
                f"max_pixels={self.max_pixels} is not allowed: with multiple={self.multiple} it is at least"
                f" {self.multiple**2}."
            )

    def __call__(self, height: int, width: int) -> tuple[int, int]:
        return fit_size(height, width, self.multiple, self.max_pixels)


def longest_length(time_factor: int, max_frames: int) -> int:
    """The longest 1 + f_t k that is at most max_frames (at least 1)."""
    return 1 + time_factor * ((max_frames - 1) // time_factor)


def fit_length(frames: int, time_factor: int, max_frames: int | None = None, rule: str = "cut") -> int:
    """The number of frames a clip of `frames` frames gets, by the rule of the table above."""
    if rule not in LENGTH_RULES:
        raise UserError(f"length_rule={rule!r} is not allowed: {' or '.join(LENGTH_RULES)} is.")
    longest = longest_length(time_factor, frames if rule == "cut" else frames + time_factor - 1)
    return longest if max_frames is None else min(longest, longest_length(time_factor, max_frames))


def fit_size(height: int, width: int, multiple: int = 16, max_pixels: int | None = None) -> tuple[int, int]:
    """The (height, width) a clip of the given native size gets.

    Both are multiples of `multiple`, not above the native sides, with an area of at most `max_pixels` (None:
    the native area). Of the sizes next to the exact one, that which crops least is taken, then the largest.
    Raises FitError where there is none.
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
    """Share of the native picture that stays in view when the new size is cut from its middle."""
    ratio = (new_height * width) / (new_width * height)
    return min(ratio, 1 / ratio)


def crop_box(height: int, width: int, new_height: int, new_width: int) -> tuple[float, float, float, float]:
    """The centred (left, top, right, bottom) of the largest part of a picture with the new aspect ratio."""
    scale = max(new_height / height, new_width / width)
    left, top = (width - new_width / scale) / 2, (height - new_height / scale) / 2
    return max(left, 0.0), max(top, 0.0), min(width - left, width), min(height - top, height)


def fit_frames(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale uint8 frames (T, H, W, 3) to cover (height, width) and crop the rest evenly (Lanczos)."""
    from PIL import Image

    if frames.shape[1:3] == tuple(size):
        return frames
    box = crop_box(*frames.shape[1:3], *size)
    lanczos = Image.Resampling.LANCZOS
    return np.stack([np.asarray(Image.fromarray(f).resize(size[::-1], lanczos, box)) for f in frames])


def pad_frames(frames: np.ndarray, length: int) -> np.ndarray:
    """Repeat the last frame until there are `length`."""
    return np.concatenate([frames, np.repeat(frames[-1:], length - len(frames), axis=0)])
