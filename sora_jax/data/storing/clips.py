"""Hold a clip in memory: what every source ends in."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


def clip_id_of(id: str) -> int:
    """Return the stable 32-bit id of a clip that keys its noise, never 0 (0 marks an empty slot)."""
    return zlib.crc32(id.encode("utf-8", "surrogatepass")) or 1


@dataclass(frozen=True)
class Clip:
    """A captioned clip."""

    id: str  # stable, of the content
    frames: np.ndarray  # uint8 (T, H, W, 3)
    fps: float  # frames a second
    captions: Mapping[str, str] = field(default_factory=dict)  # kind -> text, {"original": ..., "synthetic": ...}
    source: str = ""  # name of the source
    label: int | None = None  # class number
    start: float = 0.0  # seconds in its file
    flags: tuple[str, ...] = ()  # what a reader should know, such as "partial: ..." of a file used in part

    def __post_init__(self):
        frames = self.frames
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or self.fps <= 0:
            raise ValueError(f"clip {self.id}: {frames.dtype} {frames.shape} at {self.fps} frames a second")

    @property
    def caption(self) -> str:
        """First caption, or the empty one."""
        return next(iter(self.captions.values()), "")
