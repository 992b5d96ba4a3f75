"""The record that every source ends in."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


def clip_id_of(id: str) -> int:
    """Return the stable 32-bit id of a clip that keys its noise, never 0 (0 marks an empty slot)."""
    return zlib.crc32(id.encode("utf-8", "surrogatepass")) or 1


@dataclass(frozen=True)
class Clip:
    """A captioned clip.

    id: stable, of the content. frames: uint8 (T, H, W, 3). fps: frames a second. captions: kind -> text, such as
    {"original": ..., "synthetic": ...}. source: where it came from. label: class number. start: seconds in its file.
    flags: what a reader should know, such as "partial: ..." of a file used in part.
    """

    id: str
    frames: np.ndarray
    fps: float
    captions: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    label: int | None = None
    start: float = 0.0
    flags: tuple[str, ...] = ()

    def __post_init__(self):
        frames = self.frames
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or self.fps <= 0:
            raise ValueError(f"clip {self.id}: {frames.dtype} {frames.shape} at {self.fps} frames a second")

    @property
    def caption(self) -> str:
        """The first caption, or the empty one."""
        return next(iter(self.captions.values()), "")
