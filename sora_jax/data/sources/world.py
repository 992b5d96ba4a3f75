"""The embedded world as a source."""

import hashlib

from sora_jax import worlds as world
from sora_jax.data.sources.config import SourceConfig
from sora_jax.data.sources.entries import Entry
from sora_jax.data.sources.opened import FramesMedia


class WorldReader:
    """`limit` clips: the first from the world's training indices, `world_held_out` from its held-out ones."""

    def __init__(self, config: SourceConfig):
        self._world, self._count = config.world or world.WorldConfig(), config.limit or 0
        self._train, self.classes = self._count - config.world_held_out, set[tuple[str, int]]()
        made_of = (self._world, self._count, self._train)
        extra = self._world.extra_captions
        self.digest, self.refused = repr((*made_of, extra) if extra else made_of), list[tuple[str, str]]()

    def __len__(self) -> int:
        return self._count

    def _number(self, index: int) -> int:
        return index if index < self._train else world.HELD_OUT + index - self._train

    def entry(self, index: int) -> Entry:
        number = self._number(index)
        captions = world.captions_of(self._world, world.scene(self._world, number))
        return Entry(f"world/{self._world.seed}/{number}", captions, split=world.split(number))

    def open(self, index: int) -> FramesMedia:
        frames, _ = world.clip(self._world, self._number(index))
        variant = hashlib.blake2b(repr(self._world).encode(), digest_size=4).hexdigest()
        return FramesMedia(frames, self._world.fps, f"world/{variant}/{self._number(index)}")
