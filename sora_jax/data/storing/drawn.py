"""Clips of a world in place of a latent cache: drawn when they are read, their latents are their pixels."""

import hashlib
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax.config import check
from sora_jax.data.fit import shrink
from sora_jax.data.storing.clips import clip_id_of
from sora_jax.data.storing.latents import COLUMNS, CacheInfo, LatentCache
from sora_jax.data.storing.parts import schema_of
from sora_jax.worlds import HELD_OUT, split
from sora_jax.worlds.table import AnyWorld, WorldConfig, captions_of, count_of, draw, id_of, size_of

_THIRDS = np.full((3, 1), 1 / 3, np.float32)


@dataclass(frozen=True)
class DrawnConfig:
    """Choose the clips that are drawn, and how many."""

    world: AnyWorld = WorldConfig()  # what is drawn
    clips: int = 10_000  # training clips; 0: as many as the world has
    held_out: int = 64  # held-out clips
    grey: bool = False  # latents have one channel, the mean of the colours

    def __post_init__(self):
        count = count_of(self.world)
        check(self.clips >= 0, f"drawn.clips is {self.clips}; it must be 0 or more")
        check(
            self.clips or count,
            f"drawn.clips is 0; it must be the number of clips, of which the world {self.world.name!r} has no end",
        )
        most = count or self.clips
        check(self.clips <= most, f"drawn.clips is {self.clips}; the world {self.world.name!r} has {most}")
        check(self.held_out >= 0, f"drawn.held_out is {self.held_out}; it must be 0 or more")

    def __str__(self) -> str:
        return f"drawn clips of the world {self.world.name}"

    @property
    def channels(self) -> int:
        """Return the channels of the latents."""
        return 1 if self.grey else 3

    @property
    def first_stage(self) -> str:
        """Return the name of the first stage whose latents these are."""
        return "pixels-grey" if self.grey else "pixels"

    @property
    def training_clips(self) -> int:
        """Return the number of training clips."""
        return self.clips or count_of(self.world) or 0


class DrawnClips(LatentCache):
    """The clips of a world by the functions of a latent cache: `len`, `[i]` -> latent (t, h, w, C), and columns.

    fingerprint: of the first stage of pixels.
    """

    def __init__(self, config: DrawnConfig, fingerprint: str):
        self.config, self.fingerprint = config, fingerprint
        self.path = Path(f"world:{config.world.name}")  # for messages
        self.header = {"clips": config.training_clips + config.held_out}
        self.info = CacheInfo(fingerprint, self.digest, config.channels, (1, 1, 1), low=True)
        self._columns: dict[str, Any] = {}
        self._made: dict[str, Any] = {}

    def __reduce__(self) -> tuple:
        return type(self), (self.config, self.fingerprint)

    @cached_property
    def digest(self) -> str:
        """Return the digest of the clips and their order.

        Fields of the world with their default value do not count, so that it stays the same when a world gains one.
        """
        config, world = self.config, self.config.world
        shown = [(f, getattr(world, f.name)) for f in fields(world) if f.repr]
        chosen = {f.name: value for f, value in shown if value != f.default}
        said = type(world).__name__, chosen, config.clips, config.held_out, config.grey
        return hashlib.sha256(repr(said).encode()).hexdigest()

    def item(self, index: int) -> np.ndarray:
        """Draw the latent (t, h, w, C) of a clip: its pixels in [-1, 1]."""
        return self._latent(draw(self.config.world, self._number(index)))

    __getitem__ = item

    def low(self, index: int) -> np.ndarray:
        """Draw the latent (t, h / 2, w / 2, C) of a clip at half its height and width."""
        return self._latent(shrink(draw(self.config.world, self._number(index)), 2))

    def _latent(self, clip: np.ndarray) -> np.ndarray:
        pixels = clip.astype(np.float32) / 127.5 - 1.0
        return pixels @ _THIRDS if self.config.grey else pixels  # the mean, in a tenth of the time of `mean`

    def column(self, name: str) -> Any:
        """Return a column of the manifest of a latent cache, an Arrow array; it is kept, as it is costly to make."""
        import pyarrow as pa

        if name not in self._made:
            self._made[name] = pa.array(self._values_of(name), schema_of(COLUMNS).field(name).type)
        return self._made[name]

    def _number(self, index: int) -> int:
        """Return the index of a clip in its world; the training clips come first."""
        train = self.config.training_clips
        return int(index) if index < train else HELD_OUT + int(index) - train

    def _values_of(self, name: str) -> Any:
        world, indices = self.config.world, list(map(self._number, range(len(self))))
        columns = {
            "id": lambda: self._ids(indices),
            "uid": lambda: np.array([clip_id_of(id) for id in self._ids(indices)], np.uint32),
            "split": lambda: [split(index) for index in indices],
            "captions": lambda: [list(captions_of(world, index).values()) for index in indices],
            "kinds": lambda: [list(captions_of(world, index)) for index in indices],
            "fps": lambda: np.full(len(indices), world.fps),
            "label": lambda: np.full(len(indices), -1, np.int32),
            "weight": lambda: np.ones(len(indices), np.float32),
            "variant": lambda: np.zeros(len(indices), np.int32),
        }
        sides = {"t": 0, "h": 1, "w": 2, "frames": 0, "height": 1, "width": 2}
        return self._sizes[:, sides[name]] if name in sides else columns[name]()

    def _ids(self, indices: list[int]) -> list[str]:
        return [id_of(self.config.world, index) for index in indices]

    @cached_property
    def _sizes(self) -> np.ndarray:
        """Return the size (T, H, W) of each clip, (n, 3) int32."""
        return np.array([size_of(self.config.world, self._number(index)) for index in range(len(self))], np.int32)
