"""Media that sources open: files wherever they lie, frames in memory, strips."""

import hashlib
import io
import os
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath
from typing import BinaryIO, Protocol

import numpy as np

from sora_jax.data.fit import FitError
from sora_jax.data.reading.media import DecodedClip, FitClip, SpanRule, decode, sample_frames
from sora_jax.data.reading.tracks import MediaError, reason
from sora_jax.data.sources.entries import Media
from sora_jax.errors import UserError
from sora_jax.files import local_copy, size_and_time

WHOLE_BYTES = 2**24
BLOCK_BYTES, BLOCKS = 2**20, 16


def fingerprint(stream: BinaryIO) -> str:
    """24 hex digits of a file's content: BLAKE2b of all bytes up to 16 MiB.

    Of a larger file, of its size and of 16 evenly spread blocks of 1 MiB, the first and the last included: a few
    megabytes are read even of an hour of video, and two films that differ only between the blocks share an id.
    """
    digest, size = hashlib.blake2b(digest_size=12), stream.seek(0, os.SEEK_END)
    if size <= WHOLE_BYTES:
        stream.seek(0)
        digest.update(stream.read())
    else:
        digest.update(str(size).encode())
        for block in range(BLOCKS):
            stream.seek(block * (size - BLOCK_BYTES) // (BLOCKS - 1))
            digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()


class Stream(Protocol):
    """Bytes that can be opened, again and in another process."""

    def open(self) -> BinaryIO: ...


@dataclass(frozen=True)
class FileMedia:
    """A video or a picture: a path, or bytes inside another file."""

    file: Path | Stream

    def content_id(self) -> str:
        try:
            with self._open() as stream:
                return fingerprint(stream)
        except OSError as error:
            raise MediaError(f"unreadable: {reason(error)}") from error

    def decode(self, rule: SpanRule, fit: FitClip | None) -> DecodedClip | None:
        if isinstance(self.file, Path):  # of the disk: libav opens it itself
            return decode(self.file, rule, fit)
        with self._open() as stream:
            return decode(stream, rule, fit)

    def _open(self) -> BinaryIO:
        if isinstance(self.file, PurePath):
            return self.file.open("rb")
        try:
            return self.file.open()
        except (MediaError, UserError):
            raise
        except Exception as error:  # a damaged or encrypted member of an archive raises one of many types
            raise MediaError(f"unreadable: {reason(error)}") from error


@dataclass(frozen=True)
class FramesMedia:
    """Frames in memory, uint8 (T, H, W, 3), at `fps` frames a second."""

    frames: np.ndarray
    fps: float

    def content_id(self) -> str:
        digest = hashlib.blake2b(str(self.frames.shape).encode(), digest_size=12)
        digest.update(np.ascontiguousarray(self.frames))
        return digest.hexdigest()

    def decode(self, rule: SpanRule, fit: FitClip | None) -> DecodedClip | None:
        try:
            return sample_frames(self.frames, self.fps, rule, fit)
        except FitError as error:
            raise MediaError(str(error)) from error


@dataclass(frozen=True)
class StripMedia:
    """A picture that is read as `frames` frames from left to right."""

    picture: Media
    frames: int
    fps: float

    def content_id(self) -> str:
        return f"{self.picture.content_id()}-{self.frames}"

    def decode(self, rule: SpanRule, fit: FitClip | None) -> DecodedClip | None:
        strip = self.picture.decode(SpanRule(max_frames=1), None).frames[0]
        return FramesMedia(_unroll(strip, self.frames), self.fps).decode(rule, fit)


def _unroll(strip: np.ndarray, frames: int) -> np.ndarray:
    """(H, N W, 3) to (N, H, W, 3)."""
    height, width, _ = strip.shape
    if width % frames:
        raise MediaError(f"not a strip: {width} pixels do not divide into {frames} frames")
    return np.ascontiguousarray(strip.reshape(height, frames, width // frames, 3).swapaxes(0, 1))


@dataclass(frozen=True)
class ZipMember:
    """A file in a zip, which is read whole: zip members have no random access."""

    archive: Path
    name: str

    def open(self) -> BinaryIO:
        return io.BytesIO(archive(self.archive).read(self.name))


def archive(path: Path) -> zipfile.ZipFile:
    """An open zip file, kept for its next member."""
    return _archive(path, size_and_time(path), os.getpid())


@lru_cache(maxsize=8)
def _archive(path: Path, version: tuple, process: int) -> zipfile.ZipFile:
    # One a process: a forked child would share its parent's file offset.
    return zipfile.ZipFile(local_copy(path))


@dataclass(frozen=True)
class Part:
    """`size` bytes of a file from `offset`."""

    path: Path
    offset: int
    size: int

    def open(self) -> BinaryIO:
        return io.BufferedReader(_Window(self.path, self.offset, self.size), 2**16)


@lru_cache(maxsize=4096)
def archive_copy(path: Path) -> Path:
    """A local copy, of the content that was there when this was first called."""
    # Looked up once: a shard has thousands of parts, and each look-up of a remote one is a request.
    return local_copy(path)


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, path: Path, offset: int, size: int):
        self._file = archive_copy(path).open("rb", buffering=0)  # of what is read here and there nothing is read ahead
        self._offset, self._size, self._at = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to {base + offset}")
        self._at = base + offset
        return self._at

    def readinto(self, buffer) -> int:
        wanted = max(0, min(len(buffer), self._size - self._at))
        self._file.seek(self._offset + self._at)
        count = self._file.readinto(memoryview(buffer)[:wanted])
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


@dataclass(frozen=True)
class Held:
    """Bytes in memory."""

    data: bytes

    def open(self) -> BinaryIO:
        return io.BytesIO(self.data)
