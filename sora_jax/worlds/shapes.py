"""The embedded world of moving shapes by the functions that all worlds have."""

import numpy as np

from sora_jax.worlds import scenes
from sora_jax.worlds.scenes import WorldConfig


def draw(config: WorldConfig, index: int) -> np.ndarray:
    """Draw the frames (T, H, W, 3), uint8, of a clip."""
    return scenes.clip(config, index)[0]


def captions_of(config: WorldConfig, index: int) -> dict[str, str]:
    """Return the captions of a clip, kind -> text: its "original" one first."""
    return scenes.captions_of(config, scenes.scene(config, index))


def size_of(config: WorldConfig, index: int) -> tuple[int, int, int]:
    """Return the size (T, H, W) of a clip, which is not drawn."""
    scene = scenes.scene(config, index)
    return scene.frames, scene.height, scene.width


def count_of(config: WorldConfig) -> int | None:
    """Return the number of training clips: None, there is no end of them."""
    return None
