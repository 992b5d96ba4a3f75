"""Make the source that a SourceConfig names."""

import hashlib
from dataclasses import asdict, replace
from functools import cached_property, lru_cache
from importlib import import_module

from sora_jax.data.sources.config import SourceConfig
from sora_jax.data.sources.entries import Entry, Media, Reader, Source
from sora_jax.data.sources.opened import StripMedia
from sora_jax.errors import UserError

READERS = {
    "folder": "folder.FolderReader",
    "webdataset": "folder.FolderReader",
    "array_record": "array_record.DatasetReader",
    "world": "world.WorldReader",
}


def make_source(config: SourceConfig) -> Source:
    """List the source that the config names; UserError if it does not exist or one of its tables cannot be used."""
    return ConfiguredSource(config)


class ConfiguredSource:
    """A reader with the config's labels, weight and limit.

    It pickles as its config and is listed again, once in each process that unpickles it; UserError if it has changed.
    """

    def __init__(self, config: SourceConfig):
        self.config = config
        self.name = f"{config.name}:{config.path}" if config.path else config.name
        self._reader = _reader(config)
        self.refused = self._reader.refused
        self._chosen = spread(len(self._reader), config.limit)

    def __len__(self) -> int:
        return len(self._chosen)

    def entry(self, index: int) -> Entry:
        entry = self._reader.entry(self._chosen[_within(index, len(self))])
        return _labelled(replace(entry, weight=self.config.weight), self.config)

    def open(self, index: int) -> Media:
        media = self._reader.open(self._chosen[_within(index, len(self))])
        strip = self.config.strip_frames
        return StripMedia(media, strip, self.config.strip_fps) if strip else media

    def digest(self) -> str:
        """Return the fingerprint of what was listed when the source was made."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        options = {k: v for k, v in asdict(self.config).items() if k not in ("path", "weight")}  # they change no clip
        text = repr((options, self._reader.digest(), self.refused))
        return hashlib.blake2b(text.encode(errors="replace"), digest_size=16).hexdigest()

    def __reduce__(self):
        return _listed_again, (self.config, self.digest())


@lru_cache(maxsize=64)
def _listed_again(config: SourceConfig, digest: str) -> ConfiguredSource:
    source = ConfiguredSource(config)
    if source.digest() != digest:
        raise UserError(
            f"--path is {config.path}; it has changed while it was read: leave its files alone, then restart"
        )
    return source


def spread(count: int, limit: int | None) -> range | list[int]:
    """Return at most `limit` of `count` indices, evenly spread."""
    wanted = min(count, limit or count)
    return range(count) if wanted == count else [i * count // wanted for i in range(wanted)]


def _within(index: int, count: int) -> int:
    if not 0 <= index < count:
        raise IndexError(index)
    return index


def _reader(config: SourceConfig) -> Reader:
    # Imported here, so that a world does not wait for zip files and tables.
    module, reader = READERS.get(config.name, "tfds.TfdsReader").split(".")
    return getattr(import_module(f"sora_jax.data.sources.{module}"), reader)(config)


def _labelled(entry: Entry, config: SourceConfig) -> Entry:
    name = entry.label_name if entry.label_name is not None or entry.label is None else str(entry.label)
    if name is not None and config.label != "class":
        text = config.label_caption.replace("{label}", " ".join(name.replace("_", " ").split()))
        entry = replace(entry, captions={**entry.captions, "label": text})
    return entry if config.label != "caption" else replace(entry, label=None)
