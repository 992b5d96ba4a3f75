"""Noising processes: closed forms, every step of the discrete schedules, exact ends, steps from s to t."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from sora_jax.diffusion.process import (
    PROCESSES,
    corrupt,
    derivatives,
    edm,
    half_log_snr,
    half_log_snr_slope,
    initial,
    input_scale,
    linear_flow,
    lost_snr,
    process_named,
    step_before,
    time_of_half_log_snr,
    time_of_step,
    transition,
    trigonometric,
    vp,
    vp_linear,
    zero_terminal_snr,
)
from sora_jax.errors import UserError

ALL = list(PROCESSES.values())
PRESERVING = [process for process in ALL if process not in (linear_flow, edm)]
INSIDE = jnp.linspace(1e-3, 1 - 1e-3, 301)
STEPS = np.arange(1000)
# Where a process ends: (a(1), b(1)); None where DDPM's schedule leaves a little signal.
SILENT = {"linear_flow", "trigonometric", "vp_linear_zero_snr", "vp_scaled_linear_zero_snr"}


def snr(process, t):
    return np.square(np.float64(process.a(t)) / np.float64(process.b(t)))


def name_of(process):
    return process.name


def cosine_betas():
    """Nichol and Dhariwal 2102.09672, equation 17, with their limit on beta."""
    power = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - power[1:] / power[:-1], 0.999)


def without_terminal_signal(betas):
    """Lin et al. 2305.08891, algorithm 1."""
    signal = np.sqrt(np.cumprod(1 - betas))
    signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    return 1 - signal**2 / np.append(1, signal[:-1] ** 2)


LINEAR = np.linspace(1e-4, 0.02, 1000)
SCALED = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
BETAS = {
    "vp_linear": LINEAR,
    "vp_scaled_linear": SCALED,
    "vp_cosine": cosine_betas(),
    "vp_linear_zero_snr": without_terminal_signal(LINEAR),
    "vp_scaled_linear_zero_snr": without_terminal_signal(SCALED),
}


def clean_and_noise(shape=(301, 5)):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))


def step_times():
    return jnp.asarray(STEPS / 1000, jnp.float32), jnp.asarray(time_of_step(STEPS), jnp.float32)


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.mark.parametrize("process", ALL, ids=name_of)
def test_ends_are_exact(process):
    x0, eps = clean_and_noise()
    np.testing.assert_array_equal(corrupt(process, x0, eps, jnp.zeros((301, 1))), x0)
    end = corrupt(process, x0, eps, jnp.ones((301, 1)))
    assert np.array_equal(end, eps) == (process.name in SILENT)


@pytest.mark.parametrize("process", ALL, ids=name_of)
def test_noise_only_grows(process):
    """Also between any two of ten thousand neighbouring times, where the pieces of a process meet."""
    dense = jnp.linspace(0.0, 1.0, 10_001)[1:]
    assert np.all(np.diff(half_log_snr(process, dense)) < 0)
    assert np.all(half_log_snr_slope(process, INSIDE) < 0)
    assert corrupt(process, *clean_and_noise(), jnp.full((301, 1), 0.5)).dtype == jnp.float32


@pytest.mark.parametrize("process", PRESERVING, ids=name_of)
def test_variance_is_preserved(process):
    t = jnp.linspace(0.0, 1.0, 2001)
    a, b = process.a(t), process.b(t)
    da, db = derivatives(process, t)
    np.testing.assert_allclose(a**2 + b**2, 1.0, atol=5e-7)
    inside = (np.asarray(b) > 0) & (np.asarray(t) > 1e-4)
    np.testing.assert_allclose((a * da + b * db)[inside], 0.0, atol=5e-5)


def test_derivatives_match_the_closed_forms():
    t = np.asarray(INSIDE, np.float64)
    da, db = derivatives(trigonometric, INSIDE)
    np.testing.assert_allclose(da, -0.5 * np.pi * np.sin(0.5 * np.pi * t), atol=1e-6)
    np.testing.assert_allclose(db, 0.5 * np.pi * np.cos(0.5 * np.pi * t), atol=1e-6)
    da, db = derivatives(linear_flow, INSIDE)
    np.testing.assert_array_equal(da, -1.0)
    np.testing.assert_array_equal(db, 1.0)
    da, db = derivatives(edm, INSIDE)
    np.testing.assert_array_equal(da, 0.0)
    np.testing.assert_allclose(db, 560 * t**6, rtol=1e-5)


@pytest.mark.parametrize("process", ALL, ids=name_of)
def test_derivatives_are_those_of_finite_differences(process):
    """At both ends and where pieces meet too: a slope that is 0 there by accident would stop a flow."""
    t, h = jnp.asarray([0.003, 0.02, 0.3, 0.7, 0.95, 0.99, 1.0]), jnp.float32(2e-3)
    for function, slope in zip((process.a, process.b), derivatives(process, t), strict=True):
        backward = (3 * function(t) - 4 * function(t - h / 2) + function(t - h)) / h
        scale = np.abs(backward).max()
        np.testing.assert_allclose(slope[1:], backward[1:], atol=0.02 * scale)


@pytest.mark.parametrize("name", BETAS)
def test_discrete_schedules_are_met_at_every_step(name):
    """All thousand steps against the running product in float64; a kept to the digits of a where it is tiny."""
    process, (_, t) = process_named(name), step_times()
    abar = np.cumprod(1.0 - BETAS[name])
    np.testing.assert_allclose(process.a(t), np.sqrt(abar), rtol=2e-5, atol=1e-12)
    np.testing.assert_allclose(process.b(t) ** 2, 1.0 - abar, rtol=2e-6)


def test_published_values():
    _, t = step_times()
    np.testing.assert_allclose(vp_linear.a(t[0]), 0.99995, rtol=1e-6)
    np.testing.assert_allclose(vp_linear.a(t[499]) ** 2, 0.0785872, rtol=1e-5)
    np.testing.assert_allclose(vp_linear.a(t[999]), 0.00635282, rtol=1e-5)
    np.testing.assert_allclose(vp_linear.a(t[999]) ** 2, 4.03583e-5, rtol=1e-5)
    np.testing.assert_allclose(process_named("vp_scaled_linear").a(t[999]) ** 2, 0.00466010, rtol=2e-6)
    silent = process_named("vp_linear_zero_snr")
    np.testing.assert_allclose(silent.a(t[0]) ** 2, 0.9999, rtol=1e-7)
    np.testing.assert_allclose(silent.a(t[499]) ** 2, 0.0760288, rtol=1e-6)
    assert float(silent.a(t[999])) == 0.0 and float(silent.b(t[999])) == 1.0
    assert transition(silent, t[998], t[999])[1] == 1.0


def test_ddpm_schedule_is_smooth_between_steps():
    """-d log abar / dt is 1000 beta up to second order in beta: no kinks where steps meet."""
    t = jnp.asarray(np.linspace(0.05, 0.95, 2001), jnp.float32)
    da, _ = derivatives(vp_linear, t)
    beta = 1e-4 + (0.02 - 1e-4) * (1000.0 * np.asarray(t, np.float64) - 0.5) / 999.0
    np.testing.assert_allclose(-2.0 * da / vp_linear.a(t), -1000.0 * np.log1p(-beta), rtol=1e-4)


def test_vp_sde_is_the_integral_of_its_rate():
    for t in (0.01, 0.3, 1.0):
        total = integrate.quad(lambda time: 0.1 + 19.9 * time, 0, t)[0]
        np.testing.assert_allclose(vp.a(jnp.float32(t)), np.exp(-0.5 * total), rtol=1e-6)


@pytest.mark.parametrize("process", PRESERVING, ids=name_of)
def test_equal_snr_maps_to_the_linear_flow(process):
    a, b = process.a(INSIDE), process.b(INSIDE)
    np.testing.assert_allclose(snr(linear_flow, b / (a + b)), snr(process, INSIDE), rtol=2e-3)


@pytest.mark.parametrize("process", ALL, ids=name_of)
def test_time_of_a_signal_to_noise_ratio(process):
    t = jnp.linspace(0.2, 0.999, 100)
    np.testing.assert_allclose(time_of_half_log_snr(process, half_log_snr(process, t)), t, atol=5e-7)
    beyond = time_of_half_log_snr(process, jnp.array([200.0, -200.0]))
    np.testing.assert_allclose(beyond, [0.0, 1.0], atol=1e-5)


def test_even_times_of_edm_are_the_spacing_of_karras():
    """2206.00364, equation 5, from sigma 80 to 0.002 with rho = 7."""
    ends = np.array([80.0, 0.002]) ** (1 / 7)
    sigmas = np.linspace(*ends, 18) ** 7
    times = jnp.linspace(1.0, (0.002 / 80) ** (1 / 7), 18)
    np.testing.assert_allclose(edm.b(times), sigmas, rtol=1e-5)
    np.testing.assert_allclose(input_scale(edm, times), 1 / np.sqrt(sigmas**2 + 1), rtol=1e-5)


@pytest.mark.parametrize("process", ALL, ids=name_of)
def test_what_a_sampler_starts_from_has_the_variance_of_noised_data(process):
    x0, eps = clean_and_noise((4, 20_000))
    for t in (0.4, 1.0):
        times = jnp.full((4, 1), t)
        start, noised = initial(process, eps, times), corrupt(process, x0, eps, times)
        np.testing.assert_allclose(np.std(start), np.std(noised), rtol=0.02)
        scale = input_scale(process, times)
        if process is edm:
            np.testing.assert_allclose(scale * start, eps, rtol=1e-5)
        else:
            np.testing.assert_array_equal(scale, 1.0)


@pytest.mark.parametrize("name", BETAS)
def test_transitions_between_neighbours_are_the_betas(name):
    """float32 here, float64 there; what is left at the last steps without signal is the rounding of a itself."""
    betas, (s, t) = BETAS[name], step_times()
    alpha, variance = jax.jit(lambda s, t: transition(process_named(name), s, t))(s, t)
    smooth = slice(0, 900)
    np.testing.assert_allclose(variance[smooth], betas[smooth], rtol=3e-6)
    np.testing.assert_allclose(alpha[smooth], np.sqrt(1 - betas)[smooth], rtol=3e-6)
    np.testing.assert_allclose(variance, betas, rtol=3e-5)
    np.testing.assert_allclose(alpha, np.sqrt(1 - betas), rtol=1e-4)


@pytest.mark.parametrize("process", ALL, ids=name_of)
def test_two_transitions_are_one(process):
    """From r over s to t, over every kind of end: means multiply and variances add up."""
    for r, s, t in ((0.0, 0.3, 0.9), (0.2, 0.5, 0.6), (5e-4, 0.1, 1.0), (0.0, 4e-4, 8e-4), (0.998, 0.999, 1.0)):
        r, s, t = map(jnp.float32, (r, s, t))
        first, second, whole = (transition(process, *pair) for pair in ((r, s), (s, t), (r, t)))
        np.testing.assert_allclose(first[0] * second[0], whole[0], rtol=2e-4, atol=1e-7)
        np.testing.assert_allclose(second[0] ** 2 * first[1] + second[1], whole[1], rtol=2e-4)
    start, end = jnp.float32(0.0), jnp.float32(0.7)
    alpha, variance = transition(process, start, end)
    np.testing.assert_allclose(alpha, process.a(end), rtol=1e-6)
    np.testing.assert_allclose(variance, process.b(end) ** 2, rtol=1e-6)


@pytest.mark.parametrize("process", ALL, ids=name_of)
def test_lost_signal_to_noise_ratio(process):
    """0 where nothing moves, 1 from clean data or to pure noise, else one less the ratio."""
    for t in (0.0, 1e-5, 0.5, 1.0):
        assert float(lost_snr(process, jnp.float32(t), jnp.float32(t))) == 0.0
    assert float(lost_snr(process, jnp.float32(0.0), jnp.float32(0.6))) == 1.0
    if process.name in SILENT:
        assert float(lost_snr(process, jnp.float32(0.6), jnp.float32(1.0))) == 1.0
    s, t = jnp.float32(0.4), jnp.float32(0.6)
    wanted = 1 - snr(process, t) / snr(process, s)
    np.testing.assert_allclose(lost_snr(process, s, t), wanted, rtol=1e-5)


@pytest.mark.parametrize("process", ALL, ids=name_of)
def test_lost_signal_to_noise_ratio_is_a_share(process):
    """Not a rounding error below 0 or above 1, where its root or that of 1 - g would be a NaN."""
    times = np.linspace(0, 1, 1001, dtype=np.float32)
    tiny = np.geomspace(1e-5, 1e-3, 20, dtype=np.float32)
    times = np.sort(np.concatenate([times, tiny, np.nextafter(times[1:], np.float32(0))]))
    g = np.asarray(jax.jit(lambda s, t: lost_snr(process, jnp.minimum(s, t), jnp.maximum(s, t)))(
        *(jnp.asarray(axis) for axis in np.meshgrid(times, times))
    ))  # fmt: skip
    assert np.all((g >= 0) & (g <= 1)) and np.any(g > 0.9) and np.any(g < 0.1)


def test_zero_terminal_snr_is_a_change_of_any_process():
    """Of the VP-SDE: no signal at the end, the first step as it was, signal linear in the old one between them."""
    changed = zero_terminal_snr(vp)
    t = jnp.linspace(0.001, 1.0, 400)
    signal = np.asarray(changed.a(t), np.float64)
    np.testing.assert_allclose(signal[[0, -1]], [vp.a(t[0]), 0.0], rtol=1e-7)
    slope = (signal[0] - signal[-1]) / float(vp.a(t[0]) - vp.a(t[-1]))
    np.testing.assert_allclose(signal, slope * (np.asarray(vp.a(t)) - float(vp.a(t[-1]))), atol=3e-7)
    assert changed.name == "vp_zero_snr"


def test_a_step_that_forbids_transfers_may_be_the_first_to_use_a_process():
    fresh, t = dataclasses.replace(vp, name="fresh"), jnp.float32([0.5])  # nothing of it has been computed
    changed = zero_terminal_snr(fresh)
    with jax.transfer_guard("disallow"):
        found = jax.jit(lambda t: (changed.a(t), changed.b(t)))(t)
    np.testing.assert_allclose(jax.device_get(found), (changed.a(t), changed.b(t)), rtol=1e-5)


def test_steps_before():
    """The whole grid and the times between its steps."""
    s, t = step_times()
    np.testing.assert_allclose(step_before(t), s, atol=1e-7)
    assert float(step_before(t[0])) == 0.0 and float(step_before(jnp.float32(3e-4))) == 0.0
    np.testing.assert_allclose(step_before(jnp.float32(0.50037)), 0.49937, atol=1e-6)


def test_unknown_names_are_user_errors():
    with pytest.raises(
        UserError, match="process is 'ddpm'; allowed: 'linear_flow', 'trigonometric', 'vp', 'vp_linear', .* 'edm'"
    ):
        process_named("ddpm")
    assert process_named("trigonometric") is trigonometric
