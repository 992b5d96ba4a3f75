"""Diversity: closed forms, real clips against real clips, clips of a caption against plain rejection."""

from dataclasses import asdict, replace

import numpy as np
import pytest
from scipy import stats

from sora_jax.errors import UserError
from sora_jax.evaluate.diversity import Diversity, diversity, mean_diversity, spread, world_clips
from sora_jax.worlds import WorldConfig, clip, scene, wanted
from sora_jax.worlds.captions import write
from sora_jax.worlds.oracle import agreement
from sora_jax.worlds.render import render

WORLD = WorldConfig(
    sizes=((24, 24), (24, 36)),
    backgrounds=("plain",),
    shapes=("circle", "square"),
    motions=("move", "move", "still"),
    scale=(0.5, 0.7),
)
# Few words, so that rejection finds a caption soon.
FEW = replace(WORLD, sizes=((24, 36),), frames=(5,), image_share=0.0, colours=("red", "blue"), tones=("white", "grey"))
CAPTION = "a red circle moves left on a plain white background"
SIZE = (5, 24, 36)


@pytest.fixture(scope="module")
def real():
    return world_clips(WORLD, CAPTION, SIZE, 240)


def test_real_clips_are_as_diverse_as_real_clips(real):
    found = diversity(real[:120], real[120:])
    assert found.counted == 1.0
    for name in ("start", "size", "path"):
        assert getattr(found, name) == pytest.approx(1.0, abs=0.2), name


def test_copies_have_no_diversity(real):
    found = diversity([real[0]] * 8, real[:40])
    assert asdict(found) == pytest.approx({"start": 0, "size": 0, "path": 0, "counted": 1}, abs=1e-6)


def test_each_measure_is_of_its_own_fact():
    """Scenes whose starts, sizes or travels are drawn together to half their spread have half the diversity."""
    scenes = [planned for index in range(3000) if (planned := scene(FEW, index)).caption == CAPTION][:24]
    shapes = [planned.shapes[0] for planned in scenes]
    own = [render(planned) for planned in scenes]

    def halved(name):
        middle = np.mean([getattr(shape, name) for shape in shapes], axis=0)
        moved = [np.add(getattr(shape, name), middle) / 2 for shape in shapes]
        values = [float(m) if np.ndim(m) == 0 else tuple(m) for m in moved]
        pairs = zip(scenes, shapes, values, strict=True)
        return [render(replace(planned, shapes=(replace(shape, **{name: v}),))) for planned, shape, v in pairs]

    for name, fact in {"start": "start", "travel": "path", "diameter": "size"}.items():
        found = asdict(diversity(halved(name), own))
        for other in ("start", "path", "size"):
            assert found[other] == pytest.approx(0.5 if other == fact else 1.0, abs=0.06), (name, other)


def test_spread_is_in_short_sides():
    scenes = [planned for index in range(2000) if (planned := scene(FEW, index)).caption == CAPTION][:12]
    found = spread([render(planned) for planned in scenes])
    starts = np.array([planned.shapes[0].start for planned in scenes])
    sides = np.array([planned.shapes[0].diameter for planned in scenes]) * np.sqrt(np.pi) / 2
    assert found.start == pytest.approx(np.sqrt(starts.var(0, ddof=1).sum()), rel=0.03)
    assert found.size == pytest.approx(sides.std(ddof=1), rel=0.05)


def test_clips_of_a_caption_are_those_that_rejection_keeps():
    """The words of the caption are drawn no more, but taken: places, sizes and paths are distributed as before."""
    rejected = [planned.shapes[0] for index in range(9000) if (planned := scene(FEW, index)).caption == CAPTION]
    found = [_measured(frames) for frames in world_clips(FEW, CAPTION, SIZE, 150)]
    wanted_values = [(*shape.start, shape.diameter, shape.travel[0]) for shape in rejected]
    assert len(rejected) > 100
    for one, other in zip(np.transpose(found), np.transpose(wanted_values), strict=True):
        assert stats.ks_2samp(one, other).pvalue > 0.01


def _measured(frames):
    """Start, diameter and travel of a red circle on white, from the pixels."""
    cover = (236 - frames[..., 2].astype(float)) / (236 - 35)
    y, x = np.mgrid[:24, :36] + 0.5
    mass = cover.sum((1, 2))
    centres = [(cover * axis).sum((1, 2)) / mass / 24 for axis in (x, y)]
    return centres[0][0], centres[1][0], np.sqrt(mass[0] * 4 / np.pi) / 24, centres[0][-1] - centres[0][0]


@pytest.mark.parametrize(
    "caption, size",
    [
        ("a red circle moves left", SIZE),
        ("blue square", (9, 24, 24)),
        ("A cyan square on a plain sand background", (1, 24, 24)),
    ],
)
def test_clips_of_a_caption_show_it_at_its_size(caption, size):
    clips = world_clips(WORLD, caption, size, 8)
    assert all(frames.shape[:3] == size and agreement(caption, frames).all for frames in clips)
    assert len({frames.tobytes() for frames in clips}) == 8
    assert len({tuple(frames[0, 0, 0]) for frames in clips}) > 1 or "sand" in caption


def test_a_caption_that_the_world_does_not_write_is_refused():
    for caption in ("a red star", "a dog", "a red circle moves left and a blue circle moves up"):
        with pytest.raises(UserError, match="the world has 0 clips"):
            world_clips(WORLD, caption, SIZE, 1)


def test_several_shapes_are_found_by_rejection_alone():
    world = replace(FEW, sizes=((48, 80),), max_shapes=2, scale=(0.3, 0.36))
    planned = next(p for p in (scene(world, index) for index in range(100)) if len(p.shapes) == 2)
    caption = write(wanted(planned), "shape")
    assert all(agreement(caption, frames).all for frames in world_clips(world, caption, (5, 48, 80), 3))


def test_what_does_not_differ_in_the_world_has_no_ratio(real):
    still = world_clips(WORLD, "a red circle stays still", SIZE, 30)
    found = diversity(still[:15], still[15:])
    assert np.isnan(found.path) and found.start > 0.5
    blank = [np.full((5, 24, 36, 3), 236, np.uint8)] * 3
    unread = diversity([*real[:9], *blank], real[:40])
    assert unread.counted == pytest.approx(0.75)
    assert unread.start == pytest.approx(diversity(real[:9], real[:40]).start)
    assert np.isnan(diversity(blank, real[:40]).start)


def test_clips_that_show_another_thing_do_not_count(real):
    wrong = world_clips(WORLD, "a red circle moves right on a plain white background", SIZE, 6)
    mixed = [*real[:12], *wrong]
    found, own = diversity(mixed, real[:40], CAPTION), diversity(real[:12], real[:40])
    assert found.counted == pytest.approx(12 / 18)
    assert (found.start, found.size, found.path) == pytest.approx((own.start, own.size, own.path))
    assert diversity(mixed, real[:40]).path > 3, "paths in two directions"
    assert diversity(mixed, real[:40], "a red circle").counted == 1.0


def test_the_mean_leaves_out_what_was_not_measured():
    nan = float("nan")
    found = mean_diversity([Diversity(1.0, 0.5, nan, 1.0), Diversity(0.5, nan, nan, 0.5)])
    assert (found.start, found.size, found.counted) == (0.75, 0.5, 0.75) and np.isnan(found.path)


def test_drawing_clips_of_a_caption_is_a_pure_function():
    one, other = (world_clips(WORLD, CAPTION, SIZE, 3) for _ in range(2))
    np.testing.assert_array_equal(one, other)
    assert not any(np.array_equal(one[0], clip(WORLD, index)[0]) for index in range(20))
