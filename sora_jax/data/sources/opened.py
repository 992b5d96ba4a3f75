"""Media that sources open: files wherever they lie, frames in memory, strips of frames."""

import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import BinaryIO, TypeAlias, cast

import numpy as np

from sora_jax.data.fit import FitError
from sora_jax.data.reading.media import DecodedClip, FitClip, SpanRule, decode, sample_frames
from sora_jax.data.reading.tracks import MediaError, reason
from sora_jax.data.sources.entries import Media
from sora_jax.errors import UserError
from sora_jax.files import local_copy, size_and_time

WHOLE_BYTES = 2**24
BLOCK_BYTES, BLOCKS = 2**20, 16
File: TypeAlias = "Path | ZipMember | Part | Held"


def fingerprint(stream: BinaryIO) -> str:
    """Return 24 hex digits that identify a file's content: the BLAKE2b hash of its bytes.

    Of a file above 16 MiB, its size and 16 evenly spread blocks of 1 MiB are hashed, the first and the last included:
    an hour of video costs a few megabytes, and two films that differ only between the blocks share an id.
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


def open_file(file: File) -> BinaryIO:
    """Open a file wherever it lies."""
    return file.open("rb") if isinstance(file, PurePath) else file.open()


@dataclass(frozen=True)
class FileMedia:
    """A video or a picture: a path, or bytes inside another file."""

    file: File

    def content_id(self) -> str:
        with self._reading() as stream:
            return fingerprint(stream)

    def decode(self, rule: SpanRule, fit: FitClip | None) -> DecodedClip | None:
        if isinstance(self.file, Path):  # of the disk: libav opens it itself
            return decode(self.file, rule, fit)
        with self._reading() as stream:
            return decode(stream, rule, fit)

    @contextmanager
    def _reading(self) -> Iterator[BinaryIO]:
        try:
            with open_file(self.file) as stream:
                yield stream
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
        digest.update(np.ascontiguousarray(self.frames).data)
        return digest.hexdigest()

    def decode(self, rule: SpanRule, fit: FitClip | None) -> DecodedClip | None:
        try:
            return sample_frames(self.frames, self.fps, rule, fit)
        except FitError as error:
            raise MediaError(str(error)) from error


@dataclass(frozen=True)
class StripMedia:
    """A picture that holds `frames` frames from left to right."""

    picture: Media
    frames: int
    fps: float

    def content_id(self) -> str:
        return f"{self.picture.content_id()}-{self.frames}"

    def decode(self, rule: SpanRule, fit: FitClip | None) -> DecodedClip | None:
        strip = self.picture.decode(SpanRule(max_frames=1), None)
        assert strip is not None  # every picture has a first frame
        return FramesMedia(_unroll(strip.frames[0], self.frames), self.fps).decode(rule, fit)


def _unroll(strip: np.ndarray, frames: int) -> np.ndarray:
    """Split (H, N W, 3) into (N, H, W, 3)."""
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
        return io.BytesIO(open_zip(self.archive).read(self.name))


def open_zip(path: Path) -> zipfile.ZipFile:
    """Return an open zip file, which is kept for its next member."""
    return _zip(path, size_and_time(path), os.getpid())


@lru_cache(maxsize=8)
def _zip(path: Path, version: tuple, process: int) -> zipfile.ZipFile:
    # One a process: a forked child would share its parent's file offset.
    try:
        return zipfile.ZipFile(local_copy(path), metadata_encoding="utf-8")  # macOS does not mark its names as UTF-8
    except UnicodeDecodeError:
        return zipfile.ZipFile(local_copy(path))


@dataclass(frozen=True)
class Part:
    """`size` bytes of a file from `offset`: a member of a tar file, read where it lies."""

    path: Path
    offset: int
    size: int

    def open(self) -> BinaryIO:
        file = archive_copy(self.path).open("rb", buffering=0)  # random access: do not read ahead
        member = tarfile.TarInfo(self.path.name)
        member.offset_data, member.size = self.offset, self.size
        return cast(BinaryIO, tarfile.ExFileObject(SimpleNamespace(fileobj=file), member))  # type: ignore[arg-type]


@lru_cache(maxsize=4096)
def archive_copy(path: Path) -> Path:
    """Return a local copy of an archive as it was when this was first called."""
    # Cached: a shard has thousands of parts, and each look-up of a remote one is a request.
    return local_copy(path)


@dataclass(frozen=True)
class Held:
    """Bytes in memory."""

    data: bytes

    def open(self) -> BinaryIO:
        return io.BytesIO(self.data)
