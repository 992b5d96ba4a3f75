"""Times and keys: distributions against SciPy, published shift values, independence of the pack's layout."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from scipy import special, stats

from sora_jax.diffusion.keys import Purpose, clip_keys, step_key, token_noise
from sora_jax.diffusion.process import linear_flow, snr
from sora_jax.diffusion.times import MIN_TIME, TimesConfig, draw_times, per_token, sampling_times, shift
from sora_jax.errors import UserError

KEY = step_key(0, 7, Purpose.TIME)
draw = jax.jit(draw_times, static_argnums=0)
QUANTILES = np.array([0.05, 0.25, 0.5, 0.75, 0.95])


def many_draws(config, tokens=256, count=40_000):
    clips_BS = jnp.arange(1, count + 1, dtype=jnp.uint32).reshape(4, -1)
    return np.asarray(draw(config, KEY, clips_BS, jnp.full(clips_BS.shape, tokens, jnp.int32))).ravel()


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.5, 1.4)])
def test_logit_normal_quantiles(mean, std):
    drawn = many_draws(TimesConfig("logit_normal", mean, std))
    wanted = special.expit(stats.norm.ppf(QUANTILES, mean, std))
    np.testing.assert_allclose(np.quantile(drawn, QUANTILES), wanted, atol=0.01)


def test_logit_normal_published_values():
    drawn = many_draws(TimesConfig())
    found = np.quantile(drawn, [0.05, 0.25, 0.75, 0.95])
    np.testing.assert_allclose(found, [0.1619, 0.3375, 0.6625, 0.8382], atol=0.01)
    np.testing.assert_allclose(drawn.std(), 0.2082, atol=0.003)


def test_uniform_is_uniform():
    assert stats.kstest(many_draws(TimesConfig("uniform")), "uniform").pvalue > 0.01


def test_training_times_are_shifted_by_clip_size():
    """Sixteen times the base tokens: alpha = 4, every quantile moves along the shift."""
    wanted = special.expit(stats.norm.ppf(QUANTILES))
    wanted = 4 * wanted / (1 + 3 * wanted)
    found = np.quantile(many_draws(TimesConfig(), tokens=16 * 256), QUANTILES)
    np.testing.assert_allclose(found, wanted, atol=0.01)


def test_no_clip_in_training_is_at_time_zero():
    extreme = many_draws(TimesConfig("logit_normal", mean=-300.0, std=10.0))
    assert extreme.min() == np.float32(MIN_TIME)


@pytest.mark.parametrize(
    "alpha, wanted", [(3, (0.5, 0.75, 0.9)), (5, (0.625, 0.8333, 0.9375)), (7, (0.7, 0.875, 0.9545))]
)
def test_shift_table(alpha, wanted):
    tokens = jnp.full((3,), 100 * alpha**2, jnp.int32)
    shifted = shift(TimesConfig(base_tokens=100), jnp.array([0.25, 0.5, 0.75]), tokens)
    np.testing.assert_allclose(shifted, wanted, atol=5e-5)


def test_shift_moves_log_snr_by_the_size_ratio():
    """log snr falls by 2 log alpha = log(tokens / base) at every time of the linear flow."""
    t = jnp.linspace(0.05, 0.95, 19)
    shifted = shift(TimesConfig(base_tokens=64), t, jnp.full((19,), 640, jnp.int32))
    fall = jnp.log(snr(linear_flow, t) / snr(linear_flow, shifted))
    np.testing.assert_allclose(fall, np.log(10.0), rtol=1e-4)


def test_shift_is_exact_at_both_ends_and_can_be_off():
    tokens = jnp.arange(0, 100_000, 37, dtype=jnp.int32)
    for end in (0.0, 1.0):
        t = jnp.full(tokens.shape, end)
        np.testing.assert_array_equal(shift(TimesConfig(), t, tokens), t)
    t = jnp.linspace(0.0, 1.0, tokens.size)
    np.testing.assert_array_equal(shift(TimesConfig(base_tokens=0), t, tokens), t)


def test_sampling_grid():
    tokens_BR = jnp.array([[256, 1024, 0], [17, 256, 40_000]], jnp.int32)
    times_KBR = sampling_times(TimesConfig(), 10, tokens_BR)
    assert times_KBR.shape == (11, 2, 3) and times_KBR.dtype == jnp.float32
    np.testing.assert_array_equal(times_KBR[0], 1.0)
    np.testing.assert_array_equal(times_KBR[-1], 0.0)
    assert bool(jnp.all(jnp.diff(times_KBR, axis=0) < 0))
    np.testing.assert_allclose(times_KBR[:, 0, 0], np.linspace(1, 0, 11), atol=1e-6)
    np.testing.assert_allclose(times_KBR[5, 0, 1], 2 * 0.5 / 1.5, rtol=1e-6)


def test_times_follow_the_clip_not_its_slot():
    rng = np.random.default_rng(1)
    clips_BS = np.arange(1, 25, dtype=np.uint32).reshape(4, 6)
    tokens_BS = rng.integers(1, 999, (4, 6)).astype(np.int32)
    order = rng.permutation(24)
    moved_clips, moved_tokens = (array.ravel()[order].reshape(2, 12) for array in (clips_BS, tokens_BS))
    here = draw(TimesConfig(), KEY, jnp.asarray(clips_BS), jnp.asarray(tokens_BS))
    there = draw(TimesConfig(), KEY, jnp.asarray(moved_clips), jnp.asarray(moved_tokens))
    np.testing.assert_array_equal(np.asarray(here).ravel()[order], np.asarray(there).ravel())
    assert np.unique(here).size == 24


def test_noise_follows_the_token_not_its_place():
    """Three clips in one pack, then in other orders, with padding or alone: bit for bit the same noise."""
    lengths = {11: 5, 12: 9, 13: 3, 0: 4}
    noise_of = jax.jit(token_noise, static_argnums=3)

    def by_clip(*clips):
        ids_L, index_L = np.zeros(32, np.uint32), np.zeros(32, np.int32)
        ids = np.concatenate([np.full(lengths[clip], clip) for clip in clips])
        ids_L[: ids.size] = ids
        index_L[: ids.size] = np.concatenate([np.arange(lengths[clip]) * (clip > 0) for clip in clips])
        noise_BLP = np.asarray(noise_of(KEY, jnp.asarray(ids_L)[None], jnp.asarray(index_L)[None], 6))
        assert np.all(np.isfinite(noise_BLP))
        return {clip: noise_BLP[0, ids_L == clip] for clip in clips if clip}

    packed = by_clip(11, 12, 13)
    for layout in ((13, 11, 0), (12,), (0, 12, 13, 0, 11)):
        for clip, noise in by_clip(*layout).items():
            np.testing.assert_array_equal(noise, packed[clip])


def test_noise_is_standard_normal_and_independent():
    clips_BL = jnp.repeat(jnp.arange(1, 41, dtype=jnp.uint32), 50)[None]
    index_BL = jnp.tile(jnp.arange(50, dtype=jnp.int32), 40)[None]
    noise = np.asarray(token_noise(KEY, clips_BL, index_BL, 16))[0]
    assert noise.dtype == np.float32 and np.unique(noise[:, 0]).size == 2000
    assert stats.kstest(noise.ravel(), "norm").pvalue > 0.01
    correlation = np.corrcoef(noise.reshape(40, -1))
    assert np.abs(correlation - np.eye(40)).max() < 5 / np.sqrt(800)


def test_every_part_of_a_key_matters():
    draws = [
        float(jax.random.normal(step_key(seed, step, purpose)))
        for seed in (0, 1)
        for step in (0, 1)
        for purpose in Purpose
    ]
    assert len(set(draws)) == len(draws)
    keys_BS = clip_keys(KEY, jnp.array([[1, 2], [3, 1]], jnp.uint32))
    data = np.asarray(jax.random.key_data(keys_BS))
    np.testing.assert_array_equal(data[0, 0], data[1, 1])
    assert keys_BS.shape == (2, 2) and not np.array_equal(data[0, 0], data[0, 1])


def test_step_may_be_traced():
    traced = jax.jit(lambda step: step_key(5, step, Purpose.NOISE))(jnp.int32(9))
    plain = step_key(5, 9, Purpose.NOISE)
    np.testing.assert_array_equal(jax.random.key_data(traced), jax.random.key_data(plain))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32, jnp.uint32])
def test_per_token_is_indexing(dtype):
    rng = np.random.default_rng(2)
    values_BR = (rng.normal(size=(3, 7)) * 1000 + 10_000).astype(dtype)
    rows_BL = rng.integers(0, 7, (3, 20)).astype(np.int32)
    spread = per_token(jnp.asarray(values_BR), jnp.asarray(rows_BL))
    assert spread.dtype == dtype
    np.testing.assert_array_equal(spread, np.take_along_axis(values_BR, rows_BL, 1))


def test_bad_options_are_user_errors():
    for options, said in (
        ({"distribution": "beta"}, "uniform, logit_normal, not 'beta'"),
        ({"std": 0.0}, "times.std must be above 0, not 0.0"),
        ({"base_tokens": -1}, "not -1"),
    ):
        with pytest.raises(UserError, match=said):
            TimesConfig(**options)
    with pytest.raises(UserError, match="steps must be 1 or more, not 0"):
        sampling_times(TimesConfig(), 0, jnp.ones((1, 1), jnp.int32))
    with pytest.raises(UserError, match="not -1"):
        step_key(-1, 0, Purpose.TIME)


def test_shapes_are_checked_in_tests():
    """setup.cfg has the shape annotations of the diffusion room checked at every call made by a test."""
    with pytest.raises(jaxtyping.TypeCheckError):
        per_token(jnp.zeros((2, 3)), jnp.zeros((1, 4), jnp.int32))
