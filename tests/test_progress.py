"""A solve that is cut into parts is the whole one to the bit, is counted in steps, and can be cancelled."""

import dataclasses

import jax
import numpy as np
import pytest
from fixtures_runs import chain, one_device, trained, with_random_weights  # noqa: F401

from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.diffusion.solvers import SolverConfig
from sora_jax.generate import sampler
from sora_jax.generate.progress import Watch
from sora_jax.generate.requests import Known, Request
from sora_jax.generate.sampler import sample_latents

REQUESTS = [Request("a red square moves right", (3, 4, 6), 11, guidance=3.0), Request("", (1, 4, 4), 22, guidance=2.0)]
KNOWN = np.random.default_rng(1).standard_normal((3, 4, 6, 8)).astype(np.float32)
PROMPT = "a red square moves right"


@pytest.fixture(scope="module")
def model(trained):  # noqa: F811
    return with_random_weights(trained)


@pytest.fixture
def single_steps(monkeypatch):
    """Parts of one step each, however fast the machine is."""
    monkeypatch.setattr(sampler, "PART_SECONDS", 0.0)


def known(model, **changes) -> list[Request]:
    """Give the first frame of the first clip, or what `changes` say."""
    latent = KNOWN[..., : model.config.model.latent_channels]
    ceiling = np.ones(latent.shape[:3], np.float32)
    ceiling[0] = 0
    return [dataclasses.replace(REQUESTS[0], known=Known(latent, ceiling, **changes))]


def sampled(model, requests, sampling, watch=Watch()):
    with jax.set_mesh(model.mesh):
        return sample_latents(model, requests, sampling, 5, watch)


@pytest.mark.parametrize(
    "name, change",
    [
        ("euler", {}),
        ("heun", {}),  # ends otherwise than it begins
        ("heun", {"steps": "1"}),  # and has no other step here
        ("unipc", {}),  # has a history
        ("edm", {"solver": SolverConfig("edm", churn=2.0)}),  # draws noise, in its last step too
        ("euler_sde", {"skipped": (2, 3)}),  # keeps residuals from step to step
        ("ddim", {"condition": "replace", "resamplings": 1}),  # solves inside of a step
    ],
)
def test_parts_are_the_whole_to_the_bit_by_one_program(model, single_steps, name, change):
    sampling = SamplingConfig(**{"steps": "4", "solver": SolverConfig(name)} | change)
    requests = known(model) if sampling.condition == "replace" else REQUESTS
    whole, told = sampled(model, requests, sampling), []
    programs = sampler.solve_packs._cache_size()
    parts = sampled(model, requests, sampling, Watch(lambda done, total: told.append((done, total))))
    for a, b in zip(parts, whole, strict=True):
        np.testing.assert_array_equal(a, b)
    steps = int(sampling.steps)
    assert told == [(done, steps) for done in range(steps + 1)]
    assert sampler.solve_packs._cache_size() == programs


def test_an_edit_by_prompts_is_cut_alike(model, single_steps):
    requests, told = known(model, source="a green square"), []
    whole = sampled(model, requests, SamplingConfig(steps="3"))
    parts = sampled(model, requests, SamplingConfig(steps="3"), Watch(lambda *pair: told.append(pair)))
    np.testing.assert_array_equal(parts[0], whole[0])
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_steps_of_all_batches_are_counted(model, monkeypatch):
    """Long parts: one step first, then all that are left; two batches of one pack each."""
    monkeypatch.setattr(sampler, "PART_SECONDS", 1e6)
    monkeypatch.setattr(sampler, "PACKS_AT_ONCE", 1)
    packing = dataclasses.replace(model.config.packing, slots=1)
    one_slot = dataclasses.replace(model, config=dataclasses.replace(model.config, packing=packing))
    told = []
    sampled(one_slot, REQUESTS, SamplingConfig(steps="5"), Watch(lambda *pair: told.append(pair)))
    assert told == [(0, 10), (1, 10), (2, 10), (5, 10), (6, 10), (7, 10), (10, 10)]


class Cancelled(Exception):
    """Cancel a sampling from its callback."""


def test_an_exception_of_the_callback_cancels_and_the_run_goes_on_working(model, single_steps):
    def stop(done, total):
        if done == 2:
            raise Cancelled

    with one_device():
        with pytest.raises(Cancelled):
            model.generate(PROMPT, (9, 16, 24), steps=6, progress=stop)
        plain, told = model.generate(PROMPT, (9, 16, 24), steps=6), []
        clip = model.generate([PROMPT], (9, 16, 24), steps=6, progress=lambda done, total: told.append(done))[0]
    np.testing.assert_array_equal(clip, plain)
    assert told == list(range(7))


def test_one_prompt_gives_one_clip_of_the_preview_size(model):
    clip = model.generate(PROMPT, steps=2)
    assert clip.shape == (*model.config.preview.sizes[0], 3) and clip.dtype == np.uint8
    (same,) = model.generate([PROMPT], model.config.preview.sizes[0], steps=2)
    np.testing.assert_array_equal(clip, same)


def test_a_bar_is_shown_when_it_is_asked_for_or_where_somebody_sees_it(model, capsys, monkeypatch):
    model.generate(PROMPT, steps=2)
    assert capsys.readouterr().err == ""
    model.generate(PROMPT, steps=2, bar=True)
    assert "2/2" in capsys.readouterr().err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert Watch(bar=None).shows_bar and not Watch(bar=False).shows_bar
    assert not Watch(progress=lambda done, total: None, bar=None).shows_bar
