"""Grids of times: the conventions' own examples, and what every grid keeps."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion.process import PROCESSES, half_log_snr, process_named
from sora_jax.diffusion.sampling import SamplingConfig, grid_times
from sora_jax.diffusion.spacing import SPACINGS, base_times, count_steps, respaced_steps
from sora_jax.diffusion.times import TimesConfig
from sora_jax.errors import UserError


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 250])
@pytest.mark.parametrize("spacing", sorted(set(SPACINGS) - {"times"}))
@pytest.mark.parametrize("process", ["linear_flow", "vp_linear", "edm"])
def test_grids_descend_to_zero(process, spacing, steps):
    times = base_times(process, steps, spacing)
    assert times.shape == (steps + 1,) and times[-1] == 0 and times[0] <= 1
    assert np.all(np.diff(times.astype(np.float32)) < 0)
    assert count_steps(steps, spacing) == steps


@pytest.mark.parametrize("end", ["", ",0", ", 0.0"])
def test_a_list_of_times_is_the_grid(end):
    """The grid of a distilled model: no clip's size shifts it."""
    listed = [1, 0.9937, 0.9875, 0.9812, 0.975, 0.9094, 0.725]
    text = ",".join(map(str, listed)) + end
    np.testing.assert_allclose(base_times("linear_flow", text, "times"), [*listed, 0], rtol=1e-6)
    assert count_steps(text, "times") == 7
    config, tokens_BR = SamplingConfig(text, "times"), jnp.array([[4, 4096]])
    times_KBR = grid_times(config, TimesConfig(base_tokens=4), process_named("linear_flow"), tokens_BR)
    np.testing.assert_allclose(times_KBR[:, 0], np.stack([[*listed, 0]] * 2, 1), rtol=1e-6)


@pytest.mark.parametrize(
    "text", ["", "0", "0.9,0.5", "1,0.5,0.5", "1,0.5,0.6", "1,-0.5", "1,x", "1,,0.5", "1,nan", "30"]
)
def test_a_list_that_does_not_fall_from_1_is_refused(text):
    with pytest.raises(UserError, match=f"steps is '{text}'; with spacing 'times' it must be times that fall from 1"):
        SamplingConfig(text, "times")


def test_even_times():
    np.testing.assert_allclose(base_times("vp", 4), [1, 0.75, 0.5, 0.25, 0])


def test_discrete_spacings_of_ten_steps():
    """Table 2 of 2305.08891, whose steps count from 1."""
    leading, trailing, linspace = (base_times("vp", 10, s)[:-1] * 1000 for s in ("leading", "trailing", "linspace"))
    np.testing.assert_allclose(leading, np.arange(901, 0, -100))
    np.testing.assert_allclose(trailing, np.arange(1000, 0, -100))
    np.testing.assert_allclose(linspace, [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1])


def test_respacing_to_250_steps():
    """DiT's sampler: 999/249 of a step at a time, rounded."""
    steps = respaced_steps("250")
    assert steps[:7] == [0, 4, 8, 12, 16, 20, 24] and steps[-4:] == [987, 991, 995, 999] and len(set(steps)) == 250
    np.testing.assert_allclose(base_times("vp_linear", "250", "respaced"), [*(np.array(steps[::-1]) + 1) / 1000, 0])


def test_respacing_keeps_whole_strides_and_sections():
    assert respaced_steps("ddim50") == list(range(0, 1000, 20))
    assert respaced_steps("ddim250") == list(range(0, 1000, 4))
    assert respaced_steps("1000") == list(range(1000))
    # The example in the words of the convention: sections of a hundred each, strided by 10, 15 and 20 counts.
    sections = respaced_steps("10,15,20", 300)
    assert [sum(start <= i < start + 100 for i in sections) for start in (0, 100, 200)] == [10, 15, 20]
    assert sections[0] == 0 and sections[9] == 99 and sections[10] == 100 and sections[-1] == 299
    assert respaced_steps("1,1,2", 10) == [0, 4, 7, 9]


def test_the_grid_of_stable_diffusion_is_one_step_later():
    """steps_offset=1 of its published schedulers: 50 steps from 981 down to 1."""
    np.testing.assert_allclose(base_times("vp_scaled_linear", 50, "leading_1")[:-1] * 1000 - 1, np.arange(981, 0, -20))


def test_the_grid_of_sd3_ends_at_its_shifted_least_time():
    times = base_times("linear_flow", 28, "sd3")
    np.testing.assert_allclose(times, [*np.linspace(1, 3 * 0.001 / (1 + 2 * 0.001), 28), 0])


@pytest.mark.parametrize("alpha", [1.0, 4.0])
def test_a_grid_is_stretched_to_the_time_of_its_last_step(alpha):
    """After the shift: distances from 1 keep their ratios, and the end stays at 0."""
    times, tokens_BR = TimesConfig(shift_rule="constant", constant_shift=alpha), jnp.array([[9]])
    plain, stretched = (
        grid_times(SamplingConfig("10", last_time=last), times, process_named("linear_flow"), tokens_BR)[:, 0, 0]
        for last in (0.0, 0.04)
    )
    assert stretched[0] == 1 and stretched[-1] == 0 and abs(stretched[-2] - 0.04) < 1e-6
    np.testing.assert_allclose((1 - stretched[:-1]) / 0.96, (1 - plain[:-1]) / (1 - plain[-2]), atol=1e-6)


def test_a_last_time_of_steps_that_are_all_at_noise_leaves_them_there():
    """A shift so large that a process with some signal at t = 1 has no other time for any step."""
    config, times = SamplingConfig("4", last_time=0.1), TimesConfig(shift_rule="constant", constant_shift=1e6)
    found = grid_times(config, times, process_named("vp_scaled_linear"), jnp.array([[9]]))[:, 0, 0]
    np.testing.assert_array_equal(found, [1, 1, 1, 1, 0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"last_time": 1.0}, "sampling.last_time is 1.0; it must be from 0"),
        ({"last_time": 0.1, "steps": "1"}, "sampling.last_time is 0.1; with one step, or the spacing 'times', it must"),
        ({"last_time": 0.1, "steps": "1,0.5", "spacing": "times"}, "or the spacing 'times', it must be 0"),
        ({"clip_x0": -1.0}, "sampling.clip_x0 is -1.0; it must be 0"),
    ],
)
def test_ends_and_bounds_that_cannot_be_are_told(options, message):
    with pytest.raises(UserError, match=message):
        SamplingConfig(**options)


@pytest.mark.parametrize("name", PROCESSES)
def test_karras_levels_are_even_in_their_seventh_root(name):
    times = base_times(name, 12, "karras")
    levels = half_log_snr(process_named(name), jnp.asarray(times[:-1], jnp.float32))
    sigma = np.exp(-np.asarray(levels, np.float64))
    roots = sigma ** (1 / 7)
    np.testing.assert_allclose(roots, np.linspace(roots[0], roots[-1], 12), rtol=1e-3)
    ends = {
        "linear_flow": (80, 0.002),
        "edm": (80, 0.002),
        "vp_linear": (157.4, 0.01),
        "vp_scaled_linear": (14.61, 0.0292),
    }
    if name in ends:
        np.testing.assert_allclose(sigma[[0, -1]], ends[name], rtol=5e-3)


def test_karras_levels_of_edm_are_even_in_time():
    """The process was made so: sigma = 80 t^7."""
    times = base_times("edm", 9, "karras")[:-1]
    np.testing.assert_allclose(times, np.linspace(1.0, (0.002 / 80) ** (1 / 7), 9), atol=1e-5)


@pytest.mark.parametrize(
    "steps, spacing, message",
    [
        (10, "cubic", "spacing is 'cubic'; allowed: 'even', 'respaced', .*"),
        (0, "even", "steps is 0; it must be a whole number of 1 or more"),
        ("ddim50", "even", "steps is 'ddim50'; it must be a whole number of 1 or more"),
        (1000, "leading_1", "steps is 1000; it must be a whole number from 1 to 999"),
        (1001, "trailing", "steps is 1001; it must be a whole number from 1 to 1000"),
        ("10,x", "respaced", "steps is 'x'; it must be a whole number from 1 to 500"),
        ("ddim300", "respaced", "no whole stride keeps 300 of 1000"),
        ("600,10", "respaced", "steps is '600'; it must be a whole number from 1 to 500"),
    ],
)
def test_mistakes_are_told(steps, spacing, message):
    with pytest.raises(UserError, match=message):
        base_times("vp", steps, spacing)
    with pytest.raises(UserError, match=message):
        count_steps(steps, spacing)
    with pytest.raises(
        UserError,
        match=message.replace("is 0;", "is '0';").replace("is 1001", "is '1001'").replace("is 1000;", "is '1000';"),
    ):
        SamplingConfig(str(steps), spacing)


def test_a_configuration_is_checked_without_a_device():
    """A file of options is read before it is known where it runs; asking for a device fails here."""
    program = "from sora_jax.diffusion.sampling import SamplingConfig; SamplingConfig('12', 'karras')"
    environment = os.environ | {"JAX_PLATFORMS": "none", "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
