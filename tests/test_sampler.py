"""The packed sampler: what shares a pack with a clip, and in which order, changes nothing."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from compare import assert_far, assert_near
from fixtures_runs import chain, trained, with_random_weights  # noqa: F401

from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.errors import UserError
from sora_jax.generate import sampler
from sora_jax.generate.requests import Request
from sora_jax.generate.sampler import sample_latents

REQUESTS = [
    Request("a red square moves right", (3, 4, 6), 11),
    Request("a green square", (1, 4, 4), 22),
    Request("a blue square moves down", (2, 6, 4), 33),
    Request("", (1, 4, 6), 44),
]
SETTINGS = SamplingConfig(steps="2")
near = functools.partial(assert_near, tolerance=1e-4)


@pytest.fixture(scope="module")
def model(trained):  # noqa: F811
    return with_random_weights(trained)


@pytest.fixture(scope="module")
def latents(model):
    def draw(requests, seed=5, guidance=3.0):
        requests = [dataclasses.replace(request, guidance=guidance) for request in requests]
        with jax.set_mesh(model.mesh):
            return sample_latents(model, requests, SETTINGS, seed)

    return draw


@pytest.fixture(scope="module")
def together(latents):
    return latents(REQUESTS)


def test_shapes(together):
    assert [z.shape for z in together] == [(*r.size, 4) for r in REQUESTS]
    assert all(np.isfinite(z).all() for z in together)


def test_calls_of_few_packs_are_one_call_of_all(model, together, monkeypatch):
    """One pack at a time, with a clip to a pack: the same clips, in the same order."""
    monkeypatch.setattr(sampler, "PACKS_AT_ONCE", 1)
    packing = dataclasses.replace(model.config.packing, slots=1)
    one_slot = dataclasses.replace(model, config=dataclasses.replace(model.config, packing=packing))
    solve, calls = sampler.solve_packs, []
    monkeypatch.setattr(sampler, "solve_packs", lambda *arguments: calls.append(1) or solve(*arguments))
    requests = [dataclasses.replace(request, guidance=3.0) for request in REQUESTS]
    with jax.set_mesh(model.mesh):
        found = sample_latents(one_slot, requests, SETTINGS, 5)
    for a, b in zip(found, together, strict=True):
        near(a, b)
    assert len(calls) == len(REQUESTS)


def test_clips_come_while_later_ones_are_sampled(model, monkeypatch):
    """With a pack of one clip at a time the first of four clips comes when the second call is dispatched."""
    packing = dataclasses.replace(model.config.packing, slots=1)
    run = dataclasses.replace(model, config=dataclasses.replace(model.config, packing=packing))
    requests = [dataclasses.replace(request, guidance=3.0) for request in REQUESTS]
    whole = run.sample(requests, SETTINGS, 5)
    monkeypatch.setattr(sampler, "PACKS_AT_ONCE", 1)
    solve, calls = sampler.solve_packs, []
    monkeypatch.setattr(sampler, "solve_packs", lambda *arguments: calls.append(1) or solve(*arguments))
    counts, found = [], {}
    for number, clip in run.stream(requests, SETTINGS, 5):
        counts.append(len(calls))
        found[number] = clip
    assert counts == [2, 3, 4, 4]
    for number, clip in enumerate(whole):
        assert np.abs(found[number].astype(int) - clip).max() <= 1  # float error may cross the middle of two levels


@pytest.mark.parametrize("i", range(len(REQUESTS)))
def test_together_is_alone(latents, together, i):
    near(latents([REQUESTS[i]])[0], together[i])


def test_order_does_not_matter(latents, together):
    order = [2, 0, 3, 1]
    for i, z in zip(order, latents([REQUESTS[i] for i in order]), strict=True):
        near(z, together[i])


def test_requests_beyond_one_pack(latents, together):
    for z, alone in zip(latents([*REQUESTS, *REQUESTS[:2]]), [*together, *together[:2]], strict=True):
        near(z, alone)


def test_the_same_request_is_the_same_to_the_bit_and_each_part_of_it_matters(latents, together):
    first = REQUESTS[0]
    for a, b in zip(latents(REQUESTS), together, strict=True):
        np.testing.assert_array_equal(a, b)
    assert_far(latents(REQUESTS, seed=6)[0], together[0])
    assert_far(latents([dataclasses.replace(first, clip_id=12)])[0], together[0])
    assert_far(latents([dataclasses.replace(first, prompt="a blue square")])[0], together[0])


def test_guidance_1_is_the_conditional_model(latents, together):
    conditional = latents(REQUESTS, guidance=1.0)
    almost = latents(REQUESTS, guidance=1 + 2.0**-23)  # through the guided program
    for a, b in zip(conditional, almost, strict=True):
        near(a, b)
    assert_far(conditional[0], together[0])
    near(conditional[3], together[3])  # without a caption there is nothing to be guided by


def test_a_run_makes_clips_and_images_of_the_sizes_asked_for(model):
    sizes = [(9, 16, 24), (1, 16, 16), (5, 24, 16), (1, 16, 24)]
    prompts, ids = [r.prompt for r in REQUESTS], [r.clip_id for r in REQUESTS]
    clips = model.generate(prompts, sizes, steps=2, guidance=3.0, seed=5, clip_ids=ids)
    assert [clip.shape for clip in clips] == [(*size, 3) for size in sizes]
    assert all(clip.dtype == np.uint8 for clip in clips)
    alone = model.generate([prompts[1]], sizes[1], steps=2, guidance=3.0, seed=5, clip_ids=[ids[1]])
    assert np.abs(alone[0].astype(int) - clips[1].astype(int)).max() <= 1


@pytest.mark.parametrize(
    "size, message",
    [
        ((9, 16, 20), "width is 20; .*16 or 24"),
        ((9, 30, 16), "height is 30; .*24 or 32"),
        ((9, 0, 16), "height is 0; .*8 or 16"),
        ((8, 16, 16), "frames is 8; .*5 or 9"),
        ((0, 16, 16), "frames is 0; .* 1$"),
    ],
)
def test_a_size_that_cannot_be_names_those_that_can(model, size, message):
    with pytest.raises(UserError, match=message):
        model.generate(["a red square"], size, steps=2)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(steps=0), "steps .*'0'"),
        (dict(solver="magic"), "'euler', 'heun'|euler, heun"),
        (dict(guidance=float("nan")), "guidance is nan"),
        (dict(seed=-1), "seed is -1"),
        (dict(classes=[0]), "takes prompts, not classes"),
    ],
)
def test_settings_are_checked(model, change, message):
    with pytest.raises(UserError, match=message):
        model.generate([] if "classes" in change else ["a red square"], (9, 16, 24), **change)


def test_a_negative_prompt_is_what_guidance_leads_away_from(model):
    """At scale 0 the sample is that of the negative prompt alone; the empty one is no prompt."""
    away = dict(sizes=(1, 16, 16), steps=2, clip_ids=[5])
    plain = model.generate(["a red square"], guidance=1.0, **away)[0].astype(int)
    swapped = model.generate(["a blue square"], guidance=0.0, negative="a red square", **away)[0]
    assert np.abs(swapped - plain).max() <= 1
    one, other = (model.generate(["a red square"], guidance=3.0, negative=n, **away)[0] for n in ("", "a blue square"))
    assert np.abs(one.astype(int) - other).max() > 5
