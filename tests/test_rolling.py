"""Rolling noise levels: exact models keep their distribution, one row is a frame, lengths share their beginnings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures_diffusion import quick_jit
from fixtures_runs import chain, run, trained, with_random_weights  # noqa: F401

from sora_jax.data.reading.media import decode
from sora_jax.diffusion.given import Given
from sora_jax.diffusion.guidance import GuidanceConfig
from sora_jax.diffusion.history import HISTORY_LEVEL
from sora_jax.diffusion.keys import Purpose, step_key
from sora_jax.diffusion.process import linear_flow
from sora_jax.diffusion.rolling import roll, rolling_levels, rolling_times
from sora_jax.diffusion.sampling import SamplingConfig, grid_times, sample
from sora_jax.diffusion.solvers import Problem, SolverConfig
from sora_jax.diffusion.times import TimesConfig
from sora_jax.errors import UserError
from sora_jax.generate import rolling
from sora_jax.generate.long import Windows
from sora_jax.generate.recipe import read_recipe
from sora_jax.generate.requests import Request
from sora_jax.generate.rolling import roll_packs, sample_rolling
from sora_jax.generate.sampler import sample_latents

HISTORY, ROLLING, CLIPS, VALUES = 2, 4, 500, 16  # so many independent clips in the values of a token
RED, BLUE = "a red square moves right", "a blue square moves down"
TIMES = TimesConfig(base_tokens=1)  # clips of more than one token are shifted
SETTINGS = SamplingConfig("4")


def window(x0_BLP, rolling=ROLLING, steps=40):
    """The given of windows with a row for each token, and their times."""
    shape = x0_BLP.shape[:2]
    levels_BR = jnp.broadcast_to(rolling_levels(shape[1] - rolling, rolling), shape)
    given = Given(x0_BLP, levels_BR, jnp.zeros(shape))
    tokens_BR = jnp.full(shape, shape[1], jnp.int32)
    return given, grid_times(SamplingConfig(str(steps)), TIMES, linear_flow, tokens_BR)


def test_rows_go_down_the_grid_of_an_ordinary_clip_step_by_step():
    given, grid = window(jnp.zeros((1, HISTORY + ROLLING, 1)))
    times = np.asarray(rolling_times(given, grid, ROLLING))[:, 0]
    assert times.shape == (11, 6)
    np.testing.assert_array_equal(times[:, :HISTORY], np.float32(HISTORY_LEVEL))
    # The last row's times, then the one's before it, ..., are the grid, whose middle is shifted.
    whole = np.concatenate([[1.0], *(times[1:, row] for row in range(HISTORY + ROLLING - 1, HISTORY - 1, -1))])
    np.testing.assert_array_equal(whole, np.asarray(grid)[:, 0, 0])
    assert whole[20] > 0.6
    np.testing.assert_array_equal(times[0, HISTORY:-1], times[-1, HISTORY + 1 :])


def exact(covariance, x_BLP, t_BR):
    """The exact model of Gaussian frames whose levels differ, of the times of one clip for all."""
    t = t_BR[0]
    a, b = jnp.diag(1.0 - t), jnp.diag(t)
    gain = covariance @ a @ jnp.linalg.inv(a @ covariance @ a + b @ b)
    x0 = jnp.einsum("ij,bjp->bip", gain, x_BLP)
    return (x_BLP - x0) / jnp.where(t > 0, t, 1.0)[None, :, None]


@functools.partial(quick_jit, static_argnums=(0, 1, 2))
def rolled(rho, solver, steps, x0_BLP, step, begins):
    given, grid = window(x0_BLP, steps=steps)
    rows_BL = jnp.broadcast_to(jnp.arange(x0_BLP.shape[1]), x0_BLP.shape[:2])
    frames = jnp.arange(x0_BLP.shape[1])
    covariance = float(rho) ** jnp.abs(frames[:, None] - frames[None, :])
    draw = lambda purpose, k: jax.random.normal(step_key(0, k, purpose), x0_BLP.shape)  # noqa: E731
    noise = lambda k: draw(Purpose.SOLVER, 100 * step + k)  # noqa: E731
    problem = Problem(functools.partial(exact, covariance), "velocity", linear_flow, rows_BL, noise)
    pair = draw(Purpose.SAMPLE, step), draw(Purpose.NOISE, step)
    return roll(SolverConfig(solver), problem, given, pair, rolling_times(given, grid, ROLLING), begins)


def long_run(rho, solver, steps, count=8):
    """Frames (CLIPS * VALUES, count) that leave the windows, the first window being data."""
    length = HISTORY + ROLLING
    covariance = rho ** np.abs(np.subtract.outer(np.arange(length), np.arange(length)))
    x = np.random.default_rng(0).normal(size=(CLIPS, VALUES, length)) @ np.linalg.cholesky(covariance).T
    x, out = jnp.asarray(x.swapaxes(1, 2), jnp.float32), []
    for step in range(count):
        before, x = x, rolled(rho, solver, steps, x, step, step == 0)
        np.testing.assert_array_equal(x[:, :HISTORY], before[:, :HISTORY])
        out.append(np.asarray(x)[:, HISTORY].ravel())
        x = jnp.concatenate([x[:, 1:], jnp.full_like(x[:, :1], jnp.nan)], 1)  # what the last row holds is not read
    return np.stack(out, 1)


@pytest.mark.parametrize("solver, steps", [("euler", 200), ("dpm2", 40)])
def test_independent_frames_keep_unit_variance(solver, steps):
    found = long_run(0.0, solver, steps)
    np.testing.assert_allclose(found.var(0), 1.0, atol=0.05)
    np.testing.assert_allclose(found.mean(0), 0.0, atol=0.03)
    correlation = np.corrcoef(found.T) - np.eye(found.shape[1])
    assert np.abs(correlation).max() < 0.05  # every latent has noise of its own


def test_correlated_frames_stay_so():
    found = long_run(0.9, "dpm2", 40)
    np.testing.assert_allclose(found.var(0), 1.0, atol=0.1)
    pairs = [np.corrcoef(found[:, k], found[:, k + 1])[0, 1] for k in range(found.shape[1] - 1)]
    np.testing.assert_allclose(pairs, 0.9, atol=0.05)


def test_one_rolling_row_is_an_ordinary_sample_behind_its_history():
    x0_BLP = jnp.asarray(np.random.default_rng(2).normal(size=(64, 4, 1)), jnp.float32)
    eps_BLP = jax.random.normal(jax.random.key(3), x0_BLP.shape)
    rows_BL, shape = jnp.broadcast_to(jnp.arange(4), (64, 4)), (64, 4)
    covariance = 0.9 ** jnp.abs(jnp.arange(4)[:, None] - jnp.arange(4)[None, :])
    problem = Problem(functools.partial(exact, covariance), "velocity", linear_flow, rows_BL)
    given, grid = window(x0_BLP, 1, 30)
    found = roll(SolverConfig(), problem, given, (eps_BLP, eps_BLP), rolling_times(given, grid, 1), jnp.bool_(False))
    history = given._replace(ceiling_BR=jnp.where(given.ceiling_BR > 0, 1.0, HISTORY_LEVEL))
    counts = jnp.full(shape, 4, jnp.int32)
    expected = sample(SamplingConfig("30"), TIMES, problem, eps_BLP, counts, history)
    np.testing.assert_allclose(found[:, -1], expected[:, -1], atol=1e-5)
    np.testing.assert_array_equal(found[:, :-1], x0_BLP[:, :-1])


# ----------------------------------------------------------------------------------------------------------
# A run
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(trained):  # noqa: F811
    return with_random_weights(trained)


@pytest.fixture(scope="module")
def sampled(tiny):
    def sample_once(requests, frames, settings=SETTINGS, seed=5):
        with jax.set_mesh(tiny.mesh):
            return sample_rolling(tiny, requests, Windows(frames, 5, 2, rolls=True), 4, settings, seed)

    return sample_once


def requests_of(*prompts, size=(9, 4, 6)):
    return [Request(prompt, size, i + 1, guidance=2.0) for i, prompt in enumerate(prompts)]


def test_a_longer_clip_begins_as_a_shorter_one(sampled):
    short, long = (sampled(requests_of(RED), frames)[0] for frames in (7, 11))
    assert short.shape == (7, 4, 6, 4) and long.shape == (11, 4, 6, 4)
    np.testing.assert_array_equal(long[:7], short)
    assert np.isfinite(long).all()
    # Every latent has noise of its own: those that enter the window one after the other are not alike.
    alike = [np.corrcoef(long[k].ravel(), long[k + 1].ravel())[0, 1] for k in range(5, 10)]
    assert max(alike) < 0.995, alike  # 0.9999 with one noise for all
    (other,) = sampled(requests_of(RED), 7, seed=6)
    assert np.abs(other - short).max() > 0.1


@pytest.mark.parametrize("solver, history", [("euler", 1.0), ("ddpm", 1.0), ("euler", 2.0)])
def test_a_clip_in_company_is_the_clip_alone(sampled, solver, history):
    settings = SamplingConfig("4", solver=SolverConfig(solver), guidance=GuidanceConfig(history=history))
    mixed = [*requests_of(RED, BLUE), Request(RED, (9, 2, 4), 3, guidance=2.0)]
    together = sampled(mixed, 7, settings)
    for request, z in zip(mixed, together, strict=True):
        np.testing.assert_allclose(sampled([request], 7, settings)[0], z, atol=2e-4)


def test_one_program_serves_all_windows(sampled, monkeypatch):
    calls, before = [], roll_packs._cache_size()
    monkeypatch.setattr(rolling, "roll_packs", lambda *arguments: calls.append(1) or roll_packs(*arguments))
    sampled(requests_of(f"0: {RED} 13: {BLUE}"), 9, SamplingConfig("6"))
    assert len(calls) == 6
    assert roll_packs._cache_size() == before + 1


def test_a_prompt_may_change_in_time(sampled):
    turns, stays = sampled([Request(f"0: {RED} 21: {BLUE}", (9, 4, 6), 1), Request(RED, (9, 4, 6), 1)], 9)
    np.testing.assert_allclose(turns[:4], stays[:4], atol=1e-4)
    assert np.abs(turns[5:] - stays[5:]).max() > 1e-3


def test_a_short_clip_is_the_ordinary_sample(sampled, tiny):
    first, long = (sampled(requests_of(RED), frames)[0] for frames in (5, 6))
    with jax.set_mesh(tiny.mesh):
        (ordinary,) = sample_latents(tiny, [Request(RED, (5, 4, 6), 1, guidance=2.0)], SETTINGS, 5)
    np.testing.assert_array_equal(first, ordinary)
    np.testing.assert_array_equal(long[:3], first[:3])


def test_replacement_does_not_roll(sampled):
    with pytest.raises(UserError, match="--condition is 'replace'; with --long=rolling it must be 'clean'"):
        sampled(requests_of(RED), 7, SamplingConfig("4", condition="replace"))


def test_the_command_rolls_and_is_repeated(chain, tmp_path, capfd):  # noqa: F811
    out, again = tmp_path / "long.gif", tmp_path / "again.gif"
    size = ["--upscale=1", "--height=16", "--width=24"]
    common = [f"--workdir={chain.transformer}", "--steps=2", *size, f"--prompt={RED}"]
    assert run("sample", *common, "--frames=25", "--window=17", "--long=rolling", f"--out={out}") == 0
    told = capfd.readouterr().err
    assert "windows of 5 latent frames, 2 of them carried, 2 rolling" in told
    assert "the run has not trained on rows of different noise levels (config.diffusion.given.levels is 0)" in told
    assert decode(out).frames.shape == (25, 16, 24, 3)
    assert "--long=rolling" in read_recipe(out)["command"]
    assert run("sample", f"--like={out}", f"--out={again}") == 0
    assert again.read_bytes() == out.read_bytes()
    for options, message in [
        (["--long=rings"], "--long is 'rings'; allowed: 'windows', 'rolling'"),
        (["--long=rolling", "--loop"], "--long is rolling; with other options for clips that cannot be"),
    ]:
        assert run("sample", *common, "--frames=25", *options, f"--out={again}") == 2
        assert message in capfd.readouterr().err
