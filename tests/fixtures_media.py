"""Small clips made on the spot, and how to tell their frames."""

from fractions import Fraction

import av
import numpy as np

COLOURS = np.array([(230, 40, 40), (40, 200, 60), (50, 70, 230), (240, 220, 40), (200, 60, 200), (30, 200, 210)])


def flat(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frame k is one colour, by which it can be told."""
    colours = COLOURS[np.arange(count) % len(COLOURS)].astype(np.uint8)
    return np.broadcast_to(colours[:, None, None], (count, height, width, 3)).copy()


def noise(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames that differ in every pixel."""
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def quadrants(height: int = 48, width: int = 64) -> np.ndarray:
    """One frame with red, green, blue, yellow corners, clockwise from the top left."""
    frame = np.empty((height, width, 3), np.uint8)
    h, w = height // 2, width // 2
    frame[:h, :w], frame[:h, w:], frame[h:, w:], frame[h:, :w] = COLOURS[:4]
    return frame


def corners(frame: np.ndarray) -> list[int]:
    """Which colour stands in each corner, clockwise from the top left."""
    points = frame[4, 4], frame[4, -5], frame[-5, -5], frame[-5, 4]
    return [int(np.abs(COLOURS - point.astype(int)).sum(1).argmin()) for point in points]


def names(frames: np.ndarray) -> list[int]:
    """The number of each flat frame's colour."""
    middle = frames[:, frames.shape[1] // 2, frames.shape[2] // 2].astype(int)
    return [int(np.abs(COLOURS - pixel).sum(1).argmin()) for pixel in middle]


def encode(path, frames, stamps=None, rate=10, codec="libx264", pix_fmt="yuv444p", sar=None, rotation=None, **options):
    """Write frames with given time stamps (in 1/1000 s)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        stream.options = {"crf": "10", **options} if codec.startswith("lib") else options
        stream.codec_context.time_base = Fraction(1, 1000)
        if sar:
            stream.codec_context.sample_aspect_ratio = sar
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for k, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = int(stamps[k] if stamps is not None else k * 1000 / rate)
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
