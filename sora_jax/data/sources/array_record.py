"""Read a dataset folder of `sora-jax data build` as a source, to build another dataset from its clips."""

import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from sora_jax.config import check
from sora_jax.data.reading.media import DecodedClip, FitClip, SpanRule
from sora_jax.data.sources.config import SourceConfig
from sora_jax.data.sources.entries import Entry
from sora_jax.data.sources.opened import FramesMedia
from sora_jax.data.storing.manifest import Dataset
from sora_jax.files import as_path


class DatasetReader:
    """List the clips of a dataset folder, with their ids, captions, labels and splits.

    Raises:
        UserError: the path is no dataset folder.
    """

    def __init__(self, config: SourceConfig):
        self._path, made_by = as_path(config.path), "a dataset folder, as `sora-jax data build` makes it"
        check((self._path / "dataset.json").is_file(), f"--path is {config.path!r}; it must be {made_by}")
        self._count = len(_dataset(self._path, os.getpid()))
        self.refused: list[tuple[str, str]] = []

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
    """Clip `number` of a dataset folder, with its id, its flags and its start in the file that it came from."""

    path: Path
    number: int

    def content_id(self) -> str:
        row = _dataset(self.path, os.getpid()).row(self.number)
        return f"{row['id']}.v{row['variant']}" if row["variant"] else row["id"]  # variants of a clip share an id

    def decode(self, rule: SpanRule, fit: FitClip | None) -> DecodedClip | None:
        clip = _dataset(self.path, os.getpid())[self.number]
        part = FramesMedia(clip.frames, clip.fps).decode(rule, fit)
        return part and replace(part, start=clip.start + part.start, flags=(*clip.flags, *part.flags))


@lru_cache(maxsize=8)
def _dataset(path: Path, process: int) -> Dataset:
    """Open a dataset. Each process opens its own: a forked child must not share the files of its parent."""
    return Dataset(path)
