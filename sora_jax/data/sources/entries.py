"""What a source gives: entries, known before any media is read, and media to decode."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PureWindowsPath
from typing import Protocol

from sora_jax.data.reading.media import DecodedClip, FitClip, SpanRule


@dataclass(frozen=True)
class Entry:
    """What is known of a clip before it is read.

    file: name for people, relative to the source ("set.zip/fox.png", "shard.tar/fox.mp4"). captions: kind -> text,
    {} where nobody gave one. label: class number, label_name: what the class is called, split: each None where not
    given. weight: how often a clip of the source comes in an epoch, on average.
    """

    file: str
    captions: Mapping[str, str] = field(default_factory=dict)
    label: int | None = None
    label_name: str | None = None
    split: str | None = None
    weight: float = 1.0


class Media(Protocol):
    """One thing that can be decoded; small to pickle, opened when used. Both methods raise MediaError."""

    def content_id(self) -> str:
        """Stable, of the content: equal files have equal ids wherever they lie."""

    def decode(self, rule: SpanRule, fit: FitClip | None) -> DecodedClip | None:
        """The span of `rule`; None where the media has none of that number."""


class Reader(Protocol):
    """All entries of one kind of source; the number of `refused` is known from listing."""

    refused: list[tuple[str, str]]

    def __len__(self) -> int: ...

    def entry(self, index: int) -> Entry: ...

    def open(self, index: int) -> Media: ...

    def digest(self) -> str:
        """A fingerprint of names, sizes and captions, to tell whether the source has changed; reads no media."""


class Source(Reader, Protocol):
    """A Reader under a SourceConfig: labels, weight and limit applied. `name` goes into the manifest."""

    name: str


def escapes(name: str) -> bool:
    """Whether a file name leads out of the folder or archive that it stands in."""
    path = PureWindowsPath(name)  # knows both kinds of slashes
    return bool(path.root or path.drive) or ".." in path.parts
