"""Read a dataset folder of `sora-jax data build` as a source, to build another dataset from its clips."""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from sora_jax.config import check
from sora_jax.data.reading.media import DecodedClip, FitClip, SpanRule, sample_frames
from sora_jax.data.sources.config import SourceConfig
from sora_jax.data.sources.entries import Entry
from sora_jax.data.storing.manifest import Dataset, captions_of
from sora_jax.files import as_path

dataset = lru_cache(maxsize=8)(Dataset)  # one for all media of a process


class DatasetReader:
    """List the clips of a dataset folder, with their ids, captions, labels and splits.

    Raises:
        UserError: the path is no dataset folder.
    """

    def __init__(self, config: SourceConfig):
        self._path, made_by = as_path(config.path), "a dataset folder, as `sora-jax data build` makes it"
        check((self._path / "dataset.json").is_file(), f"--path is {config.path!r}; it must be {made_by}")
        self._dataset = dataset(self._path)
        self.refused: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self._dataset)

    def entry(self, index: int) -> Entry:
        row = self._dataset.row(index)
        label = None if row["label"] < 0 else row["label"]
        return Entry(row["file"], captions_of(row), label, None, row["split"] or None)

    def open(self, index: int) -> "DatasetMedia":
        return DatasetMedia(self._path, index)

    def digest(self) -> str:
        return self._dataset.digest


@dataclass(frozen=True)
class DatasetMedia:
    """Clip `number` of a dataset folder, with its id, its flags and its start in the file that it came from."""

    path: Path
    number: int

    def content_id(self) -> str:
        row = dataset(self.path).row(self.number)
        return f"{row['id']}.v{row['variant']}" if row["variant"] else row["id"]  # variants of a clip share an id

    def decode(self, rule: SpanRule, fit: FitClip | None) -> DecodedClip | None:
        clip = dataset(self.path)[self.number]
        part = sample_frames(clip.frames, clip.fps, rule, fit)
        return part and replace(part, start=clip.start + part.start, flags=(*clip.flags, *part.flags))
