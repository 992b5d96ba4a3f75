"""What is in a video or picture file, and when it is shown: no frame is decoded before it is asked for.

Nothing a file says of itself is believed: rate, number of frames and duration come from the time stamps of
its packets.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

# By name, so that formats which run programs or point to other files (EPS, PDF, WMF) are not tried.
PICTURE_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "AVIF", "TIFF", "BMP", "PPM", "TGA", "ICO", "JPEG2000")
ANIMATED_FORMATS = ("PNG", "GIF", "WEBP", "AVIF")
# FFmpeg draws text files as video and follows lists of other files; neither is a clip.
FOREIGN_CONTAINERS = {"tty", "hls", "dash", "concat", "sdp", "image2", "imf", "lrc", "srt", "webvtt", "ass"}
MAX_FRAME_PIXELS = 2**26
MAX_TIMES = 4096  # frames of a file that are looked at: more than two minutes at 30 frames a second

File = str | Path | BinaryIO
# Draws a frame when it is wanted: the upright picture and the (height, width) it has with square pixels.
Draw = Callable[[], tuple[Image.Image, tuple[int, int]]]


class MediaError(Exception):
    """A file that gives no clip; the text is the reason, its kind before the first colon."""


class CorruptFrame(Exception):
    """The decoder gave a frame and marked it as wrong."""


@dataclass(frozen=True)
class Track:
    """The frames of a file in the order they are shown, before any is decoded.

    times: seconds, ascending; end: when the last one goes; frames(start): pairs (time, draw) from `start` or
    earlier.
    """

    times: np.ndarray
    end: float
    frames: Callable[[float], Iterator[tuple[float, Draw]]]


def usual_period(times: np.ndarray, end: float) -> float:
    """Seconds between frames: the mean of the gaps near the median, unmoved by jitter and pauses."""
    gaps = np.diff(times) if len(times) > 1 else np.array([end - times[0]])
    median = np.median(gaps)
    return float(np.mean(gaps[np.abs(gaps - median) <= 0.5 * median]))


def reason(error: Exception) -> str:
    """An error of a decoder in one line."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return f"{type(error).__name__}, {text}"[:200].rstrip(".")


@contextmanager
def open_track(file: File) -> Iterator[Track]:
    """Pillow for what it knows by content (it composes animations and reads EXIF), PyAV for the rest."""
    try:
        image = Image.open(file, formats=PICTURE_FORMATS)
    except Image.UnidentifiedImageError:
        with _open_video(file) as track:
            yield track
        return
    with image:
        _check_pixels(*image.size)
        yield _picture_track(image)


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_FRAME_PIXELS:
        raise MediaError(f"too large: {width}x{height} pixels a frame, at most {MAX_FRAME_PIXELS} are read")


def _picture_track(image: Image.Image) -> Track:
    moving = image.format in ANIMATED_FORMATS and getattr(image, "is_animated", False)
    if not moving:
        return Track(np.zeros(1), 1.0, lambda start: iter([(0.0, partial(_square, image))]))
    first = int(getattr(image, "default_image", False))  # an APNG's poster is not part of its film
    ends = np.cumsum(_durations(image, first))
    times = np.concatenate([[0.0], ends[:-1]])

    def frames(start: float):
        for i, time in enumerate(times):
            image.seek(first + i)
            yield time, partial(_square, image.copy())

    return Track(times, ends[-1], frames)


def _durations(image: Image.Image, first: int) -> list[float]:
    """Seconds for each frame up to the end or to the first damage."""
    durations = []
    try:
        for index in range(first, min(image.n_frames, first + MAX_TIMES)):
            image.seek(index)
            image.load()
            milliseconds = image.info.get("duration", 0)
            # Browsers show frames of at most 10 ms for 100 ms, and makers of GIFs count on it.
            durations.append(milliseconds / 1000 if milliseconds > 10 else 0.1)
    except Exception as error:
        if not durations:
            raise MediaError(f"damaged: {reason(error)}, in the first frame") from error
    return durations


def _square(image: Image.Image) -> tuple[Image.Image, tuple[int, int]]:
    image = _over_white(ImageOps.exif_transpose(image))
    return image, (image.height, image.width)


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64)
        shallow = deep // 257 if deep.max() > 255 else deep
        return Image.fromarray(shallow.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise MediaError("unreadable: a picture of floating-point numbers has no known white")
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


@contextmanager
def _open_video(file: File) -> Iterator[Track]:
    with _container(file) as container:
        times, end = _packet_times(container, _best_stream(container))
    with _container(file) as container:
        yield Track(times, end, lambda start: _video_frames(container, times, start))


@contextmanager
def _container(file: File):
    import av

    if isinstance(file, str | Path):
        # "file:" keeps a colon in a name from being read as a protocol, the white list a play list off the
        # network.
        file = f"file:{os.fspath(file)}"
    else:
        file.seek(0)
    with av.open(file, options={"protocol_whitelist": "file"}) as container:
        if FOREIGN_CONTAINERS & set(container.format.name.split(",")):
            raise MediaError(f"not a video: FFmpeg reads it as {container.format.name}")
        yield container


def _best_stream(container):
    from av.stream import Disposition

    stream = container.streams.best("video")
    if stream is None or stream.disposition & Disposition.attached_pic:
        raise MediaError("no video: the file has no video stream")
    _check_pixels(stream.codec_context.width, stream.codec_context.height)
    return stream


def _packet_times(container, stream) -> tuple[np.ndarray, float]:
    """When each frame is shown, in seconds, and the end of the last, without decoding any."""
    stamps = []
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            ticks = packet.dts if packet.pts is None else packet.pts
            counted = len(stamps) / _nominal_rate(stream)
            stamps.append(counted if ticks is None else float(ticks * stream.time_base))
        if len(stamps) == MAX_TIMES:
            break
    if not stamps:
        raise MediaError("no frames: the file opens but holds none")
    times = np.unique(stamps)
    last = usual_period(times, times[-1] + 1 / _nominal_rate(stream))
    return times, float(times[-1] + last)


def _nominal_rate(stream) -> float:
    return float(stream.average_rate or 1)


def _video_frames(container, times: np.ndarray, start: float):
    from av.format import Flags

    stream = _best_stream(container)
    # In the first second, decoding from the beginning is cheaper than a seek, and safe in files without an
    # index.
    if start > times[0] + 1 and not container.format.flags & Flags.no_timestamps.value:
        container.seek(int(start / stream.time_base), stream=stream)
    shape = _pixel_shape(stream)
    for index, frame in enumerate(container.decode(stream)):
        if frame.is_corrupt:
            raise CorruptFrame("marked so by the decoder")
        time = times[min(index, len(times) - 1)] if frame.time is None else frame.time
        yield time, partial(_upright, frame, shape)


def _pixel_shape(stream) -> float:
    """Width over height of a pixel; shapes that no camera has are taken for square."""
    shape = float(stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1)
    return shape if 1 / 8 <= shape <= 8 else 1.0


def _upright(frame, shape: float) -> tuple[Image.Image, tuple[int, int]]:
    """The frame as a picture, turned as its rotation tag says (degrees counter-clockwise)."""
    if any(component.is_alpha for component in frame.format.components):
        image = _over_white(Image.fromarray(frame.to_ndarray(format="rgba")))
    else:
        image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    size = image.height, max(1, round(image.width * shape))
    if frame.rotation % 90:
        return image, size
    quarters = frame.rotation // 90 % 4
    turned = image.rotate(90 * quarters, expand=True)
    return turned, size[::-1] if quarters % 2 else size
