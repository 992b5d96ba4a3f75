"""Where clips come from: a source has a length, says what clip i is (`entry`), reads it (`read`, `[i]`)."""

import csv
import hashlib
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Protocol

import numpy as np

from sora_jax.data.fit import FitError, fit_frames
from sora_jax.data.media import Fit, decode
from sora_jax.data.tracks import MediaError, reason
from sora_jax.errors import UserError

# What people keep beside clips; everything else is tried, and listed with a reason where it cannot be read.
BESIDE_CLIPS = {".txt", ".csv", ".tsv", ".json", ".jsonl", ".md", ".parquet", ".html", ".pdf", ".py"}
MAX_MEMBER_BYTES = 2**28


@dataclass(frozen=True)
class Clip:
    """A captioned clip.

    id: stable and unique in its source. frames: uint8 (T, H, W, 3). fps: frames a second. source: kind of
    source. note: what is wrong with a file that was used in part.
    """

    id: str
    frames: np.ndarray
    fps: float
    caption: str
    source: str
    note: str = ""

    def __post_init__(self):
        frames = self.frames
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or self.fps <= 0:
            raise ValueError(f"clip {self.id}: {frames.dtype} {frames.shape} at {self.fps} frames a second")


@dataclass(frozen=True)
class Entry:
    """What is known of a clip before it is read; caption and split are None where nobody gave them.

    file: relative to the source; member: the clip's name inside the file, if that is a zip.
    """

    id: str
    file: str
    member: str = ""
    caption: str | None = None
    split: str | None = None


class Source(Protocol):
    """Random access to clips. `read` takes part of a clip as `media.decode` does, and raises MediaError."""

    refused: list[tuple[str, str]]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Clip: ...

    def entry(self, index: int) -> Entry: ...

    def read(
        self,
        index: int,
        max_frames: int | None = None,
        max_fps: float | None = None,
        place: float = 0.0,
        fit: Fit | None = None,
    ) -> Clip: ...


class WorldSource:
    """The embedded world: `train` clips from its training indices, then `held_out` from its held-out ones."""

    def __init__(self, config, train: int, held_out: int = 0):
        self._config, self._train, self._count = config, train, train + held_out
        self.refused = []

    def __len__(self) -> int:
        return self._count

    def _index(self, index: int) -> int:
        from sora_jax.data.world import HELD_OUT

        if not 0 <= index < self._count:
            raise IndexError(index)
        return index if index < self._train else HELD_OUT + index - self._train

    def entry(self, index: int) -> Entry:
        from sora_jax.data import world

        number = self._index(index)
        caption = world.scene(self._config, number).caption
        return Entry(f"world/{self._config.seed}/{number}", "", "", caption, world.split(number))

    def read(self, index, max_frames=None, max_fps=None, place=0.0, fit=None) -> Clip:
        from sora_jax.data import world

        entry = self.entry(index)
        frames, caption = world.clip(self._config, self._index(index))
        frames = _part(frames, max_frames, place, fit)
        return Clip(entry.id, frames, self._config.fps, caption, "world")

    def __getitem__(self, index: int) -> Clip:
        return self.read(index)


class FolderSource:
    """Every video and picture below a folder, in sorted order; pictures inside zip files too.

    Captions come from a text file of the same name (`run.mp4`, `run.txt`) or from a `captions.csv` in the
    clip's folder or above, with columns file (relative to the csv, members of a zip as if unpacked beside
    it), caption and, optionally, split. strip_frames=N reads each picture as N frames from left to right at
    `strip_fps`.

    `refused` lists what was not taken, with reasons. Raises UserError for a missing folder or an unusable
    csv.
    """

    def __init__(self, path: str | Path, strip_frames: int | None = None, strip_fps: float = 8.0):
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"path={path} is not a folder: a folder of videos or pictures is allowed.")
        if strip_frames is not None and strip_frames < 1:
            raise UserError(f"strip_frames={strip_frames} is not allowed: a whole number of at least 1 is.")
        self._strip_frames, self._strip_fps = strip_frames, strip_fps
        self._archives = {}
        self.refused: list[tuple[str, str]] = []
        self._entries = self._list()

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Clip:
        return self.read(index)

    def __getstate__(self):
        return self.__dict__ | {"_archives": {}}

    def entry(self, index: int) -> Entry:
        return self._entries[index]

    def read(self, index, max_frames=None, max_fps=None, place=0.0, fit=None) -> Clip:
        entry = self._entries[index]
        if self._strip_frames:
            frames = _unroll(decode(self._file(entry), max_frames=1).frames[0], self._strip_frames)
            frames, fps, note = _part(frames, max_frames, place, fit), self._strip_fps, ""
        else:
            clip = decode(self._file(entry), max_frames=max_frames, max_fps=max_fps, place=place, fit=fit)
            frames, fps, note = clip.frames, clip.fps, clip.note
        return Clip(entry.id, frames, fps, entry.caption or "", "folder", note)

    def digest(self) -> str:
        """A fingerprint of names, sizes and captions, to tell whether the folder has changed."""
        sizes = [self._size(entry) for entry in self._entries]
        listing = repr((self._entries, sizes, self.refused))
        return hashlib.blake2b(listing.encode(errors="replace"), digest_size=16).hexdigest()

    def _size(self, entry: Entry) -> int:
        if entry.member:
            return self._archive(entry.file).getinfo(entry.member).file_size
        file = self.path / entry.file
        return file.stat().st_size if file.exists() else -1  # a link to nothing is refused when it is read

    def _file(self, entry: Entry) -> Path | BytesIO:
        if not entry.member:
            return self.path / entry.file
        try:
            return BytesIO(self._archive(entry.file).read(entry.member))
        except Exception as error:  # a damaged or encrypted member raises one of many types
            raise MediaError(f"unreadable: in the zip, {error}") from error

    def _archive(self, name: str) -> zipfile.ZipFile:
        key = os.getpid(), name  # a forked child would share its parent's file offset
        if key not in self._archives:
            self._archives[key] = zipfile.ZipFile(self.path / name)
        return self._archives[key]

    def _list(self) -> list[Entry]:
        captions = _Captions(self.path)
        found = [pair for file in _files(self.path) for pair in self._members(file)]
        entries = [entry for file, member in found if (entry := self._describe(file, member, captions))]
        self.refused += [(name, "missing: named in captions.csv but not there") for name in captions.unused()]
        return entries

    def _members(self, name: str) -> Iterator[tuple[str, str]]:
        if PurePosixPath(name).suffix.lower() != ".zip":
            yield name, ""
            return
        try:
            members = sorted(self._archive(name).infolist(), key=lambda member: member.filename)
        except (OSError, zipfile.BadZipFile) as error:
            self.refused.append((name, f"unreadable: {error}"))
            return
        for member in members:
            if why := _refuse_member(member):
                self.refused.append((f"{name}/{member.filename}", why))
            elif not member.is_dir() and not _beside_clips(PurePosixPath(member.filename)):
                yield name, member.filename

    def _describe(self, file: str, member: str, captions: "_Captions") -> Entry | None:
        name = f"{file}/{member}" if member else file
        try:
            name.encode()
            caption, split = captions.find(file, member)
        except (UnicodeError, OSError) as error:
            self.refused.append((name.encode(errors="replace").decode(), f"name or caption: {reason(error)}"))
            return None
        return Entry(name, file, member, caption, split)


def _files(root: Path) -> Iterator[str]:
    """Names of the files below root that may be clips, relative and sorted."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            relative = PurePosixPath(Path(folder).relative_to(root).as_posix()) / name
            if not _beside_clips(relative):
                yield str(relative)


def _beside_clips(name: PurePosixPath) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in name.parts)
    return hidden or name.suffix.lower() in BESIDE_CLIPS


def _refuse_member(member: zipfile.ZipInfo) -> str | None:
    if _escapes(member.filename):
        return "unsafe: the name leads out of the zip"
    if member.file_size > MAX_MEMBER_BYTES:
        return f"too large: {member.file_size} bytes, at most {MAX_MEMBER_BYTES} are read from a zip"
    return None


def _escapes(name: str) -> bool:
    path = PureWindowsPath(name)  # knows both kinds of slashes
    return bool(path.root) or ".." in path.parts


def _unroll(strip: np.ndarray, frames: int) -> np.ndarray:
    """(H, N W, 3) to (N, H, W, 3)."""
    height, width, _ = strip.shape
    if width % frames:
        raise MediaError(f"not a strip: {width} pixels do not divide into {frames} frames")
    return strip.reshape(height, frames, width // frames, 3).swapaxes(0, 1)


def _part(frames: np.ndarray, max_frames: int | None, place: float, fit: Fit | None) -> np.ndarray:
    count = min(len(frames), max_frames or len(frames))
    first = round(place * (len(frames) - count))
    try:
        size = fit(*frames.shape[1:3]) if fit else frames.shape[1:3]
    except FitError as error:
        raise MediaError(str(error)) from error
    return fit_frames(frames[first : first + count], size)


class _Captions:
    """Captions of a folder, by file name relative to it."""

    def __init__(self, root: Path):
        self._root = root
        self._rows = {}
        for path in sorted(root.rglob("captions.csv")):
            folder = PurePosixPath(path.parent.relative_to(root).as_posix())
            for name, caption, split in _read_csv(path):
                self._rows[str(folder / name)] = caption, split
        self._used = set()

    def find(self, file: str, member: str) -> tuple[str | None, str | None]:
        """(caption, split) of a file or of a zip's member; a text file of the same name has the last word."""
        listed = str(PurePosixPath(file).parent / member) if member else file
        self._used.add(listed)
        caption, split = self._rows.get(listed, (None, None))
        beside = self._root / PurePosixPath(file).with_suffix(".txt")
        if not member and beside.is_file():
            caption = " ".join(beside.read_text(encoding="utf-8-sig").split())
        return caption or None, split or None

    def unused(self) -> list[str]:
        return [name for name in self._rows if name not in self._used]


def _read_csv(path: Path) -> Iterator[tuple[str, str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            rows = list(csv.DictReader(lines))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as UTF-8 comma-separated values: {error}.") from error
    for number, row in enumerate(rows, 2):
        if not row.get("file") or row.get("caption") is None:
            raise UserError(f"{path}, row {number}, has no file or no caption: both columns are required.")
        if _escapes(row["file"]):
            raise UserError(f"{path}, row {number}, names {row['file']}, which is outside the folder.")
        split = (row.get("split") or "").strip()
        yield str(PurePosixPath(row["file"])), " ".join(row["caption"].split()), split
