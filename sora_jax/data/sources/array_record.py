"""Read a dataset folder of `sora-jax data build` as a source, to build another dataset from its clips."""

from dataclasses import dataclass, replace

from sora_jax.config import check
from sora_jax.data.reading.media import DecodedClip, FitClip, SpanRule, sample_frames
from sora_jax.data.sources.config import SourceConfig
from sora_jax.data.sources.entries import Entry
from sora_jax.data.storing.clips import Clip
from sora_jax.data.storing.manifest import Dataset, captions_of
from sora_jax.files import as_path


class DatasetReader:
    """List the clips of a dataset folder, with their ids, captions, labels and splits.

    Raises:
        UserError: the path is no dataset folder.
    """

    def __init__(self, config: SourceConfig):
        path, made_by = as_path(config.path), "a dataset folder, as `sora-jax data build` makes it"
        check((path / "dataset.json").is_file(), f"--path is {config.path!r}; it must be {made_by}")
        self._dataset = Dataset(path)
        self.refused: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self._dataset)

    def entry(self, index: int) -> Entry:
        row = self._dataset.row(index)
        label = None if row["label"] < 0 else row["label"]
        return Entry(row["file"], captions_of(row), label, None, row["split"] or None)

    def open(self, index: int) -> "DatasetMedia":
        return DatasetMedia(self._dataset[index], self._dataset.row(index)["variant"])

    def digest(self) -> str:
        return self._dataset.digest


@dataclass(frozen=True)
class DatasetMedia:
    """A clip of a dataset, with its id, its flags and its start in the file that it came from."""

    clip: Clip
    variant: int

    def content_id(self) -> str:
        return f"{self.clip.id}.v{self.variant}" if self.variant else self.clip.id  # variants of a clip share an id

    def decode(self, rule: SpanRule, fit: FitClip | None) -> DecodedClip | None:
        part = sample_frames(self.clip.frames, self.clip.fps, rule, fit)
        return part and replace(part, start=self.clip.start + part.start, flags=(*self.clip.flags, *part.flags))
