"""Seam ratios against clips whose joins are known."""

import numpy as np

from sora_jax.evaluate.seams import closure, seam


def sliding(frames, speed=1.0, start=0.0, width=32):
    """A sine that moves to the right, periodic in the width of the picture."""
    x = np.arange(width)[None] - (start + speed * np.arange(frames))[:, None]
    line = 127.5 + 120 * np.sin(2 * np.pi * x / width)
    return np.broadcast_to(line[:, None, :, None], (frames, 16, width, 3)).round().astype(np.uint8)


def test_a_join_like_any_other_has_ratio_1():
    found = seam(sliding(17), 9)
    assert abs(found.ratio - 1) < 0.02 and abs(found.quarter - 1) < 0.1 and found.motion > 5


def test_a_jump_is_seen_as_large_as_it_is():
    jumped = np.concatenate([sliding(8), sliding(8, start=10)])  # three steps at once
    assert abs(seam(jumped, 8).ratio - 3) < 0.15
    assert abs(seam(jumped, 5).ratio - 1) < 0.05


def test_a_change_of_velocity_is_a_jolt():
    turned = np.concatenate([sliding(8), sliding(8, speed=-1.0, start=6)])
    assert seam(turned, 8).jolt > 5 and seam(turned, 8).ratio < 1.1


def test_a_stall_in_a_quarter_is_not_hidden_by_the_rest():
    clip = sliding(16)
    clip[8:, :8, :16] = np.roll(clip[8:, :8, :16], 2, axis=1)[::-1]
    assert seam(clip, 8).quarter > seam(clip, 8).ratio + 0.5


def test_a_period_closes_and_less_does_not():
    assert abs(closure(sliding(32)).ratio - 1) < 0.02
    assert closure(sliding(24)).ratio > 4


def test_a_still_clip_has_no_ratio():
    still = np.full((9, 16, 16, 3), 70, np.uint8)
    assert np.isnan(seam(still, 4).ratio) and np.isnan(closure(still).ratio)
