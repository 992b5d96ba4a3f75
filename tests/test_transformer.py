"""The denoiser: packed equals one by one, nothing leaks, coordinates decide, and every way to run it agrees.

All parameters are random, so no gate is closed; float32. "Equal" is to 2e-5 of the largest value compared.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_near

from sora_jax.data.packing.packs import PackingConfig
from sora_jax.diffusion.loss import Corruption, LossSpec, denoising_loss, loss_weight
from sora_jax.diffusion.process import linear_flow
from sora_jax.errors import UserError
from sora_jax.models.ends import head_specs, predict
from sora_jax.models.text import TextConfig, TextContext, encode_text
from sora_jax.models.transformer import SIZES, TransformerConfig, denoise, denoiser_specs, encode_condition
from sora_jax.nn.pack import Pack, per_slot
from sora_jax.nn.params import count, init
from sora_jax.train.denoiser import DenoiserRun, DiffusionConfig, denoiser_loss
from sora_jax.train.state import MODEL
from sora_jax.train.step import gradients

TEXT = TextConfig(vocabulary=16, width=16, depth=1, head_width=8)
CONFIG = TransformerConfig(depth=2, width=24, heads=2, latent_channels=2, text=TEXT, remat="none", dtype="float32")
RUN = DenoiserRun(model=CONFIG, packing=PackingConfig(), diffusion=DiffusionConfig(caption_dropout=0.5))


class Result(NamedTuple):
    output_BLP: jax.Array
    loss: jax.Array
    weight: jax.Array
    gradient: dict


def times_of(pack):
    """Some noise level in (0, 1) for each row: a function of the clip alone."""
    return per_slot((pack.clip_ids_BS % 7 + 1) / 9, pack.row_slots_BR)


@functools.cache
def evaluator(run: DenoiserRun):
    """Compiled (params, pack) -> Result: the output for the pack's own tokens, the training loss of step 3."""

    def evaluate(params, pack):
        output_BLP = denoise(params, run.model, pack, pack.tokens_BLP, times_of(pack))
        gradient, total, weight, _ = gradients(functools.partial(denoiser_loss, run), {MODEL: params}, (), pack, 3, 0)
        return Result(output_BLP, total[MODEL], weight[MODEL], gradient[MODEL])

    compiled = jax.jit(evaluate)
    return lambda params, pack: jax.device_get(compiled(params, pack))


@pytest.fixture(scope="module")
def params(randomised):
    return jax.device_get(randomised(denoiser_specs(CONFIG)))


def outputs(result: Result, pack: Pack) -> dict[int, np.ndarray]:
    """The output of each clip, in the order of its tokens."""
    found = {}
    for b, slot in zip(*np.nonzero(pack.clip_ids_BS), strict=True):
        places = np.flatnonzero(pack.segments_BL[b] == slot + 1)
        places = places[np.argsort(pack.index_BL[b][places])]
        found[int(pack.clip_ids_BS[b, slot])] = np.asarray(result.output_BLP[b, places])
    return found


@pytest.mark.parametrize("sincos", [False, True])
def test_at_initialisation_the_output_is_exactly_zero(clips, packed, sincos):
    config = dataclasses.replace(CONFIG, sincos_positions=sincos)
    pack = packed([clips])

    @jax.jit
    def start(key):
        return denoise(init(denoiser_specs(config), key), config, pack, pack.tokens_BLP, times_of(pack))

    assert not np.asarray(start(jax.random.key(0))).any()


def test_packed_equals_one_by_one(params, clips, packed, alone):
    """Outputs, loss and the gradient of every parameter: two packs with padding against clips without any."""
    together = packed([clips[:3], clips[3:]])
    both = evaluator(RUN)(params, together)
    singles = [evaluator(RUN)(params, alone(clip)) for clip in clips]
    found = outputs(both, together)
    for clip, single in zip(clips, singles, strict=True):
        assert np.abs(single.output_BLP).max() > 0.1
        assert_near(found[clip.clip_id], single.output_BLP[0])
    assert both.weight == sum(single.weight for single in singles) == 28
    assert_near(both.loss, sum(single.loss for single in singles))
    total = jax.tree.map(lambda *parts: sum(parts), *(single.gradient for single in singles))
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(total))
    assert_near(both.gradient, total)


@pytest.mark.parametrize("learned_variance", [False, True])
def test_gates_add_the_input_to_the_prediction_alone(params, clips, packed, learned_variance):
    plain = dataclasses.replace(CONFIG, learned_variance=learned_variance)
    skip = dataclasses.replace(plain, input_skip=True)
    pack, P = packed([clips[:3], clips[3:]]), CONFIG.patch_values
    gates = np.linspace(-1.0, 2.0, P, dtype=np.float32)

    def head(gates):  # of a network whose gates are the same everywhere; variances are predicted as values are
        copies = 1 + learned_variance
        weight, bias = np.tile(params["head"]["weight"], copies), np.tile(params["head"]["bias"], copies)
        weight = np.concatenate([weight, np.zeros((len(weight), len(gates)), np.float32)], 1)
        return params | {"head": {"weight": weight, "bias": np.concatenate([bias, gates])}}

    one, other = (
        np.asarray(jax.jit(lambda p, c=c: denoise(p, c, pack, pack.tokens_BLP, times_of(pack)))(head(g)))
        for c, g in ((plain, gates[:0]), (skip, gates))
    )
    assert one.shape == other.shape == (*pack.tokens_BLP.shape[:2], (1 + learned_variance) * P)
    assert_near(other[..., :P] - one[..., :P], gates * np.asarray(pack.tokens_BLP))
    np.testing.assert_allclose(other[..., P:], one[..., P:], atol=1e-6)


def test_a_hidden_layer_lets_the_head_make_more_dimensions_than_the_network_is_wide(randomised):
    """The head against NumPy, and its outputs' rank: at most D (the tokens have mean 0: D - 1) of a linear map."""
    D, P = 6, 16
    rng = np.random.default_rng(0)
    x_BLD, x_BLP = rng.normal(size=(2, 40, D)).astype(np.float32), np.zeros((2, 40, P), np.float32)
    ranks = []
    for hidden in (0, 32):
        config = TransformerConfig(width=D, heads=1, patch=(1, 4, 4), latent_channels=1, head_hidden=hidden, text=None)
        params = randomised(head_specs(config))
        y_BLP = np.asarray(predict(params, config, x_BLD, x_BLP), np.float64)
        h_BLD = (x_BLD - x_BLD.mean(-1, keepdims=True)) / x_BLD.std(-1, keepdims=True)
        head = jax.device_get(params["head"])
        if hidden:
            u = h_BLD @ head["up"]["weight"] + head["up"]["bias"]
            h_BLD, head = u / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3))), head["down"]
        np.testing.assert_allclose(y_BLP, h_BLD @ head["weight"] + head["bias"], rtol=1e-4, atol=1e-5)
        rows = y_BLP.reshape(-1, P)
        ranks.append(np.linalg.matrix_rank(rows - rows.mean(0), tol=1e-3))
    assert ranks == [D - 1, P]


def test_the_place_in_the_batch_does_not_matter(params, clips, packed):
    """Other slots, other rows, other neighbours: the same outputs, loss and gradients."""
    a, b, c, d = clips
    first, second = packed([[a, b, c], [d]]), packed([[d, c], [b, a]])
    one, other = (evaluator(RUN)(params, pack) for pack in (first, second))
    assert_near(outputs(other, second), outputs(one, first))
    assert_near((other.loss, other.gradient), (one.loss, one.gradient))


def test_the_order_of_tokens_does_not_matter(params, clips, packed):
    """Tokens shuffled through the pack, clips interleaved and padding between them: coordinates decide."""
    pack = packed([clips[:2], clips[2:]])
    order = np.random.default_rng(0).permutation(pack.segments_BL.shape[1])
    names = ("tokens_BLP", "segments_BL", "coords_BL3", "index_BL", "rows_BL")
    shuffled = pack.replace(**{name: getattr(pack, name)[:, order] for name in names})
    one, other = (evaluator(RUN)(params, p) for p in (pack, shuffled))
    assert_near(other.output_BLP, one.output_BLP[:, order])
    assert_near((other.loss, other.gradient), (one.loss, one.gradient))


@pytest.mark.parametrize("axis", range(3))
def test_coordinates_and_not_indices_say_where_a_token_is(params, clips, packed, axis):
    pack = packed([clips[:1], clips[1:2]])
    one = evaluator(RUN)(params, pack).output_BLP
    renumbered = pack.replace(index_BL=pack.index_BL[:, ::-1].copy())
    np.testing.assert_array_equal(evaluator(RUN)(params, renumbered).output_BLP, one)
    stretch = np.where(np.arange(3) == axis, np.float32(3), np.float32(1))
    moved = pack.replace(coords_BL3=pack.coords_BL3 * stretch)
    changed = outputs(Result(evaluator(RUN)(params, moved).output_BLP, 0, 0, {}), pack)[clips[0].clip_id]
    assert np.abs(changed - outputs(Result(one, 0, 0, {}), pack)[clips[0].clip_id]).max() > 1e-3
    shifted = pack.replace(coords_BL3=pack.coords_BL3 + np.float32(2) * (stretch - 1))
    assert_near(evaluator(RUN)(params, shifted).output_BLP, one, 1e-4)  # rotary positions are relative


def test_other_clips_and_padding_have_exactly_no_gradient(params, clips, packed):
    """Tokens, coordinates, noise levels and captions: those of clip 2 alone reach the outputs of clip 2."""
    pack = packed([clips[:3], clips[3:]])
    mine_BL = np.zeros(pack.segments_BL.shape, bool)
    mine_BL[0] = pack.segments_BL[0] == 2

    @jax.jit
    @jax.grad
    def slope(inputs, params):
        x_BLP, coords_BL3, times_BR, text = inputs
        text = TextContext(text[0], pack.text_segments_BM, text[1])
        output = denoise(params, CONFIG, pack.replace(coords_BL3=coords_BL3), x_BLP, times_BR, text)
        return jnp.where(mine_BL[..., None], jnp.sin(output), 0).sum()

    context = jax.jit(lambda p: encode_text(p, TEXT, pack))(params["text"])
    inputs = (pack.tokens_BLP, pack.coords_BL3, times_of(pack), (context.tokens_BME, context.pooled_BSE))
    x, coords, times, (text, pooled) = (jax.tree.map(np.asarray, part) for part in slope(inputs, params))
    clip_BS = np.arange(8).reshape(2, 4) == 1
    for gradient, own in [
        (x, mine_BL),
        (coords, mine_BL),
        (times, clip_BS),
        (pooled, clip_BS),
        (text, np.stack([pack.text_segments_BM[0] == 2, np.zeros(12, bool)])),
    ]:
        gradient = gradient.reshape(*own.shape, -1)
        assert not gradient[~own].any()
        assert gradient[own].any(-1).all()


def test_what_stands_in_padding_changes_nothing(params, clips, packed):
    pack = packed([clips[:2], clips[2:]])
    padding = pack.segments_BL == 0
    rng = np.random.default_rng(0)
    noisy = pack.replace(
        tokens_BLP=np.where(padding[..., None], 1e4 * rng.standard_normal(pack.tokens_BLP.shape), pack.tokens_BLP),
        coords_BL3=np.where(padding[..., None], 99, pack.coords_BL3),
        rows_BL=np.where(padding, 2, pack.rows_BL),
        text_BM=np.where(pack.text_segments_BM == 0, 9, pack.text_BM),
    )
    one, other = (evaluator(RUN)(params, jax.tree.map(np.float32, p).replace(**ints(p))) for p in (pack, noisy))
    np.testing.assert_array_equal(
        np.where(padding[..., None], 0, other.output_BLP), np.where(padding[..., None], 0, one.output_BLP)
    )
    assert_near((other.loss, other.gradient), (one.loss, one.gradient))


def ints(pack):
    names = [name for name, x in vars(pack).items() if x is not None and name not in ("tokens_BLP", "coords_BL3")]
    return {name: np.asarray(getattr(pack, name), np.uint32 if name == "clip_ids_BS" else np.int32) for name in names}


WAYS = [
    {"remat": "dots"},
    {"remat": "full"},
    {"remat": "attention", "attention": "blockwise"},
    {"unroll": 2, "attention": "dense"},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_every_way_to_run_gives_the_same_gradient(params, clips, packed, way):
    pack = packed([clips[:3], clips[3:]], length=300)  # two blocks of queries
    run = dataclasses.replace(RUN, model=dataclasses.replace(CONFIG, **way))
    assert_near(evaluator(run)(params, pack), evaluator(RUN)(params, pack))


@functools.cache
def two_rows():
    """Compiled function of (params, pack, x, eps, t): the loss and its slopes with the first frames given at time 0."""

    def loss(params, x_BLP, eps_BLP, pack, t_BR):
        weight_BL = loss_weight(pack.segments_BL, t_BR, pack.rows_BL)
        model = functools.partial(denoise, params, CONFIG, pack)
        data = Corruption(x_BLP, eps_BLP, t_BR, pack.rows_BL)
        sums = denoising_loss(LossSpec(linear_flow, "velocity"), model, data, weight_BL)
        return sums.loss, sums.weight

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    return lambda *arguments: jax.device_get(compiled(*arguments))


def given_first_frame(pack):
    """Row 2 s + 1 of every clip s is at time 0 and serves the tokens of its first frame."""
    first_BL = (pack.coords_BL3[..., 0] == 0) & (pack.segments_BL > 0)
    t_BR = np.where(np.arange(pack.row_slots_BR.shape[1]) % 2, 0, jax.device_get(times_of(pack)))
    return pack.replace(rows_BL=pack.rows_BL + first_BL), np.float32(t_BR), first_BL


def noise_of(pack):
    """Noise by clip and token, wherever they stand."""
    clip_ids_BL = np.take_along_axis(pack.clip_ids_BS, np.maximum(pack.segments_BL - 1, 0), 1).astype(np.float64)
    phases = np.cos(clip_ids_BL * 0.37 + pack.index_BL)[..., None] * np.arange(1, 9)
    return np.float32(2 * np.sin(7 * phases))


def test_given_tokens_are_read_but_not_learnt(params, clips, packed):
    pack, t_BR, first_BL = given_first_frame(packed([[clips[0], clips[2]]], rows_per_clip=2))
    (loss, weight), (gradient, to_x, to_eps) = two_rows()(params, pack.tokens_BLP, noise_of(pack), pack, t_BR)
    assert weight == 8 + 4  # the frames after the first
    assert not np.asarray(to_eps)[first_BL].any(), "a given token has no noise"
    assert np.asarray(to_x)[first_BL].any(-1).all(), "a given token is looked at"
    total, gradients = 0, []
    for clip in (clips[0], clips[2]):
        one, t_BR, _ = given_first_frame(packed([[clip]], 12, 1, 4, rows_per_clip=2))
        (value, _), (slope, _, _) = two_rows()(params, one.tokens_BLP, noise_of(one), one, t_BR)
        total, gradients = total + value, [*gradients, slope]
    assert_near((loss, gradient), (total, jax.tree.map(np.add, *gradients)))


def test_two_rows_at_one_time_are_one_row(params, clips, packed):
    rows = [clips[:3], clips[3:]]
    one, two = packed(rows), packed(rows, rows_per_clip=2)
    mixed = two.replace(rows_BL=two.rows_BL + (two.index_BL % 2) * (two.segments_BL > 0))
    found, expected = (evaluator(RUN)(params, pack) for pack in (mixed, one))
    assert_near(outputs(found, mixed), outputs(expected, one))
    assert_near((found.loss, found.gradient), (expected.loss, expected.gradient))


def test_encoded_text_may_be_given(params, clips, packed):
    """The captions of another pack, given encoded, take the place of the pack's own."""
    pack = packed([clips[:3], clips[3:]])
    other = pack.replace(text_BM=np.where(pack.text_BM > 0, 15 - pack.text_BM, 0))
    text = jax.jit(lambda p: encode_text(p["text"], TEXT, other))(params)
    run = jax.jit(lambda p, text: denoise(p, CONFIG, pack, pack.tokens_BLP, times_of(pack), text))
    assert_near(run(params, text), evaluator(RUN)(params, other).output_BLP)


def test_keys_and_values_of_captions_computed_once_are_those_of_every_block(params, clips, packed):
    pack = packed([clips[:3], clips[3:]])
    text = jax.jit(lambda p: encode_condition(p, CONFIG, pack))(params)
    keys, _ = text.keys_values
    assert keys.shape == (CONFIG.depth, *pack.text_BM.shape, CONFIG.heads, CONFIG.head_width)
    run = jax.jit(lambda p, text: denoise(p, CONFIG, pack, pack.tokens_BLP, times_of(pack), text))
    np.testing.assert_array_equal(run(params, text), run(params, dataclasses.replace(text, keys_values=None)))
    other = dataclasses.replace(text, keys_values=jax.tree.map(lambda x: x[::-1], text.keys_values))
    assert np.abs(run(params, other) - run(params, text)).max() > 1e-3  # they are what is read


def test_parameter_count_in_closed_form():
    config = TransformerConfig(
        depth=5, width=48, heads=4, mlp_ratio=3.0, patch=(2, 3, 1), latent_channels=7, text=dataclasses.replace(TEXT)
    )
    D, F, K, P, E = 48, 144, 12, 2 * 3 * 1 * 7, 16
    text = 16 * E + 4 * (E * E + E) + 8 * E * E + 5 * E
    ways_in = (P * D + D) + (256 * D + D) + (D * D + D) + (E * D + D)
    modulated = 6 * (D * D + D) + 4 * (D * D + D) + (D * F + F) + (F * D + D) + 2 * K
    cross = 2 * (D * D + D) + 2 * (E * D + D)
    ways_out = 2 * (D * D + D) + (D * P + P)
    assert count(denoiser_specs(config)) == text + ways_in + 5 * (modulated + cross) + ways_out


DIT_COUNTS = {  # trainable parameters of DiT (2212.09748) by size and patch, class table and learnt variance included
    ("S", 8): 33_142_016,
    ("S", 2): 32_865_056,
    ("B", 4): 130_426_496,
    ("L", 8): 458_578_432,
    ("XL", 4): 675_000_704,
    ("XL", 2): 674_834_720,
}


@pytest.mark.parametrize("size, patch", DIT_COUNTS)
def test_sizes_are_those_of_dit(size, patch):
    """Without text, cross-attention and the norms of q and k, with DiT's class table and second output."""
    depth, width, heads = SIZES[size]
    config = TransformerConfig(depth=depth, width=width, heads=heads, patch=(1, patch, patch), latent_channels=4)
    specs = denoiser_specs(config)
    ours = {name: specs[name] for name in ("patch", "time_in", "time_out", "modulation")}
    blocks = {name: specs["blocks"][name] for name in ("modulation", "qkv", "merge", "mlp")}
    assert width // heads in (64, 72)
    assert count([ours, blocks, specs["head"], specs["head"]]) + 1001 * width == DIT_COUNTS[size, patch]


def test_float32_output_of_a_bfloat16_model(params, clips, packed):
    config, pack = dataclasses.replace(CONFIG, dtype="bfloat16"), packed([clips[:3], clips[3:]])
    output = jax.jit(lambda p: denoise(p, config, pack, pack.tokens_BLP, times_of(pack)))(params)
    output = jax.device_get(output)
    exact = evaluator(RUN)(params, pack).output_BLP
    assert output.dtype == jnp.float32
    assert 0 < np.abs(output - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"width": 25}, "width is 25.*heads = 2"),
        ({"width": 8}, "is 4; .*at least 6"),
        ({"patch": (1, 0, 2)}, "patch is"),
        ({"remat": "some"}, "'some'.*'dots'"),
        ({"dtype": "float64"}, "'float64'.*'bfloat16'"),
        ({"attention": "flash"}, "'flash'.*'blockwise'"),
    ],
)
def test_wrong_options_are_named(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **change)
