"""Our solvers against the schedulers of diffusers: the same states on the same noise, to 1e-5 of their scale."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures_diffusion import quick_jit
from peers.solver_cases import CASES, GOLDENS, network

from sora_jax.diffusion.process import process_named
from sora_jax.diffusion.sampling import SamplingConfig, grid_times
from sora_jax.diffusion.solvers import Problem, clip_x0, solve
from sora_jax.diffusion.times import TimesConfig

SEEN = []
_grid_times = quick_jit(grid_times, static_argnums=(0, 1, 2))


@pytest.fixture(scope="module")
def goldens():
    with np.load(GOLDENS) as stored:
        return dict(stored)


def times_of(case):
    """Our grid, shifted by the size of a clip: the case's own, or one that gives the case's factor."""
    config = case.times or TimesConfig(base_tokens=100, shift_rule="exponential" if case.tokens else "root")
    tokens_BR = jnp.full((1, 1), case.tokens or round(config.base_tokens * case.shift**2), jnp.int32)
    sampling = SamplingConfig(str(case.steps), case.spacing, last_time=case.last_time)
    return _grid_times(sampling, config, process_named(case.process), tokens_BR)


@functools.partial(quick_jit, static_argnums=(0, 1, 2, 3, 4))
def end_of(solver, process, prediction_type, variance, bound, inputs, times_KBR):
    """The end of a trajectory; the states at which the model is evaluated are appended to SEEN."""

    def denoise(x_BLP, t_BR):
        jax.debug.callback(lambda x: SEEN.append(np.asarray(x)), x_BLP, ordered=True)
        return network(inputs, x_BLP, t_BR[0, 0], variance == "learned", jnp)

    rows_BL = jnp.zeros(inputs["start"].shape[:2], jnp.int32)
    noise = lambda step: inputs["draws"][step]  # noqa: E731
    problem = Problem(denoise, prediction_type, process_named(process), rows_BL, noise, variance)
    return solve(solver, clip_x0(problem, bound), inputs["start"], times_KBR)


def states(case, inputs):
    """What our solver lets the model see, step by step, and the end."""
    SEEN.clear()
    inputs = {name: jnp.asarray(inputs[name]) for name in ("start", "draws", "token", "time", "out")}
    fixed = case.solver, case.process, case.prediction_type, case.variance, case.clip_x0
    end = end_of(*fixed, inputs, times_of(case))
    jax.effects_barrier()
    return np.stack([*SEEN, end])


@pytest.mark.parametrize("name", CASES)
def test_times_are_those_of_the_peer(name, goldens):
    np.testing.assert_allclose(times_of(CASES[name])[:-1, 0, 0], goldens[f"{name}/times"], rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_trajectories_are_those_of_the_peer(name, goldens):
    wanted = goldens[f"{name}/states"]
    found = states(CASES[name], goldens)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)
    # A golden file of states that hardly move would pass anything.
    assert np.abs(wanted[-1] - wanted[0]).max() > 0.3
