"""Rotary and sin-cos positions: closed forms, an implementation with complex numbers, the relative property."""

import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.nn.positions import axis_widths, rotary_angles, rotate, sincos, sincos_table

THETA = 10_000.0
B, L, N, K = 2, 7, 3, 20


def coordinates(seed=0, high=30):
    return np.random.default_rng(seed).integers(0, high, (B, L, 3)).astype(np.float32)


def heads(seed=0):
    return np.random.default_rng(seed).standard_normal((B, L, N, K), np.float32)


def turned(x, coords):
    return np.asarray(rotate(jnp.asarray(x), rotary_angles(jnp.asarray(coords), K, THETA)))


def test_a_head_is_shared_as_in_wan():
    assert axis_widths(128) == (44, 42, 42)


@pytest.mark.parametrize("width", range(6, 200, 2))
def test_axis_widths_are_even_and_use_the_whole_head(width):
    widths = axis_widths(width)
    assert sum(widths) == width and all(w > 0 and w % 2 == 0 for w in widths) and widths[1] == widths[2]


def test_rotation_is_a_product_with_complex_numbers():
    x, coords = heads(), coordinates()
    angles = []
    for axis, width in enumerate((8, 6, 6)):  # 20 = 20 - 4 * (20 // 6) + 2 * 6
        angles.append(coords[..., axis, None] * THETA ** (-np.arange(0, width, 2) / width))
    turn = np.exp(1j * np.concatenate(angles, -1).astype(np.float64))[:, :, None]
    pairs = (x[..., : K // 2] + 1j * x[..., K // 2 :]) * turn
    np.testing.assert_allclose(turned(x, coords), np.concatenate([pairs.real, pairs.imag], -1), atol=1e-5)


def test_rotation_keeps_the_norm_and_the_origin():
    x, coords = heads(), coordinates()
    np.testing.assert_allclose(np.linalg.norm(turned(x, coords), axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6)
    np.testing.assert_array_equal(turned(x, 0 * coords), x)


@pytest.mark.parametrize("shift", [(1, 0, 0), (0, 5, 0), (0, 0, 9), (4, 2, 7)])
def test_scores_depend_on_differences_of_coordinates_alone(shift):
    q, k, coords = heads(0), heads(1), coordinates()

    def scores(coords):
        return np.einsum("blnk,bmnk->bnlm", turned(q, coords), turned(k, coords))

    np.testing.assert_allclose(scores(coords + np.float32(shift)), scores(coords), atol=5e-5)


@pytest.mark.parametrize("axis", range(3))
def test_each_axis_moves_the_scores(axis):
    q, k, coords = heads(0), heads(1), coordinates()
    step = np.eye(3, dtype=np.float32)[axis]
    dot = lambda a, b: (turned(q, a) * turned(k, b)).sum(-1)  # noqa: E731
    assert np.abs(dot(coords, coords + step) - dot(coords, coords)).max() > 0.1


def test_rotation_is_taken_in_float32():
    x, coords = jnp.asarray(heads(), jnp.bfloat16), coordinates(high=4000)
    angles = rotary_angles(jnp.asarray(coords, jnp.float32), K, THETA)
    out = rotate(x, angles)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, rotate(x.astype(jnp.float32), angles).astype(jnp.bfloat16))


def test_sincos_is_the_published_row():
    """Row (y = 0, x = 1) of MAE's table of width 8 (2111.06377, official code)."""
    np.testing.assert_allclose(sincos(jnp.asarray(1), 4), [0.8415, 0.01, 0.5403, 1.0], atol=1e-4)
    np.testing.assert_allclose(sincos(jnp.asarray(0), 4), [0, 0, 1, 1])


def test_sincos_of_a_sum_is_a_rotation_of_the_parts():
    """sin(a + b) = sin a cos b + cos a sin b, and the same for the cosine: no frequency depends on position."""
    a, b = np.arange(12.0), np.float64(7.5)
    (sin_a, cos_a), (sin_b, cos_b) = (np.split(np.asarray(sincos(jnp.asarray(p), 16)), 2, -1) for p in (a, b))
    expected = np.concatenate([sin_a * cos_b + cos_a * sin_b, cos_a * cos_b - sin_a * sin_b], -1)
    np.testing.assert_allclose(sincos(jnp.asarray(a + b), 16), expected, atol=1e-5)


def test_sincos_table_is_one_table_per_axis():
    coords = coordinates()
    table = np.asarray(sincos_table(jnp.asarray(coords), 20))
    assert table.shape == (B, L, 20) and not table[..., 18:].any()
    for axis in range(3):
        angles = coords[..., axis, None] * THETA ** (-np.arange(3) / 3)
        expected = np.concatenate([np.sin(angles), np.cos(angles)], -1)
        np.testing.assert_allclose(table[..., 6 * axis : 6 * axis + 6], expected, atol=1e-5)
