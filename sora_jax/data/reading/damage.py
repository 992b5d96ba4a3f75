"""Signs of damage that decoders pass over: what libav logs, check sums, and byte patterns that a format forbids."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import av.logging

from sora_jax.data.reading.tracks import Damage

_listeners = 0
_lock = Lock()


@contextmanager
def listening() -> Iterator[list]:
    """Yield libav's errors of this thread, as a list of (level, source, text) that grows."""
    global _listeners
    with _lock:
        _listeners += 1
        av.logging.set_level(av.logging.ERROR)
        av.logging.set_skip_repeated(False)  # or the same error of another file would be kept back
    try:
        with av.logging.Capture() as log:
            yield log
    finally:
        with _lock:
            _listeners -= 1
            if not _listeners:
                av.logging.set_level(None)


# What H.264 and HEVC decoders report of a picture whose references were cut away, not of its own data.
MISSING_REFERENCE = (
    "mmco: unref short failure",
    "co located POCs unavailable",
    "reference picture missing",
    "Missing reference picture",
    "number of reference frames",
    "illegal short term buffer state",
    "Frame num gap",
    "Could not find ref with POC",
)


def length_bytes(codec: str, extradata: bytes | None) -> int:
    """Return the bytes of the length before each unit of an H.264 or HEVC packet (MP4, Matroska); 0 for others."""
    place = {"h264": 4, "hevc": 21}.get(codec)
    if place is None or not extradata or extradata[0] != 1 or len(extradata) <= place:
        return 0
    return 1 + (extradata[place] & 3)


def check_units(codec: str, data: bytes, prefix: int) -> None:
    """Raise Damage if coded picture data hold 0 0 0, 0 0 1 or 0 0 2, which an encoder must break up.

    This finds zeroed blocks that the decoder passes over (ITU-T H.264 and H.265, 7.4). Units that hold no pictures are
    left out, as some writers put start codes into them.

    Args:
        codec: h264 or hevc.
        data: a packet, each unit of which stands behind its length.
        prefix: bytes of that length.
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
