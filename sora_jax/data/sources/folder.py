"""A folder of videos and pictures as a source."""

import hashlib
import math
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from sora_jax.data.reading.tracks import reason
from sora_jax.data.sources.config import SourceConfig
from sora_jax.data.sources.entries import Entry, escapes
from sora_jax.data.sources.opened import FileMedia, ZipMember, archive
from sora_jax.data.sources.tables import (
    ORIGINAL,
    Annotations,
    Fields,
    clean,
    file_rows,
    is_file_table,
    number_labels,
    original_first,
)
from sora_jax.errors import UserError
from sora_jax.files import as_path, is_remote, read_together, remote_files, size_and_time

# What people keep beside clips; everything else is tried, and listed with a reason where it cannot be read.
BESIDE_CLIPS = {".txt", ".csv", ".tsv", ".json", ".jsonl", ".md", ".parquet", ".html", ".pdf", ".py"}
MAX_MEMBER_BYTES = 2**28
MAX_TEXT_BYTES = 2**20


class Place(NamedTuple):
    """A file of the folder, or a member of a zip file in it; size in bytes."""

    file: str
    member: str
    size: int

    @property
    def name(self) -> str:
        return f"{self.file}/{self.member}" if self.member else self.file


class FolderReader:
    """Every video and picture below a folder, in sorted order; pictures inside zip files too.

    Captions come from text files of the same name (`run.mp4`: `run.txt` of kind original, `run.KIND.txt`) and from
    tables in the clip's folder or above (`captions.csv`, any .jsonl and .parquet with a file column, see
    `captions.py`) whose files are relative to the table, members of a zip as if unpacked beside it. A deeper table
    goes before one above it, a text file before both, each for its own kinds.

    `refused` lists what was not taken, with reasons. Raises UserError for a missing folder or an unusable table.
    """

    def __init__(self, config: SourceConfig):
        self._root = as_path(config.path)
        if not self._root.is_dir():
            raise UserError(f"path={config.path} is not a folder: a folder of videos or pictures is allowed.")
        self.refused: list[tuple[str, str]] = []
        remote = is_remote(self._root)
        self._sizes = remote_files(self._root) if remote else {}
        listed = sorted(filter(_visible, self._sizes), key=_as_walked)
        names = listed if remote else list(_files(self._root, self.refused))
        clips = [name for name in names if not _beside_clips(name)]
        captions = FolderCaptions(self._root, names, clips, _fields(config), self._sizes)
        found = [place for name in clips for place in self._places(name)]
        self._list([(place, said) for place in found if (said := self._said(place, captions))])
        self.refused += [(name, f"missing: named in {table} but not there") for name, table in captions.unused()]

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, index: int) -> Entry:
        return self._entries[index]

    def open(self, index: int) -> FileMedia:
        file, member, _ = self._found[index]
        return FileMedia(ZipMember(self._root / file, member) if member else self._root / file)

    def digest(self) -> str:
        listing = repr((self._entries, [place.size for place in self._found], self.refused))
        return hashlib.blake2b(listing.encode(errors="replace"), digest_size=16).hexdigest()

    def _list(self, found: list[tuple[Place, Annotations]]) -> None:
        self._found = [place for place, _ in found]
        labels = number_labels(said.label for _, said in found)
        self._entries = [
            Entry(place.name, said.captions, *label, said.split) for (place, said), label in zip(found, labels)
        ]

    def _places(self, name: str) -> Iterator[Place]:
        path = self._root / name
        if name not in self._sizes and not path.is_file():  # a pipe would be waited for without end
            self.refused.append((name, _no_file(path)))
        elif path.suffix.lower() != ".zip":
            yield Place(name, "", self._size(name))
        else:
            yield from self._members(name)

    def _size(self, name: str) -> int:
        return self._sizes[name] if name in self._sizes else size_and_time(self._root / name)[0]

    def _members(self, name: str) -> Iterator[Place]:
        try:
            members = sorted(archive(self._root / name).infolist(), key=lambda member: member.filename)
        except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            self.refused.append((name, f"unreadable: {error}"))
            return
        for member in members:
            if why := _refuse_member(member):
                self.refused.append((f"{name}/{member.filename}", why))
            elif not member.is_dir() and not _beside_clips(member.filename):
                yield Place(name, member.filename, member.file_size)

    def _said(self, place: Place, captions: "FolderCaptions") -> Annotations | None:
        try:
            place.name.encode()
            return captions.find(place)
        except (ValueError, OSError) as error:
            shown = place.name.encode(errors="replace").decode()
            self.refused.append((shown, f"name or caption: {reason(error)}"))
            return None


def _no_file(path: Path) -> str:
    if path.is_dir():
        return "not a file: a link to a folder, which is not followed"
    return "missing: a link to nothing" if path.is_symlink() else "not a file: a pipe, a socket or a device"


def _fields(config: SourceConfig) -> Fields:
    return Fields(config.caption_field, config.label_field)


def _files(root: Path, refused: list[tuple[str, str]]) -> Iterator[str]:
    """Names of all files below root, and links to folders, but the hidden ones, relative and sorted."""

    def skip(error: OSError) -> None:
        refused.append((os.path.relpath(error.filename, root), f"unreadable: {reason(error)}"))

    for folder, folders, files in os.walk(root, onerror=skip):
        folders[:] = sorted(name for name in folders if not _hidden(name))
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in sorted(files + links):
            if not _hidden(name):
                yield str(PurePosixPath(Path(folder).relative_to(root).as_posix()) / name)


def _visible(name: str) -> bool:
    return not any(map(_hidden, PurePosixPath(name).parts))


def _as_walked(name: str) -> list[tuple[bool, str]]:
    """Sorts names as `_files` gives them: the files of a folder before the folders in it."""
    *folders, file = name.split("/")
    return [*((True, folder) for folder in folders), (False, file)]


def _hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def _beside_clips(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in BESIDE_CLIPS or any(map(_hidden, path.parts))


def _refuse_member(member: zipfile.ZipInfo) -> str | None:
    if escapes(member.filename):
        return "unsafe: the name leads out of the zip"
    if member.file_size > MAX_MEMBER_BYTES:
        return f"too large: {member.file_size} bytes, at most {MAX_MEMBER_BYTES} are read from a zip"
    return None


class FolderCaptions:
    """Captions, labels and splits of a folder's clips, by file name relative to it; sizes: bytes of remote files."""

    def __init__(self, root: Path, names: list[str], clips: list[str], fields: Fields, sizes: Mapping[str, int]):
        self._root, self._rows, self._tables = root, {}, {}
        for table in _tables(root, names):
            for name, said in file_rows(root / table, fields).items():
                name = str(PurePosixPath(table).parent / name)
                self._rows[name] = _over(self._rows.get(name, Annotations()), said)
                self._tables[name] = table
        self._texts = _texts(names, clips)
        texts = [name for named in self._texts.values() for _, name in named]
        # One after the other, a million texts would take a night.
        self._read_before = read_together(root, [name for name in texts if sizes.get(name, math.inf) <= MAX_TEXT_BYTES])

    def find(self, place: Place) -> Annotations:
        """What is said of a clip. Raises ValueError or OSError where its text file cannot be read."""
        listed = str(PurePosixPath(place.file).parent / place.member) if place.member else place.file
        self._tables.pop(listed, None)
        said = self._rows.get(listed, Annotations())
        if place.member:
            return said
        texts = {kind: self._read(name) for kind, name in self._texts.get(_stem(place.file), [])}
        captions = {kind: text for kind, text in {**said.captions, **texts}.items() if text}
        return replace(said, captions=original_first(captions))

    def _read(self, name: str) -> str:
        path = self._root / name
        data = self._read_before.get(name)
        if data is None:
            with path.open("rb") as file:
                data = file.read(MAX_TEXT_BYTES + 1)
        if len(data) > MAX_TEXT_BYTES:
            raise ValueError(f"{name} has more than {MAX_TEXT_BYTES} bytes")
        return clean(data.decode("utf-8-sig"))

    def unused(self) -> Iterable[tuple[str, str]]:
        """Pairs (file, table) of what was never asked for."""
        return self._tables.items()


def _tables(root: Path, names: list[str]) -> list[str]:
    """Tables by depth, so that what stands nearer to a clip comes later."""
    tables = [name for name in names if is_file_table(root / name)]
    return sorted(tables, key=lambda name: (name.count("/"), name))


def _over(below: Annotations, above: Annotations) -> Annotations:
    label = below.label if above.label is None else above.label
    return Annotations(original_first({**below.captions, **above.captions}), label, above.split or below.split)


def _texts(names: list[str], clips: list[str]) -> dict[str, list[tuple[str, str]]]:
    """(kind, text file) by the name without its ending of the clip beside it; the longest name fits."""
    stems, texts = set(map(_stem, clips)), {}
    for name in names:
        if not name.lower().endswith(".txt"):
            continue
        stem = _stem(name)
        if stem in stems:
            texts.setdefault(stem, []).append((ORIGINAL, name))
        elif (shorter := _stem(stem)) in stems and shorter != stem:
            kind = PurePosixPath(stem).suffix[1:]
            texts.setdefault(shorter, []).insert(0, (kind, name))  # `run.txt` goes before `run.original.txt`
    return texts


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))
