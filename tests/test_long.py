"""Clips longer than the model was trained on: windows, prompts in time, parts that are decoded one by one."""

import jax
import numpy as np
import pytest
from fixtures_runs import chain, run, trained, with_random_weights  # noqa: F401

from sora_jax.data.reading.media import decode
from sora_jax.data.viewing.write import write_chunks, write_video
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.errors import UserError
from sora_jax.generate.long import HISTORY_LEVEL, Windows, _at, _history, sample_long, windows_of
from sora_jax.generate.prompts import spans_of
from sora_jax.generate.requests import Request

SETTINGS = SamplingConfig(steps="2")
RED, BLUE = "a red square moves right", "a blue square moves down"


@pytest.fixture(scope="module")
def sampled(trained):  # noqa: F811
    model = with_random_weights(trained)

    def draw(frames, *prompts):
        requests = [Request(prompt, (frames, 4, 6), i + 1, guidance=2.0) for i, prompt in enumerate(prompts)]
        with jax.set_mesh(model.mesh):
            return sample_long(model, requests, Windows(frames, 4, 2), 4, SETTINGS, 5)

    return draw


def test_a_longer_clip_begins_as_a_shorter_one(sampled):
    (short,), (long,) = sampled(6, RED), sampled(9, RED)
    assert short.shape == (6, 4, 6, 4) and long.shape == (9, 4, 6, 4)
    np.testing.assert_array_equal(long[:6], short)
    assert np.isfinite(long).all() and not np.allclose(long[4:6], long[6:8])


def test_a_prompt_holds_from_its_frame_on(sampled):
    """Before the change the clip is that of the first prompt, to the bit; after it, it is not."""
    (red,), (changed,) = sampled(8, RED), sampled(8, f"0: {RED} 17: {BLUE}")
    np.testing.assert_array_equal(changed[:5], red[:5])
    assert np.abs(changed[5:] - red[5:]).max() > 0.1


def test_windows_of_several_clips_travel_together(sampled):
    """Also beside a clip whose windows end elsewhere."""
    together = sampled(6, RED, f"0: {BLUE} 9: {RED}", BLUE)
    (alone,) = sampled(6, RED)
    np.testing.assert_allclose(together[0], alone, atol=1e-4)


def test_a_prompt_begins_with_the_latent_of_its_frame():
    """Latent 0 is frame 0, latent 1 frames 1 to 4."""
    (request,) = _at([Request("0: a 2: b 9: c", (9, 4, 6), 1)], 0, 4, 4)
    assert request.prompt == "a"
    found = [_at([Request("0: a 2: b 9: c", (9, 4, 6), 1)], latent, 4, 4)[0].prompt for latent in range(5)]
    assert found == ["a", "b", "b", "c", "c"]


def test_only_the_first_latent_of_a_clip_stands_at_time_0():
    z = np.arange(3, dtype=np.float32).reshape(3, 1, 1, 1)
    whole, later = _history(z, 3, 2), _history(z, 2, 2)
    assert whole.first == 0 and later.first == 1
    np.testing.assert_array_equal(whole.latent.ravel(), [0, 1, 2, 0, 0])
    np.testing.assert_array_equal(later.latent.ravel(), [1, 2, 0, 0])
    np.testing.assert_allclose(later.ceiling.ravel(), [HISTORY_LEVEL, HISTORY_LEVEL, 1, 1])


def test_spans_are_read():
    assert spans_of("a fox: 2 cubs") == [(0, "a fox: 2 cubs")]
    assert spans_of("0: a clock at 7:30 24: night") == [(0, "a clock at 7:30"), (24, "night")]
    assert spans_of("0: a fox") == [(0, "a fox")]
    assert spans_of("0: a fox runs 24: a fox sleeps") == [(0, "a fox runs"), (24, "a fox sleeps")]
    with pytest.raises(UserError, match="its frames must rise"):
        spans_of("0: a 24: b 12: c")
    with pytest.raises(UserError, match="the first part must begin at frame 0"):
        spans_of("8: a 24: b")


def test_windows_are_counted_in_latents():
    assert windows_of(481, 17, 8, 4) == Windows(121, 5, 2)
    assert windows_of(33, 9, 9, 4) == Windows(9, 3, 1)
    with pytest.raises(UserError, match="--window is 8; it must be at least 9 frames"):
        windows_of(33, 8, 4, 4)


def test_a_file_written_in_parts_is_the_file_written_at_once(tmp_path):
    clip = np.random.default_rng(0).integers(0, 255, (9, 15, 24, 3), dtype=np.uint8)
    for ending in ("mp4", "gif"):
        whole = write_video(tmp_path / f"whole.{ending}", clip, 8.0, 2)
        parts = write_chunks(tmp_path / f"parts.{ending}", iter([clip[:4], clip[4:5], clip[5:]]), 8.0, 2)
        found, wanted = (decode(file).frames.astype(int) for file in (parts, whole))
        assert np.abs(found - wanted).max() <= (8 if ending == "mp4" else 0)


def test_the_command_samples_long_clips(chain, tmp_path, capfd):  # noqa: F811
    size = ["--upscale=1", "--height=16", "--width=24"]
    common = [f"--workdir={chain.transformer}", "--steps=2", *size, f"--prompt={RED}"]
    assert run("sample", *common, "--frames=41", f"--out={tmp_path / 'long.mp4'}") == 0
    assert decode(tmp_path / "long.mp4").frames.shape == (41, 16, 24, 3)
    assert "windows of 3 latent frames, 1 of them carried" in capfd.readouterr().err
    options = [f"--prompt=0: {RED} 5: {BLUE}", "--frames=9", "--window=9", f"--out={tmp_path / 'two.mp4'}"]
    assert run("sample", *common[:-1], *options) == 0
    assert decode(tmp_path / "two.mp4").frames.shape == (9, 16, 24, 3)
    assert run("sample", *common, "--frames=40", "--window=9", f"--out={tmp_path / 'no.mp4'}") == 2
    assert "frames is 40; it must be" in capfd.readouterr().err
    for options, message in [
        ([f"--prompt=0: {RED} 9: {BLUE}", "--frames=9"], "--prompt changes at frame 9; the clip has 9 frames"),
        ([f"--prompt=0: {RED} 2: {BLUE} 3: {RED}", "--frames=9"], "--prompt changes twice within 4 frames"),
        ([f"--prompt={RED}", "--frames=17", "--window=8"], "--window is 8; it must be at least 9 frames"),
        ([f"--prompt={RED}", "--frames=17", "--window=9", "--loop"], "--window is 9; with other options for clips"),
    ]:
        assert run("sample", *common[:-1], *options, f"--out={tmp_path / 'no.mp4'}") == 2
        assert message in capfd.readouterr().err
