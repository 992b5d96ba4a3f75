"""A world as a source."""

from sora_jax import worlds
from sora_jax.data.sources.config import SourceConfig
from sora_jax.data.sources.entries import Entry
from sora_jax.data.sources.opened import FramesMedia
from sora_jax.worlds import table


class WorldReader:
    """`limit` clips: the first from the world's training indices, `world_held_out` from its held-out ones."""

    def __init__(self, config: SourceConfig):
        self._world, self._count = config.world or worlds.WorldConfig(), config.limit or 0
        self._train, self.classes = self._count - config.world_held_out, set[tuple[str, int]]()
        made_of = (self._world, self._count, self._train)
        extra = getattr(self._world, "extra_captions", ())
        self.digest, self.refused = repr((*made_of, extra) if extra else made_of), list[tuple[str, str]]()

    def __len__(self) -> int:
        return self._count

    def _number(self, index: int) -> int:
        return index if index < self._train else worlds.HELD_OUT + index - self._train

    def entry(self, index: int) -> Entry:
        number = self._number(index)
        captions = table.captions_of(self._world, number)
        return Entry(f"world/{self._world.seed}/{number}", captions, split=worlds.split(number))

    def open(self, index: int) -> FramesMedia:
        number = self._number(index)
        return FramesMedia(table.draw(self._world, number), self._world.fps, table.id_of(self._world, number))
