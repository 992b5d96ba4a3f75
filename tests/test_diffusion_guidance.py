"""Guidance: every rule token by token in plain NumPy, exactness at scale 1, clips that do not see each other."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures_diffusion import quick_jit

from sora_jax.diffusion.guidance import GuidanceConfig, TokenLayout, TwoConditions, TwoScales, guided, guided_by_two
from sora_jax.errors import UserError

P, C = 8, 4
# Two packs, three slots, padding at the end; row 3 holds given tokens at time 0.
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 3, 0], [2, 2, 1, 1, 1, 1, 1, 1, 0, 0]], np.int32)
ROWS = np.array([[3, 0, 0, 1, 1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0, 0, 3, 0, 0]], np.int32)
TIMES = np.array([[0.9, 0.3, 0.6, 0.0], [1.0, 0.45, 0.2, 0.0]], np.float32)
SCALES = np.array([[4.0, 1.0, 2.5], [0.0, 7.0, 1.0]], np.float32)
MODELS = np.random.default_rng(0).normal(size=(3, *SEGMENTS.shape, 2 * P)).astype(np.float32) * [
    [[[1.0]]],
    [[[0.3]]],
    [[[2.0]]],
]


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@functools.partial(quick_jit, static_argnums=0)
def compiled(config, outputs, scales, second):
    """Guided outputs of three models that say `outputs`, by one condition or, with scales for a second, by two."""
    models = [lambda x, t, output=output: output for output in outputs]
    layout = TokenLayout(jnp.asarray(SEGMENTS), jnp.asarray(ROWS), C)
    if second is None:
        model = guided(config, *models[:2], scales, layout)
    else:
        model = guided_by_two(config, TwoConditions(*models), TwoScales(scales, second), layout)
    return model(jnp.zeros((*SEGMENTS.shape, P)), jnp.asarray(TIMES))


def run(config, width=P, scales=SCALES, second=None, dtype=jnp.float32):
    outputs = jnp.asarray(MODELS[..., :width], jnp.float32).astype(dtype)
    return np.asarray(compiled(config, outputs, jnp.asarray(scales), None if second is None else jnp.asarray(second)))


def scale_of(b, token, scales=SCALES):
    return float(scales[b, SEGMENTS[b, token] - 1]), float(TIMES[b, ROWS[b, token]])


def each_token():
    return np.argwhere(SEGMENTS > 0)


def test_every_clip_has_its_scale():
    out = run(GuidanceConfig())
    for b, token in each_token():
        w, _ = scale_of(b, token)
        c, u = MODELS[:2, b, token, :P].astype(np.float32)
        np.testing.assert_allclose(out[b, token], u + w * (c - u), atol=5e-6)
        if w in (0.0, 1.0):
            np.testing.assert_array_equal(out[b, token], c if w else u)
    assert np.all(np.isfinite(out))


@pytest.mark.parametrize(
    "config",
    [
        GuidanceConfig(),
        GuidanceConfig(channels=3),
        GuidanceConfig(rescale=0.7),
        GuidanceConfig(power=4.0, start=0.2, end=0.8, rescale=1.0, channels=2),
    ],
)
def test_scale_one_is_exactly_the_conditional(config):
    """Clip by clip in a mixed pack, and with two conditions; whatever else is configured."""
    out, ones = run(config, 2 * P), np.ones_like(SCALES)
    conditional = MODELS[0].astype(np.float32)
    at_one = np.array([[scale_of(b, token)[0] == 1.0 for token in range(10)] for b in range(2)]) & (SEGMENTS > 0)
    assert at_one.any()
    np.testing.assert_array_equal(out[at_one], conditional[at_one])
    np.testing.assert_array_equal(run(config, 2 * P, ones), conditional)
    np.testing.assert_array_equal(run(config, 2 * P, ones, ones), conditional)


@pytest.mark.parametrize("first", [0, 1, 3, 4])
def test_only_the_first_channels_and_never_the_variance(first):
    """Channels are the fastest axis of a token's values: two pixels of four channels here."""
    out = run(GuidanceConfig(channels=first), 2 * P)
    everything = run(GuidanceConfig(), 2 * P)
    guided_P = np.tile(np.arange(C) < (first or C), P // C)
    np.testing.assert_array_equal(out[..., :P][..., guided_P], everything[..., :P][..., guided_P])
    np.testing.assert_array_equal(out[..., :P][..., ~guided_P], MODELS[0, ..., :P][..., ~guided_P].astype(np.float32))
    np.testing.assert_array_equal(out[..., P:], MODELS[0, ..., P:].astype(np.float32))


def test_interval_of_times():
    out = run(GuidanceConfig(start=0.3, end=0.6))
    plain = run(GuidanceConfig())
    inside = 0
    for b, token in each_token():
        t = TIMES[b, ROWS[b, token]]
        within = np.float32(0.3) <= t <= np.float32(0.6)
        inside += within
        wanted = plain if within else MODELS[0, ..., :P].astype(np.float32)
        np.testing.assert_array_equal(out[b, token], wanted[b, token])
    assert 0 < inside < len(each_token())


def test_outside_the_interval_the_other_models_are_not_evaluated():
    """Given tokens, at time 0, are in no interval: nothing is done for them."""
    calls = []

    def model(name, x_BLP, t_BR):
        jax.debug.callback(lambda: calls.append(name))
        return x_BLP + len(name)

    layout = TokenLayout(jnp.asarray(SEGMENTS), jnp.asarray(ROWS), C)
    parts = functools.partial(model, "given"), functools.partial(model, "none")
    for start, end, expected in [(0.0, 0.1, ["given"]), (0.85, 0.95, ["given", "none"]), (0.0, 1.0, ["given", "none"])]:
        denoise = guided(GuidanceConfig(start=start, end=end), *parts, jnp.asarray(SCALES), layout)
        jax.block_until_ready(jax.jit(denoise)(jnp.zeros((*SEGMENTS.shape, P)), jnp.asarray(TIMES)))
        jax.effects_barrier()
        assert sorted(calls) == sorted(expected)
        calls.clear()


def test_power_cosine():
    """1 at pure noise, the scale at the data, between them the formula; a larger power waits longer."""
    out = run(GuidanceConfig(power=2.0))
    for b, token in each_token():
        scale, t = scale_of(b, token)
        w = 1 + (scale - 1) * (1 - np.cos(np.pi * (1 - t) ** 2)) / 2
        c, u = MODELS[:2, b, token, :P]
        np.testing.assert_allclose(out[b, token], u + w * (c - u), atol=1e-5)
    np.testing.assert_array_equal(out[1, 2:7], MODELS[0, 1, 2:7, :P].astype(np.float32))  # t = 1


def test_rescale_takes_its_spread_from_the_clip_alone():
    """Equation (4) with NumPy's standard deviation over the sampled tokens of every clip."""
    out, plain = run(GuidanceConfig(rescale=0.7)), run(GuidanceConfig())
    for b in range(2):
        for segment in (1, 2, 3):
            mine = (SEGMENTS[b] == segment) & (TIMES[b][ROWS[b]] > 0)
            if not mine.any():
                continue
            ratio = MODELS[0, b, mine, :P].std() / plain[b, mine].std()
            np.testing.assert_allclose(out[b, mine], plain[b, mine] * (0.7 * ratio + 0.3), rtol=2e-5)
    spread = run(GuidanceConfig(rescale=1.0))[0, 1:3].std()
    np.testing.assert_allclose(spread, MODELS[0, 0, 1:3, :P].std(), rtol=1e-5)


def test_rescale_knows_of_the_guided_channels_alone():
    """The others stay conditional to the bit, however large they are, and do not count for the spread."""
    out, plain = run(GuidanceConfig(rescale=0.7, channels=3)), run(GuidanceConfig(channels=3))
    guided_P, conditional = np.tile(np.arange(C) < 3, P // C), MODELS[0, ..., :P].astype(np.float32)
    np.testing.assert_array_equal(out[..., ~guided_P], conditional[..., ~guided_P])
    mine = (SEGMENTS[0] == 1) & (TIMES[0][ROWS[0]] > 0)
    before, after = plain[0, mine][:, guided_P], out[0, mine][:, guided_P]
    ratio = conditional[0, mine][:, guided_P].std() / before.std()
    np.testing.assert_allclose(after, before * (0.7 * ratio + 0.3), rtol=2e-5)
    assert abs(ratio - 1) > 0.1


def test_two_conditions():
    """Equation (2) token by token, and the cases in which one of the conditions is not guided."""
    frames = np.array([[1.5, 2.0, 1.0], [3.0, 1.0, 0.0]], np.float32)
    out = run(GuidanceConfig(), second=frames)
    for b, token in each_token():
        text, image = scale_of(b, token)[0], scale_of(b, token, frames)[0]
        both, only, none = MODELS[:, b, token, :P]
        np.testing.assert_allclose(out[b, token], none + image * (only - none) + text * (both - only), atol=2e-5)
    np.testing.assert_allclose(run(GuidanceConfig(), second=np.ones_like(frames)), run(GuidanceConfig()), atol=1e-5)
    equal = run(GuidanceConfig(), second=SCALES)
    both, none = MODELS[0, 0, 0, :P], MODELS[2, 0, 0, :P]
    np.testing.assert_allclose(equal[0, 0], none + 4.0 * (both - none), atol=2e-5)


def test_float32_whatever_the_model_computes_in():
    assert run(GuidanceConfig(rescale=0.5), dtype=jnp.bfloat16).dtype == np.float32


def test_bad_options_are_user_errors():
    for options, said in (
        ({"scale": float("nan")}, "guidance.scale is nan; it must be a finite number"),
        ({"channels": -1}, "guidance.channels is -1; it must be 0 .all. or more"),
        ({"rescale": 1.5}, "guidance.rescale is 1.5; it must be from 0 to 1"),
        ({"start": 0.8, "end": 0.2}, "guidance.start is 0.8; it must be from 0 to guidance.end = 0.2"),
        ({"end": 1.2}, "guidance.end is 1.2; it must be from 0 to 1"),
        ({"power": -1.0}, "guidance.power is -1.0; it must be 0 .off. or more"),
    ):
        with pytest.raises(UserError, match=said):
            dataclasses.replace(GuidanceConfig(), **options)
