"""The embedded world as a source."""

import hashlib
from dataclasses import dataclass

from sora_jax import worlds as world
from sora_jax.data.reading.media import DecodedClip, FitClip, SpanRule
from sora_jax.data.sources.config import SourceConfig
from sora_jax.data.sources.entries import Entry
from sora_jax.data.sources.opened import FramesMedia


@dataclass(frozen=True)
class WorldMedia:
    """Clip `number` of the world; drawn when decoded."""

    config: world.WorldConfig
    number: int

    def content_id(self) -> str:
        variant = hashlib.blake2b(repr(self.config).encode(), digest_size=4).hexdigest()
        return f"world/{variant}/{self.number}"

    def decode(self, rule: SpanRule, fit: FitClip | None) -> DecodedClip | None:
        frames, _ = world.clip(self.config, self.number)
        return FramesMedia(frames, self.config.fps).decode(rule, fit)


class WorldReader:
    """`limit` clips: the first from the world's training indices, `world_held_out` from its held-out ones."""

    def __init__(self, config: SourceConfig):
        self._world, self._count = config.world or world.WorldConfig(), config.limit or 0
        self._train = self._count - config.world_held_out
        self.refused: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return self._count

    def _number(self, index: int) -> int:
        return index if index < self._train else world.HELD_OUT + index - self._train

    def entry(self, index: int) -> Entry:
        number = self._number(index)
        captions = world.captions_of(self._world, world.scene(self._world, number))
        name = f"world/{self._world.seed}/{number}"
        return Entry(name, captions, split=world.split(number))

    def open(self, index: int) -> WorldMedia:
        return WorldMedia(self._world, self._number(index))

    def digest(self) -> str:
        made_of = (self._world, self._count, self._train)
        extra = self._world.extra_captions
        return repr((*made_of, extra) if extra else made_of)
