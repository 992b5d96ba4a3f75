"""Decode any video or picture into uint8 frames; write clips for people.

A clip is looked at on an even grid of moments, so variable and absurd frame rates come out regular; it ends
where the decoder reports damage. A frame is held in full size only until it has been scaled.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from sora_jax.data.fit import FitError, crop_box
from sora_jax.data.tracks import File, MediaError, Track, open_track, reason, usual_period
from sora_jax.errors import UserError
from sora_jax.files import replacing

MAX_CLIP_BYTES = 2**32

Fit = Callable[[int, int], tuple[int, int]]


@dataclass(frozen=True)
class DecodedClip:
    """Frames uint8 (T, H, W, 3), frames a second (1.0 for a picture), and what ended a file used in part."""

    frames: np.ndarray
    fps: float
    note: str = ""


def decode(
    file: File,
    max_frames: int | None = None,
    fps: float | None = None,
    max_fps: float | None = None,
    place: float = 0.0,
    fit: Fit | None = None,
) -> DecodedClip:
    """Decode a part of a video or a picture (one frame; animated GIF, WebP, PNG: several).

    Frames are upright (rotation tags, EXIF), with square pixels, 8 bits, transparency over white. Of a
    longer file `max_frames` are taken, from the start (place=0) to the end (place=1) of its first
    `tracks.MAX_TIMES` frames. `fps` resamples to that rate by holding frames, `max_fps` only slows faster
    files down; a file of variable rate gets its most usual one. `fit` maps the upright (height, width) to
    the size wanted: the frame is scaled to cover it and the rest cropped evenly.

    Raises MediaError for anything that gives no frame.
    """
    try:
        with open_track(file) as track:
            return sample(track, max_frames, fps, max_fps, place, fit)
    except (MediaError, UserError):
        raise
    except FitError as error:
        raise MediaError(str(error)) from error
    except Exception as error:  # decoders raise whatever they like: UnicodeDecodeError, EOFError, ...
        raise MediaError(f"unreadable: {reason(error)}") from error


def sample(
    track: Track,
    max_frames: int | None = None,
    fps: float | None = None,
    max_fps: float | None = None,
    place: float = 0.0,
    fit: Fit | None = None,
) -> DecodedClip:
    """`decode` for an open track."""
    period = usual_period(track.times, track.end)
    rate = fps or min(1 / period, max_fps or np.inf)
    grid = _grid(track, rate, max_frames, place)
    frames, note = [], ""
    try:
        for frame in _hold(track, grid, 0.49 * period, lambda draw: _pixels(*draw(), fit)):
            if frame.nbytes * len(grid) > MAX_CLIP_BYTES:
                raise MediaError(f"too large: {len(grid)} frames of {frame.shape[:2]} at once")
            frames.append(frame)
    except (MediaError, FitError):
        raise
    except Exception as error:
        note = f"damaged: {reason(error)}, after {len(frames)} of {len(grid)} frames"
    if not frames:
        raise MediaError(note or "no frames: none of the file's frames decodes")
    return DecodedClip(np.stack(frames), round(float(rate), 3), note)


def _grid(track: Track, rate: float, max_frames: int | None, place: float) -> np.ndarray:
    """The moments at which the clip is looked at, in seconds."""
    start = track.times[0]
    total = max(1, int((track.end - start) * rate + 0.5))
    count = min(total, max_frames or total)
    return start + (round(place * (total - count)) + np.arange(count)) / rate


def _hold(track: Track, grid: np.ndarray, slack: float, render: Callable) -> Iterator[np.ndarray]:
    """For each moment the frame shown then, drawn once; the last one is held as long as the file says."""
    k, shown, until = 0, None, -np.inf
    for time, draw in track.frames(grid[0]):
        frame = None
        while shown is not None and k < len(grid) and grid[k] < time - slack:
            frame = render(shown) if frame is None else frame
            yield frame
            k += 1
        if k == len(grid):
            return
        shown, until = draw, _next_time(track, time + slack)
    if shown is not None and k < len(grid):
        frame = render(shown)
        yield from (frame for moment in grid[k:] if moment < until - slack)


def _next_time(track: Track, time: float) -> float:
    later = np.searchsorted(track.times, time, side="right")
    return track.times[later] if later < len(track.times) else max(track.end, time)


def _pixels(image: Image.Image, size: tuple[int, int], fit: Fit | None) -> np.ndarray:
    """One resampling from the stored picture to the wanted size, however the pixels were shaped."""
    target = fit(*size) if fit else size
    if (image.height, image.width) != target:
        left, top, right, bottom = crop_box(*size, *target)
        across, down = image.width / size[1], image.height / size[0]
        box = left * across, top * down, right * across, bottom * down
        image = image.resize(target[::-1], Image.Resampling.LANCZOS, box)
    return np.asarray(image)


def write_video(path: str | Path, frames: np.ndarray, fps: float, upscale: int = 1) -> Path:
    """Write uint8 frames (T, H, W, 3) as .mp4 (H.264), .gif, .webp or, where T = 1, .png; returns the path.

    upscale: each pixel becomes a square of that side, for clips too small to watch. An odd side of an mp4
    grows by a copy of its last row or column. The file appears under its name only when it is whole; a full
    disk or an unknown ending is a UserError.
    """
    path = Path(path)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        raise UserError(f"frames of {frames.dtype} {frames.shape} cannot be written: uint8 (T, H, W, 3) can.")
    check_ending(path, len(frames))
    large = frames.repeat(upscale, axis=1).repeat(upscale, axis=2)
    with replacing(path) as temporary:
        WRITERS[path.suffix.lower()](temporary, large, fps)
    return path


def check_ending(path: str | Path, frames: int) -> None:
    """UserError unless a clip of so many frames can be written under this name; to call before making the clip."""
    ending = Path(path).suffix.lower()
    if ending not in WRITERS:
        raise UserError(f"out={path} has an unknown ending: {', '.join(WRITERS)} are allowed.")
    if ending == ".png" and frames != 1:
        raise UserError(f"out={path} holds one frame, the clip has {frames}: use .mp4, .gif or .webp.")


def save_png(path: str | Path, image: np.ndarray) -> Path:
    """Write one uint8 picture (H, W, 3) as PNG."""
    return write_video(Path(path).with_suffix(".png"), image[None], 1.0)


def _write_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    even = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(60000))
        stream.height, stream.width = even.shape[1:3]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "16", "preset": "medium"}
        # Untagged, players guess the matrix from the size, and colours shift between small and large clips.
        stream.codec_context.colorspace, stream.codec_context.color_range = Colorspace.ITU709, ColorRange.MPEG
        for pixels in even:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))
        container.mux(stream.encode())


def _write_animation(path: Path, frames: np.ndarray, fps: float, **options) -> None:
    first, *rest = [Image.fromarray(frame) for frame in frames]
    # Rounded as sums, so that a rate that does not divide 100 (GIF) or 1000 keeps the right duration.
    ticks = np.diff(np.round(np.arange(len(frames) + 1) * 100 / fps)).astype(int) * 10
    first.save(path, save_all=True, append_images=rest, duration=ticks.tolist(), loop=0, **options)


def _write_png(path: Path, frames: np.ndarray, fps: float) -> None:
    Image.fromarray(frames[0]).save(path)


WRITERS = {
    ".mp4": _write_mp4,
    ".gif": _write_animation,
    ".webp": partial(_write_animation, quality=95),
    ".png": _write_png,
}
