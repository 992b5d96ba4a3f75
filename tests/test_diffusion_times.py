"""Times and keys: distributions against SciPy, published shift values, independence of the pack's layout."""

import math

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from fixtures_diffusion import quick_jit
from scipy import special, stats

from sora_jax.diffusion.keys import Purpose, clip_keys, step_key, token_noise
from sora_jax.diffusion.process import (
    PROCESSES,
    edm,
    half_log_snr,
    initial,
    linear_flow,
    time_of_step,
    trigonometric,
    vp_linear,
)
from sora_jax.diffusion.solvers import Problem, SolverConfig, solve
from sora_jax.diffusion.times import (
    MAX_MODE_SCALE,
    MIN_TIME,
    QUANTILES,
    ClipBatch,
    TimesConfig,
    batch_ranks,
    draw_times,
    per_token,
    sampling_times,
    shift,
)
from sora_jax.errors import UserError

KEY = step_key(0, 7, Purpose.TIME)
_draw = quick_jit(draw_times, static_argnums=(0, 1))
_shift = quick_jit(shift, static_argnums=(0, 3))
_sampling_times = quick_jit(sampling_times, static_argnums=(0, 3))
QUANTILES_AT = np.array([0.05, 0.25, 0.5, 0.75, 0.95])
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def draw(config, key, clip_ids_BS, tokens_BS, ranks_BS=None, process=edm):
    return _draw(config, process, key, ClipBatch(clip_ids_BS, tokens_BS, ranks_BS))


def many_draws(config, tokens=256, count=40_000, process=edm):
    clip_ids_BS = jnp.arange(1, count + 1, dtype=jnp.uint32).reshape(4, -1)
    tokens_BS = jnp.full(clip_ids_BS.shape, tokens, jnp.int32)
    return np.asarray(draw(config, KEY, clip_ids_BS, tokens_BS, None, process)).ravel()


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.5, 1.4)])
def test_logit_normal_quantiles(mean, std):
    drawn = many_draws(TimesConfig("logit_normal", mean, std))
    wanted = special.expit(stats.norm.ppf(QUANTILES_AT, mean, std))
    np.testing.assert_allclose(np.quantile(drawn, QUANTILES_AT), wanted, atol=0.01)


def test_logit_normal_published_values():
    drawn = many_draws(TimesConfig())
    found = np.quantile(drawn, [0.05, 0.25, 0.75, 0.95])
    np.testing.assert_allclose(found, [0.1619, 0.3375, 0.6625, 0.8382], atol=0.01)
    np.testing.assert_allclose(drawn.std(), 0.2082, atol=0.003)


def test_uniform_is_uniform():
    assert stats.kstest(many_draws(TimesConfig("uniform")), "uniform").pvalue > 0.01


@pytest.mark.parametrize("scale", [-1.0, 0.8, 1.29, MAX_MODE_SCALE])
def test_mode_is_monotonic_and_its_density_that_of_its_quantiles(scale):
    """2403.03206, equation 20: the middle is favoured by a positive scale, the ends by a negative one."""
    drawn = many_draws(TimesConfig("mode", mode_scale=scale))
    u = np.linspace(0, 1, 2001)
    t = 1 - u - scale * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
    assert np.all(np.diff(t) < 1e-6) and t[0] == 1.0 and abs(t[-1]) < 1e-12
    np.testing.assert_allclose(np.quantile(drawn, QUANTILES_AT), np.interp(1 - QUANTILES_AT, u, t), atol=0.01)
    assert (np.mean(np.abs(drawn - 0.5) < 0.1) > 0.2) == (scale > 0)


def test_cosmap_has_the_noise_levels_of_the_trigonometric_path():
    """2403.03206, equation 21: density 2 / (pi - 2 pi t + 2 pi t^2), here as its quantiles and as levels."""
    drawn = many_draws(TimesConfig("cosmap"))
    grid = np.linspace(0, 1, 20_001)
    density = 2 / (np.pi - 2 * np.pi * grid + 2 * np.pi * grid**2)
    cumulative = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(grid))])
    np.testing.assert_allclose(np.quantile(drawn, QUANTILES_AT), np.interp(QUANTILES_AT, cumulative, grid), atol=0.01)
    u = jnp.linspace(0.01, 0.99, 99)
    mapped = QUANTILES["cosmap"](TimesConfig("cosmap"), edm, u)
    np.testing.assert_allclose(half_log_snr(linear_flow, mapped), half_log_snr(trigonometric, u), atol=1e-5)


@pytest.mark.parametrize("process", [edm, linear_flow, vp_linear], ids=lambda process: process.name)
def test_log_sigma_is_normal_on_every_process(process):
    """Karras et al. 2206.00364, table 1: log of noise over signal has mean -1.2 and deviation 1.2."""
    drawn = many_draws(TimesConfig("log_sigma", -1.2, 1.2, base_tokens=0), process=process)
    log_sigma = -np.asarray(half_log_snr(process, jnp.asarray(drawn)))
    assert stats.kstest(log_sigma, stats.norm(-1.2, 1.2).cdf).pvalue > 0.01


def test_steps_are_the_thousand_of_ddpm_each_as_often():
    drawn = many_draws(TimesConfig("steps", base_tokens=0))
    step = np.rint(drawn * 1000).astype(int) - 1
    np.testing.assert_allclose(drawn, time_of_step(step), rtol=2e-7)
    counts = np.bincount(step, minlength=1000)
    assert counts.size == 1000 and stats.chisquare(counts).pvalue > 0.01
    ends = QUANTILES["steps"](
        TimesConfig("steps", base_tokens=0), edm, jnp.array([0.0, 0.0009, 0.0011, 0.9989, 0.9991, 1.0])
    )
    np.testing.assert_allclose(ends, [0.001, 0.001, 0.002, 0.999, 1.0, 1.0], rtol=1e-6)


def test_quantile_functions_start_and_end_in_time():
    """Also at the numbers next to 0 and 1, where logarithms and tangents would leave [0, 1]."""
    u = jnp.array([0.0, 1e-7, 0.5, 1.0 - 6e-8])
    for name, quantile in QUANTILES.items():
        t = np.asarray(quantile(TimesConfig(name, base_tokens=0), linear_flow, u))
        assert np.all(np.isfinite(t)) and t.min() >= 0 and t.max() <= 1, name
        assert name in ("mode",) or np.all(np.diff(t) >= 0), name


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal", "steps"])
def test_stratified_times_fill_the_distribution_evenly(distribution):
    """One clip in every n-th of the probability; the marginal of a single clip stays the distribution itself."""
    clip_ids_BS = jnp.asarray(np.random.default_rng(3).permutation(np.arange(1, 97)).reshape(4, 24), jnp.uint32)
    clip_ids_BS = clip_ids_BS.at[1, 5:].set(0)
    real = np.asarray(clip_ids_BS) > 0
    config = TimesConfig(distribution, base_tokens=0, stratified=True)
    tokens_BS = jnp.full((4, 24), 9, jnp.int32)
    drawn = np.asarray(draw(config, KEY, clip_ids_BS, tokens_BS))[real]
    u = stats.norm.cdf(special.logit(drawn)) if distribution == "logit_normal" else drawn
    count = real.sum()
    gaps = np.diff(np.sort(u))
    grain = 2e-3 if distribution == "steps" else 1e-5
    np.testing.assert_allclose(gaps, 1 / count, atol=grain)
    keys = jax.vmap(lambda step: step_key(0, step, Purpose.TIME))(jnp.arange(2000))
    first = ClipBatch(clip_ids_BS[:1], tokens_BS[:1])
    times = quick_jit(jax.vmap(lambda key: draw_times(config, edm, key, first)[0, 3]))(keys)
    plain = stats.norm.cdf(special.logit(np.asarray(times))) if distribution == "logit_normal" else times
    assert stats.kstest(np.asarray(plain), "uniform").pvalue > 0.01


@pytest.mark.parametrize("stratified", [False, True])
def test_a_share_is_pure_noise_and_the_rest_has_its_distribution(stratified):
    times = many_draws(TimesConfig("logit_normal", base_tokens=0, pure=0.3, stratified=stratified))
    pure, count = (times == 1.0).mean(), len(times)
    assert abs(pure - 0.3) < (2 / count if stratified else 3 * np.sqrt(0.21 / count))
    assert stats.kstest(stats.norm.cdf(special.logit(times[times < 1])), "uniform").pvalue > 0.01
    plain = many_draws(TimesConfig("logit_normal", base_tokens=0, stratified=stratified))
    assert not (plain == 1.0).any()
    assert (many_draws(TimesConfig(pure=1.0, stratified=stratified)) == 1.0).all()


def test_stratified_times_do_not_depend_on_the_layout():
    """Other packs, other slots, empty slots in other places: a clip of a batch keeps its time to the bit."""
    rng = np.random.default_rng(1)
    clips = rng.choice(2**32 - 1, 20, replace=False).astype(np.uint32) + 1
    config = TimesConfig(stratified=True)
    seen = []
    for shape in ((4, 6), (3, 9), (20, 1)):
        slots = np.zeros(shape, np.uint32).ravel()
        slots[rng.permutation(slots.size)[:20]] = clips
        tokens = jnp.full(shape, 300, jnp.int32)
        drawn = np.asarray(draw(config, KEY, jnp.asarray(slots.reshape(shape)), tokens)).ravel()
        seen.append({clip: drawn[slots == clip].item() for clip in clips})
    assert seen[0] == seen[1] == seen[2] and len(set(seen[0].values())) == 20


def test_stratified_micro_batches_are_slices_of_the_whole():
    clips = jnp.arange(5, 53, dtype=jnp.uint32).reshape(4, 2, 6)
    tokens = jnp.arange(48, dtype=jnp.int32).reshape(4, 2, 6)
    config = TimesConfig(stratified=True)
    ranks = batch_ranks(clips)
    np.testing.assert_allclose(np.sort(np.asarray(ranks).ravel()), np.arange(48) / 48, atol=1e-7)
    whole = draw(config, KEY, clips.reshape(8, 6), tokens.reshape(8, 6))
    parts = [draw(config, KEY, *part) for part in zip(clips, tokens, ranks, strict=True)]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-6)
    assert not np.array_equal(draw(config, KEY, clips[0], tokens[0]), whole[:2])


def test_ranks_of_empty_and_repeated_clips():
    np.testing.assert_array_equal(batch_ranks(jnp.zeros((2, 3), jnp.uint32)), 0.0)
    ranks = np.asarray(batch_ranks(jnp.array([[7, 0, 7], [7, 9, 0]], jnp.uint32)))
    assert set(ranks[[0, 0, 1, 1], [0, 2, 0, 1]].tolist()) == {0.0, 0.25, 0.5, 0.75}
    assert ranks[0, 1] == ranks[1, 2] == 0.0


def test_training_times_are_shifted_by_clip_size():
    """Sixteen times the base tokens: alpha = 4, every quantile moves along the shift."""
    wanted = special.expit(stats.norm.ppf(QUANTILES_AT))
    wanted = 4 * wanted / (1 + 3 * wanted)
    found = np.quantile(many_draws(TimesConfig(), tokens=16 * 256, process=linear_flow), QUANTILES_AT)
    np.testing.assert_allclose(found, wanted, atol=0.01)


def test_no_clip_in_training_is_at_time_zero():
    extreme = many_draws(TimesConfig("logit_normal", mean=-300.0, std=10.0))
    assert extreme.min() == np.float32(MIN_TIME)


@pytest.mark.parametrize(
    "alpha, wanted", [(3, (0.5, 0.75, 0.9)), (5, (0.625, 0.8333, 0.9375)), (7, (0.7, 0.875, 0.9545))]
)
def test_shift_table(alpha, wanted):
    tokens = jnp.full((3,), 100 * alpha**2, jnp.int32)
    shifted = _shift(TimesConfig(base_tokens=100), jnp.array([0.25, 0.5, 0.75]), tokens, linear_flow)
    np.testing.assert_allclose(shifted, wanted, atol=5e-5)


@pytest.mark.parametrize("tokens", [400, 250, 99, 25])
@every_process
def test_shift_multiplies_noise_over_signal(process, tokens):
    """By alpha, the root of the size ratio, at every time of every process, up to the noise it ends with."""
    t = jnp.linspace(0.02, 0.98, 49)
    shifted = _shift(TimesConfig(base_tokens=100), t, jnp.full((49,), tokens, jnp.int32), process)
    assert np.all(np.diff(shifted) >= 0)
    reached = np.asarray(shifted) < 1
    levels = [np.float64(process.a(times)) / np.float64(process.b(times)) for times in (t, shifted)]
    ratio = levels[0] / levels[1]
    np.testing.assert_allclose(ratio[reached], np.sqrt(tokens / 100), rtol=1e-3)
    # The others would have more noise than there is.
    assert reached.sum() > 35 and np.all(ratio[~reached] < np.sqrt(tokens / 100) * (1 + 1e-3))


def test_shift_in_closed_form():
    """tan(pi t / 2) of the trigonometric path and 80 t^7 of EDM's are multiplied by alpha = 2."""
    t, tokens = jnp.linspace(0.05, 0.85, 17), jnp.full((17,), 400, jnp.int32)
    time = np.linspace(0.05, 0.85, 17)
    found = [_shift(TimesConfig(base_tokens=100), t, tokens, process) for process in (trigonometric, edm)]
    np.testing.assert_allclose(found[0], np.arctan(2 * np.tan(np.pi * time / 2)) * 2 / np.pi, rtol=2e-6)
    np.testing.assert_allclose(found[1], 2 ** (1 / 7) * time, rtol=2e-6)


def test_exponential_shift_of_flux():
    """exp(mu) / (exp(mu) + 1 / t - 1), mu = 0.5 at 256 tokens and 1.15 at 4096, linear between and beyond."""
    t = np.array([0.1, 0.5, 0.9, 0.5])
    tokens, mu = np.array([256, 4096, 2176, 7936]), np.array([0.5, 1.15, 0.825, 1.8])
    found = _shift(
        TimesConfig(shift_rule="exponential"), jnp.asarray(t, jnp.float32), jnp.asarray(tokens, jnp.int32), linear_flow
    )
    np.testing.assert_allclose(found, np.exp(mu) / (np.exp(mu) + 1 / t - 1), rtol=1e-6)


def test_shifts_of_ltx_and_sd3():
    """LTX-Video: mu = 0.95 at 1024 tokens and 2.05 at 4096; SD3: alpha = 3 for all."""
    t, tokens = np.array([0.1, 0.5, 0.9, 0.5]), np.array([1024, 4096, 2560, 5632])
    alpha = np.exp([0.95, 2.05, 1.5, 2.6])
    ltx = TimesConfig(shift_rule="exponential", shift_tokens=(1024, 4096), log_shifts=(0.95, 2.05))
    sd3 = TimesConfig(shift_rule="constant", constant_shift=3.0)
    for config, factor in ((ltx, alpha), (sd3, 3.0)):
        found = _shift(config, jnp.asarray(t, jnp.float32), jnp.asarray(tokens, jnp.int32), linear_flow)
        np.testing.assert_allclose(found, factor * t / (1 + (factor - 1) * t), rtol=1e-6)


@every_process
def test_shift_is_exact_at_both_ends_and_can_be_off(process):
    tokens = jnp.arange(0, 100_000, 37, dtype=jnp.int32)
    for rule in ("root", "exponential", "constant"):
        for end in (0.0, 1.0):
            t = jnp.full(tokens.shape, end)
            np.testing.assert_array_equal(_shift(TimesConfig(shift_rule=rule), t, tokens, process), t)
    t = jnp.linspace(0.0, 1.0, tokens.size)
    np.testing.assert_array_equal(_shift(TimesConfig(base_tokens=0), t, tokens, process), t)
    np.testing.assert_array_equal(_shift(TimesConfig(base_tokens=99), t, jnp.full_like(tokens, 99), process), t)


def test_sampling_grid():
    tokens_BR = jnp.array([[256, 1024, 0], [17, 256, 40_000]], jnp.int32)
    times_KBR = _sampling_times(TimesConfig(), jnp.linspace(1.0, 0.0, 11), tokens_BR, linear_flow)
    assert times_KBR.shape == (11, 2, 3) and times_KBR.dtype == jnp.float32
    np.testing.assert_array_equal(times_KBR[0], 1.0)
    np.testing.assert_array_equal(times_KBR[-1], 0.0)
    assert bool(jnp.all(jnp.diff(times_KBR, axis=0) < 0))
    np.testing.assert_allclose(times_KBR[:, 0, 0], np.linspace(1, 0, 11), atol=1e-6)
    np.testing.assert_allclose(times_KBR[5, 0, 1], 2 * 0.5 / 1.5, rtol=1e-6)


@pytest.mark.parametrize("process", [linear_flow, edm, vp_linear], ids=lambda process: process.name)
def test_training_and_sampling_shift_alike(process):
    """A grid of quantiles is sampled at the very times at which a clip of that size is trained."""
    tokens = 1600
    drawn = many_draws(TimesConfig("uniform"), tokens=tokens, process=process)
    base_K = jnp.asarray(np.append(np.linspace(0.99, 0.01, 50), 0.0), jnp.float32)
    times_KBR = _sampling_times(TimesConfig("uniform"), base_K, jnp.full((1, 1), tokens, jnp.int32), process)
    np.testing.assert_allclose(np.quantile(drawn, base_K[:-1]), times_KBR[:-1, 0, 0], atol=0.01)


def test_solvers_take_grids_whose_first_steps_have_no_length():
    """Shifted towards noise, EDM's grid begins with times that are all 1: samples are those of the grid without."""
    times_KBR = _sampling_times(
        TimesConfig(base_tokens=100), jnp.linspace(1.0, 0.0, 21), jnp.full((1, 1), 400, jnp.int32), edm
    )
    idle = int(jnp.sum(times_KBR == 1.0)) - 1
    assert idle > 0 and bool(jnp.all(jnp.diff(times_KBR[idle:], axis=0) < 0))
    x_BLP = initial(edm, jax.random.normal(KEY, (1, 5, 1)), times_KBR[0, :, :, None])
    problem = Problem(lambda x, t: jnp.tanh(x), "edm", edm, jnp.zeros((1, 5), jnp.int32))
    for name in ("dpm2", "unipc"):
        run = quick_jit(lambda x, grid, name=name: solve(SolverConfig(name), problem, x, grid))
        ends = [run(x_BLP, grid) for grid in (times_KBR, times_KBR[idle:])]
        np.testing.assert_allclose(*ends, rtol=1e-6, err_msg=name)


def test_times_follow_the_clip_not_its_slot():
    rng = np.random.default_rng(1)
    clip_ids_BS = np.arange(1, 25, dtype=np.uint32).reshape(4, 6)
    tokens_BS = rng.integers(1, 999, (4, 6)).astype(np.int32)
    order = rng.permutation(24)
    moved_clips, moved_tokens = (array.ravel()[order].reshape(2, 12) for array in (clip_ids_BS, tokens_BS))
    here = draw(TimesConfig(), KEY, jnp.asarray(clip_ids_BS), jnp.asarray(tokens_BS))
    there = draw(TimesConfig(), KEY, jnp.asarray(moved_clips), jnp.asarray(moved_tokens))
    np.testing.assert_array_equal(np.asarray(here).ravel()[order], np.asarray(there).ravel())
    assert np.unique(here).size == 24


def test_noise_follows_the_token_not_its_place():
    """Three clips in one pack, then in other orders, with padding or alone: bit for bit the same noise."""
    lengths = {11: 5, 12: 9, 13: 3, 0: 4}
    noise_of = quick_jit(token_noise, static_argnums=3)

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
    clip_ids_BL = jnp.repeat(jnp.arange(1, 41, dtype=jnp.uint32), 50)[None]
    index_BL = jnp.tile(jnp.arange(50, dtype=jnp.int32), 40)[None]
    noise = np.asarray(quick_jit(token_noise, static_argnums=3)(KEY, clip_ids_BL, index_BL, 16))[0]
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
        (
            {"distribution": "beta"},
            "times.distribution is 'beta'; allowed: 'uniform', 'logit_normal', 'mode', .*, 'steps'",
        ),
        ({"std": 0.0}, "times.std is 0.0; it must be above 0"),
        ({"mode_scale": 2.0}, "times.mode_scale is 2.0; it must be from -1 to 1.7519"),
        ({"pure": 1.5}, "times.pure is 1.5; it must be from 0 to 1"),
        ({"base_tokens": -1}, "times.base_tokens is -1; it must be 0 .no shift. or more"),
        ({"distribution": "steps"}, "times.base_tokens is 256; with times.distribution 'steps' it must be 0"),
        ({"shift_rule": "linear"}, "times.shift_rule is 'linear'; allowed: 'root', 'exponential', 'constant'"),
        ({"shift_tokens": (9, 9)}, r"times.shift_tokens is \(9, 9\); it must be two rising numbers above 0"),
        ({"log_shifts": (0.0, math.inf)}, r"times.log_shifts is \(0.0, inf\); its numbers must be finite"),
        ({"constant_shift": 0.0}, "times.constant_shift is 0.0; it must be above 0 and finite"),
    ):
        with pytest.raises(UserError, match=said):
            TimesConfig(**options)
    with pytest.raises(UserError, match="seed is -1; it must be from 0 to 4294967295"):
        step_key(-1, 0, Purpose.TIME)


def test_shapes_are_checked_in_tests():
    """setup.cfg has the shape annotations of the diffusion room checked at every call made by a test."""
    with pytest.raises(jaxtyping.TypeCheckError):
        per_token(jnp.zeros((2, 3)), jnp.zeros((1, 4), jnp.int32))
