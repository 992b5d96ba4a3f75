"""The frames of a file before they are drawn, and how a file can fail: shared by `pictures`, `videos` and `media`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

MAX_FRAME_PIXELS = 2**26

File = str | Path | BinaryIO
Fit = Callable[[int, int], tuple[int, int]]
# Draws a frame when it is wanted: upright, with square pixels, uint8 (height, width, 3), of the size that `fit` gives.
Draw = Callable[[Fit | None], np.ndarray]


class MediaError(Exception):
    """Refusal of a file that gives no clip; the text is the reason, its kind before the first colon."""


class Damage(Exception):
    """First sign that what follows in the file is not what was written."""


@dataclass(frozen=True)
class FrameSource:
    """The frames of a file in the order of presentation, before any is decoded.

    Attributes:
        times: seconds, ascending.
        end: seconds at which the last frame goes.
        frames: maps a time to pairs (seconds, draw) of the frames from then, or from earlier, on. The iterator raises
            Damage or the decoder's own error where the file is damaged.
        flags: what a user should know of the file; grows while frames are read.
    """

    times: np.ndarray
    end: float
    frames: Callable[[float], Iterator[tuple[float, Draw]]]
    flags: list[str] = field(default_factory=list)


def usual_period(times: np.ndarray, end: float) -> float:
    """Return the seconds between frames: the mean of the gaps near the median, unmoved by jitter and pauses."""
    gaps = np.diff(times) if len(times) > 1 else np.array([end - times[0]])
    median = np.median(gaps)
    return float(np.mean(gaps[np.abs(gaps - median) <= 0.5 * median]))


def reason(error: Exception) -> str:
    """Return an error of a decoder as one line."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())[:200].rstrip(".")
    return text if isinstance(error, Damage) else f"{type(error).__name__}, {text}".rstrip(", ")


def check_pixels(width: int, height: int) -> None:
    """Raise MediaError for frames that no clip needs and that would fill the memory."""
    if width * height > MAX_FRAME_PIXELS:
        raise MediaError(f"too large: {width}x{height} pixels a frame, at most {MAX_FRAME_PIXELS} are read")
