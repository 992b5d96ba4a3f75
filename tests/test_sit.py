"""SiT: its network and its SDE sampler, whose time runs from noise to data, are those of the published code."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import relative_error
from fixtures_diffusion import quick_jit
from fixtures_models import PACKINGS, Golden, Images, dit_weights, write_official
from fixtures_runs import ROOT, run
from peers.solver_cases import fixed_inputs, network

from sora_jax.config import load
from sora_jax.convert import command
from sora_jax.convert import dit as dits
from sora_jax.convert.tensors import read_tensors
from sora_jax.diffusion.guidance import GuidanceConfig, TokenLayout, guided
from sora_jax.diffusion.process import process_named
from sora_jax.diffusion.sampling import SamplingConfig, grid_times
from sora_jax.diffusion.solvers import Problem, SolverConfig, solve
from sora_jax.diffusion.times import TimesConfig
from sora_jax.errors import UserError
from sora_jax.kinds import run_config
from sora_jax.models.transformer import TransformerConfig, denoise
from sora_jax.nn.pack import drop_captions

SIT_TIMES = np.array([0.0, 0.3, 0.99])  # those of the golden file
HEAD = "final_layer.linear.weight"


@pytest.fixture(scope="module")
def golden():
    return Golden("sit_official")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A SiT with the unused half of its output; its tensors are those of the golden DiT."""
    return write_official(tmp_path_factory.mktemp("sit") / "sit.safetensors", Golden("dit_official"))


@pytest.fixture(scope="module")
def sit(checkpoint):
    found = dits.read_sit(checkpoint, heads=2)
    return dataclasses.replace(found, config=dataclasses.replace(found.config, dtype="float32"))


@pytest.mark.parametrize("layout", PACKINGS)
def test_the_velocity_is_that_of_the_published_network_back_in_time(golden, sit, layout):
    images = Images(layout, 1 - SIT_TIMES)
    x_BLP = images.of(golden["x"]).tokens_BLP
    out = jax.jit(lambda p, x, t: denoise(p, sit.config, images.pack, x, t))(sit.params, x_BLP, images.times_BR)
    assert relative_error(images.back(out), -golden["out"]) < 2e-5
    # A file of outputs that the time hardly changes would pass with any convention.
    other = jax.jit(lambda p, x, t: denoise(p, sit.config, images.pack, x, t))(sit.params, x_BLP, 1 - images.times_BR)
    assert relative_error(images.back(other), -golden["out"]) > 1e-3


def test_guidance_is_that_of_the_published_network(golden, sit):
    images = Images("together", 1 - SIT_TIMES)
    nothing = drop_captions(images.pack, jnp.ones_like(images.pack.clip_ids_BS, bool))
    rule = guided(
        GuidanceConfig(4.0, 3),
        *(functools.partial(denoise, sit.params, sit.config, each) for each in (images.pack, nothing)),
        jnp.full(images.pack.clip_ids_BS.shape, 4.0),
        TokenLayout(images.pack.segments_BL, images.pack.rows_BL, 4),
    )
    out = jax.jit(rule)(images.of(golden["x"]).tokens_BLP, images.times_BR)
    assert relative_error(images.back(out), -golden["guided_3"]) < 2e-5


def test_a_sit_goes_back_to_the_same_bits_without_the_half_it_does_not_use(sit, checkpoint, tmp_path):
    dits.write_sit(sit, tmp_path / "sit.safetensors")
    found, wanted = read_tensors(tmp_path / "sit.safetensors"), dit_weights(Golden("dit_official"))
    used = wanted[HEAD].reshape(4, 2, 4, -1)[:, 0].reshape(16, -1)  # place, half, channel
    np.testing.assert_array_equal(found.pop(HEAD), used)
    bias = wanted["final_layer.linear.bias"].reshape(4, 2, 4)[:, 0].ravel()
    np.testing.assert_array_equal(found.pop("final_layer.linear.bias"), bias)
    for name, x in found.items():
        np.testing.assert_array_equal(x, wanted[name])
    again = dits.read_sit(tmp_path / "sit.safetensors", heads=2)
    jax.tree.map(np.testing.assert_array_equal, again.params, sit.params)
    with pytest.raises(UserError, match="config.model.step_times is False; for the format 'dit' it must be True"):
        dits.write_dit(sit, tmp_path / "dit.safetensors")
    assert not (tmp_path / "dit.safetensors").exists()


def test_a_sit_is_converted_both_ways_by_the_command(checkpoint, tmp_path, capsys):
    out, back = tmp_path / "run", tmp_path / "back.safetensors"
    assert run("convert", "--from=sit", f"--weights={checkpoint}", "--heads=2", f"--out={out}") == 0
    assert "the second half of the output was left out: SiT does not use it" in capsys.readouterr().out
    config = run_config(json.loads((out / "config.json").read_text()))
    assert (config.diffusion.process, config.diffusion.prediction) == ("linear_flow", "velocity")
    assert run("convert", "--to=sit", f"--workdir={out}", f"--out={back}") == 0
    np.testing.assert_array_equal(read_tensors(back)["pos_embed"], dits.position_table(24, 4)[None])
    assert run("convert", "--to=dit", f"--workdir={out}", f"--out={tmp_path / 'dit.safetensors'}") == 2
    assert "must be 'vp_linear' and 'eps'" in capsys.readouterr().err


def test_the_recipe_of_a_converted_sit_is_that_of_the_config():
    config = run_config(load(f"{ROOT / 'configs' / 'sit.py'}:XL/2,512"))
    model = dataclasses.replace(config.model, data_times=True)
    assert command.denoiser_run(dits.Network(model, {}, 64)) == dataclasses.replace(config, model=model)


def test_two_conventions_of_time_at_once_are_refused():
    with pytest.raises(UserError, match="model.data_times is True; with model.step_times it must be False"):
        TransformerConfig(step_times=True, data_times=True)


# ------------------------------------------------------------------------------------------------ the SDE sampler

STEPS, LAST = 12, 0.04
QUARTER = np.pi / 2
PATHS = {  # of SiT's time: alpha, alpha', sigma, sigma'
    "linear_flow": lambda s: (s, 1.0, 1 - s, -1.0),
    "trigonometric": lambda s: (
        np.sin(QUARTER * s),
        QUARTER * np.cos(QUARTER * s),
        np.cos(QUARTER * s),
        -QUARTER * np.sin(QUARTER * s),
    ),
}
FORMS = {  # SiT's name: ours, and the diffusion at time s where the noise has deviation sigma
    "sigma": ("sigma", lambda s, sigma: sigma),
    "linear": ("linear", lambda s, sigma: 1 - s),
    "constant": ("constant", lambda s, sigma: 1.0),
    "decreasing": ("decreasing", lambda s, sigma: 0.25 * (np.cos(np.pi * s) + 1) ** 2),
    "increasing-decreasing": ("sine", lambda s, sigma: np.sin(np.pi * s) ** 2),
}


def published(inputs, path, form, norm, method, last_step):
    """The sample of transport/transport.py and integrators.py of willisma/SiT, told again in float64.

    STEPS evaluations, or pairs of them, and the noise of every step from the table.
    """

    def velocity(x, s):
        return network(inputs, x, s, False)

    def diffusion(s):
        return norm * FORMS[form][1](s, PATHS[path](s)[2])

    def drift(x, s):
        alpha, slope, sigma, sigma_slope = PATHS[path](s)
        u, ratio = velocity(x, s), alpha / slope
        score = (ratio * u - x) / (sigma**2 - ratio * sigma_slope * sigma)
        return u + diffusion(s) * score

    times = np.linspace(0.0, 1.0 - LAST, STEPS)
    h, x = times[1], inputs["start"]
    for s, w in zip(times[:-1], inputs["draws"], strict=False):
        noise = np.sqrt(2 * diffusion(s) * h) * w
        if method == "Euler":
            x = x + h * drift(x, s) + noise
        else:
            first = drift(x + noise, s)
            x = x + noise + h / 2 * (first + drift(x + noise + h * first, s + h))
    alpha, slope, sigma, sigma_slope = PATHS[path](times[-1])
    if last_step == "Mean":
        return x + LAST * drift(x, times[-1])
    if last_step == "Euler":
        return x + LAST * velocity(x, times[-1])
    ratio = alpha / slope
    score = (ratio * velocity(x, times[-1]) - x) / (sigma**2 - ratio * sigma_slope * sigma)
    return (x + sigma**2 * score) / alpha


@functools.partial(quick_jit, static_argnums=(0, 1))
def ours(config, path, inputs):
    process, times = process_named(path), TimesConfig(base_tokens=0)
    rows_BL = jnp.zeros(inputs["start"].shape[:2], jnp.int32)

    def denoise(x_BLP, t_BR):
        return -network(inputs, x_BLP, 1.0 - t_BR[0, 0], False, jnp)

    problem = Problem(denoise, "velocity", process, rows_BL, lambda step: inputs["draws"][step])
    return solve(
        config.solver, problem, inputs["start"], grid_times(config, times, process, jnp.ones((1, 1), jnp.int32))
    )


SDES = [  # path, form and norm of the diffusion, method, last step
    ("linear_flow", "sigma", 1.0, "Euler", "Mean"),  # the published setting
    ("linear_flow", "linear", 0.5, "Euler", "Tweedie"),
    ("linear_flow", "constant", 1.0, "Heun", "Euler"),
    ("trigonometric", "decreasing", 1.0, "Heun", "Tweedie"),
    ("trigonometric", "increasing-decreasing", 2.0, "Euler", "Mean"),
]


@pytest.mark.parametrize("path, form, norm, method, last_step", SDES)
def test_the_sde_sampler_is_that_of_the_published_code(path, form, norm, method, last_step):
    inputs = fixed_inputs()
    wanted = published({k: x.astype(np.float64) for k, x in inputs.items()}, path, form, norm, method, last_step)
    solver = SolverConfig(
        {"Euler": "euler_sde", "Heun": "heun_sde"}[method],
        coefficient=FORMS[form][0],
        coefficient_scale=2 * norm,
        last_step=last_step.lower(),
        noise_first=True,
    )
    config = SamplingConfig(str(STEPS), solver=solver, last_time=LAST)
    found = ours(config, path, {name: jnp.asarray(x) for name, x in inputs.items()})
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())
