"""Positions from real (t, y, x) coordinates, never from the place in a pack."""

import jax
import jax.numpy as jnp


def axis_widths(width: int) -> tuple[int, int, int]:
    """How a head of even `width` is shared between t, y and x: two thirds to space, in pairs.

    The split of Wan2.1: y and x get 2 * (width // 6) each, t the rest.
    """
    space = 2 * (width // 6)
    return width - 2 * space, space, space


def rotary_angles(coords_BL3: jax.Array, width: int, theta: float) -> jax.Array:
    """Angles (B, L, width / 2) for `rotate`; each axis turns its own pairs at theta^(-2i / axis width)."""
    parts = []
    for axis, axis_width in enumerate(axis_widths(width)):
        frequencies = theta ** (-jnp.arange(0, axis_width, 2, dtype=jnp.float32) / max(axis_width, 1))
        parts.append(coords_BL3[..., axis, None].astype(jnp.float32) * frequencies)
    return jnp.concatenate(parts, axis=-1)


def rotate(x_BLNK: jax.Array, angles_BLK: jax.Array) -> jax.Array:
    """Turns each pair (i, i + K/2) of every head by its angle (RoPE, 2104.09864), in float32."""
    cos, sin = jnp.cos(angles_BLK)[:, :, None], jnp.sin(angles_BLK)[:, :, None]
    first, second = jnp.split(x_BLNK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return turned.astype(x_BLNK.dtype)


def sincos(positions: jax.Array, width: int, theta: float = 10_000.0) -> jax.Array:
    """Sines then cosines of a position at width / 2 frequencies: (...,) -> (..., width)."""
    half = width // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def sincos_table(coords_BL3: jax.Array, width: int, theta: float = 10_000.0, axes: str = "tyx") -> jax.Array:
    """`sincos` of each of the axes, side by side, zero-filled to `width`: (B, L, 3) -> (B, L, width).

    axes "xy" is the table of DiT, whose first half is that of x (2212.09748, official code).
    """
    each = 2 * (width // (2 * len(axes)))
    parts = [sincos(coords_BL3[..., "tyx".index(axis)], each, theta) for axis in axes]
    table = jnp.concatenate(parts, axis=-1)
    return jnp.pad(table, ((0, 0), (0, 0), (0, width - each * len(axes))))
