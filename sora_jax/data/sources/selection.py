"""Make the source that a SourceConfig names."""

import hashlib
from dataclasses import asdict, replace
from functools import lru_cache
from importlib import import_module

from sora_jax.config import check
from sora_jax.data.sources.config import SourceConfig
from sora_jax.data.sources.entries import Entry, Media, Reader
from sora_jax.data.sources.opened import unroll

READERS = {
    "folder": "folder.FolderReader",
    "webdataset": "folder.FolderReader",
    "array_record": "array_record.DatasetReader",
    "world": "world.WorldReader",
}


def make_source(config: SourceConfig) -> "Source":
    """List the source that the config names; UserError if it does not exist or one of its tables cannot be used."""
    return Source(config)


class Source:
    """A reader with the config's labels, weight and limit; `name` goes into the manifest.

    It pickles as its config and is listed again, once in each process that unpickles it; UserError if it has changed.
    """

    def __init__(self, config: SourceConfig):
        self.config = config
        self.name = f"{config.name}:{config.path}" if config.path else config.name
        # Imported here, so that a world does not wait for zip files and tables.
        module, reader = READERS.get(config.name, "tfds.TfdsReader").split(".")
        self.reader: Reader = getattr(import_module(f"sora_jax.data.sources.{module}"), reader)(config)
        self.refused = self.reader.refused
        options = {k: v for k, v in asdict(config).items() if k not in ("path", "weight")}  # they change no clip
        text = repr((options, self.reader.digest, self.refused))
        self.digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=16).hexdigest()
        count = len(self.reader)
        wanted = min(count, config.limit or count)
        self._chosen = [i * count // wanted for i in range(wanted)] if wanted < count else range(count)

    def __len__(self) -> int:
        return len(self._chosen)

    def entry(self, index: int) -> Entry:
        return _labelled(replace(self.reader.entry(self._chosen[index]), weight=self.config.weight), self.config)

    def open(self, index: int) -> Media:
        media, strip = self.reader.open(self._chosen[index]), self.config.strip_frames
        return unroll(media, strip, self.config.strip_fps) if strip else media

    def __reduce__(self):
        return _listed_again, (self.config, self.digest)


@lru_cache(maxsize=64)
def _listed_again(config: SourceConfig, digest: str) -> Source:
    source = Source(config)
    changed = "it has changed while it was read: leave its files alone, then restart"
    check(source.digest == digest, f"--path is {config.path}; {changed}")
    return source


def _labelled(entry: Entry, config: SourceConfig) -> Entry:
    name = entry.label_name if entry.label_name is not None or entry.label is None else str(entry.label)
    if name is not None and config.label != "class":
        text = config.label_caption.replace("{label}", " ".join(name.replace("_", " ").split()))
        entry = replace(entry, captions={**entry.captions, "label": text})
    return entry if config.label != "caption" else replace(entry, label=None)
