"""DDIM inversion: sampling from the noise that it returns gives the data back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures_diffusion import quick_jit
from fixtures_mixtures import PLANE, gaussian, one_row, perfect
from mixture import draw_data

from sora_jax.diffusion.inversion import invert
from sora_jax.diffusion.sampling import SamplingConfig, sample
from sora_jax.diffusion.solvers import SolverConfig
from sora_jax.diffusion.times import TimesConfig
from sora_jax.errors import UserError

TOKENS = 60
CASES = [("linear_flow", "velocity", "even"), ("vp_linear", "eps", "leading"), ("trigonometric", "x0", "even")]


def configured(steps, spacing="even"):
    return SamplingConfig(str(steps), spacing, SolverConfig("ddim"))


def data():
    return jnp.asarray(draw_data(PLANE, jax.random.key(0), TOKENS))[None]


def error(process, prediction_type, spacing, steps, iterations):
    """The largest difference between the data and the sample from their noise."""
    problem, times = perfect(process, prediction_type, one_row(TOKENS)), TimesConfig(base_tokens=16)
    clips = jnp.full((1, 1), TOKENS)
    config, x_BLP = configured(steps, spacing), data()
    noise_BLP = quick_jit(lambda x: invert(config, times, problem, x, clips, iterations))(x_BLP)
    again_BLP = quick_jit(lambda eps: sample(config, times, problem, eps, clips))(noise_BLP)
    return float(jnp.abs(again_BLP - x_BLP).max())


@pytest.mark.parametrize("process, prediction_type, spacing", CASES)
def test_the_error_falls_with_the_steps_and_faster_with_the_iterations(process, prediction_type, spacing):
    coarse, fine = (error(process, prediction_type, spacing, steps, 1) for steps in (25, 100))
    assert coarse < 0.3 and 3 < coarse / fine < 6
    assert error(process, prediction_type, spacing, 100, 2) < fine / 8
    assert error(process, prediction_type, spacing, 100, 6) < 2e-5


@pytest.mark.parametrize("process, prediction_type, spacing", CASES)
def test_the_noise_of_one_gaussian_has_a_closed_form(process, prediction_type, spacing):
    """Data N(0.4, 0.8^2): the flow keeps every token's rank, so the noise is the data's distance in deviations."""
    x_BLP = jnp.linspace(-1.6, 2.4, 9)[None, :, None]
    problem = perfect(process, prediction_type, one_row(9), gaussian(0.4, 0.8))
    clips, config = jnp.full((1, 1), 9), configured(400, spacing)
    noise_BLP = quick_jit(lambda x: invert(config, TimesConfig(base_tokens=0), problem, x, clips, 2))(x_BLP)
    np.testing.assert_allclose(noise_BLP, (x_BLP - 0.4) / 0.8, atol=0.03)


def test_rows_are_inverted_at_their_own_times():
    """Clips of two sizes in one pack, whose grids are shifted differently, and a pack by itself."""
    x_BLP, times, config = data(), TimesConfig(base_tokens=16), configured(20)
    rows_BL = jnp.arange(TOKENS)[None] % 2
    noise_BLP = invert(config, times, perfect("linear_flow", "velocity", rows_BL), x_BLP, jnp.array([[16, 64]]), 2)
    for row, count in enumerate((16, 64)):
        own_BLP = x_BLP[:, row::2]
        problem = perfect("linear_flow", "velocity", one_row(TOKENS // 2))
        alone_BLP = invert(config, times, problem, own_BLP, jnp.array([[count]]), 2)
        np.testing.assert_allclose(noise_BLP[:, row::2], alone_BLP, atol=1e-5)
    assert np.abs(noise_BLP[:, ::2] - invert(config, times, problem, x_BLP[:, ::2], jnp.array([[64]]), 2)).max() > 1e-3


@pytest.mark.parametrize("steps, iterations, message", [(1, 1, "there must be 2 or more"), (9, 0, "iterations is 0")])
def test_mistakes_are_told(steps, iterations, message):
    problem = perfect("linear_flow", "velocity", one_row(TOKENS))
    with pytest.raises(UserError, match=message):
        invert(configured(steps), TimesConfig(), problem, data(), jnp.full((1, 1), TOKENS), iterations)
