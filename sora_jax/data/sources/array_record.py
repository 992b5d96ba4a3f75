"""ArrayRecord files as a source: a dataset of this package, or records of media files.

The simple format, for records of any origin: record i of `X.array_record` is the bytes of a video or a picture, and
row i of the table beside it (`X.jsonl`, `X.csv` or `X.parquet`) describes it with the columns of `captions.py`, of
which file is not needed.
"""

import hashlib
import io
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from sora_jax.data.reading.media import DecodedClip, FitClip, SpanRule
from sora_jax.data.reading.tracks import MediaError, reason
from sora_jax.data.sources.config import SourceConfig
from sora_jax.data.sources.entries import Entry, Reader
from sora_jax.data.sources.opened import FileMedia, FramesMedia
from sora_jax.data.sources.tables import READERS, Fields, number_labels, table_rows
from sora_jax.data.storing.shards import open_reader
from sora_jax.errors import UserError
from sora_jax.files import as_path, names_below, size_and_time

SUFFIX = ".array_record"


def array_record_reader(config: SourceConfig) -> Reader:
    """Reads a dataset folder by its `dataset.json`, everything else as records with tables."""
    return (DatasetReader if (as_path(config.path) / "dataset.json").is_file() else RecordReader)(config)


class DatasetReader:
    """The clips of a folder made by `sora-jax data build`, with ids, captions, labels and splits as they are."""

    def __init__(self, config: SourceConfig):
        self._path = as_path(config.path)
        self._count, self.refused = len(_dataset(self._path, os.getpid())), []

    def __len__(self) -> int:
        return self._count

    def entry(self, index: int) -> Entry:
        row = _dataset(self._path, os.getpid()).row(index)
        captions = dict(zip(row["kinds"], row["captions"], strict=True))
        label = None if row["label"] < 0 else row["label"]
        return Entry(row["file"], captions, label, None, row["split"] or None)

    def open(self, index: int) -> "DatasetMedia":
        return DatasetMedia(self._path, index)

    def digest(self) -> str:
        return _dataset(self._path, os.getpid()).digest


@dataclass(frozen=True)
class DatasetMedia:
    """Clip `number` of a dataset folder; it keeps its id, its flags and its place in the file it came from.

    Variants of one clip share its id there, so all but the first are told apart here.
    """

    path: Path
    number: int

    def content_id(self) -> str:
        row = _dataset(self.path, os.getpid()).row(self.number)
        return f"{row['id']}.v{row['variant']}" if row["variant"] else row["id"]

    def decode(self, rule: SpanRule, fit: FitClip | None) -> DecodedClip | None:
        clip = _dataset(self.path, os.getpid())[self.number]
        part = FramesMedia(clip.frames, clip.fps).decode(rule, fit)
        return part and replace(part, start=clip.start + part.start, flags=(*clip.flags, *part.flags))


@lru_cache(maxsize=8)
def _dataset(path: Path, process: int):
    from sora_jax.data.storing.manifest import Dataset

    return Dataset(path)


class RecordReader:
    """The simple format: `X.array_record` with a table beside it, or a folder of such pairs.

    Raises UserError where there is none, or where file and table do not fit; a damaged file is refused.
    """

    def __init__(self, config: SourceConfig):
        self._root, self._files = _find(config.path)
        self.refused: list[tuple[str, str]] = []
        fields = Fields(config.caption_field, config.label_field)
        described = [(place, said) for name in self._files for place, said in self._describe(name, fields)]
        self._places = [place for place, _ in described]
        labels = number_labels(said.label for _, said in described)
        self._entries = [
            Entry(f"{name}/{number}", said.captions, *label, said.split)
            for ((name, number), said), label in zip(described, labels)
        ]

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, index: int) -> Entry:
        return self._entries[index]

    def open(self, index: int) -> FileMedia:
        name, number = self._places[index]
        return FileMedia(Record(self._root / name, number))

    def digest(self) -> str:
        sizes = [size_and_time(self._root / name)[0] for name in self._files]
        listing = repr((self._entries, self._files, sizes, self.refused))
        return hashlib.blake2b(listing.encode(), digest_size=16).hexdigest()

    def _describe(self, name: str, fields: Fields):
        path = self._root / name
        rows = table_rows(_table(path), fields)
        try:
            count = _records(path, os.getpid()).num_records()
            if not count and rows:  # what the library makes of a file that is not its own
                raise ValueError("it holds no records")
        except Exception as error:  # the library raises RuntimeError and ValueError for damage
            self.refused.append((name, f"unreadable: {reason(error)}"))
            return
        if count != len(rows):
            raise UserError(f"{path} holds {count} records and {_table(path).name} {len(rows)} rows: equal is allowed.")
        yield from (((name, number), said) for number, said in enumerate(rows))


def _find(path: str) -> tuple[Path, list[str]]:
    root = as_path(path)
    if root.is_file() and root.suffix == SUFFIX:
        return root.parent, [root.name]
    names = sorted(name for name in names_below(root) if name.endswith(SUFFIX)) if root.is_dir() else []
    if not names:
        raise UserError(f"path={path} holds no {SUFFIX} file: a dataset folder, such a file or a folder of them is.")
    return root, names


def _table(path: Path) -> Path:
    tables = [table for suffix in READERS if (table := path.with_suffix(suffix)).is_file()]
    if len(tables) != 1:
        raise UserError(f"{path} has {len(tables)} tables beside it: one of {', '.join(READERS)} is required.")
    return tables[0]


@dataclass(frozen=True)
class Record:
    """The bytes of one record."""

    path: Path
    number: int

    def open(self) -> BinaryIO:
        data = _records(self.path, os.getpid()).read([self.number])
        if not data:
            raise MediaError(f"unreadable: record {self.number} is not there")
        return io.BytesIO(data[0])


@lru_cache(maxsize=16)
def _records(path: Path, process: int):
    return open_reader(path)  # one a process: a forked child must not share its parent's files and threads
