"""All worlds behind one set of functions: clips drawn on demand, each a pure function of (config, index).

The class of the config selects the module. A world is a module with `draw`, `captions_of`, `size_of` and `count_of`, a
config with the fields or properties `name`, `seed`, `fps` and `sizes` (every (height, width) that a clip may have), and
one line in `MODULES`. Training clips have the indices 0, 1, 2, ...; held-out clips HELD_OUT, HELD_OUT + 1, ...
"""

import hashlib
from types import ModuleType
from typing import Annotated

import numpy as np

from sora_jax.config import OneOf
from sora_jax.worlds import moving_mnist, phyworld, shapes
from sora_jax.worlds.moving_mnist import MovingMnistConfig
from sora_jax.worlds.phyworld import PhyworldConfig
from sora_jax.worlds.scenes import FULL_WORLD, WorldConfig

MODULES: dict[type, ModuleType] = {WorldConfig: shapes, PhyworldConfig: phyworld, MovingMnistConfig: moving_mnist}
AnyWorld = Annotated[WorldConfig | PhyworldConfig | MovingMnistConfig, OneOf(MODULES)]

# Variants by the names that `sora-jax data build --world` takes.
NAMED: dict[str, AnyWorld] = {
    "simple": WorldConfig(),
    "full": FULL_WORLD,
    "phyworld": PhyworldConfig(),
    "phyworld:parabola": PhyworldConfig(scenario="parabola"),
    "phyworld:collision": PhyworldConfig(scenario="collision"),
    "moving_mnist": MovingMnistConfig(),
    "moving_mnist:stochastic": moving_mnist.STOCHASTIC,
}


def draw(config: AnyWorld, index: int) -> np.ndarray:
    """Draw the frames (T, H, W, 3), uint8, of a clip, the same on every call and every machine."""
    return MODULES[type(config)].draw(config, index)


def captions_of(config: AnyWorld, index: int) -> dict[str, str]:
    """Return the captions of a clip, kind -> text: its "original" one first."""
    return MODULES[type(config)].captions_of(config, index)


def size_of(config: AnyWorld, index: int) -> tuple[int, int, int]:
    """Return the size (T, H, W) of a clip, which is not drawn."""
    return MODULES[type(config)].size_of(config, index)


def count_of(config: AnyWorld) -> int | None:
    """Return the number of training clips; None where there is no end of them."""
    return MODULES[type(config)].count_of(config)


def id_of(config: AnyWorld, index: int) -> str:
    """Return the stable id of a clip, which no clip of another world or variant has."""
    variant = hashlib.blake2b(repr(config).encode(), digest_size=4).hexdigest()
    return f"world/{variant}/{index}"
