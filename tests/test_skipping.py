"""Steps that skip the blocks: which they are, what they do, and that a clip does not depend on its pack."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_far, assert_near
from fixtures_runs import chain, run, trained, with_random_weights  # noqa: F401

from sora_jax.diffusion.guidance import GuidanceConfig
from sora_jax.diffusion.keys import Purpose, step_key, token_noise
from sora_jax.diffusion.process import linear_flow
from sora_jax.diffusion.sampling import SamplingConfig, grid_times
from sora_jax.diffusion.solvers import SolverConfig
from sora_jax.diffusion.times import per_token
from sora_jax.errors import UserError
from sora_jax.generate import packs, sampler
from sora_jax.generate.requests import Known, Request, Task
from sora_jax.generate.run import load_run
from sora_jax.generate.sampler import sample_latents
from sora_jax.generate.skipping import choose_skipped, read_skipped, reuse_trunk
from sora_jax.models.denoiser import encode_condition
from sora_jax.nn.pack import per_slot, slot_of
from sora_jax.train.denoiser import network

REQUESTS = [Request("a red square moves right", (3, 4, 6), 11, guidance=3.0), Request("", (1, 4, 4), 22, guidance=2.0)]
near = functools.partial(assert_near, tolerance=1e-4)
SOME = 1 + np.array([0, 0.1, 0.1, 1 / 1.1 - 1, 0.1, 1 / 1.1 - 1, 0, -0.5, 0, 0])  # up and down again; a leap at step 7


@pytest.fixture(scope="module")
def model(trained):  # noqa: F811
    return with_random_weights(trained)


def sampled(model, sampling, requests=REQUESTS):
    with jax.set_mesh(model.mesh):
        return sample_latents(model, requests, sampling, 5)


@pytest.mark.parametrize(
    "ratios, error, most, skipped",
    [
        ([[0.95] * 10], 0.12, 2, (2, 4, 6, 8)),  # errors 0.05 and 0.05 + 0.0975
        ([[0.95] * 10], 0.15, 2, (2, 3, 5, 6, 8, 9)),  # the third would add 0.1426
        ([[0.95] * 10], 0.15, 1, (2, 4, 6, 8)),
        ([[1.0] * 10], 0.01, 2, (2, 3, 5, 6, 8, 9)),
        ([[0.95] * 10], 0.05, 9, ()),
        # Step 2: |1 - 1.1| = 0.1; 3: + 0; 4: + 0.1, runs. 5: |1 - 1 / 1.1| = 0.09; 6: + 0.09, runs. 7: 0.5, runs.
        ([SOME], 0.12, 9, (2, 3, 5, 8, 9)),
        ([[1.0] * 10, [1.0] * 4 + [0.5] + [1.0] * 5], 0.12, 9, (2, 3, 5, 6, 7, 8, 9)),  # the worse branch decides
        ([[1.0] * 4], 0.12, 2, (1, 2)),  # the first step always runs
    ],
)
def test_the_rule_on_lists_made_by_hand(ratios, error, most, skipped):
    assert choose_skipped(np.array(ratios), error, most) == skipped


def test_all_steps_run_is_plain_sampling_to_the_bit(model, monkeypatch):
    plain = sampled(model, SamplingConfig(steps="3"))
    monkeypatch.setattr(sampler, "reuse_trunk", lambda _, *rest: reuse_trunk((), *rest))
    sampler.solve_packs.clear_cache()  # of what was traced without the change
    for a, b in zip(sampled(model, SamplingConfig(steps="3", skipped=(1, 2))), plain, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("solver", ["euler", "dpm2", "unipc", "ddpm"])
def test_a_clip_alone_is_the_clip_in_a_pack(model, solver):
    sampling = SamplingConfig(steps="4", solver=SolverConfig(solver), skipped=(1, 3))
    together = sampled(model, sampling)
    for request, z in zip(REQUESTS, together, strict=True):
        near(sampled(model, sampling, [request])[0], z)
    assert_far(together[0], sampled(model, dataclasses.replace(sampling, skipped=()))[0])


def test_a_skipped_step_adds_the_residual_of_the_last_that_ran(model):
    """Euler's method in a Python loop over an undivided model, which keeps the residual in a variable."""
    sampling = SamplingConfig(steps="4", skipped=(2, 3))
    request = dataclasses.replace(REQUESTS[0], guidance=1.0)
    (found,) = sampled(model, sampling, [request])
    layout = packs.lay_out(model, [request])
    kept = []

    def run_trunk(step, trunk, x_BLD):
        if step not in sampling.skipped:
            kept.append(trunk(x_BLD) - x_BLD)
        return x_BLD + kept[-1]

    with jax.set_mesh(model.mesh):
        pack, params = packs.place(model.mesh, layout, layout.rows, [request]).positive, model.params
    pack, params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), (pack, params))  # off the mesh
    tokens_BR = per_slot(pack.grids_BS3.prod(-1), pack.row_slots_BR)
    times_KBR = grid_times(sampling, model.config.diffusion.times, linear_flow, tokens_BR)
    key, clips_BL = step_key(5, 0, Purpose.SAMPLE), per_slot(pack.clip_ids_BS, slot_of(pack.segments_BL))
    x_BLP = token_noise(key, clips_BL, pack.index_BL, model.config.model.patch_values)
    known = encode_condition(params, model.config.model, pack)
    for step in range(4):
        denoise = network(params, model.config, pack, known, functools.partial(run_trunk, step))
        length_BL = per_token(times_KBR[step + 1] - times_KBR[step], pack.rows_BL)
        x_BLP += length_BL[..., None] * denoise(x_BLP, times_KBR[step])
    arrays = {name: np.asarray(getattr(pack, name)) for name in sampler.UNPACKED} | {"tokens_BLP": np.asarray(x_BLP)}
    near(found, sampler.unpack(sampler.unstack(arrays)[0], model.config.model.patch)[0])
    assert len(kept) == 2


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(solver=SolverConfig("heun")), "--solver is heun; .* euler, ddpm, ddim, dpm1, dpm2, dpm3, unipc"),
        (dict(guidance=GuidanceConfig(3.0, start=0.2)), r"guidance.start and end are \(0.2, 1.0\)"),
        (dict(skipped=(0, 1)), r"skipped is \(0, 1\); it must be rising numbers from 1 to 3"),
        (dict(skipped=(2, 2)), "rising"),
        (dict(skipped=(4,)), "rising"),
    ],
)
def test_what_cannot_skip_says_so(change, message):
    with pytest.raises(UserError, match=message):
        SamplingConfig(**{"steps": "4", "skipped": (2,)} | change)


def test_loops_do_not_skip(model):
    ring = Known(np.zeros((2, 2, 4, 4), np.float32), np.ones((2, 2, 4), np.float32), first=1, ring=True)
    with pytest.raises(UserError, match="--loop is given; .* skipped"):
        sampling = SamplingConfig(steps="4", skipped=(2,))
        model.generate(["a red square"], sampling=sampling, tasks=[Task((8, 8, 16), ring, loops=True)])


def test_a_run_is_calibrated_once_and_sampled_with_what_it_keeps(chain, tmp_path, capfd):  # noqa: F811
    folder, out = tmp_path / "run", tmp_path / "red.png"
    shutil.copytree(chain.transformer, folder)
    sample = ["sample", f"--workdir={folder}", "--prompt=a red square", "--steps=6", f"--out={out}", "--skip-steps"]
    assert run(*sample) == 2
    assert f"sora-jax calibrate --workdir={folder} must be run for steps 6" in capfd.readouterr().err
    assert run("calibrate", f"--workdir={folder}", "--steps=6", "--error=0.5", "--most=1") == 0
    assert run("calibrate", f"--workdir={folder}", "--steps=6", "--error=9", "--most=1") == 0  # replaces the first
    assert run("calibrate", f"--workdir={folder}", "--steps=6", "--guidance=1", "--error=9", "--most=9") == 0
    assert "a clip of 1x16x16 has 4 tokens; the clips of training had 12 to 18" in capfd.readouterr().err
    assert run(*sample) == 0 and out.exists()
    assert "6 steps of euler, 3 of them without the blocks" in capfd.readouterr().err
    sampling = dataclasses.replace(load_run(folder).config.sampling, steps="6")
    assert read_skipped(folder, sampling) == (1, 3, 5)
    assert read_skipped(folder, sampling, guidance=1.0) == (1, 2, 3, 4, 5)
    assert run("calibrate", f"--workdir={folder}", "--solver=heun") == 2
    assert "--solver is heun" in capfd.readouterr().err
