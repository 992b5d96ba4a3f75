"""Videos by PyAV: when each frame is shown, and the frames from any moment on.

Nothing a file says of itself is believed: rate, number of frames and duration come from the time stamps of its
packets. A decoder that conceals damage says so in its log; the log is read after every packet, and the first
error in it ends the file.
"""

import os
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from sora_jax.data.reading.damage import check_gif, check_units, heard, length_bytes, listening, signs_of_damage
from sora_jax.data.reading.hdr import HLG, PQ, to_srgb
from sora_jax.data.reading.tracks import (
    MAX_FRAME_PIXELS,
    Damage,
    File,
    Fit,
    MediaError,
    Track,
    check_pixels,
    reason,
    usual_period,
)

# FFmpeg draws text files as video and follows lists of other files; neither is a clip.
FOREIGN_CONTAINERS = {"tty", "hls", "dash", "concat", "sdp", "image2", "imf", "lrc", "srt", "webvtt", "ass"}
# Errors are not to end the decoder: it has to get over references that are missing where it begins in mid-file.
DECODER = {"err_detect": "crccheck+bitstream+buffer", "max_pixels": str(MAX_FRAME_PIXELS)}
MAX_PACKETS = 4_000_000  # 37 hours at 30 frames a second
KEPT_BYTES = 2**25  # of packets, so that a short file is read once
REMEMBERED = 8  # files whose time stamps are kept, so that the spans of a long one read them once


@dataclass(frozen=True)
class Index:
    """What the packets of a stream say: `times` in seconds, ascending, and the `end` of the last.

    keys: ticks of the frames that decode without others, ascending; empty where there are no time stamps to seek by.
    damage: why the file ends where it does.
    """

    times: np.ndarray
    end: float
    keys: np.ndarray
    damage: str = ""


class Reel:
    """An open stream; `packets` are all of it where they are few, `log` grows by what libav complains of."""

    def __init__(self, container, log: list):
        from av.video.reformatter import VideoReformatter

        self.container, self.log, self.heard = container, log, len(log)
        self.stream, self.packets, self.moved, self.size = _best_stream(container), None, False, None
        self.decoder = _decoder(self.stream)
        # Processes decode side by side; and libav's log can be read only in the thread that waits for it.
        self.decoder.thread_count = 1
        self.decoder.options = DECODER
        self.scaler, self.mixer = VideoReformatter(), VideoReformatter()  # they keep their tables
        self.shape = _pixel_shape(self.stream)
        context = self.stream.codec_context
        self.codec = context.codec.canonical_name
        self.prefix = length_bytes(self.codec, context.extradata)

    def complaint(self) -> str:
        """The first error that was not heard before."""
        return heard(self.log, self.heard)

    def demux(self) -> Iterator:
        """The packets from where the container stands to the end; Damage at the first sign of it."""
        self.moved = True
        for packet in self.container.demux(self.stream):
            if self.complaint() or packet.is_corrupt:
                raise Damage(self.complaint() or "a packet is cut short")
            if packet.size:
                yield packet
        if self.complaint():
            raise Damage(self.complaint())

    def packets_from(self, index: Index, ticks: int | None) -> Iterator:
        """The packets from the key frame at `ticks` on, or from the first."""
        if self.packets is None:
            if ticks is not None or self.moved:
                ticks = int(index.times[0] / self.stream.time_base) if ticks is None else ticks
                self.container.seek(ticks, stream=self.stream)
            return self.demux()
        found = (i for i, packet in enumerate(self.packets) if packet.is_keyframe and packet.pts == ticks)
        return iter(self.packets[next(found, 0) :])

    def decode(self, packet) -> list:
        """The frames that the decoder gives for a packet (None: what it still holds); Damage at any sign of it."""
        if packet is not None and self.prefix:
            check_units(self.codec, bytes(packet), self.prefix)
        if packet is not None and self.codec == "gif":
            check_gif(bytes(packet))
        frames = self.decoder.decode(packet)
        if self.complaint():
            raise Damage(self.complaint())
        for frame in frames:
            self.size = self.size or (frame.width, frame.height)
            if frame.is_corrupt:
                raise Damage("a frame marked so by the decoder")
            if self.size != (frame.width, frame.height):
                raise Damage(f"the frames' size changes to {frame.width}x{frame.height}")
        return frames


@contextmanager
def open_video(file: File) -> Iterator[Track]:
    """The best video stream of a file; MediaError where there is none."""
    with listening() as log, ExitStack() as stack:
        reel = stack.enter_context(_open_reel(file, log))
        name = _name(file)
        index = _remembered.get(name)
        if index is None:
            index = _read_index(reel, *signs_of_damage(file, reel.container.format.name))
            _remember(name, index)
            if reel.packets is None:  # the container stands at its end, and not every format can go back
                reel = stack.enter_context(_open_reel(file, log))
        yield Track(index.times, index.end, partial(_frames, reel, index))


_remembered: OrderedDict[tuple, Index] = OrderedDict()


def _name(file: File) -> tuple | None:
    """What tells a file from others and from what it was before."""
    if not isinstance(file, str | Path):
        return None
    status = os.stat(file)
    return os.path.abspath(file), status.st_size, status.st_mtime_ns


def _remember(name: tuple | None, index: Index) -> None:
    if name is not None:
        _remembered[name] = index
        while len(_remembered) > REMEMBERED:
            _remembered.popitem(last=False)


@contextmanager
def _open_reel(file: File, log: list) -> Iterator[Reel]:
    import av

    if isinstance(file, str | Path):
        # "file:" keeps a colon in a name from being read as a protocol, the white list a play list off the network.
        file = f"file:{os.fspath(file)}"
    else:
        file.seek(0)
    options = {"protocol_whitelist": "file", "err_detect": "crccheck"}
    with av.open(file, options=options, metadata_errors="replace") as container:
        if FOREIGN_CONTAINERS & set(container.format.name.split(",")):
            raise MediaError(f"not a video: FFmpeg reads it as {container.format.name}")
        yield Reel(container, log)


def _best_stream(container):
    from av.stream import Disposition

    stream = container.streams.best("video")
    if stream is None or stream.disposition & Disposition.attached_pic:
        raise MediaError("no video: the file has no video stream")
    check_pixels(stream.codec_context.width, stream.codec_context.height)
    return stream


def _decoder(stream):
    """The stream's own; libvpx for VP8 and VP9, as it gives transparency too and sees more of damage."""
    import av

    name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.codec.canonical_name)
    return av.CodecContext.create(name, "r") if name in av.codecs_available else stream.codec_context


def _pixel_shape(stream) -> float:
    """Width over height of a pixel; shapes that no camera has are taken for square."""
    shape = float(stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1)
    return shape if 1 / 8 <= shape <= 8 else 1.0


class _Seen:
    """What is kept of the packets while they are read: time stamps, key frames, and all of a file that is small."""

    def __init__(self, stream):
        self.rate, self.unit = float(stream.average_rate or 1), float(stream.time_base or 1)
        self.stamps, self.keys, self.kept, self.size = array("d"), array("q"), [], 0
        self.stamped, self.last = True, 0.0

    def add(self, packet) -> None:
        self.size += packet.size
        if self.size <= KEPT_BYTES:
            self.kept.append(packet)
        else:
            self.kept.clear()
        if packet.is_discard:
            return
        ticks = packet.dts if packet.pts is None else packet.pts
        self.stamps.append(len(self.stamps) / self.rate if ticks is None else ticks * self.unit)
        self.stamped = self.stamped and packet.pts is not None
        self.last = float((packet.duration or 0) * self.unit)
        if packet.is_keyframe and packet.pts is not None:
            self.keys.append(packet.pts)


def _read_index(reel: Reel, limit: float, damage: str) -> Index:
    """Read every packet once, up to the first damage; the reel keeps them where they are few.

    limit: the place in the file, in bytes, from which on `damage` is known.
    """
    seen, damage = _Seen(reel.stream), damage or heard(reel.log)  # when the file was opened
    try:
        for packet in reel.demux():
            if (packet.pos or 0) >= limit or len(seen.stamps) == MAX_PACKETS:
                break
            seen.add(packet)
    except Exception as error:
        damage = reason(error)
    if not seen.stamps:
        raise MediaError(f"damaged: {damage}" if damage else "no frames: the file opens but holds none")
    reel.packets, times = seen.kept or None, np.unique(seen.stamps)
    period = usual_period(times, times[-1] + 1 / seen.rate)
    # A GIF's last frame may be meant to stand still; elsewhere what is said of the last frame is not to be trusted.
    end = float(times[-1] + (seen.last if reel.codec == "gif" else period))
    if not damage and _promised(reel.stream) > end - times[0] + max(2 * period, 0.1):
        damage = f"it ends after {end - times[0]:.2f} of {_promised(reel.stream):.2f} seconds"
    return Index(times, end, np.sort(seen.keys) if seen.stamped else np.empty(0, np.int64), damage)


def _promised(stream) -> float:
    """The seconds that a video stream's header gives it; 0 where it does not say."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    parts = stream.metadata.get("DURATION", "").split(":")
    try:
        hours, minutes, seconds = (float(part) for part in parts)
    except ValueError:
        return 0.0
    return 3600 * hours + 60 * minutes + seconds


def _frames(reel: Reel, index: Index, start: float) -> Iterator[tuple]:
    """Pairs (time, draw) from the last frame before `start` on."""
    early = np.searchsorted(index.keys * float(reel.stream.time_base), start + 1e-6, side="right")
    # In the first second, decoding from the beginning is cheaper than a seek, and safe in files without an index.
    if start <= index.times[0] + 1 or early == 0:
        yield from _timed(reel, index)
        return
    failure, key = None, int(index.keys[early - 1])
    # Frames after a key frame may be made from frames before it: then decoding begins one or two key frames earlier.
    for ticks in index.keys[max(0, early - 3) : early][::-1].tolist():
        try:
            frames = _timed(reel, index, ticks, key)
            if head := _run_up(frames, start):
                yield from chain(head, frames)
                return
        except Exception as error:
            failure = error
    if failure:
        raise failure
    yield from _timed(reel, index)  # the format's own index leads too far on


def _run_up(frames: Iterator[tuple], start: float) -> list[tuple]:
    """The frame shown at `start` and the next one; none where the first frame comes later."""
    shown = []
    for time, draw in frames:
        if time > start + 1e-6:
            return [*shown, (time, draw)] if shown else []
        shown = [(time, draw)]
    return shown


def _timed(reel: Reel, index: Index, ticks: int | None = None, key: int | None = None) -> Iterator[tuple]:
    unit, last = float(reel.stream.time_base or 1), len(index.times) - 1
    for number, frame in enumerate(_decoded(reel, index, ticks, key)):
        yield index.times[min(number, last)] if frame.pts is None else frame.pts * unit, partial(_draw, reel, frame)


def _decoded(reel: Reel, index: Index, ticks: int | None, key: int | None) -> Iterator:
    """The frames from the key frame at `ticks` on; what is shown before the one at `key` may lack its references."""
    reel.decoder.flush_buffers()
    reel.heard = len(reel.log)
    for packet in reel.packets_from(index, ticks):
        try:
            yield from reel.decode(packet)
        except Exception:
            if key is None or packet.pts >= key:
                raise
            reel.heard = len(reel.log)
    if index.damage:
        raise Damage(index.damage)
    yield from reel.decode(None)


def _draw(reel: Reel, frame, fit: Fit | None) -> np.ndarray:
    """The frame turned as its rotation tag says (degrees counter-clockwise), scaled and cropped."""
    quarters = 0 if frame.rotation % 90 else frame.rotation // 90 % 4
    size = frame.height, max(1, round(frame.width * reel.shape))
    turn = slice(None, None, -1 if quarters % 2 else 1)
    target = fit(*size[turn])[turn] if fit else size
    cover = _cover(size, target)
    top, left = (cover[0] - target[0]) // 2, (cover[1] - target[1]) // 2
    return np.rot90(_rgb(reel, frame, cover)[top : top + target[0], left : left + target[1]], quarters)


def _over_white(frame):
    """An RGB frame from one with transparency. (Scaled before, it would show the colours of transparent parts.)"""
    packed = frame.format.name in ("rgba", "bgra")
    if packed and frame.to_ndarray()[:, :, 3].min() == 255:
        return frame
    image = Image.fromarray(frame.to_ndarray(format="rgba", threads=1))
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return frame.from_image(Image.alpha_composite(white, image).convert("RGB"))


def _cover(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The size in which a picture covers the target, which lies in its exact middle: what is over is even."""
    scale = max(target[0] / size[0], target[1] / size[1])
    return tuple(want + 2 * round((have * scale - want) / 2) for have, want in zip(size, target))


def _rgb(reel: Reel, frame, size: tuple[int, int]) -> np.ndarray:
    """The frame in sRGB, scaled to (height, width)."""
    from av.video.reformatter import ColorRange, Interpolation

    if any(component.is_alpha for component in frame.format.components):
        frame = _over_white(frame)
    # Planes are scaled before they are mixed: faster than to mix them at full size, and more exact.
    options = dict(interpolation=Interpolation.BICUBIC, threads=1)
    if frame.format.is_rgb:
        scaled = (frame.height, frame.width) != size
        options["interpolation"] |= Interpolation.FULL_CHR_H_INP  # else every second column gives the colour of two
        return reel.scaler.reformat(frame, size[1], size[0], "gbrp" if scaled else "rgb24", **options).to_ndarray()
    high = frame.color_trc in (PQ, HLG)
    colours = dict(src_colorspace=_matrix(frame), src_color_range=_range(frame))
    same = dict(dst_colorspace=_matrix(frame), dst_color_range=_range(frame))
    planes = "yuv444p16le" if high else "yuv444p"
    frame = reel.scaler.reformat(frame, size[1], size[0], planes, **colours, **same, **options)
    mixed = "rgb48le" if high else "rgb24"
    pixels = reel.mixer.reformat(
        frame, format=mixed, dst_color_range=ColorRange.JPEG, **colours, **options
    ).to_ndarray()
    return to_srgb(pixels, frame.color_trc) if high else pixels


def _matrix(frame):
    """The matrix of the frame's tag; untagged, what players guess (mpv: BT.709 for high definition, BT.601 below)."""
    from av.video.reformatter import Colorspace

    guess = Colorspace.ITU709 if frame.width >= 1280 or frame.height > 576 else Colorspace.ITU601
    tags = {1: "ITU709", 4: "FCC", 5: "ITU601", 6: "ITU601", 7: "SMPTE240M", 9: "BT2020", 10: "BT2020"}  # AVCOL_SPC_
    return Colorspace[tags[frame.colorspace]] if frame.colorspace in tags else guess


def _range(frame):
    from av.video.reformatter import ColorRange

    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    return ColorRange.JPEG if full else ColorRange.MPEG
