"""Tar shards in the manner of WebDataset as a source: samples are members of one name with several endings.

The name of a sample is that of its members up to the first dot of the last part: `a/fox.mp4`, `a/fox.txt` (caption of
kind original), `a/fox.KIND.txt`, `a/fox.json` (a row of `captions.py`) and `a/fox.cls` (class number or name) are one.
Nothing is unpacked: media is read where it lies in the shard, or in its local copy where the shard is in a bucket.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from sora_jax.data.reading.tracks import reason
from sora_jax.data.sources.config import SourceConfig
from sora_jax.data.sources.entries import Entry, escapes
from sora_jax.data.sources.opened import FileMedia, Part, archive_copy
from sora_jax.data.sources.tables import (
    ORIGINAL,
    Annotations,
    Fields,
    annotations,
    clean,
    number_labels,
    original_first,
)
from sora_jax.errors import UserError
from sora_jax.files import as_path, matching, names_below, size_and_time

MEDIA_ENDINGS = ("mp4", "webm", "mkv", "mov", "avi", "gif", "webp", "png", "jpg", "jpeg", "avif")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MAX_MEMBER_BYTES = 2**31
MAX_TEXT_BYTES = 2**20
MAX_HEADER_BYTES = 2**20


class Member(NamedTuple):
    """A file in a shard: its bytes lie at `offset`."""

    name: str
    offset: int
    size: int


@dataclass
class Index:
    """What a shard holds: files, what is refused (name, reason), and what ended the reading too early."""

    members: list[Member] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    damage: str = ""


class TarReader:
    """The samples of one or many shards, in the order of names and then of members.

    A shard that is damaged gives its samples up to there and is listed in `refused`, as is every sample without media,
    with several, or with texts that cannot be read, and every member that is a link, a device or named outside.

    Raises UserError where the path names no shard.
    """

    def __init__(self, config: SourceConfig):
        self._root, self._shards = _find(config.path)
        self._fields, self._ending = Fields(config.caption_field, config.label_field), config.media_field.lstrip(".")
        self.refused: list[tuple[str, str]] = []
        self._places: list[tuple[str, Member]] = []
        said = [said for shard in self._shards for said in self._samples(shard)]
        labels = number_labels(one.label for one in said)
        self._entries = [
            Entry(f"{shard}/{member.name}", one.captions, *label, one.split)
            for (shard, member), one, label in zip(self._places, said, labels)
        ]

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, index: int) -> Entry:
        return self._entries[index]

    def open(self, index: int) -> FileMedia:
        shard, member = self._places[index]
        return FileMedia(Part(self._root / shard, member.offset, member.size))

    def digest(self) -> str:
        listing = repr((self._entries, [member for _, member in self._places], self.refused))
        return hashlib.blake2b(listing.encode(errors="replace"), digest_size=16).hexdigest()

    def _samples(self, shard: str) -> Iterator[Annotations]:
        """What is said of each usable sample; fills `_places` and `refused` on the way."""
        path = self._root / shard
        if shard.lower().endswith(COMPRESSED):
            self.refused.append((shard, "compressed: a packed tar has no random access, unpack it to a plain .tar"))
            return
        index = _index(path)
        self.refused += [(f"{shard}/{name}", why) for name, why in index.refused]
        listed = {_split(name)[0] for name, _ in index.refused}
        for key, members in _groups(index.members).items():
            try:
                media = self._media(members)
                said = self._said(path, members)
            except (ValueError, OSError) as error:
                if key not in listed:  # of the others the reason is known
                    self.refused.append((f"{shard}/{key}", str(error)))
                continue
            self._places.append((shard, media))
            yield said
        if index.damage:
            self.refused.append((shard, index.damage))

    def _media(self, members: dict[str, Member]) -> Member:
        wanted = (self._ending,) if self._ending else MEDIA_ENDINGS
        found = [member for ending, member in members.items() if ending.rpartition(".")[2].lower() in wanted]
        if self._ending in members:
            found = [members[self._ending]]
        if not found:
            raise ValueError(f"no media: only {', '.join(members)}")
        if len(found) > 1:
            raise ValueError(f"several media: {', '.join(members)}; media_field says which to take")
        return found[0]

    def _said(self, path: Path, members: dict[str, Member]) -> Annotations:
        try:
            return _read_words(path, members, self._fields)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"name or caption: {reason(error)}") from error


def _read_words(path: Path, members: dict[str, Member], fields: Fields) -> Annotations:
    next(iter(members.values())).name.encode()
    row = json.loads(_read_text(path, members["json"])) if "json" in members else {}
    if not isinstance(row, dict):
        raise ValueError("the .json member is not an object")
    said = annotations(row, fields)
    texts = {ending[:-4]: member for ending, member in members.items() if ending.endswith(".txt")}
    texts |= {ORIGINAL: members["txt"]} if "txt" in members else {}
    captions = said.captions | {kind: clean(_read_text(path, member)) for kind, member in texts.items()}
    captions = original_first({kind: text for kind, text in captions.items() if text})
    if "cls" in members:
        said = replace(said, label=annotations({"label": _read_text(path, members["cls"])}).label)
    return replace(said, captions=captions)


def _read_text(path: Path, member: Member) -> str:
    if member.size > MAX_TEXT_BYTES:
        raise ValueError(f"{member.name} has {member.size} bytes, at most {MAX_TEXT_BYTES} are read")
    with Part(path, member.offset, member.size).open() as stream:
        return stream.read().decode("utf-8-sig")


def _find(path: str) -> tuple[Path, list[str]]:
    """The folder and the names of the shards in it."""
    if "{" in path:
        raise UserError(f"path={path} has braces: a tar file, a folder or a pattern with * and ? is allowed.")
    root = as_path(path)
    if root.is_file():
        if path.lower().endswith(COMPRESSED):
            raise UserError(f"path={path} is compressed and has no random access: unpack it to a plain .tar file.")
        return root.parent, [root.name]
    if root.is_dir():
        names = [name for name in names_below(root) if name.lower().endswith((".tar", *COMPRESSED))]
    else:
        files, root = matching(path), _fixed_part(as_path(path))
        names = sorted(file.relative_to(root).as_posix() for file in files if file.is_file())
    if not names:
        raise UserError(f"path={path} names no tar file: one, a folder of them or a pattern with * and ? is allowed.")
    return root, names


def _fixed_part(pattern: Path) -> Path:
    parts = pattern.parts
    fixed = next((n for n, part in enumerate(parts) if any(c in part for c in "*?[")), len(parts) - 1)
    return pattern.parents[len(parts) - 1 - fixed]


def _split(name: str) -> tuple[str, str]:
    """(sample, ending) of a member."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return folder + slash + stem, ending


def _groups(members: list[Member]) -> dict[str, dict[str, Member]]:
    groups: dict[str, dict[str, Member]] = {}
    for member in members:
        key, ending = _split(member.name)
        hidden = any(part.startswith(".") for part in PurePosixPath(member.name).parts)
        if ending and not hidden:
            groups.setdefault(key, {})[ending] = member
    return groups


def _index(path: Path) -> Index:
    return _indexed(path, *size_and_time(path))


@lru_cache(maxsize=4096)
def _indexed(path: Path, size: int, modified: str) -> Index:
    """The index of a shard, made once a process from its headers alone."""
    archive_copy.cache_clear()  # it may be of another version
    index, copy = Index(), archive_copy(path)  # one that does not come is not damaged
    try:
        with copy.open("rb", buffering=0) as file, tarfile.open(fileobj=_Headers(file), mode="r:") as tar:
            for info in _headers(tar):
                _file_away(info, size, index)
            index.damage = _ending(file, tar.offset, size)
    except Exception as error:  # tarfile meets damage with whatever its parts raise
        index.damage = f"damaged: {reason(error)}, after {len(index.members)} files"
    return index


class _Headers:
    """Lets tarfile read headers and nothing longer, whatever size a header claims."""

    def __init__(self, file: BinaryIO):
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        return self._file.read(size)


def _headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    at = -1
    while (info := tar.next()) is not None:
        if not at < info.offset < tar.offset or info.size < 0:  # a negative size would lead back, for ever
            raise tarfile.ReadError(f"the header at byte {info.offset} leads back")
        at = info.offset
        tar.members.clear()  # tarfile keeps all, and a shard may hold millions
        yield info


def _file_away(info: tarfile.TarInfo, size: int, index: Index) -> None:
    if info.isdir():
        return
    if why := _refuse(info):
        index.refused.append((info.name, why))
    elif info.offset_data + info.size > size:
        index.refused.append((info.name, "damaged: the shard ends inside of it"))
    else:
        index.members.append(Member(info.name, info.offset_data, info.size))


def _refuse(info: tarfile.TarInfo) -> str | None:
    if not info.isreg() or info.issparse():
        return "unsafe: a link, a device or a sparse file, not a plain one"
    if escapes(info.name):
        return "unsafe: the name leads out of the shard"
    if info.size > MAX_MEMBER_BYTES:
        return f"too large: {info.size} bytes, at most {MAX_MEMBER_BYTES} are read"
    return None


def _ending(file: BinaryIO, offset: int, size: int) -> str:
    """What is wrong where tarfile stopped: it takes any damaged header but the first for the end."""
    file.seek(min(offset, size))
    rest = file.read(MAX_HEADER_BYTES)
    if len(rest) < tarfile.BLOCKSIZE:
        return f"damaged: the shard ends at byte {size} without an end mark"
    if any(rest[: tarfile.BLOCKSIZE]):
        return f"damaged: no header at byte {offset}, what follows is not read"
    return f"damaged: what follows the end mark at byte {offset} is not read" if any(rest) else ""
