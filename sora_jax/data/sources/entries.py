"""The interfaces of a source: entries, known before any media is read, and media to decode."""

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    """A file or frames to decode. Both methods raise MediaError."""

    def content_id(self) -> str:
        """Return an id of the content: equal files have equal ids wherever they lie."""

    def decode(self, rule: SpanRule, fit: FitClip | None) -> DecodedClip | None:
        """Decode the span of `rule`; return None if the media has no span of that number."""


class Reader(Protocol):
    """All entries of one kind of source, listed when it is made."""

    refused: list[tuple[str, str]]  # file, reason
    classes: set[tuple[str, int]]  # name (of a class without one, its number), number
    digest: str  # a fingerprint of names, sizes and captions, which changes with the source; no media is read for it

    def __len__(self) -> int: ...

    def entry(self, index: int) -> Entry: ...

    def open(self, index: int) -> Media:
        """Return the media of an entry; MediaError if what holds it is damaged."""
