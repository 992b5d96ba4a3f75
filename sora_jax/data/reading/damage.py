"""Signs of damage that decoders pass over: what libav logs, check sums, and byte patterns that a format forbids."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np

from sora_jax.data.reading.tracks import Damage, File

_listeners = 0
_lock = Lock()


@contextmanager
def listening() -> Iterator[list]:
    """libav's errors of this thread, as a list of (level, source, text) that grows."""
    import av.logging

    global _listeners
    with _lock:
        _listeners += 1
        av.logging.set_level(av.logging.ERROR)
        av.logging.set_skip_repeated(False)  # or the same error of another file would be kept back, and told later
    try:
        with av.logging.Capture() as log:
            yield log
    finally:
        with _lock:
            _listeners -= 1
            if not _listeners:
                av.logging.set_level(None)


def heard(log: list, after: int = 0) -> str:
    """The text of the first entry after the first so many, in one line; empty where there is none."""
    return " ".join(log[after][2].split()) if len(log) > after else ""


def signs_of_damage(file: File, container: str) -> tuple[float, str]:
    """(place in bytes, what is wrong) of the first damage that libav's reader of the container does not look for.

    (infinity, "") where there is none; damage with an infinite place is that the end is missing.
    """
    checks = {"gif": _gif_end, "avi": _riff_end, "matroska,webm": _matroska_sums}
    if container not in checks:
        return float("inf"), ""
    if not isinstance(file, str | Path):
        place = file.tell()
        try:
            return checks[container](file)
        finally:
            file.seek(place)
    with open(file, "rb") as opened:
        return checks[container](opened)


def _gif_end(file: BinaryIO) -> tuple[float, str]:
    file.seek(max(0, file.seek(0, 2) - 4096))
    ended = file.read().rstrip(b"\0").endswith(b";")
    return float("inf"), "" if ended else "the file ends before its end mark"


def _riff_end(file: BinaryIO) -> tuple[float, str]:
    size = file.seek(0, 2)
    file.seek(4)
    promised = 8 + int.from_bytes(file.read(4), "little")
    return float("inf"), f"the file ends after {size} of {promised} bytes" if size < promised else ""


MATROSKA_SEGMENT, MATROSKA_CLUSTER = 0x18538067, 0x1F43B675
MATROSKA_NEEDED = {0x1549A966: "Info", 0x1654AE6B: "Tracks"}


def _matroska_sums(file: BinaryIO) -> tuple[float, str]:
    """Check the check sums that a writer may give to the elements of a segment (RFC 9559, 6.2; RFC 8794, 11.3.1)."""
    end = file.seek(0, 2)
    place = file.seek(0)
    while place < end:
        head = file.read(12)
        kind, used = _vint(head, keep=True)
        size, more = _vint(head[used:])
        if not used or not more or size < 0:
            break  # an unknown size or no Matroska: there is nothing that can be checked
        body = place + used + more
        file.seek(body)
        if kind == MATROSKA_SEGMENT:
            place = body
            continue
        wrong = (kind == MATROSKA_CLUSTER or kind in MATROSKA_NEEDED) and not _sum_fits(file, min(size, end - body))
        if wrong:
            name = MATROSKA_NEEDED.get(kind, "Cluster")
            return (place if name == "Cluster" else 0), f"wrong check sum of a {name} element"
        place = file.seek(body + size)
    return float("inf"), ""


def _sum_fits(file: BinaryIO, size: int) -> bool:
    head = file.read(6)
    if head[:2] != b"\xbf\x84":
        return True  # no check sum is given
    left, found = size - 6, 0
    while left > 0 and (part := file.read(min(left, 2**20))):
        found, left = zlib.crc32(part, found), left - len(part)
    return found == int.from_bytes(head[2:], "little")


def _vint(data: bytes, keep: bool = False) -> tuple[int, int]:
    """(value, bytes used) of a number of variable length; used = 0: none; value = -1: unknown. keep: with its mark."""
    if not data or not data[0]:
        return 0, 0
    used = 9 - data[0].bit_length()
    if len(data) < used:
        return 0, 0
    value = int.from_bytes(data[:used])
    plain = value & (1 << 7 * used) - 1
    unknown = plain == (1 << 7 * used) - 1
    return (value if keep else -1 if unknown else plain), used


def length_bytes(codec: str, extradata: bytes | None) -> int:
    """Bytes of the length before each unit of an H.264 or HEVC packet in an MP4 or Matroska file; 0: not such a one."""
    place = {"h264": 4, "hevc": 21}.get(codec)
    if place is None or not extradata or extradata[0] != 1 or len(extradata) <= place:
        return 0
    return 1 + (extradata[place] & 3)


def check_units(codec: str, data: bytes, prefix: int) -> None:
    """Damage where coded picture data hold 0 0 0, 0 0 1 or 0 0 2, which an encoder must break up.

    data: a packet whose units each stand behind `prefix` bytes of length. A zeroed block shows itself so. (ITU-T
    H.264 and H.265, 7.4: units of other kinds are not looked at, as some writers put start codes into them.)
    """
    place = 0
    while place + prefix < len(data):
        start = place + prefix
        place = start + int.from_bytes(data[place:start])
        if not start < place <= len(data):
            raise Damage("a unit of picture data has a wrong length")
        picture = data[start] & 31 in (1, 5) if codec == "h264" else data[start] >> 1 & 63 < 32
        unit = data[start:place].rstrip(b"\0") if picture else b""
        if any(pattern in unit for pattern in (b"\0\0\0", b"\0\0\1", b"\0\0\2")):
            raise Damage("picture data hold bytes that only stand between units")


def check_gif(data: bytes) -> None:
    """Damage where the coded data of a GIF's pictures (of a packet) are not exactly as many as their pixels."""
    place = 0
    if data[:4] == b"GIF8":
        place = 13 + (3 << (data[10] & 7) + 1 if data[10] & 128 else 0)
    while place < len(data) and data[place] in b"\x21\x2c":
        if data[place] == 0x21:
            place, _ = _sub_blocks(data, place + 2)
            continue
        if len(data) < place + 11:
            raise Damage("a picture is cut short")
        width, height = (int.from_bytes(data[place + k : place + k + 2], "little") for k in (5, 7))
        place += 10 + (3 << (data[place + 9] & 7) + 1 if data[place + 9] & 128 else 0)
        bits = data[place] if place < len(data) else 0
        place, coded = _sub_blocks(data, place + 1)
        if bits == 1:
            continue  # below what the standard allows, and read in more than one way
        if not 2 <= bits <= 8 or lzw_length(coded, bits) != width * height:
            raise Damage(f"the coded data are not of {width}x{height} pixels")


def _sub_blocks(data: bytes, place: int) -> tuple[int, bytes]:
    parts = []
    while place < len(data) and data[place]:
        parts.append(data[place + 1 : place + 1 + data[place]])
        place += 1 + data[place]
    return place + 1, b"".join(parts)


def lzw_length(data: bytes, bits: int) -> int:
    """The number of symbols of `bits` >= 2 that GIF's LZW codes stand for; -1 for codes that cannot be."""
    octets = np.frombuffer(data + b"\0\0\0", np.uint8).astype(np.int32)
    words = octets[:-2] | octets[1:-1] << 8 | octets[2:] << 16
    clear, place, total, room = 1 << bits, 0, 0, 4200
    while True:
        # After a clear code, the table grows by one entry a code, so the places of all codes are known beforehand.
        sizes = np.minimum(clear + 1 + np.arange(room), 4095)
        widths = np.frexp(sizes)[1]
        starts = place + np.concatenate([[0], np.cumsum(widths[:-1])])
        inside = int(np.searchsorted(starts + widths, 8 * len(data), side="right"))
        starts = starts[:inside]
        codes = (words[starts >> 3] >> (starts & 7)) & ((1 << widths[:inside]) - 1)
        special = np.flatnonzero((codes == clear) | (codes == clear + 1))
        if not len(special) and inside == room:
            room *= 4
            continue
        count = int(special[0]) if len(special) else inside
        length = _string_lengths(codes[:count] - clear - 2)
        if length < 0:
            return -1
        total += length
        if not len(special) or codes[count] == clear + 1:
            return total
        place = int(starts[count] + widths[count])


def _string_lengths(before: np.ndarray) -> int:
    """The lengths of the codes' strings, added up; `before`: the code that each string goes on from, negative: none."""
    if (before >= np.arange(len(before))).any():
        return -1
    lengths = np.ones(len(before), np.int64)
    while (linked := np.flatnonzero(before >= 0)).size:
        # Each link is replaced by the link of the code it leads to, so that few rounds are enough.
        lengths[linked] += lengths[before[linked]]
        before = before.copy()
        before[linked] = before[before[linked]]
    return int(lengths.sum())
