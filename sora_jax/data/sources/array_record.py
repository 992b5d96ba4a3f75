"""Read a dataset folder of `sora-jax data build` as a source, to build another dataset from its clips."""

from functools import cached_property

from sora_jax.config import check
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
        path, made_by = as_path(config.path), "a dataset folder, as `sora-jax data build` makes it"
        check((path / "dataset.json").is_file(), f"--path is {config.path!r}; it must be {made_by}")
        self._dataset = Dataset(path)
        self.digest, self.refused = self._dataset.digest, list[tuple[str, str]]()

    def __len__(self) -> int:
        return len(self._dataset)

    @cached_property
    def classes(self) -> set[tuple[str, int]]:
        entries = map(self.entry, range(len(self)))
        return {(entry.label_name or str(entry.label), entry.label) for entry in entries if entry.label is not None}

    def entry(self, index: int) -> Entry:
        row = self._dataset.row(index)
        captions = dict(zip(row["kinds"], row["captions"], strict=True))
        label = None if row["label"] < 0 else row["label"]
        return Entry(row["file"], captions, label, captions.get("label"), row["split"] or None)

    def open(self, index: int) -> FramesMedia:
        clip, variant = self._dataset[index], self._dataset.row(index)["variant"]
        name = f"{clip.id}.v{variant}" if variant else clip.id  # variants of a clip share an id
        return FramesMedia(clip.frames, clip.fps, name, clip.start, clip.flags)
