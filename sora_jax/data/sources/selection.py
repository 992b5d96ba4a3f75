"""From a SourceConfig to a source."""

import hashlib
from dataclasses import asdict, replace
from functools import cached_property, lru_cache

from sora_jax.data.sources.config import SourceConfig
from sora_jax.data.sources.entries import Entry, Media, Reader, Source
from sora_jax.data.sources.opened import StripMedia
from sora_jax.errors import UserError


def make_source(config: SourceConfig) -> Source:
    """The source that the config names, listed. Raises UserError where there is none or its tables are wrong."""
    return ConfiguredSource(config)


class ConfiguredSource:
    """A reader with the config's labels, weight and limit. It pickles as its config and is listed again where it
    is used, once a process; UserError if it has changed since."""

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
        """Of what was listed when the source was made."""
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
        raise UserError(f"source={source.name} has changed while it was read: leave its files alone and start again.")
    return source


def spread(count: int, limit: int | None) -> range | list[int]:
    """At most `limit` of `count` indices, evenly spread."""
    wanted = min(count, limit or count)
    return range(count) if wanted == count else [i * count // wanted for i in range(wanted)]


def _within(index: int, count: int) -> int:
    if not 0 <= index < count:
        raise IndexError(index)
    return index


def _reader(config: SourceConfig) -> Reader:
    # Imported here, so that a world does not wait for zip files and tables.
    if config.name == "folder":
        from sora_jax.data.sources.folder import FolderReader as reader
    elif config.name == "webdataset":
        from sora_jax.data.sources.webdataset import TarReader as reader
    elif config.name == "array_record":
        from sora_jax.data.sources.array_record import DatasetReader as reader
    elif config.name == "world":
        from sora_jax.data.sources.world import WorldReader as reader
    else:
        from sora_jax.data.sources.tfds import TfdsReader as reader
    return reader(config)


def _labelled(entry: Entry, config: SourceConfig) -> Entry:
    name = entry.label_name if entry.label_name is not None or entry.label is None else str(entry.label)
    if name is not None and config.label != "class":
        text = config.label_caption.replace("{label}", " ".join(name.replace("_", " ").split()))
        entry = replace(entry, captions={**entry.captions, "label": text})
    return entry if config.label != "caption" else replace(entry, label=None)
