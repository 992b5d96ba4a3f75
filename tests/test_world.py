"""The embedded world: purity, sizes, motions against closed forms read from the pixels, captions, bad options."""

import colorsys
from dataclasses import replace

import numpy as np
import pytest

from sora_jax.data.sources import SourceConfig
from sora_jax.data.sources.world import WorldReader
from sora_jax.errors import UserError
from sora_jax.worlds import (
    FULL_WORLD,
    HELD_OUT,
    WorldConfig,
    captions,
    captions_of,
    clip,
    render,
    scene,
    scenes,
    split,
    wanted,
)
from sora_jax.worlds.captions import COLOURS, LEVELS, MOTIONS, TONES
from sora_jax.worlds.figures import FIGURES

# Areas at unit diameter, by elementary geometry from the lengths in figures.py.
AREAS = {
    "circle": np.pi / 4,
    "square": 0.92**2,
    "triangle": 3 * np.sqrt(3) / 4 * 0.62**2,
    "cross": 2 * 1.08 * 0.32 - 0.32**2,
    "ring": np.pi * (0.52**2 - 0.28**2),
    "star": 5 * 0.62 * 0.26 * np.sin(np.pi / 5),
}


def one_shape(motion, **options):
    options = dict(sizes=((40, 64),), frames=(9,), image_share=0.0, motions=(motion,), directions=8) | options
    return [scene(WorldConfig(**options), index) for index in range(30)]


def cover(planned):
    """Share of each pixel that the only shape covers, solved from the drawn clip and the bare backdrop."""
    drawn, bare = render.render(planned).astype(float), render.paint_backdrop(planned)
    toward = np.array(COLOURS[planned.shapes[0].colour]) - bare
    return ((drawn - bare) * toward).sum(-1) / (toward**2).sum(-1)


def centres(planned):
    """Centroids (T, 2) of the only shape in pixels, from the drawn clip."""
    share = cover(planned)
    y, x = np.mgrid[: planned.height, : planned.width] + 0.5
    mass = share.sum((1, 2))
    return np.stack([(share * x).sum((1, 2)) / mass, (share * y).sum((1, 2)) / mass], -1)


def test_clip_is_a_pure_function_of_seed_and_index():
    forward = [clip(FULL_WORLD, i) for i in range(8)]
    backward = [clip(replace(FULL_WORLD), i) for i in reversed(range(8))][::-1]
    for (frames, caption), (again, same) in zip(forward, backward, strict=True):
        assert caption == same
        np.testing.assert_array_equal(frames, again)


def test_indices_and_seeds_give_different_clips():
    config = WorldConfig(sizes=((24, 24),), frames=(5,), image_share=0.0)
    clips = {clip(config, i)[0].tobytes() for i in range(200)} | {clip(replace(config, seed=1), 3)[0].tobytes()}
    assert len(clips) == 201


def test_held_out_clips_have_indices_of_their_own():
    config = WorldConfig()
    assert [split(i) for i in (0, HELD_OUT - 1, HELD_OUT, HELD_OUT + 5)] == ["train", "train", "held-out", "held-out"]
    assert scene(config, 5) != scene(config, HELD_OUT + 5)


@pytest.mark.parametrize("size", [(24, 24), (24, 40), (40, 24), (32, 32), (48, 80), (64, 64), (27, 51)])
@pytest.mark.parametrize("frames", [1, 5, 9, 17])
def test_every_size_and_length(size, frames):
    config = WorldConfig(sizes=(size,), frames=(frames,), image_share=0.0, max_shapes=3, scale=(0.2, 0.5))
    for index in range(4):
        drawn, _ = clip(config, index)
        planned = scene(config, index)
        assert drawn.shape == (frames, *size, 3) == (planned.frames, planned.height, planned.width, 3)
        assert drawn.dtype == np.uint8


def test_images_say_nothing_of_motion():
    config = replace(FULL_WORLD, image_share=1.0)
    verbs = [phrase.split()[0] for phrase in captions.PHRASES.values()] + ["camera"]
    for index in range(60):
        planned = scene(config, index)
        assert planned.frames == 1
        assert not any(verb in planned.caption for verb in verbs)


@pytest.mark.parametrize("motion", [m for m in MOTIONS if m != "pass"])
def test_area_in_every_frame_is_the_figures_own(motion):
    """A shape that left the frame, grew when it should not, or lost its anti-aliasing would have another area."""
    for planned in one_shape(motion, scale=(0.3, 0.5)):
        shape, times = planned.shapes[0], np.linspace(0, 1, planned.frames)
        diameters = shape.diameter * planned.short * (1 + (shape.growth - 1) * times)
        np.testing.assert_allclose(cover(planned).sum((1, 2)), AREAS[shape.kind] * diameters**2, rtol=0.02)


def test_still_shapes_stay():
    for planned in one_shape("still"):
        assert np.ptp(centres(planned), axis=0).max() < 1e-6


def test_move_has_constant_velocity_in_the_captions_direction():
    for planned in one_shape("move"):
        steps = np.diff(centres(planned), axis=0)
        way = np.array(captions.DIRECTIONS[planned.shapes[0].direction])
        np.testing.assert_allclose(steps, np.broadcast_to(steps.mean(0), steps.shape), atol=0.12)
        assert (np.sign(steps.mean(0) * (np.abs(steps.mean(0)) > 0.05)) == way).all()
        assert np.abs(steps.sum(0)).max() > 0.2 * planned.short


def test_bounce_keeps_speed_and_turns_at_the_wall():
    for planned in one_shape("bounce", frames=(33,)):
        shape, path = planned.shapes[0], centres(planned)
        axis = 0 if shape.direction == "left and right" else 1
        steps = np.diff(path[:, axis])
        assert np.ptp(path[:, 1 - axis]) < 0.1
        assert (np.diff(np.sign(steps)) != 0).sum() in (1, 2), "a turn, or one that falls between two frames"
        speed = np.sort(np.abs(steps))
        np.testing.assert_allclose(speed[2:], np.median(speed), atol=0.12)
        filled = np.nonzero(cover(planned).max(0).max(axis) > 0.1)[0]
        length = (planned.width, planned.height)[axis]
        assert min(filled[0], length - 1 - filled[-1]) <= np.median(speed) / 2 + 1


def test_orbit_has_constant_radius_and_rate():
    for planned in one_shape("orbit"):
        z = centres(planned) @ [1, 1j]
        # Circle through the points, linear in hub and (hub^2 - radius^2).
        system = np.stack([2 * z.real, 2 * z.imag, np.ones_like(z.real)], -1)
        hub_x, hub_y, _ = np.linalg.lstsq(system, np.abs(z) ** 2, rcond=None)[0]
        arms = z - (hub_x + 1j * hub_y)
        np.testing.assert_allclose(np.abs(arms), np.abs(arms).mean(), atol=0.12)
        turns = np.angle(arms[1:] / arms[:-1])
        np.testing.assert_allclose(turns, turns.mean(), atol=0.05)
        assert (turns.mean() > 0) == (planned.shapes[0].direction == "clockwise")  # y goes down


def test_rotation_turns_steadily_in_place():
    for planned in one_shape("rotate", scale=(0.46, 0.6), sizes=((64, 64),)):
        shape, path = planned.shapes[0], centres(planned)
        order = FIGURES[shape.kind].symmetry
        assert np.ptp(path, axis=0).max() < 0.2
        y, x = np.mgrid[:64, :64] + 0.5
        arm = (x - path[:, 0, None, None]) + 1j * (y - path[:, 1, None, None])
        moment = (cover(planned) * arm**order).sum((1, 2))
        turns = np.angle(moment[1:] / moment[:-1]) / order
        np.testing.assert_allclose(turns, shape.turn / 8, atol=0.03)
        assert (turns.mean() > 0) == (shape.direction == "clockwise")


@pytest.mark.parametrize("motion", ["grow", "shrink"])
def test_growth_is_linear_in_time(motion):
    for planned in one_shape(motion):
        side = np.sqrt(cover(planned).sum((1, 2)))
        np.testing.assert_allclose(side, np.linspace(side[0], side[-1], len(side)), rtol=0.01)
        assert (side[-1] > 1.5 * side[0]) if motion == "grow" else (side[0] > 1.5 * side[-1])


def test_a_pass_hides_the_shape_behind():
    config = replace(FULL_WORLD, motions=("pass", "still"), image_share=0.0, shapes=("circle", "square", "triangle"))
    passes = [s for s in (scene(config, i) for i in range(60)) if s.shapes[0].motion == "pass"]
    assert len(passes) > 10
    for planned in passes:
        front, behind = (render.track(s, planned).centres_T2 for s in planned.shapes[:2])
        nearest = np.hypot(*(front - behind).T).argmin()
        x, y = (front[nearest] * planned.short).astype(int)
        np.testing.assert_array_equal(render.render(planned)[nearest, y, x], COLOURS[planned.shapes[0].colour])
        assert 0 < nearest < planned.frames - 1


def test_shapes_of_a_scene_have_their_own_colours_and_keep_apart():
    for planned in (scene(FULL_WORLD, i) for i in range(100)):
        assert len({s.colour for s in planned.shapes}) == len(planned.shapes) >= 1
        tracks = [render.track(s, planned) for s in planned.shapes if s.motion not in ("pass", "behind")]
        for i, one in enumerate(tracks):
            for other in tracks[:i]:
                gaps = np.hypot(*(one.centres_T2 - other.centres_T2).T)
                assert (gaps > (one.diameters_T + other.diameters_T) / 2).all()


@pytest.mark.parametrize("camera, shift", [("pan left", (0, 12)), ("pan right", (0, -12)), ("pan up", (12, 0))])
def test_a_pan_slides_the_backdrop_the_other_way(camera, shift):
    config = WorldConfig(sizes=((40, 60),), frames=(5,), image_share=0.0, backgrounds=("textured",), cameras=(camera,))
    drawn = render.paint_backdrop(scene(config, 0))
    rolled = np.roll(drawn[0], shift, axis=(0, 1))
    inner = (slice(14, -14), slice(14, -14))
    np.testing.assert_allclose(drawn[-1][inner], rolled[inner], atol=0.01)


def test_captions_parse_back_to_the_scene_at_every_level():
    seen = set()
    for index in range(400):
        planned = scene(FULL_WORLD, index)
        facts = wanted(planned)
        for level in LEVELS:
            assert captions.parse(captions.write(facts, level)) == captions.facts_at(facts, level)
        assert planned.caption == captions.write(facts, planned.level)
        seen |= {s.motion for s in facts.shapes} | {facts.camera}
    assert seen == set(MOTIONS) | set(captions.CAMERAS) | {"behind", None}


def test_short_captions_tell_of_shapes_alone():
    shape = captions.WantedShape("orange", "ring", "large", "move", "left")
    moving, image = (captions.Wanted((s,), "plain", "white") for s in (shape, replace(shape, motion=None)))
    written = {level: captions.write(moving, level) for level in captions.SHORT}
    assert written == {
        "short": "an orange ring moves left",
        "short_tags": "orange ring, moves left",
        "shape": "an orange ring",
    }
    assert captions.write(image, "short") == "an orange ring"
    pair = replace(
        moving, shapes=(replace(shape, motion="pass"), captions.WantedShape("red", "star", "large", "behind"))
    )
    assert captions.write(pair, "short") == "an orange ring moves left in front of a red star"
    assert captions.write(pair, "shape") == "an orange ring and a red star"
    assert captions.parse("A red circle moves left") == captions.Wanted(
        (captions.WantedShape("red", "circle", None, "move", "left"),)
    )


def test_extra_captions_leave_clips_their_ids_and_first_captions():
    plain, rich = WorldConfig(seed=3), WorldConfig(seed=3, extra_captions=("short", "shape"))
    first, second = (
        WorldReader(SourceConfig("world", limit=9, world=world, world_held_out=2)) for world in (plain, rich)
    )
    assert first.open(5).content_id() == second.open(5).content_id() == "world/870241c2/5"  # as before there were any
    assert first.digest() != second.digest()
    for index in range(9):
        planned = scene(rich, index if index < 7 else HELD_OUT + index - 7)
        found = second.entry(index).captions
        assert list(found) == ["original", "short", "shape"] and found == captions_of(rich, planned)
        assert first.entry(index).captions == {"original": found["original"]} == {"original": planned.caption}
        assert found["original"].startswith(found["short"]) and found["short"].startswith(found["shape"])
    np.testing.assert_array_equal(clip(plain, 5)[0], clip(rich, 5)[0])


def test_parse_leaves_open_what_a_prompt_does_not_say():
    found = captions.parse("A circle, please")
    assert found == captions.Wanted((captions.WantedShape(None, "circle"),))
    assert captions.parse("a dog on the beach").shapes == ()


def test_colours_are_apart_in_hue_and_more_saturated_than_backdrops():
    hues = sorted(colorsys.rgb_to_hsv(*np.divide(rgb, 255))[0] * 360 for rgb in COLOURS.values())
    assert np.diff([*hues, hues[0] + 360]).min() > 20
    assert min(max(c) - min(c) for c in COLOURS.values()) > 2 * max(max(c) - min(c) for c in TONES.values())


@pytest.mark.parametrize(
    "options, named",
    [
        (dict(shapes=("blob",)), "blob"),
        (dict(motions="move"), "move"),
        (dict(sizes=((16, 64),)), "16"),
        (dict(frames=(3,)), "3"),
        (dict(image_share=1.5), "1.5"),
        (dict(max_shapes=4), "4"),
        (dict(directions=6), "6"),
        (dict(scale=(0.2, 0.25)), "0.25"),
        (dict(cameras=("pan left",)), "textured"),
        (dict(motions=("pass", "move")), "max_shapes"),
        (dict(motions=("rotate",), shapes=("ring",)), "ring"),
        (dict(seed=-1), "-1"),
        (dict(extra_captions=("short", "long")), "long"),
        (dict(extra_captions=("short", "short")), "each once"),
    ],
)
def test_bad_options_are_named(options, named):
    with pytest.raises(UserError, match=r"world\.") as caught:
        WorldConfig(**options)
    assert named in str(caught.value)


def test_world_makes_no_more_shapes_than_fit():
    config = WorldConfig(max_shapes=3, scale=(0.2, 0.5), sizes=((24, 24), (64, 64)))
    counts = {24: set(), 64: set()}
    for index in range(100):
        planned = scene(config, index)
        counts[planned.short].add(len(planned.shapes))
        assert all(s.diameter * planned.short >= scenes.MIN_PIXELS for s in planned.shapes)
    assert max(counts[24]) < 3 and counts[64] == {1, 2, 3}
