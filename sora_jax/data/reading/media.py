"""Decode any video or picture into uint8 frames.

A clip is sampled on an even grid of moments, so variable and absurd frame rates come out regular; it ends where the
decoder reports damage. A frame is held in full size only until it has been scaled.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from PIL import Image, UnidentifiedImageError

from sora_jax.data.fit import FitError
from sora_jax.data.reading.cuts import cut_moments, longest_run, small_size
from sora_jax.data.reading.pictures import open_picture, scaled
from sora_jax.data.reading.tracks import Draw, Fit, FrameSource, Input, MediaError, as_media_error, reason, usual_period
from sora_jax.data.reading.videos import open_video

MAX_CLIP_BYTES = 2**32
MAX_CLIP_FRAMES = 2**22
REPEATS = 1.5  # times the file's own rate: above, many frames are shown twice

# Upright (height, width) of a clip and its number of frames -> the (height, width) wanted.
FitClip = Callable[[int, int, int], tuple[int, int]]


@dataclass(frozen=True)
class SpanRule:
    """Selects which part of a file becomes its clip `number` (of at most `count`), and at what rate.

    The file is cut into as many equal stretches as spans of `max_frames` fit into it, at most `count`, at least one;
    span `number` lies in its stretch.
    """

    max_frames: int | None = None  # None: the whole file is the one span
    fps: float | None = None  # resample to this rate by holding or leaving out frames; None: the file's usual rate
    max_fps: float | None = None  # slow faster files down to this rate
    place: float = 0.0  # of the span in its stretch, from the start (0) to the end (1)
    number: int = 0
    count: int = 1
    cuts: bool = False  # keep only the longest run of frames without a scene cut


@dataclass(frozen=True)
class DecodedClip:
    """Holds a decoded clip."""

    frames: np.ndarray  # uint8 (T, H, W, 3)
    fps: float  # 1.0 for a picture
    start: float = 0.0  # seconds in the file at which the first frame is shown
    flags: tuple[str, ...] = ()  # what a user should know: "partial: ..." of a file used up to its damage


@as_media_error()
def decode(file: Input, rule: SpanRule = SpanRule(), fit: FitClip | None = None) -> DecodedClip | None:
    """Decode a part of a video or a picture (one frame; animated GIF, WebP, PNG: several).

    Frames are upright (display matrix, EXIF), progressive, with square pixels, in sRGB of 8 bits, transparency over
    white.

    Args:
        file: a path or an open binary file.
        rule: which part.
        fit: maps the upright (height, width) and the number of frames to the size wanted: a frame is scaled to cover
            it and the rest cropped evenly.

    Returns:
        The clip; None if the file has no span of this number.

    Raises:
        MediaError: the file gives no frame.
    """
    with ExitStack() as stack:
        try:
            source = stack.enter_context(open_picture(file))
        except UnidentifiedImageError:
            source = stack.enter_context(open_video(file))
        return sample(source, rule, fit)


@as_media_error()
def sample_frames(
    frames: np.ndarray, fps: float, rule: SpanRule = SpanRule(), fit: FitClip | None = None
) -> DecodedClip | None:
    """Sample frames in memory, uint8 (T, H, W, 3) at `fps` frames a second, as `decode` samples a file."""

    def draw(k: int, fit: Fit | None) -> np.ndarray:
        return np.asarray(scaled(Image.fromarray(frames[k]), frames.shape[1:3], fit))

    times = np.arange(len(frames)) / fps
    draws = [(time, partial(draw, k)) for k, time in enumerate(times)]
    return sample(FrameSource(times, len(frames) / fps, lambda start: iter(draws)), rule, fit)


def sample(source: FrameSource, rule: SpanRule = SpanRule(), fit: FitClip | None = None) -> DecodedClip | None:
    """Sample an open file, as `decode` does."""
    period = usual_period(source.times, source.end)
    if len(source.times) == 1:
        rule = replace(rule, fps=None)  # a picture stays a picture
    rate = float(rule.fps or min(1 / period, rule.max_fps or np.inf))
    grid = _grid(source, rate, rule)
    if grid is None:
        return None
    slack = 0.49 * period
    grid, flags = _without_cuts(source, grid, slack) if rule.cuts and len(grid) > 1 else (grid, ())
    frames, damage = _drawn(source, grid, slack, fit and (lambda height, width: fit(height, width, len(grid))))
    flags += tuple(source.flags)
    if rule.fps and len(grid) > 1 and rule.fps * period > REPEATS:
        flags += (f"repeated: {1 / period:.3g} frames a second are shown at {rule.fps:g}",)
    if damage:
        flags += (f"partial: damaged: {damage}, after {len(frames)} of {len(grid)} frames",)
    fps = round(rate, 3) if rate >= 1 else float(f"{rate:.6g}")  # one frame an hour is not none
    return DecodedClip(np.stack(frames), fps, round(float(grid[0] - source.times[0]), 6), flags)


def _grid(source: FrameSource, rate: float, rule: SpanRule) -> np.ndarray | None:
    """Return the moments at which span `rule.number` is sampled, in seconds; None if the file has no such span."""
    total = max(1, int((source.end - source.times[0]) * rate + 0.5))
    spans = max(1, min(rule.count, total // (rule.max_frames or total)))
    if rule.number >= spans:
        return None
    low, high = rule.number * total // spans, (rule.number + 1) * total // spans
    length = min(high - low, rule.max_frames or total)
    if length > MAX_CLIP_FRAMES:
        raise MediaError(f"too large: {length} frames at once")
    return source.times[0] + (low + round(rule.place * (high - low - length)) + np.arange(length)) / rate


def _without_cuts(source: FrameSource, grid: np.ndarray, slack: float) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the longest part of the grid without a scene cut, and the flag that says so."""
    moments = cut_moments(_small_frames(source, grid, slack))
    inner = [moment for moment in moments if grid[0] + slack < moment <= grid[-1] + slack]
    if not inner:
        return grid, ()
    part = longest_run(grid, inner, slack)
    seconds = ", ".join(f"{moment - source.times[0]:.2f}" for moment in inner[:5]) + ", ..." * (len(inner) > 5)
    return grid[part], (f"cut: at {seconds} s, {part.stop - part.start} of {len(grid)} frames are kept",)


def _small_frames(source: FrameSource, grid: np.ndarray, slack: float) -> Iterator[tuple[float, np.ndarray]]:
    """Yield every frame of the file within the grid, small, up to the first damage."""
    try:
        for time, until, draw in _shown(source, grid, slack):
            if until > grid[0] - slack:
                yield time, draw(small_size)
    except Exception:
        return


def _drawn(source: FrameSource, grid: np.ndarray, slack: float, fit: Fit | None) -> tuple[list[np.ndarray], str]:
    """Return the frames at the grid's moments up to the first damage, at least one, and what that was."""
    frames, damage = list[np.ndarray](), ""
    try:
        for _, until, draw in _shown(source, grid, slack):
            if count := int(np.searchsorted(grid, until - slack)) - len(frames):
                frame = draw(fit)
                if frame.nbytes * len(grid) > MAX_CLIP_BYTES:
                    raise MediaError(f"too large: {len(grid)} frames of {frame.shape[:2]} at once")
                frames += [frame] * count
    except (MediaError, FitError):
        raise
    except Exception as error:
        damage = reason(error)
    if not frames:
        raise MediaError(f"damaged: {damage}" if damage else "no frames: none of the file's frames decodes")
    return frames, damage


def _shown(source: FrameSource, grid: np.ndarray, slack: float) -> Iterator[tuple[float, float, Draw]]:
    """Yield the frames up to the last moment of the grid: from and until when each is shown, in seconds, and its draw.

    Damage is raised after the frame before it, which is shown until the next one was to come.
    """
    last, failure = None, None
    try:
        for time, draw in source.frames(grid[0]):
            if last:
                yield last[0], time, last[1]
            if time > grid[-1] + slack:
                return
            last = time, draw
    except Exception as error:
        failure = error
    if last:
        later = np.searchsorted(source.times, last[0] + slack, side="right")
        yield last[0], source.times[later] if later < len(source.times) else max(source.end, last[0] + slack), last[1]
    if failure:
        raise failure
