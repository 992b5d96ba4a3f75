"""The scores of generated clips: clean and constant where rendered, and by how much where spoilt; prompts held out."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import ndimage

from sora_jax.evaluate.world import cleanness, held_out_prompts, score
from sora_jax.worlds import WorldConfig, captions, clip, scene
from sora_jax.worlds.captions import COLOURS, MOTIONS
from sora_jax.worlds.oracle import read_frames
from sora_jax.worlds.oracle.drawing import fit_drawing
from sora_jax.worlds.render import render, track

# As the quickstart draws them: large shapes in small frames.
LARGE = WorldConfig(
    sizes=((24, 24), (24, 36), (36, 24)),
    image_share=0.0,
    shapes=("circle", "square", "triangle", "cross", "ring"),
    motions=("move", "still"),
    backgrounds=("plain",),
    scale=(0.62, 0.7),
)
# One shape, every motion that one shape can make.
TURNING = WorldConfig(
    sizes=((48, 48), (48, 80)),
    image_share=0.0,
    motions=tuple(m for m in MOTIONS if m != "pass"),
    directions=8,
    backgrounds=("plain", "gradient"),
)


def noisy(frames, index, sigma=8.0):
    noise = np.random.default_rng(index).normal(0, sigma, frames.shape)
    return np.clip(frames + noise, 0, 255).astype(np.uint8)


def blurred(frames, pixels):
    soft = ndimage.gaussian_filter(frames.astype(np.float32), (0, pixels, pixels, 0))
    return np.clip(soft + 0.5, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "config, number",
    [
        (LARGE, 48),
        (TURNING, 24),
        (WorldConfig(sizes=((48, 80),), max_shapes=3, scale=(0.2, 0.5), image_share=0.0), 12),
    ],
    ids=["quickstart", "all motions", "three shapes"],
)
def test_rendered_clips_are_clean_and_constant(config, number):
    for index in range(number):
        found = cleanness(clip(config, index)[0])
        assert found.constant and found.edge_error < 0.002 and found.speckle < 0.002


def test_a_frame_is_read_from_itself_alone():
    config = replace(LARGE, sizes=((24, 36),))
    frames = np.concatenate([noisy(clip(config, index)[0], index) for index in range(3)])
    together = read_frames(frames)
    for frame, found in zip(frames, together, strict=True):
        alone = read_frames(frame[None])[0]
        assert alone.shapes == found.shapes
        assert alone.edge_error == pytest.approx(found.edge_error, abs=1e-5)
        assert alone.speckle == pytest.approx(found.speckle, abs=1e-5)


def test_one_frame_with_another_shape_breaks_constancy():
    others = {
        "kind": {"circle": "square", "square": "cross", "triangle": "ring", "cross": "circle", "ring": "triangle"}
    }
    others["colour"] = dict(zip(COLOURS, [*tuple(COLOURS)[3:], *tuple(COLOURS)[:3]], strict=True))
    clips, prompts = [], []
    for index in range(24):
        planned = scene(LARGE, index)
        frames, shape = render(planned), planned.shapes[0]
        fact = ("kind", "colour", "nothing")[index % 3]
        if fact in others:
            changed = replace(shape, **{fact: others[fact][getattr(shape, fact)]})
            frames[index % len(frames)] = render(replace(planned, shapes=(changed,)))[index % len(frames)]
        clips.append(frames)
        prompts.append(planned.caption)
        assert cleanness(frames).constant == (fact == "nothing")
        assert cleanness(frames).edge_error < 0.002, "the edges are clean all the same"
    assert score(prompts, clips).shape_constancy == pytest.approx(1 / 3)


def test_a_frame_without_its_shape_breaks_constancy_and_has_no_edges():
    frames = clip(LARGE, 0)[0].copy()
    frames[2] = frames[0, 0, 0]
    found = read_frames(frames)
    assert found[2].shapes == () and np.isnan(found[2].edge_error) and found[2].speckle < 0.001
    assert not cleanness(frames).constant and cleanness(frames).edge_error < 0.002
    empty = np.full((5, 24, 24, 3), 200, np.uint8)
    assert not cleanness(empty).constant and np.isnan(cleanness(empty).edge_error)


def test_blurred_edges_are_the_worse_the_softer_they_are():
    clips = [clip(LARGE, index)[0] for index in range(16)]
    found = [[cleanness(blurred(frames, pixels)).edge_error for frames in clips] for pixels in (0.4, 0.7, 1.2)]
    assert (np.diff(found, axis=0) > 0).all() and np.min(found) > 0.002


def test_noise_has_its_own_mean_difference():
    for index in range(12):
        frames = clip(LARGE, index)[0]
        astray = np.random.default_rng(index).normal(0, 5.0, frames.shape)
        found = cleanness((frames + astray) / 127.5 - 1)  # as floats, so that nothing is clipped
        expected = 5.0 * np.sqrt(2 / np.pi) / 255  # mean absolute value of a normal variable
        assert found.speckle == pytest.approx(expected, rel=0.06)
        assert found.edge_error == pytest.approx(expected, rel=0.12), "a part of it is fitted"
        assert found.constant


def test_specks_count_by_what_they_change():
    for index in range(12):
        frames = clip(LARGE, index)[0]
        astray = np.random.default_rng(index).random(frames.shape[:3] + (1,)) < 0.02
        spoilt = np.where(astray, 255 - frames, frames)
        change = np.abs(spoilt.astype(float) - frames).mean() / 255
        assert cleanness(spoilt).speckle == pytest.approx(change, rel=0.3)


def test_jagged_edges_are_an_error_of_edges_alone():
    for index in range(12):
        frames = clip(LARGE, index)[0].copy()
        frames[:, ::2] = np.roll(frames[:, ::2], 1, axis=2)
        found = cleanness(frames)
        assert found.edge_error > max(0.01, 4 * found.speckle)


@pytest.mark.parametrize("kind", captions.KINDS)
def test_a_drawing_is_fitted_to_where_the_shape_was_drawn(kind):
    config = replace(TURNING, shapes=(kind,), motions=("move",), frames=(9,), sizes=((40, 56),))
    for index in range(4):
        planned = scene(config, index)
        path = track(planned.shapes[0], planned)
        truth = np.column_stack([path.centres_T2 * 40, path.diameters_T * 40, np.zeros(9)])[:, None]
        guess = truth + np.random.default_rng(index).uniform(-1, 1, truth.shape) * [0.5, 0.5, 0.5, 0.1]
        frames = render(replace(planned, backdrop=replace(planned.backdrop, style="gradient"))).astype(np.float32)
        drawing = fit_drawing(frames, (kind,), guess)
        round_figure = kind in ("circle", "ring")
        np.testing.assert_allclose(drawing.places_NK4[..., :3], truth[..., :3], atol=0.08)
        assert round_figure or np.abs(drawing.places_NK4[..., 3]).max() < 0.01
        np.testing.assert_allclose(drawing.colours_NM3[:, 0], [COLOURS[planned.shapes[0].colour]] * 9, atol=1)


def test_held_out_prompts_are_first_captions_that_no_training_clip_has_at_all():
    def row(*captions, frames=5):
        return {"captions": list(captions), "frames": frames, "height": 24, "width": 36}

    background = " on a plain white background"
    left, right, down = ("a red circle moves " + way for way in ("left", "right", "down"))
    held_out = [
        row(left + background, left),
        row(right + background, left),  # its short caption is known, what is asked for is not
        row(down, down + background),
        row("a red circle" + background, "a red circle", frames=1),
    ]
    train = [row(left + background, left), row("a red circle stays still" + background, down)]
    dataset = SimpleNamespace(rows=lambda split: train, held_out=lambda: held_out)
    assert held_out_prompts(dataset, 5) == [(right + background, (5, 24, 36))]
