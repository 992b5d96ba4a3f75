"""Scene cuts: found where they were put, and the longest part between them kept."""

import sys

import numpy as np
import pytest
from fixtures_media import encode

from sora_jax.data.reading.cuts import longest_run, small_size
from sora_jax.data.reading.media import SpanRule, decode, sample_frames
from sora_jax.errors import UserError


def scenes(lengths: list[int], height: int = 48, width: int = 64) -> np.ndarray:
    """Scenes of so many frames, each a picture of its own that drifts by a pixel a frame."""
    random, parts = np.random.default_rng(1), []
    for k, length in enumerate(lengths):
        coarse = random.integers(0, 100, (height // 8, width // 8 + 8, 3)) + 150 * (k % 2)
        picture = coarse.astype(np.uint8).repeat(8, 0).repeat(8, 1)
        parts += [picture[:, i : i + width] for i in range(length)]
    return np.stack(parts)


@pytest.mark.parametrize(("lengths", "kept"), [([12, 20, 9], (12, 32)), ([20, 5], (0, 20)), ([3, 30], (3, 33))])
def test_the_longest_scene_is_kept(tmp_path, lengths, kept):
    pytest.importorskip("scenedetect")
    frames = scenes(lengths)
    for clip in (
        sample_frames(frames, 10, SpanRule(cuts=True)),
        decode(encode(tmp_path / "a.mp4", frames), SpanRule(cuts=True)),
    ):
        assert (round(clip.start * 10), len(clip.frames)) == (kept[0], kept[1] - kept[0])
        assert clip.flags[0].startswith("cut: ") and f"{kept[1] - kept[0]} of {len(frames)}" in clip.flags[0]
    np.testing.assert_array_equal(sample_frames(frames, 10, SpanRule(cuts=True)).frames, frames[slice(*kept)])


def test_cuts_are_looked_for_in_the_span_and_at_the_file_s_own_rate():
    pytest.importorskip("scenedetect")
    frames = scenes([20, 20])
    span = sample_frames(frames, 20, SpanRule(15, cuts=True))  # of one scene
    assert span.flags == () and len(span.frames) == 15
    clip = sample_frames(frames, 20, SpanRule(fps=5, cuts=True))
    assert (len(clip.frames), clip.start) == (5, 0.0)


def test_longest_run_is_the_first_of_the_longest():
    grid = np.arange(10) / 10
    assert longest_run(grid, [], 0.01) == slice(0, 10)
    assert longest_run(grid, [0.5], 0.01) == slice(0, 5)
    assert longest_run(grid, [0.2, 0.3], 0.01) == slice(3, 10)


def test_small_size_keeps_the_shape_and_never_enlarges():
    assert small_size(1080, 1920) == (72, 128)
    assert small_size(40, 30) == (40, 30)


def test_without_the_library_the_user_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    with pytest.raises(UserError, match="pip install .*scenes"):
        sample_frames(scenes([4, 4]), 10, SpanRule(cuts=True))
