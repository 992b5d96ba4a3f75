"""Media that sources open: files wherever they lie, and frames in memory."""

import hashlib
import io
import os
import tarfile
import zipfile
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import BinaryIO, TypeAlias, cast

import numpy as np

from sora_jax.data.reading.media import DecodedClip, FitClip, SpanRule, decode, sample_frames
from sora_jax.data.reading.tracks import MediaError, as_media_error
from sora_jax.data.sources.entries import Media
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

    @as_media_error()
    def content_id(self) -> str:
        with open_file(self.file) as stream:
            return fingerprint(stream)

    @as_media_error()
    def decode(self, rule: SpanRule, fit: FitClip | None) -> DecodedClip | None:
        if isinstance(self.file, Path):  # of the disk: libav opens it itself
            return decode(self.file, rule, fit)
        with open_file(self.file) as stream:
            return decode(stream, rule, fit)


@dataclass(frozen=True)
class FramesMedia:
    """Frames in memory, uint8 (T, H, W, 3), at `fps` frames a second; with the start and flags of a DecodedClip."""

    frames: np.ndarray
    fps: float
    id: str = ""  # "": a hash of the frames
    start: float = 0.0
    flags: tuple[str, ...] = ()

    def content_id(self) -> str:
        if self.id:
            return self.id
        digest = hashlib.blake2b(str(self.frames.shape).encode(), digest_size=12)
        digest.update(np.ascontiguousarray(self.frames).data)
        return digest.hexdigest()

    def decode(self, rule: SpanRule, fit: FitClip | None) -> DecodedClip | None:
        part = sample_frames(self.frames, self.fps, rule, fit)
        return part and replace(part, start=self.start + part.start, flags=(*self.flags, *part.flags))


def unroll(strip: Media, count: int, fps: float) -> FramesMedia:
    """Split a picture that holds `count` frames from left to right. Raises MediaError."""
    clip = strip.decode(SpanRule(max_frames=1), None)
    assert clip is not None  # every picture has a first frame
    height, width, _ = clip.frames[0].shape
    if width % count:
        raise MediaError(f"not a strip: {width} pixels do not divide into {count} frames")
    frames = clip.frames[0].reshape(height, count, width // count, 3).swapaxes(0, 1)
    return FramesMedia(np.ascontiguousarray(frames), fps, f"{strip.content_id()}-{count}")


@dataclass(frozen=True)
class ZipMember:
    """A file in a zip, which is read whole: zip members have no random access."""

    archive: Path
    info: zipfile.ZipInfo  # not its name, which several members may have

    def open(self) -> BinaryIO:
        return io.BytesIO(open_zip(self.archive).read(self.info))


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


# A local copy of an archive as it was at the first call: each of a shard's thousands of parts would cost a request.
archive_copy = lru_cache(maxsize=4096)(local_copy)


@dataclass(frozen=True)
class Held:
    """Bytes in memory."""

    data: bytes

    def open(self) -> BinaryIO:
        return io.BytesIO(self.data)
