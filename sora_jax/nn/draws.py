"""Random draws that belong to the clips of a batch."""

from collections.abc import Callable
from typing import Any

import jax


def per_clip(draw: Callable[[jax.Array], Any], key: jax.Array, clips: int) -> Any:
    """Return `draw(key)` of each clip, (clips, ...), each with a key of its own.

    key: one for all clips, which is split, or one for each, (clips,): then a clip's draw does not depend on the others.
    """
    return jax.vmap(draw)(key if key.ndim else jax.random.split(key, clips))
