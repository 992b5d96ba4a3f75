"""History guidance: what scales of 1 and 0 are, what the model is shown instead of the history, and its training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures_diffusion import quick_jit
from fixtures_runs import chain, run, trained, with_random_weights  # noqa: F401
from test_given import ONLY, SHARES, by_clip, draw, packs_of, token_times
from test_given import SIZES as CLIPS

from sora_jax.data.viewing.write import write_video
from sora_jax.diffusion.given import Given
from sora_jax.diffusion.guidance import GuidanceConfig, HistoryModels, TokenLayout, guided, guided_by_history
from sora_jax.diffusion.history import HISTORY_LEVEL, history_tokens, without_history
from sora_jax.diffusion.process import linear_flow
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.errors import UserError
from sora_jax.generate.long import Windows, sample_long
from sora_jax.generate.recipe import read_recipe
from sora_jax.generate.requests import Request
from sora_jax.generate.sampler import sample_latents
from sora_jax.generate.tasks import Tasks
from sora_jax.train.given import GivenConfig

# ----------------------------------------------------------------------------------------------------------
# One call of a model
# ----------------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
ROWS_BL = jnp.asarray(np.repeat([[0, 1, 2, 3]], 2, 0).repeat(2, 1), jnp.int32)  # four rows of two tokens
CEILINGS_BR = jnp.asarray([[0.0, 1.0, 1.0, 1.0], [HISTORY_LEVEL, 0.5, 1.0, 0.0]], jnp.float32)
X_BLP, X0_BLP, EPS_BLP = (jnp.asarray(RNG.normal(size=(2, 8, 3)), jnp.float32) for _ in range(3))
GIVEN = Given(X0_BLP, CEILINGS_BR, jnp.zeros_like(CEILINGS_BR))
T_BR = jnp.minimum(0.7, CEILINGS_BR)
LAYOUT = TokenLayout(jnp.ones((2, 8), jnp.int32), ROWS_BL, 3)
HISTORY = np.asarray(CEILINGS_BR <= HISTORY_LEVEL).repeat(2, 1)


def model(bias, x_BLP, t_BR):
    """Mix all tokens, so that the history matters to the others."""
    t_BL1 = jnp.take_along_axis(t_BR, ROWS_BL, 1)[..., None]
    return jnp.tanh(x_BLP * (1 + t_BL1) + 0.3 * x_BLP.mean(1, keepdims=True) + bias)


def shown(level):
    """Return what a model is shown without the history: tokens and noise levels."""
    seen = {}

    def spy(x_BLP, t_BR):
        seen.update(x=np.asarray(x_BLP), t=np.asarray(t_BR))
        return x_BLP

    without_history(linear_flow, spy, GIVEN, EPS_BLP, ROWS_BL, level)(X_BLP, T_BR)
    return seen["x"], seen["t"]


@pytest.mark.parametrize("level", [1.0, 0.8])
def test_history_is_replaced_by_noise_and_marked_as_such(level):
    x, t = shown(level)
    np.testing.assert_array_equal(x[~HISTORY], np.asarray(X_BLP)[~HISTORY])
    expected = (1 - level) * X0_BLP + level * EPS_BLP
    np.testing.assert_allclose(x[HISTORY], np.asarray(expected)[HISTORY], rtol=1e-6)
    if level == 1.0:
        np.testing.assert_array_equal(x[HISTORY], np.asarray(EPS_BLP)[HISTORY])
    np.testing.assert_array_equal(t, np.where(CEILINGS_BR <= HISTORY_LEVEL, np.float32(level), T_BR))


def test_a_clip_that_is_edited_as_a_whole_has_no_history():
    edited = GIVEN._replace(rescales_BR=jnp.ones_like(CEILINGS_BR))
    assert not history_tokens(edited, ROWS_BL).any() and history_tokens(GIVEN, ROWS_BL).any()


@functools.partial(quick_jit, static_argnums=(0, 1))
def guided_output(history, text, scale):
    known = functools.partial(model, 0.1)
    without = without_history(linear_flow, known, GIVEN, EPS_BLP, ROWS_BL)
    models = HistoryModels(known, without, functools.partial(model, -0.4) if text else None)
    config, scale_BS = GuidanceConfig(history=history), jnp.full((2, 1), scale)
    denoise = guided_by_history(config, models, scale_BS, history_tokens(GIVEN, ROWS_BL), LAYOUT)
    plain = guided(config, known, functools.partial(model, -0.4), scale_BS, LAYOUT)
    return denoise(X_BLP, T_BR), known(X_BLP, T_BR), without(X_BLP, T_BR), plain(X_BLP, T_BR)


@pytest.mark.parametrize("text", [False, True])
def test_scale_1_is_the_model_with_its_history_and_0_the_one_without(text):
    made = ~HISTORY
    for history, wanted in ((1.0, 1), (0.0, 2)):
        found = [np.asarray(output) for output in guided_output(history, text, 1.0)]
        np.testing.assert_allclose(found[0][made], found[wanted][made], atol=1e-6)
        np.testing.assert_array_equal(found[0][HISTORY], found[1][HISTORY])  # what is given is not guided
    assert np.abs(found[1] - found[2])[made].max() > 0.05


def test_text_and_history_add_up():
    out, known, without, plain = (np.asarray(output) for output in guided_output(2.5, True, 3.0))
    made = ~HISTORY
    np.testing.assert_allclose(out[made], (plain + 1.5 * (known - without))[made], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out[HISTORY], plain[HISTORY], rtol=1e-5, atol=1e-5)
    out, _, _, plain = (np.asarray(output) for output in guided_output(1.0, True, 3.0))
    np.testing.assert_allclose(out, plain, atol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(history=float("nan")), "--history-guidance is nan; it must be 0 or more, and finite"),
        (dict(history_level=0.0), "--history-level is 0.0; it must be above 0, to 1"),
        (dict(history_level=1.5), "--history-level is 1.5; it must be above 0, to 1"),
    ],
)
def test_options_are_checked(changes, message):
    with pytest.raises(UserError, match=message):
        GuidanceConfig(**changes)


# ----------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many():
    return packs_of([[(CLIPS[i], 4 * row + i + 1) for i in range(4)] for row in range(64)])


def test_dropped_frames_are_pure_noise_in_their_share_of_the_draws(many):
    config = GivenConfig(**SHARES, noise=0.3, dropped=0.4)
    frames = dropped = 0
    for step in range(20):
        drawn, before = draw(config, many, step), draw(dataclasses.replace(config, dropped=0.0), many, step)
        np.testing.assert_array_equal(drawn.given_BL, before.given_BL)  # given tokens are not in the loss
        np.testing.assert_array_equal(drawn.rows_BL, before.rows_BL)
        triples = zip(
            *(by_clip(many, x) for x in (drawn.given_BL, token_times(many, drawn), token_times(many, before)))
        )
        for given, t, t_before in triples:
            np.testing.assert_array_equal(t[~given], t_before[~given])
            whole = given.any() and (given.all((1, 2)) == given.any((1, 2))).all()
            if not whole:  # nothing is given, or a box
                np.testing.assert_array_equal(t, t_before)
                continue
            gone = (t[given] == 1.0).all()
            assert gone or (t == t_before).all()
            frames, dropped = frames + 1, dropped + gone
    # Some boxes are as large as the frame; their frames are kept.
    assert 0.33 < dropped / frames < 0.44


def test_boxes_and_levels_are_not_dropped(many):
    for kind in ("boxes", "levels", "first"):
        same = dataclasses.replace(ONLY[kind], dropped=1.0)
        times, before = (np.asarray(draw(config, many, 1).times_BR) for config in (same, ONLY[kind]))
        assert (times != before).any() == (kind == "first")


# ----------------------------------------------------------------------------------------------------------
# A run
# ----------------------------------------------------------------------------------------------------------

SETTINGS = SamplingConfig("3")


def history(scale, level=1.0):
    return dataclasses.replace(SETTINGS, guidance=GuidanceConfig(history=scale, history_level=level))


@pytest.fixture(scope="module")
def tiny(trained):  # noqa: F811
    return with_random_weights(trained)


@pytest.fixture(scope="module")
def clip():
    return np.random.default_rng(1).integers(0, 255, (9, 16, 24, 3), dtype=np.uint8)


def test_given_latents_stay_and_company_changes_nothing(tiny, clip):
    known = Tasks(tiny).extend(clip, 8).known
    requests = [
        Request("a red square", known.latent.shape[:3], 1, known=known),
        Request("a red square", known.latent.shape[:3], 2, guidance=3.0, known=known),
        Request("a blue square", (3, 4, 6), 3, guidance=2.0),
    ]
    with jax.set_mesh(tiny.mesh):
        together = sample_latents(tiny, requests, history(2.0), 0)
        alone = [sample_latents(tiny, [request], history(2.0), 0)[0] for request in requests]
        others = {
            name: sample_latents(tiny, requests, way, 0)
            for name, way in {"none": SETTINGS, "one": history(1.0), "fractional": history(2.0, 0.8)}.items()
        }
    given = known.ceiling == 0
    for z in together[:2]:
        np.testing.assert_array_equal(z[given], known.latent[given])
    for z, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(z, other, atol=1e-4)
    for z, other in zip(others["one"], others["none"], strict=True):
        np.testing.assert_array_equal(z, other)
    np.testing.assert_allclose(together[2], others["none"][2], atol=1e-4)  # it has no history
    for name in ("none", "fractional"):
        assert np.abs(together[0] - others[name][0]).max() > 1e-3


def test_windows_are_guided_by_what_they_carry(tiny):
    request = [Request("a red square", (5, 4, 6), 1)]
    with jax.set_mesh(tiny.mesh):
        plain, led = (sample_long(tiny, request, Windows(6, 4, 2), 4, way, 5)[0] for way in (SETTINGS, history(2.0)))
    np.testing.assert_array_equal(plain[:4], led[:4])
    assert np.abs(plain[4:] - led[4:]).max() > 1e-3


def test_the_command_guides_and_is_repeated(chain, clip, tmp_path, capfd):  # noqa: F811
    write_video(tmp_path / "clip.png", clip[:1], 8.0)
    common = [f"--workdir={chain.transformer}", "--prompt=a", "--steps=2", "--frames=5", "--history-guidance=1.5"]
    image, out, again = f"--image={tmp_path / 'clip.png'}", tmp_path / "out.gif", tmp_path / "again.gif"
    assert run("sample", *common, image, "--history-level=0.8", f"--out={out}") == 0
    assert {"--history-guidance=1.5", "--history-level=0.8"} <= set(read_recipe(out)["command"])
    assert run("sample", f"--like={out}", f"--out={again}") == 0
    assert again.read_bytes() == out.read_bytes()
    assert run("sample", *common, f"--out={again}") == 2
    assert "--history-guidance is 1.5; it is for clips of which something is given" in capfd.readouterr().err
