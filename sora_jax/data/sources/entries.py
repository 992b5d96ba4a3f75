"""The interfaces of a source: entries, known before any media is read, and media to decode."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PureWindowsPath
from typing import Protocol

from sora_jax.data.reading.media import DecodedClip, FitClip, SpanRule


@dataclass(frozen=True)
class Entry:
    """A clip before its media is read; fields that the source does not give are None."""

    file: str  # name for people, relative to the source: "set.zip/fox.png"
    captions: Mapping[str, str] = field(default_factory=dict)  # kind -> text
    label: int | None = None  # class number
    label_name: str | None = None  # class name
    split: str | None = None
    weight: float = 1.0  # mean number of times in an epoch


class Media(Protocol):
    """A file or frames to decode; small to pickle, opened when used. Both methods raise MediaError."""

    def content_id(self) -> str:
        """Return an id of the content: equal files have equal ids wherever they lie."""

    def decode(self, rule: SpanRule, fit: FitClip | None) -> DecodedClip | None:
        """Decode the span of `rule`; return None if the media has no span of that number."""


class Reader(Protocol):
    """All entries of one kind of source, listed when it is made; `refused` holds pairs (file, reason)."""

    refused: list[tuple[str, str]]

    def __len__(self) -> int: ...

    def entry(self, index: int) -> Entry: ...

    def open(self, index: int) -> Media: ...

    def digest(self) -> str:
        """Return a fingerprint of names, sizes and captions, which changes with the source; reads no media."""


class Source(Reader, Protocol):
    """A Reader under a SourceConfig: labels, weight and limit applied. `name` goes into the manifest."""

    name: str


def escapes(name: str) -> bool:
    """Return True if a file name leads out of the folder or archive in which it stands."""
    path = PureWindowsPath(name)  # knows both kinds of slashes
    return bool(path.root or path.drive) or ".." in path.parts
