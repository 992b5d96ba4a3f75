"""The frames of a file before they are drawn, and how a file can fail: shared by `pictures`, `videos` and `media`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sora_jax.data.fit import FitError
from sora_jax.errors import UserError

MAX_FRAME_PIXELS = 2**26

Input = str | Path | BinaryIO
Fit = Callable[[int, int], tuple[int, int]]
# Draws a frame when it is wanted: upright, with square pixels, uint8 (height, width, 3), of the size that `fit` gives.
Draw = Callable[[Fit | None], np.ndarray]


class MediaError(Exception):
    """Refuses a file that gives no clip; the text is the reason, its kind before the first colon."""


class Damage(Exception):
    """Reports the first sign that what follows in the file is not what was written."""


@dataclass(frozen=True)
class FrameSource:
    """Holds the frames of a file in the order of presentation, before any is decoded.

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
    """Return an error of a decoder as one line, by its class where its text is no sentence."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())[:200].rstrip(".")
    return text if " " in text or isinstance(error, Damage) else f"{type(error).__name__}, {text}".rstrip(", ")


@contextmanager
def as_media_error() -> Iterator[None]:
    """Convert the errors of decoders and archives, which may be of any type, to a MediaError."""
    try:
        yield
    except (MediaError, UserError):
        raise
    except FitError as error:
        raise MediaError(str(error)) from error
    except Exception as error:
        raise MediaError(f"unreadable: {reason(error)}") from error


def check_pixels(width: int, height: int) -> None:
    """Raise MediaError for frames that no clip needs and that would fill the memory."""
    if width * height > MAX_FRAME_PIXELS:
        raise MediaError(f"too large: {width}x{height} pixels a frame, at most {MAX_FRAME_PIXELS} are read")
