"""Windows of clips: segments of their own, and an order of tokens in which each window lies together.

W.A.L.T (2312.06662, 3.2) alternates spatial windows, (1, h, w) of one frame, and spatiotemporal ones, (1 + t, h', w')
of a part of all frames. Attention needs nothing new for them: a window is a segment. The order is for speed alone,
since blockwise attention skips blocks, and the tokens of a window that is not a whole frame lie apart in a pack
(`models.walt`):

    place = Place(window_segments(Place(pack.segments_BL, pack.coords_BL3), (None, 8, 8)))    once per step
    order = window_order(place.segments_BL)
    x_BLD = reorder(x_BLD, order)                        and what else is per token: place, angles, rows
    ...                                                  blocks with attention(q, k, v, Places(place, place))
    x_BLD = reorder(x_BLD, order.inverse())
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import linear_call

from sora_jax.nn.attention import Place
from sora_jax.parallel.rules import reshard

Window = tuple[float | None, float | None, float | None]


class Order(NamedTuple):
    """An order of the tokens of each pack: source_BL, the old position at each new one; target_BL, the inverse."""

    source_BL: jax.Array
    target_BL: jax.Array

    def inverse(self) -> "Order":
        """Return the order that leads back."""
        return Order(self.target_BL, self.source_BL)


def window_segments(place: Place, window: Window) -> jax.Array:
    """Return a number for each window of each clip: a place with coordinates (B, L) -> segments (B, L).

    window: its size in (t, y, x), in the units of the coordinates; None is all of an axis. Windows start at coordinate
    0 and do not overlap; the last of an axis holds what is left. Numbers count from 1, by clip, then in raster order of
    the windows; padding (segment 0) stays 0. Clips may have any sizes: none has to be known.
    """
    segments_BL, coords_BL3 = _whole(place.segments_BL), _whole(place.coords_BL3)
    sizes = [(axis, size) for axis, size in enumerate(window) if size is not None]
    at = [jnp.floor(coords_BL3[..., axis] / size).astype(jnp.int32) for axis, size in sizes]
    # Numbers are ranks among the windows that are there, so they need no table of clips' sizes.
    keys = [_padding_last(segments_BL), *at]
    position_BL = _whole(jnp.broadcast_to(jnp.arange(segments_BL.shape[1], dtype=jnp.int32), segments_BL.shape))
    *keys, source_BL = jax.lax.sort((*keys, position_BL), dimension=1, num_keys=len(keys))
    begins = sum(jnp.diff(key, axis=1, prepend=key[:, :1]) != 0 for key in keys) > 0
    number_BL = _take(1 + jnp.cumsum(begins, axis=1, dtype=jnp.int32), jnp.argsort(source_BL, axis=1))
    return reshard(jnp.where(segments_BL == 0, 0, number_BL), "batch", "length")


def apart(segments_BL: jax.Array, marked_BL: jax.Array) -> jax.Array:
    """Give each marked token a segment of its own, behind all others: it attends to itself alone."""
    length = segments_BL.shape[1]
    own_BL = jnp.broadcast_to(length + 1 + jnp.arange(length, dtype=segments_BL.dtype), segments_BL.shape)
    return jnp.where(marked_BL, reshard(own_BL, "batch", "length"), segments_BL)


def window_order(segments_BL: jax.Array) -> Order:
    """Return the order by segment, padding last; the tokens of a segment stay as they stood."""
    source_BL = jnp.argsort(_padding_last(_whole(segments_BL)), axis=1, stable=True)
    return Order(source_BL, jnp.argsort(source_BL, axis=1))


def reorder(x_BLX: jax.Array, order: Order) -> jax.Array:
    """Return the tokens (B, L, ...) in an order. On a mesh the axes after L are not split."""
    # The transpose of a gather would be a scatter, which is slow everywhere; of a permutation it is a gather, too.
    moved = linear_call(
        lambda order, x: _take(x, order.source_BL), lambda order, x: _take(x, order.target_BL), order, _whole(x_BLX)
    )
    return reshard(moved, "batch", "length", *[None] * (moved.ndim - 2))


def _take(x_BLX, index_BL):
    return jax.vmap(lambda x, index: x.at[index].get(mode="promise_in_bounds"))(x_BLX, index_BL)


def _padding_last(segments_BL):
    return jnp.where(segments_BL == 0, jnp.iinfo(segments_BL.dtype).max, segments_BL)


def _whole(x_BLX):
    """Bring whole sequences to every device: a sort and a permutation reach over all of them."""
    return reshard(x_BLX, "batch", "keys", *[None] * (x_BLX.ndim - 2))
