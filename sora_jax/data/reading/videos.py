"""Videos by PyAV: when each frame is shown, and the frames from any moment on.

The rate, the number of frames and the duration come from the time stamps of the packets, not from the header. A
decoder that conceals damage reports it in libav's log: the log is read after every packet, and the first error in it
ends the file. Errors of a decoder that catches up after a cut do not count.
"""

import os
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.stream import Discard, Disposition

from sora_jax.data.reading.damage import MISSING_REFERENCE, check_units, heard, length_bytes, listening
from sora_jax.data.reading.graphs import DEINTERLACE, FrameRenderer, build_graph, display_matrix
from sora_jax.data.reading.tracks import (
    MAX_FRAME_PIXELS,
    Damage,
    File,
    FrameSource,
    MediaError,
    check_pixels,
    reason,
    usual_period,
)

# FFmpeg draws text files as video and follows lists of other files; neither is a clip.
FOREIGN_CONTAINERS = {"tty", "hls", "dash", "concat", "sdp", "image2", "imf", "lrc", "srt", "webvtt", "ass"}
# Errors must not end the decoder: it has to get over references that are missing where it begins in mid-file.
DECODER = {"err_detect": "crccheck+bitstream+buffer", "max_pixels": str(MAX_FRAME_PIXELS)}
MAX_PACKETS = 4_000_000  # 37 hours at 30 frames a second
KEPT_BYTES = 2**25  # of packets, so that a short file is read once
REMEMBERED = 8  # files whose time stamps are kept, so that the spans of a long one read them once
CATCH_UP = 16  # packets after a key frame that may refer to frames before it: the most references of H.264
PROBED = 100  # packets that are decoded if their time stamps look wrong
HELD = "held: the decoder gives no picture for some frames, the one before is shown instead"
MIN_DELAY = 0.01  # seconds; browsers show frames of a GIF with at most this delay for 0.1 s, and makers count on it


@dataclass(frozen=True)
class Index:
    """What the packets of a stream tell.

    Attributes:
        times: seconds, ascending, from the first frame that can be shown.
        end: seconds at which the last frame goes.
        keys: ticks of the key frames, ascending; empty if no time stamps lead there.
        in_order: the n-th frame of the decoder has the n-th time, its own time stamp is not to be believed.
        damage: why the file ends where it does.
        flags: what a user should know of the times.
        matrix: the display matrix, if the decoder does not put it on its frames.
    """

    times: np.ndarray
    end: float
    keys: np.ndarray
    in_order: bool = False
    damage: str = ""
    flags: tuple[str, ...] = ()
    matrix: np.ndarray | None = None


class VideoReader:
    """An open stream.

    Attributes:
        packets: all of the stream, if they are few.
        log: libav's errors; it grows.
        flags: what a user should know of the frames read so far.
    """

    def __init__(self, container, log: list):
        self.container, self.log, self.log_read = container, log, len(log)
        self.stream = _best_stream(container)
        self.packets: list | None = None
        self.moved, self.size, self.flags = False, (0, 0), list[str]()
        context = self.stream.codec_context
        self.codec = context.codec.canonical_name
        self.prefix = length_bytes(self.codec, context.extradata)
        self.decoder = _decoder(self.stream)
        # Processes decode side by side; and libav's log can be read only in the thread that waits for it.
        self.decoder.thread_count = 1
        self.decoder.options = DECODER
        self.renderer = FrameRenderer(_pixel_aspect(self.stream))

    def complaint(self) -> str:
        """Return the first error in the log since the last call."""
        after, self.log_read = self.log_read, len(self.log)
        return heard(self.log, after)

    def demux(self) -> Iterator:
        """Yield the packets from where the container stands to the end; raise Damage at the first sign of it."""
        self.moved = True
        for packet in self.container.demux(self.stream):
            # Transport streams mark packets after a jump of their counter; whether data are missing, the decoder sees.
            corrupt = packet.is_corrupt and self.container.format.name != "mpegts"
            if (complaint := self.complaint()) or corrupt:
                raise Damage(complaint or "a packet is cut short")
            if packet.size:
                yield packet
        if complaint := self.complaint():
            raise Damage(complaint)

    def packets_from(self, index: Index, ticks: int | None) -> Iterator:
        """Return the packets from the key frame at `ticks` on, or from the first."""
        if self.packets is None:
            if ticks is not None or self.moved:
                ticks = int(index.times[0] / self.stream.time_base) if ticks is None else ticks
                self.container.seek(ticks, stream=self.stream)
            return self.demux()
        found = (i for i, packet in enumerate(self.packets) if packet.is_keyframe and packet.pts == ticks)
        return iter(self.packets[next(found, 0) :])

    def decode(self, packet) -> tuple[list, str]:
        """Return the frames that the decoder gives for a packet (None: what it still holds), and its complaint."""
        frames, failure = [], ""
        try:
            if packet is not None and self.prefix:
                check_units(self.codec, bytes(packet), self.prefix)
            frames = self.decoder.decode(packet)
        except Exception as error:
            failure = reason(error)
        return frames, self.complaint() or failure

    def check(self, frame) -> None:
        """Raise Damage for a frame that is not to be shown."""
        self.size = self.size if self.size[0] else (frame.width, frame.height)
        if frame.is_corrupt:
            raise Damage("a frame marked so by the decoder")
        if self.size != (frame.width, frame.height):
            raise Damage(f"the frames' size changes to {frame.width}x{frame.height}")


@contextmanager
def open_video(file: File) -> Iterator[FrameSource]:
    """Open the best video stream of a file; raise MediaError if there is none."""
    with listening() as log, ExitStack() as stack:
        reader = stack.enter_context(_open_reader(file, log))
        name = _file_key(file)
        index = _remembered.get(name)
        if index is None:
            index = _read_index(reader)
            _remember(name, index)
            if reader.packets is None:  # the container stands at its end, and not every format can go back
                reader = stack.enter_context(_open_reader(file, log))
        reader.flags += index.flags
        reader.renderer.matrix = index.matrix
        yield FrameSource(index.times, index.end, partial(_frames, reader, index), reader.flags)


_remembered: OrderedDict[tuple | None, Index] = OrderedDict()


def _file_key(file: File) -> tuple | None:
    """Return what tells a file from others and from what it was before."""
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
def _open_reader(file: File, log: list) -> Iterator[VideoReader]:
    if isinstance(file, str | Path):
        # "file:" keeps a colon in a name from being read as a protocol, the white list a play list off the network.
        file = f"file:{os.fspath(file)}"
    else:
        file.seek(0)
    options = {"protocol_whitelist": "file", "err_detect": "crccheck"}
    with av.open(file, options=options, metadata_errors="replace") as container:
        if FOREIGN_CONTAINERS & set(container.format.name.split(",")):
            raise MediaError(f"not a video: FFmpeg reads it as {container.format.name}")
        yield VideoReader(container, log)


def _best_stream(container):
    stream = container.streams.best("video")
    if stream is None or stream.disposition & Disposition.attached_pic:
        raise MediaError("no video: the file has no video stream")
    if stream.codec_context is None:
        raise MediaError("no decoder: FFmpeg has none for the codec of the video stream")
    for other in container.streams:
        if other is not stream:
            other.discard = Discard.all  # damage beside the pictures is not looked for
    check_pixels(stream.codec_context.width, stream.codec_context.height)
    return stream


def _decoder(stream):
    """Return the stream's own decoder; libvpx for VP8 and VP9 with transparency, which only it gives."""
    name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.codec.canonical_name)
    transparent = stream.metadata.get("alpha_mode") == "1" and name in av.codecs_available
    return av.CodecContext.create(name, "r") if transparent else stream.codec_context


def _pixel_aspect(stream) -> float:
    """Return width over height of a pixel; shapes that no camera has are taken for square."""
    aspect = float(stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1)
    return aspect if 1 / 8 <= aspect <= 8 else 1.0


@dataclass
class _PacketScan:
    """What is kept of the packets while they are read: time stamps, key frames, and all of a file that is small."""

    unit: float
    count: int = 0
    bytes: int = 0
    stamps: array = field(default_factory=lambda: array("d"))  # of the packets that have one, in coding order
    keys: array = field(default_factory=lambda: array("q"))  # ticks
    kept: list = field(default_factory=list)
    probed: list = field(default_factory=list)  # the first packets
    last: float = 0.0  # seconds for which the last frame is shown

    def add(self, packet) -> None:
        self.bytes += packet.size
        if self.bytes <= KEPT_BYTES:
            self.kept.append(packet)
        else:
            self.kept.clear()
        if len(self.probed) < PROBED:
            self.probed.append(packet)
        if packet.is_keyframe and packet.pts is not None:
            self.keys.append(packet.pts)
        if packet.is_discard:
            return
        self.count += 1
        ticks = packet.dts if packet.pts is None else packet.pts
        if ticks is not None:
            self.stamps.append(ticks * self.unit)
        self.last = float((packet.duration or 0) * self.unit)


def _read_index(reader: VideoReader) -> Index:
    """Read every packet once, up to the first damage; the reader keeps them if they are few."""
    unit, damage = float(reader.stream.time_base or 1), ""
    scan = _PacketScan(unit)
    try:
        for packet in reader.demux():
            if scan.count == MAX_PACKETS:
                break
            scan.add(packet)
    except Exception as error:
        damage = reason(error)
    if not scan.count:
        raise MediaError(f"damaged: {damage}" if damage else "no frames: the file opens but holds none")
    reader.packets = scan.kept or None
    times, in_order, flags = _frame_times(reader, scan)
    period = usual_period(times, times[-1] + 1 / _nominal_rate(reader.stream))
    # A GIF's last frame may be meant to stand still; elsewhere the duration of the last frame is not to be trusted.
    end = float(times[-1] + (max(scan.last, MIN_DELAY) if reader.codec == "gif" else period))
    promised = _header_duration(reader.stream)
    if not damage and promised > end - times[0] + max(2 * period, 0.1):
        damage = f"it ends after {end - times[0]:.2f} of {promised:.2f} seconds"
    keys = np.empty(0, np.int64) if in_order else np.sort(np.asarray(scan.keys, np.int64))
    if reader.codec == "gif":
        times, end, in_order = *_gif_times(times, end), True
    elif len(keys) and (early := int(np.searchsorted(times, keys[0] * unit - 1e-6))):
        times = times[early:]
        flags += (f"start: {early} frames before the first key frame cannot be decoded",)
    return Index(times, end, keys, in_order, damage, flags, _stored_matrix(reader, scan))


def _stored_matrix(reader: VideoReader, scan: _PacketScan) -> np.ndarray | None:
    """Return the display matrix if the stream's own decoder, which puts it on its frames, is not the one in use."""
    own = reader.stream.codec_context
    if reader.decoder is own:
        return None
    return next((display_matrix(frame) for packet in scan.probed[:1] for frame in own.decode(packet)), None)


def _frame_times(reader: VideoReader, scan: _PacketScan) -> tuple[np.ndarray, bool, tuple[str, ...]]:
    """Return the times of the frames, ascending, whether they are given in the decoder's order, and flags.

    Time stamps may be absent, equal, or in coding order where the container has no field for that of presentation
    (H.264 with B-frames in AVI). Whether they are believed, the first frames of the decoder show.
    """
    times, ascend = np.unique(scan.stamps), bool((np.diff(scan.stamps) > 0).all())
    distinct = len(times) == scan.count
    if distinct and not (ascend and reader.stream.codec_context.has_b_frames):
        return times, False, ()
    shown = [frame.pts for packet in (*scan.probed, None) for frame in reader.decode(packet)[0]]
    reader.decoder.flush_buffers()
    reader.log_read = len(reader.log)
    stamped = [pts for pts in shown if pts is not None]
    if stamped == sorted(set(stamped)) and len(stamped) == len(shown) > 0:
        equal = len(scan.stamps) - len(times)
        return times, False, (f"times: {equal} frames have the time stamp of another",) if equal else ()
    if distinct:
        return times, True, ()
    rate = _nominal_rate(reader.stream)
    flag = f"times: the file has no time stamp for each frame, {rate:.4g} frames a second are assumed"
    return (times[0] if len(times) else 0) + np.arange(scan.count) / rate, True, (flag,)


def _gif_times(times: np.ndarray, end: float) -> tuple[np.ndarray, float]:
    delays = np.diff([*times, end])
    ends = np.cumsum(np.where(delays < MIN_DELAY + 1e-6, 0.1, delays))
    return np.array([0.0, *ends[:-1]]), float(ends[-1])


def _nominal_rate(stream) -> float:
    return float(stream.average_rate or stream.base_rate or 25)


def _header_duration(stream) -> float:
    """Return the seconds that the header gives the stream; 0 if it does not say."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    parts = stream.metadata.get("DURATION", "").split(":")
    try:
        hours, minutes, seconds = (float(part) for part in parts)
    except ValueError:
        return 0.0
    return 3600 * hours + 60 * minutes + seconds


def _frames(reader: VideoReader, index: Index, start: float) -> Iterator[tuple]:
    """Yield pairs (time, draw) from the last frame before `start` on."""
    early = np.searchsorted(index.keys * float(reader.stream.time_base), start + 1e-6, side="right")
    # In the first second, decoding from the beginning is cheaper than a seek, and safe in files without an index.
    if start <= index.times[0] + 1 or early == 0:
        yield from _timed(reader, index)
        return
    failure, key = "", int(index.keys[early - 1])
    # Frames after a key frame may be made from frames before it: then decoding begins one or two key frames earlier.
    for ticks in index.keys[max(0, early - 3) : early][::-1].tolist():
        try:
            frames = _timed(reader, index, ticks, key)
            if head := _run_up(frames, start, reader):
                yield from chain(head, frames)
                return
        except Exception as error:
            failure = reason(error)
    if failure:
        raise Damage(failure)
    yield from _timed(reader, index)  # the format's own index leads too far on


def _run_up(frames: Iterator[tuple], start: float, reader: VideoReader) -> list[tuple]:
    """Return the frame shown at `start` and the next one; none if decoding has to begin earlier."""
    shown: list[tuple] = []
    for count, (time, draw) in enumerate(frames):
        if time > start + 1e-6:
            # The first frame has no neighbour before it, from which its missing lines are made.
            return [] if not count or (count == 1 and "deinterlaced" in reader.flags) else [*shown, (time, draw)]
        shown = [(time, draw)]
    return shown


def _timed(reader: VideoReader, index: Index, ticks: int | None = None, key: int | None = None) -> Iterator[tuple]:
    unit, last, before = float(reader.stream.time_base or 1), len(index.times) - 1, None
    frames = _deinterlaced(reader, _decoded(reader, index, ticks, key))
    for number, frame in enumerate(frames):
        time = index.times[min(number, last)] if index.in_order or frame.pts is None else frame.pts * unit
        place = int(np.searchsorted(index.times, time - 1e-6))
        # One may be a field or a frame that is never shown.
        if before is not None and place - before > 2 and HELD not in reader.flags:
            reader.flags.append(HELD)
        before = place
        yield time, partial(reader.renderer.render, frame)


def _deinterlaced(reader: VideoReader, frames: Iterator) -> Iterator:
    """Yield the frames, from the first one marked as interlaced on through a graph, which needs all of them."""
    graph = None
    for frame in frames:
        if frame.interlaced_frame and graph is None:
            graph = build_graph([DEINTERLACE], frame)
            reader.flags += ["deinterlaced"] * ("deinterlaced" not in reader.flags)
        if graph is None:
            yield frame
            continue
        graph.push(frame)
        yield from _pulled(graph)
    if graph is not None:
        graph.push(None)
        yield from _pulled(graph)


def _pulled(graph) -> Iterator:
    try:
        while True:
            yield graph.pull()
    except (av.BlockingIOError, av.EOFError):
        return


def _decoded(reader: VideoReader, index: Index, ticks: int | None, key: int | None) -> Iterator:
    """Yield the frames from the key frame at `ticks` on, without those before the one at `key` (None: the first).

    What is decoded before `key` may lack its references, and so may the pictures that follow a key frame in coding
    order and are shown before it (open GOP): if the decoder reports it, they are left out, and nothing else.
    """
    reader.decoder.flush_buffers()
    reader.log_read = len(reader.log)
    if key is None:
        key = int(index.keys[0]) if len(index.keys) else None
    since, latest, lost = CATCH_UP, key, (0, 0)
    for packet in reader.packets_from(index, ticks):
        since, latest = (0, packet.pts) if packet.is_keyframe else (since + 1, latest)
        frames, complaint = reader.decode(packet)
        begun = key is None or (packet.pts is not None and packet.pts >= key)
        if complaint and begun:
            if since >= CATCH_UP or not complaint.startswith(MISSING_REFERENCE):
                raise Damage(complaint)
            if latest is not None and packet.pts is not None and packet.pts < latest:
                lost = packet.pts, latest
        for frame in frames:
            if frame.pts is None or (key is None or frame.pts >= key) and not lost[0] <= frame.pts < lost[1]:
                reader.check(frame)
                yield frame
    if index.damage:
        raise Damage(index.damage)
    frames, complaint = reader.decode(None)
    if complaint:
        raise Damage(complaint)
    yield from frames
