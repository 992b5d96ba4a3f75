"""Videos by PyAV: when each frame is shown, and the frames from any moment on.

The rate, the number of frames and the duration come from the time stamps of the packets, not from the header. A
decoder that conceals damage reports it in libav's log: the log is read after every packet, and the first error in it
ends the file. Errors of a decoder that catches up after a cut do not count.
"""

import os
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.stream import Discard, Disposition

from sora_jax.data.reading.damage import MISSING_REFERENCE, check_units, length_bytes, listening
from sora_jax.data.reading.graphs import DEINTERLACE, FrameRenderer, build_graph, display_matrix
from sora_jax.data.reading.tracks import (
    MAX_FRAME_PIXELS,
    Damage,
    FrameSource,
    Input,
    MediaError,
    check_pixels,
    reason,
    usual_period,
)

# FFmpeg draws text files as video and follows lists of other files, which may be pipes; neither is a clip.
FOREIGN = {"tty", "hls", "dash", "concat", "sdp", "image2", "imf", "lrc", "srt", "webvtt", "ass", "vobsub"}
CONTAINERS = ",".join(sorted(av.formats_available - FOREIGN))
OPTIONS = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS, "err_detect": "crccheck"}
# Errors must not end the decoder: it has to get over references that are missing where it begins in mid-file.
DECODER = {"err_detect": "crccheck+bitstream+buffer", "max_pixels": str(MAX_FRAME_PIXELS)}
CATCH_UP = 16  # packets after a key frame that may refer to frames before it: the most references of H.264
PROBED = 100  # packets that are decoded if their time stamps look wrong
MIN_DELAY = 0.01  # seconds; browsers show frames of a GIF with at most this delay for 0.1 s, and makers count on it
HELD = "held: the decoder gives no picture for some frames, the one before is shown instead"
UNKNOWN = np.iinfo(np.int64).min


@dataclass(frozen=True)
class Index:
    """Holds what the packets of a stream tell."""

    times: np.ndarray  # seconds, ascending, from the first frame that can be shown
    end: float  # seconds at which the last frame goes
    keys: np.ndarray  # ticks of the key frames, ascending; empty if no time stamps lead there
    keyed: bool  # key frames are marked, with or without time stamps
    in_order: bool  # the n-th frame of the decoder has the n-th time, its own time stamp is not to be believed
    damage: str  # why the file ends where it does
    flags: list[str]
    matrix: np.ndarray | None  # the display matrix, if the decoder does not put it on its frames


class VideoReader:
    """Reads an open stream. `log` grows by libav's errors, `flags` by what a user should know of the frames read."""

    def __init__(self, container, log: list):
        self.container, self.log, self.log_read, self.flags = container, log, len(log), list[str]()
        self.stream = _best_stream(container)
        self.unit = float(self.stream.time_base or 1)
        self.moved = False
        context = self.stream.codec_context
        self.codec = context.codec.canonical_name
        self.prefix = length_bytes(self.codec, context.extradata)
        self.decoder = _decoder(self.stream)
        # Processes decode side by side; and libav's log can be read only in the thread that waits for it.
        self.decoder.thread_count = 1
        self.decoder.options = DECODER
        aspect = float(self.stream.sample_aspect_ratio or context.sample_aspect_ratio or 1)
        self.renderer = FrameRenderer(aspect if 1 / 8 <= aspect <= 8 else 1.0, self.codec)  # no camera has others

    def complaint(self) -> str:
        """Return the first error in the log since the last call."""
        new, self.log_read = self.log[self.log_read :], len(self.log)
        return " ".join(new[0][2].split()) if new else ""

    def demux(self, start: int | None = None) -> Iterator:
        """Yield the packets from a key frame on, or from where the container stands; raise Damage at its first sign."""
        if start is not None:
            self.container.seek(start, stream=self.stream)
        self.moved = True
        for packet in self.container.demux(self.stream):
            # Transport streams mark packets after a jump of their counter; whether data are missing, the decoder sees.
            cut = packet.is_corrupt and self.container.format.name != "mpegts"
            if complaint := self.complaint() or "a packet is cut short" * cut:
                raise Damage(complaint)
            if packet.size:
                yield packet
        if complaint := self.complaint():
            raise Damage(complaint)

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


@contextmanager
def open_video(file: Input) -> Iterator[FrameSource]:
    """Open the best video stream of a file; raise MediaError if there is none."""
    if isinstance(file, str | Path):
        status = os.stat(file)
        index = _remembered_index(os.path.abspath(file), status.st_size, status.st_mtime_ns)
    else:
        index = _index_of(file)
    with _open_reader(file) as reader:  # again: the container stands at its end, and not every format can go back
        reader.flags += index.flags
        reader.renderer.matrix = index.matrix
        yield FrameSource(index.times, index.end, partial(_frames, reader, index), reader.flags)


@lru_cache(8)  # for the spans of a long file
def _remembered_index(path: str, size: int, changed: int) -> Index:
    return _index_of(path)


def _index_of(file: Input) -> Index:
    with _open_reader(file) as reader:
        return _read_index(reader)


@contextmanager
def _open_reader(file: Input) -> Iterator[VideoReader]:
    if isinstance(file, str | Path):
        # "file:" keeps a colon in a name from being read as a protocol, the white list a play list off the network.
        file = f"file:{os.fspath(file)}"
    else:
        file.seek(0)
    with listening() as log, ExitStack() as stack:
        try:
            container = stack.enter_context(av.open(file, options=OPTIONS, metadata_errors="replace"))
        except av.FFmpegError as error:
            if any("not on whitelist" in text for _, _, text in log):
                raise MediaError("not a picture or a video: a text, or a list of other files") from error
            raise
        yield VideoReader(container, log)


def _best_stream(container):
    stream = container.streams.best("video")
    if stream is None or stream.disposition & Disposition.attached_pic:
        raise MediaError("no video: the file has no video stream")
    if stream.codec_context is None:
        raise MediaError("no decoder: FFmpeg has none for the codec of the video stream")
    check_pixels(stream.codec_context.width, stream.codec_context.height)
    for other in container.streams:
        if other is not stream:
            other.discard = Discard.all  # damage beside the pictures is not looked for
    return stream


def _decoder(stream):
    """Return the stream's own decoder; libvpx if the stream has transparency, which FFmpeg's own decoders leave out."""
    name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.codec.canonical_name, "")
    transparent = stream.metadata.get("alpha_mode") == "1" and name in av.codecs_available
    return av.CodecContext.create(name, "r") if transparent else stream.codec_context


def _read_index(reader: VideoReader) -> Index:
    """Read every packet once, up to the first damage."""
    rows, packets, damage = array("q"), list[av.Packet](), ""
    try:
        for packet in reader.demux():
            ticks = packet.dts if packet.pts is None else packet.pts
            rows.extend(
                (UNKNOWN if ticks is None else ticks, packet.is_keyframe, packet.is_discard, packet.duration or 0)
            )
            if len(packets) < PROBED:
                packets.append(packet)
    except Exception as error:
        damage = reason(error)
    ticks, marked, discard, durations = np.array(rows, np.int64).reshape(-1, 4).T
    if not (discard == 0).any():
        raise MediaError(f"damaged: {damage}" if damage else "no frames: the file opens but holds none")
    rate = float(reader.stream.average_rate or reader.stream.base_rate or 25)
    times, in_order, flags = _frame_times(reader, ticks[discard == 0], packets, rate)
    period = usual_period(times, times[-1] + 1 / rate)
    end = float(times[-1] + period)
    promised = 0.0 if reader.codec == "gif" else _header_duration(reader.stream)  # a GIF's is with the last delay
    # The last frame may stand still for the duration of its packet; Matroska's header has the end, others the length.
    start = 0.0 if "matroska" in reader.container.format.name else times[0]
    length = max(end, float((ticks + durations).max() * reader.unit)) - start
    if not damage and reader.stream.frames != len(ticks) and promised > length + max(2 * period, 0.1):
        damage = f"it ends after {length:.2f} of {promised:.2f} seconds"
    if damage and reader.stream.codec_context.has_b_frames:  # the last may come in coding order before those that lack
        gaps = np.flatnonzero(np.diff(times[-CATCH_UP:]) > 1.5 * period)
        times = times[: len(times) - len(times[-CATCH_UP:]) + gaps[0] + 1] if len(gaps) else times
        end = float(times[-1] + period)
    keys = np.sort(ticks[(marked == 1) & (ticks != UNKNOWN) & (not in_order)])
    if reader.codec == "gif":
        # The last frame may be meant to stand still; elsewhere the duration of the last packet is not to be trusted.
        delays = np.diff(times, append=times[-1] + durations[-1] * reader.unit)
        ends = np.cumsum(np.where(delays < MIN_DELAY + 1e-6, 0.1, delays))
        times, end, in_order = ends - np.diff(ends, prepend=0), float(ends[-1]), True
    elif len(keys) and (early := int(np.searchsorted(times, keys[0] * reader.unit - 1e-6))):
        times = times[early:]
        flags.append(f"start: {early} frames before the first key frame cannot be decoded")
    own, matrix = reader.stream.codec_context, None
    if reader.decoder is not own:
        with suppress(av.FFmpegError):
            matrix = next((display_matrix(frame) for packet in packets[:1] for frame in own.decode(packet)), None)
    return Index(times, end, keys, bool(marked.any()), in_order, damage, flags, matrix)


def _frame_times(
    reader: VideoReader, ticks: np.ndarray, first: list, rate: float
) -> tuple[np.ndarray, bool, list[str]]:
    """Return the times of the frames, ascending, whether they are given in the decoder's order, and flags.

    Time stamps may be absent, equal, or in coding order where the container has no field for that of presentation
    (H.264 with B-frames in AVI). The first frames of the decoder show whether they are to be believed.
    """
    known = ticks[ticks != UNKNOWN]
    times, flags = np.unique(known) * reader.unit, list[str]()
    distinct, ascend = len(times) == len(ticks), bool((np.diff(known) > 0).all())
    if distinct and not (ascend and reader.stream.codec_context.has_b_frames):
        return times, False, flags
    shown = [frame.pts for packet in (*first, None) for frame in reader.decode(packet)[0]]
    if shown and None not in shown and shown == sorted(set(shown)):
        if equal := len(known) - len(times):
            flags.append(f"times: {equal} frames have the time stamp of another")
        return times, False, flags
    if not distinct:
        times = (times[0] if len(times) else 0) + np.arange(len(ticks)) / rate
        flags.append(f"times: the file has no time stamp for each frame, {rate:.4g} frames a second are assumed")
    return times, True, flags


def _header_duration(stream) -> float:
    """Return the seconds that the header gives the stream; 0 if it does not say."""
    if stream.duration and "DURATION" not in stream.metadata:
        return float(stream.duration * stream.time_base)
    parts = reversed(stream.metadata.get("DURATION", "0").split(":"))
    try:
        return sum(60**place * float(part) for place, part in enumerate(parts))
    except ValueError:
        return 0.0


def _frames(reader: VideoReader, index: Index, start: float) -> Iterator[tuple]:
    """Yield pairs (time, draw) from the last frame before `start` on."""
    keys = index.keys[index.keys * reader.unit <= start + 1e-6]
    # In the first second, decoding from the beginning is cheaper than a seek, and safe in files without an index.
    if start > index.times[0] + 1 and len(keys):
        try:
            frames = _timed(reader, index, int(keys[-1]))
            head = _run_up(frames, start, reader)
        except Exception:
            head = []
        if head:
            yield from chain(head, frames)
            return
    yield from _timed(reader, index)


def _run_up(frames: Iterator[tuple], start: float, reader: VideoReader) -> list[tuple]:
    """Return the frame shown at `start` and the next one; none if decoding has to begin earlier."""
    shown: list[tuple] = []
    for count, (time, draw) in enumerate(frames):
        if time > start + 1e-6:
            # The first frame has no neighbour before it, from which its missing lines are made.
            return [] if not count or (count == 1 and "deinterlaced" in reader.flags) else [*shown, (time, draw)]
        shown = [(time, draw)]
    return shown


def _timed(reader: VideoReader, index: Index, key: int | None = None) -> Iterator[tuple]:
    """Yield pairs (time, draw) from a key frame on, or from the first."""
    last, before = len(index.times) - 1, len(index.times)
    for number, frame in enumerate(_deinterlaced(reader, _decoded(reader, index, key))):
        time = index.times[min(number, last)] if index.in_order or frame.pts is None else frame.pts * reader.unit
        if index.damage and time > index.end - 1e-6:
            raise Damage(index.damage)
        place = int(np.searchsorted(index.times, time - 1e-6))
        # One that is left out may be a field or a frame that is never shown.
        if place - before > 2 and HELD not in reader.flags:
            reader.flags.append(HELD)
        before = place
        yield time, partial(reader.renderer.render, frame)


def _deinterlaced(reader: VideoReader, frames: Iterator) -> Iterator:
    """Yield the frames, from the first one marked as interlaced on through a graph, which needs all of them."""
    graph = None
    for frame in chain(frames, [None]):
        if graph is None and frame is not None and frame.interlaced_frame:
            graph = build_graph(DEINTERLACE, frame)
            reader.flags += ["deinterlaced"] * ("deinterlaced" not in reader.flags)
        if graph is None:
            yield from [frame] * (frame is not None)
            continue
        graph.push(frame)
        try:
            while True:
                yield graph.pull()
        except (av.BlockingIOError, av.EOFError):
            pass


def _decoded(reader: VideoReader, index: Index, key: int | None) -> Iterator:
    """Yield the frames from a key frame on, or from the first one; raise Damage at the first sign of it.

    Pictures that follow a key frame in coding order and are shown before it (open GOP) may lack their references after
    a cut, and so may all before the first key frame: those for which the decoder reports it are left out.
    """
    reader.decoder.flush_buffers()
    reader.log_read = len(reader.log)
    begin = int(index.times[0] / reader.unit) if key is None and reader.moved else key
    first = int(index.keys[0]) if key is None and len(index.keys) else key
    since, latest, lost, reached, size = CATCH_UP, first, (0, 0), not index.keyed, None
    for packet in reader.demux(begin):
        since, latest = (0, packet.pts) if packet.is_keyframe else (since + 1, latest)
        frames, complaint = reader.decode(packet)
        late = first is None or (packet.pts is not None and packet.pts >= first)
        reached = reached or (late and packet.is_keyframe)
        if complaint and reached and late:
            if since >= CATCH_UP or not complaint.startswith(MISSING_REFERENCE):
                raise Damage(complaint)
            if latest is not None and packet.pts is not None and packet.pts < latest:
                lost = packet.pts, latest
        for frame in frames:
            if frame.pts is not None and (first is not None and frame.pts < first or lost[0] <= frame.pts < lost[1]):
                continue
            size = size or (frame.width, frame.height)
            if frame.is_corrupt:
                raise Damage("a frame marked so by the decoder")
            if size != (frame.width, frame.height):
                raise Damage(f"the frames' size changes to {frame.width}x{frame.height}")
            yield frame
    frames, complaint = reader.decode(None)
    yield from [] if complaint else frames
    if complaint := complaint or index.damage:
        raise Damage(complaint)
