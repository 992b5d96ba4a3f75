"""Run a causal network on a clip chunk by chunk: every causal operation keeps the frames that the next chunk needs.

The result is that of the whole clip, whatever the chunks, and the memory does not grow with the clip's length. One
compiled program serves the first chunk of a clip and all others, since which clips begin is data. So a chunk always
has whole groups of frames: the first group of an encoder's clip is its first frame, repeated; of a decoder's first
group only the last frame belongs to the clip.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sora_jax.parallel.rules import parts, reshard


def clip_axes(rows: int) -> tuple[str | None, ...]:
    """Return the logical axes of clips with so many rows: rows that the mesh cannot split evenly are not split."""
    return "batch", "time", None if rows % parts("height") else "height", "breadth", "channels"


def spread(x_BTHWC: jax.Array) -> jax.Array:
    """Reshard clips by their `clip_axes`; return them unchanged if no mesh is set."""
    return reshard(x_BTHWC, *clip_axes(x_BTHWC.shape[2]))


class Past:
    """Hold the last frames that each causal operation has seen, in the order in which the network calls them.

    first_B: True for clips that begin with this chunk; what is kept from before them is of another clip.
    cache: `Past.next` of the chunk before; None if there was none, when all clips begin.

    After the network has run, `next` is the cache for the next chunk: a list of arrays with static shapes, so that it
    can be the carry of `jax.lax.scan`.
    """

    def __init__(self, first_B: jax.Array, cache: Sequence[jax.Array] | None = None):
        self._first_B11 = jnp.reshape(first_B, (-1, 1, 1, 1, 1))
        self._cache = None if cache is None else iter(cache)
        self.next: list[jax.Array] = []

    def extend(self, x_BTHWC: jax.Array, count: int, zeros: bool = False) -> jax.Array:
        """Return the chunk behind the last `count` frames before it: (B, count + T, H, W, C).

        Before a clip that begins are copies of its first frame, or `zeros`.
        """
        if count == 0:
            return x_BTHWC
        x_BTHWC = spread(x_BTHWC)
        start = jnp.repeat(jnp.zeros_like(x_BTHWC[:, :1]) if zeros else x_BTHWC[:, :1], count, axis=1)
        before = start if self._cache is None else self.where_first(start, spread(next(self._cache)))
        extended = jnp.concatenate([before, x_BTHWC], axis=1)
        self.next.append(extended[:, -count:])
        return extended

    def where_first(self, beginning: jax.Array, going_on: jax.Array) -> jax.Array:
        """Select by clip: `beginning` for those that begin with this chunk, else `going_on`."""
        return jnp.where(spread(self._first_B11), beginning, going_on)

    def repeat_last_of_first_group(self, x_BTHWC: jax.Array, group: int) -> jax.Array:
        """Replace the first `group` frames of clips that begin by the last of them, the only one that is the clip's."""
        if group == 1:
            return x_BTHWC
        head = jnp.repeat(x_BTHWC[:, group - 1 : group], group, axis=1)
        return self.where_first(jnp.concatenate([head, x_BTHWC[:, group:]], axis=1), x_BTHWC)
