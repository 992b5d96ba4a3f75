"""Consistency of clips over time: 1 where the world renders them, and less exactly where they are spoilt."""

from dataclasses import replace

import numpy as np
import pytest

from sora_jax.evaluate import looks as look
from sora_jax.evaluate.consistency import average, in_worlds_words, mean_curve, measure, permanence
from sora_jax.worlds import FULL_WORLD, clip, scene
from sora_jax.worlds.captions import LEVELS, write
from sora_jax.worlds.oracle import read_frames
from sora_jax.worlds.render import render
from sora_jax.worlds.scenes import wanted

WORLD = replace(FULL_WORLD, sizes=((36, 48), (48, 36)), frames=(9,), image_share=0.0, max_shapes=2, scale=(0.34, 0.48))
PASSES = replace(WORLD, motions=("pass", "pass", "pass", "still"), cameras=("still",), backgrounds=("plain",))
MOVES = replace(
    WORLD, max_shapes=1, motions=("move",), cameras=("still",), backgrounds=("plain",), colours=("red", "green")
)


def scenes(world, count, keep=lambda planned: True):
    """Return the first scenes of a world that are kept."""
    return [planned for i in range(40 * count) if keep(planned := scene(world, i))][:count]


def passing(count):
    return scenes(PASSES, count, lambda planned: planned.shapes[0].motion == "pass")


def recoloured(planned, colour, first, shape=0, kind=None):
    """Render a scene in which a shape has another colour or kind from frame `first` on."""
    old = planned.shapes[shape]
    shapes = list(planned.shapes)
    shapes[shape] = replace(old, colour=colour or old.colour, kind=kind or old.kind)
    frames = render(planned).copy()
    frames[first:] = render(replace(planned, shapes=tuple(shapes)))[first:]
    return frames


def test_real_clips_agree_and_stay_what_they_are():
    """All motions, cameras and backgrounds: what falls short of 1 is the ruler's own error."""
    found = average([measure(caption, frames) for frames, caption in (clip(WORLD, i) for i in range(24))])
    assert set(found.agreement.values()) == {1.0}
    assert found.constancy["identity_by_frame"] == found.constancy["shape"] == found.constancy["identity_last"] == 1.0
    assert all(set(curve) == {1.0} and len(curve) == 9 for curve in found.curves.values())
    assert found.constancy["physics_error"] < 0.005 and found.looks["flicker"] == 1.0


def test_a_frozen_clip_is_consistent_and_does_not_move():
    planned = scenes(MOVES, 1)[0]
    frames = render(planned)
    moving, still = measure(planned.caption, frames).looks, measure(planned.caption, frames[:1].repeat(9, 0)).looks
    for name in ("subject", "background", "flicker", "smoothness"):
        assert getattr(still, name) == pytest.approx(1.0, abs=1e-6) and getattr(moving, name) < 1.0 + 1e-6, name
    assert (still.motion, still.dynamic) == (0.0, 0.0) and moving.dynamic == 1.0 and moving.motion > 0.05


@pytest.mark.parametrize("first", [1, 4, 8])
def test_another_colour_is_caught_at_the_very_frame(first):
    planned = scenes(MOVES, 1)[0]
    other = {"red": "green", "green": "red"}[planned.shapes[0].colour]
    frames = recoloured(planned, other, first)
    found = measure(planned.caption, frames)
    wanted_T = (np.arange(9) < first).astype(float)
    for curve_T in (found.agreement_T, found.identity_T, found.shape_T):
        np.testing.assert_array_equal(curve_T, wanted_T)
    assert found.looks.subject < measure(planned.caption, render(planned)).looks.subject - 0.05


def test_of_two_shapes_one_may_change():
    planned = scenes(WORLD, 1, lambda p: len(p.shapes) == 2 and p.shapes[0].motion != "pass" and p.camera == "still")[0]
    kind = "star" if planned.shapes[1].kind != "star" else "ring"
    found = measure(planned.caption, recoloured(planned, None, 5, shape=1, kind=kind))
    assert found.identity_T.tolist() == found.agreement_T.tolist() == [1.0] * 5 + [0.5] * 4
    assert found.shape_T.tolist() == [1.0] * 5 + [0.0] * 4


def test_a_second_part_changes_the_shapes_but_not_who_they_are():
    planned = scenes(MOVES, 1, lambda p: p.shapes[0].kind == "square" and p.width > p.height)[0]
    small = replace(planned, shapes=(replace(planned.shapes[0], diameter=0.3, start=(0.2, 0.2), travel=(0.0, 0.0)),))
    large = replace(planned, shapes=(replace(planned.shapes[0], diameter=0.3, start=(1.1, 0.8), travel=(0.0, 0.0)),))
    twice = np.where(render(small) != render(small)[0, -1, -1], render(small), render(large))
    found = measure(planned.caption, np.concatenate([render(small)[:6], twice[6:]]))
    assert found.identity_T.tolist() == [1.0] * 9 and found.shape_T.tolist() == [1.0] * 6 + [0.0] * 3


def test_what_passes_behind_comes_out_the_same():
    for planned in passing(8):
        found = measure(planned.caption, render(planned))
        assert found.passes and found.covered and found.same, planned.caption


@pytest.mark.parametrize("spoilt", ["colour", "kind", "gone"])
def test_what_comes_out_different_is_not_the_same(spoilt):
    for planned in passing(4):
        front, behind = planned.shapes
        colour = next(c for c in ("green", "purple", "yellow") if c not in (front.colour, behind.colour))
        kind = "cross" if behind.kind != "cross" else "circle"
        frames = render(planned)
        if spoilt == "gone":
            frames[5:] = render(replace(planned, shapes=(front,)))[5:]
        else:
            frames = recoloured(
                planned, *{"colour": (colour, 5), "kind": (None, 5)}[spoilt], 1, kind * (spoilt == "kind")
            )
        assert permanence(frames, read_frames(frames)) == (True, False), planned.caption


def test_a_pass_that_is_not_shown_counts_for_nothing():
    planned = passing(1)[0]
    frames = render(planned)[:1].repeat(9, 0)
    assert permanence(frames, read_frames(frames)) == (False, True)
    found = average([measure(planned.caption, frames)])
    assert found.permanence == {"prompts": 1.0, "covered": 0.0, "same_after": None}
    assert permanence(frames[:2], read_frames(frames[:2])) == (False, False)


def test_a_shape_that_shrinks_alone_is_not_covered():
    planned = passing(1)[0]
    behind = replace(planned.shapes[1], start=(0.3, 0.3))
    front = replace(planned.shapes[0], start=(1.0, 0.7), travel=(0.0, 0.0), motion="still", diameter=0.3)
    apart, small = (
        replace(planned, height=36, width=48, shapes=(front, b)) for b in (behind, replace(behind, diameter=0.25))
    )
    frames = render(apart)
    frames[3:6] = render(small)[3:6]
    assert permanence(frames, read_frames(frames)) == (False, True)


def test_a_shape_that_vanishes_far_from_others_is_not_covered():
    planned = passing(1)[0]
    front = replace(planned.shapes[0], start=(1.0, 0.7), travel=(0.0, 0.0), motion="still", diameter=0.3)
    both = replace(planned, height=36, width=48, shapes=(front, replace(planned.shapes[1], start=(0.3, 0.3))))
    frames = render(both)
    gone = render(replace(both, shapes=(front,)))
    for end in (6, 9):
        frames[3:end] = gone[3:end]
        assert not permanence(frames, read_frames(frames))[0]


def test_a_shape_that_vanishes_beside_another_is_covered():
    planned = passing(1)[0]
    front = replace(planned.shapes[0], start=(0.75, 0.5), travel=(0.0, 0.0), motion="still", diameter=0.4)
    behind = replace(planned.shapes[1], start=(0.45, 0.5), diameter=0.4)
    frames = render(replace(planned, height=36, width=48, shapes=(front, behind)))
    assert permanence(frames, read_frames(frames)) == (False, True)
    frames[3:6] = render(replace(planned, height=36, width=48, shapes=(front,)))[3:6]
    assert permanence(frames, read_frames(frames)) == (True, True)


def test_flicker_has_its_closed_form():
    base, mask = np.full((8, 10, 12, 3), 100.0, np.float32), np.ones((8, 10, 12), bool)
    alternate = np.array([1.0, -1.0] * 4, np.float32)[:, None, None, None]
    assert look.flicker(base + 5 * alternate, mask) == pytest.approx(1 - 10 / 255)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (8, 50, 60, 3))
    assert look.flicker(100 + 5 * signs, np.ones((8, 50, 60), bool)) == pytest.approx(1 - 5 / 255, abs=2e-4)
    half = mask.copy()
    half[:, :, 6:] = False
    spoilt = base.copy()
    spoilt[::2, :, 6:] = 0  # outside of the mask
    assert look.flicker(spoilt, half) == 1.0 and np.isnan(look.flicker(base, ~mask))


def test_a_moving_camera_is_no_flicker():
    frames = np.zeros((9, 36, 48, 3), np.uint8)
    frames[::2] = 30
    still, pans = (
        measure(f"a red circle stays still on a textured grey background{end}", frames)
        for end in ("", " while the camera pans left")
    )
    assert average([pans]).looks["flicker"] is None
    assert average([still, pans]).looks["flicker"] == pytest.approx(still.looks.flicker) == pytest.approx(1 - 30 / 255)


def test_consistency_is_the_mean_of_the_similarities_to_previous_and_first():
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 255, (2, 20, 20, 3)).astype(np.float32) * np.array([1.0, 0.3])[:, None, None, None]
    frames, mask = np.stack([one, one, other, other]), np.ones((4, 20, 20), bool)
    a_F, _, b_F, _ = look.features(frames, mask)
    s = float(a_F @ b_F)
    assert s < 0.9
    assert look.consistency(frames, mask) == pytest.approx((1 + s + (1 + s) / 2) / 3)
    mask[2:] = False  # the subject is gone
    assert look.consistency(frames, mask) == pytest.approx(1 / 3)
    assert np.isnan(look.consistency(frames, mask & False))


def sliding(frames, speed, side=40):
    """A texture that slides to the right by `speed` pixels a frame, uint8 (T, side, side, 3)."""
    y, x = np.mgrid[:side, : 4 * side]
    wide = np.random.default_rng(1).integers(0, 255, (side, 4 * side, 3))
    wide = wide * 0.5 + 60 * np.sin(x / 3 + y / 5)[..., None] * 0.5 + 60
    starts = [2 * side - t * speed for t in range(frames)]
    return np.stack([wide[:, start : start + side] for start in starts]).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("speed", [0, 1, 3, 5])
def test_motion_is_in_short_sides_a_frame(speed):
    found = look.looks(sliding(5, speed))
    assert found.motion == pytest.approx(speed / 40, abs=0.01 * (speed > 0)) and found.dynamic == float(speed > 0)


def test_frames_between_are_interpolated_along_the_motion():
    frames = sliding(3, 2).astype(np.float32)
    made = look.interpolate(frames[:1], frames[2:])[0]
    inside = np.s_[8:-8, 8:-8]
    error, blend = (np.abs(x - frames[1])[inside].mean() for x in (made, (frames[0] + frames[2]) / 2))
    assert error < 0.1 < 20 < blend
    jerky = np.concatenate([sliding(9, 2)[[t - t % 2]] for t in range(9)])  # every second frame is that before
    assert look.looks(jerky).smoothness < look.looks(sliding(9, 2)).smoothness - 0.03


def test_a_drift_of_a_level_is_no_motion():
    """On a ramp it looks like one: the window a pixel further matches exactly."""
    ramp = np.broadcast_to(60 + np.arange(40)[None, None, :, None], (5, 40, 40, 3))
    frames = (ramp + np.arange(5)[:, None, None, None]).astype(np.uint8)
    assert look.looks(frames).motion == 0.0


def test_large_frames_are_pooled():
    """Twice the size at twice the speed, which is beyond the reach of the search in pixels, is the same motion."""
    small = sliding(4, 4, side=72)
    large = small.repeat(2, 1).repeat(2, 2)
    assert look.looks(large).motion == pytest.approx(look.looks(small).motion, rel=0.05)


def test_the_worlds_words_are_known():
    for planned in scenes(WORLD, 6):
        assert all(in_worlds_words(write(wanted(planned), level)) for level in LEVELS)
    for caption in ("a fox runs", "a black square moves right", "a red square dances", ""):
        assert not in_worlds_words(caption)


def test_curves_of_several_lengths_are_averaged_frame_by_frame():
    assert mean_curve([np.array([1.0, 0.0]), np.array([0.0, 1.0, 0.5]), None]) == [0.5, 0.5, 0.5]
    assert mean_curve([np.ones(2), np.zeros(3)]) == [0.5, 0.5, 0.0] and mean_curve([]) == []


def test_without_the_oracle_only_the_looks_are_left():
    found = average([measure("a fox runs", sliding(5, 2), oracle=False)])
    assert found.looks["motion"] > 0 and not found.curves["identity"]
    assert set(found.agreement.values()) | set(found.constancy.values()) == {None}
