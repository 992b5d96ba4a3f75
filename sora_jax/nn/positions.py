"""Encode positions from (t, y, x) coordinates inside a clip, never from the index in a pack."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sora_jax.parallel.rules import out_sharding, reshard


def axis_widths(width: int) -> tuple[int, int, int]:
    """Split the even width of a head between t, y and x: 2 * (width // 6) each to y and x, the rest to t (Wan2.1)."""
    space = 2 * (width // 6)
    return width - 2 * space, space, space


def rotary_angles(coords_BL3: jax.Array, width: int, theta: float) -> jax.Array:
    """Return the angles (B, L, width / 2) for `rotate`; pair i of an axis has frequency theta^(-2i / axis width)."""
    parts = []
    for axis, axis_width in enumerate(axis_widths(width)):
        frequencies = theta ** (-jnp.arange(0, axis_width, 2, dtype=jnp.float32) / max(axis_width, 1))
        parts.append(_times(coords_BL3[..., axis], frequencies))
    return jnp.concatenate(parts, axis=-1)


def rotate(x_BLNK: jax.Array, angles_BLK: jax.Array) -> jax.Array:
    """Rotate each pair (i, i + K/2) of every head by its angle (RoPE, 2104.09864), in float32."""
    cos, sin = jnp.cos(angles_BLK)[:, :, None], jnp.sin(angles_BLK)[:, :, None]
    first, second = jnp.split(x_BLNK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return turned.astype(x_BLNK.dtype)


def sincos(positions: jax.Array, width: int, theta: float = 10_000.0) -> jax.Array:
    """Return sines, then cosines, of positions at width / 2 frequencies: (...,) -> (..., width) (1706.03762)."""
    half = width // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = _times(positions, frequencies)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def _times(positions: jax.Array, frequencies: jax.Array) -> jax.Array:
    """Return the angles of every position at every frequency: (...,), (F,) -> (..., F), float32."""
    positions = positions[..., None].astype(jnp.float32)
    return positions * jax.lax.broadcast_to_rank(frequencies, positions.ndim)


def sincos_table(coords_BL3: jax.Array, width: int, theta: float = 10_000.0, axes: str = "tyx") -> jax.Array:
    """Concatenate `sincos` of each of the axes, zero-padded to `width`: (B, L, 3) -> (B, L, width).

    With axes "xy" this is the table of DiT, whose first half is that of x (2212.09748, official code).
    """
    each = 2 * (width // (2 * len(axes)))
    parts = [sincos(coords_BL3[..., "tyx".index(axis)], each, theta) for axis in axes]
    table = jnp.concatenate(parts, axis=-1)
    return jnp.pad(table, ((0, 0), (0, 0), (0, width - each * len(axes))))


def interpolated(table: jax.Array, at: Sequence[jax.Array], shape: Sequence[int]) -> jax.Array:
    """Read a learnt table between its entries, linearly along each axis: (entries, D) -> (B, L, D), float32.

    shape: the axes of the entries, in raster order. at: for each axis the place (B, L) of every token, in entries from
    0; beyond the first and the last entry their values go on.
    """
    weights_BLX = None
    for place_BL, size in zip(at, shape, strict=True):
        place_BL = reshard(place_BL.astype(jnp.float32), "batch", "length")
        place_BL1 = jnp.clip(place_BL, 0, size - 1)[..., None]
        hat_BLX = jax.nn.relu(1 - jnp.abs(place_BL1 - jnp.arange(size, dtype=jnp.float32)[None, None]))
        if weights_BLX is None:
            weights_BLX = hat_BLX
        else:
            product = weights_BLX[..., :, None] * hat_BLX[..., None, :]
            axes = out_sharding("batch", "length", None)
            weights_BLX = jnp.reshape(product, (*place_BL.shape, -1), out_sharding=axes)
    # A product, not a gather: the gradient of a gather is a scatter, which is slow.
    whole = reshard(table.astype(jnp.float32), None, None)
    return jnp.einsum("blx,xd->bld", weights_BLX, whole, out_sharding=out_sharding("batch", "length", "width"))
