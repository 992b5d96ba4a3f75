"""The U-Net over packs: that of each clip on its own canvas, and what follows from its layers.

All parameters are random, so no branch is closed; float32. "Equal" is to 2e-5 of the largest value compared.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_near

from sora_jax.data.packing.packs import PackingConfig, PackItem
from sora_jax.errors import UserError
from sora_jax.models.denoiser import denoise, denoiser_specs, encode_condition, forward_flops
from sora_jax.models.text import TextConfig, TextContext, encode_text
from sora_jax.models.unet import blocks_of
from sora_jax.models.unet_layers import UNetConfig
from sora_jax.nn.pack import per_slot
from sora_jax.nn.params import abstract, count, init
from sora_jax.train.denoiser import DenoiserRun, DiffusionConfig, denoiser_loss
from sora_jax.train.state import MODEL
from sora_jax.train.step import gradients

TEXT = TextConfig(vocabulary=16, width=16, depth=1, head_width=8)
CONFIG = UNetConfig(
    width=8, multipliers=(1, 2), blocks=1, attended=(1,), head_width=8, latent_channels=2, text=TEXT,
    input_skip=True, remat="none", dtype="float32",
)  # fmt: skip
RUN = DenoiserRun(model=CONFIG, packing=PackingConfig(), diffusion=DiffusionConfig(caption_dropout=0.5))
SIZES = dict(patch=(1, 1, 1), multiple=(2, 2), length=100)


def times_of(pack):
    """Some noise level in (0, 1) for each row: a function of the clip alone."""
    return per_slot((pack.clip_ids_BS % 7 + 1) / 9, pack.row_slots_BR)


@functools.cache
def evaluator(config=CONFIG):
    """Compiled (params, pack) -> output for the pack's own tokens, loss, weight and gradient of a step."""
    run = dataclasses.replace(RUN, model=config)

    def evaluate(params, pack):
        output_BLP = denoise(params, config, pack, pack.tokens_BLP, times_of(pack))
        gradient, total, weight, _ = gradients(functools.partial(denoiser_loss, run), {MODEL: params}, (), pack, 3, 0)
        return output_BLP, total[MODEL], weight[MODEL], gradient[MODEL]

    compiled = jax.jit(evaluate)
    return lambda params, pack: jax.device_get(compiled(params, pack))


@pytest.fixture(scope="module")
def params(randomised):
    return jax.device_get(randomised(denoiser_specs(CONFIG)))


@pytest.fixture(scope="module")
def odd_clips():
    """Clips of sides that no level divides, one of them an image."""
    rng, sizes = np.random.default_rng(0), ((2, 3, 5), (1, 5, 4), (3, 2, 2), (2, 1, 3))
    texts = ((3, 4, 5), (6,), (7, 8, 9, 10), (11, 12))
    return [
        PackItem(rng.standard_normal((*size, 2), np.float32), 11 * (i + 1), np.array(text))
        for i, (size, text) in enumerate(zip(sizes, texts, strict=True))
    ]


def outputs(output_BLP, pack) -> dict[int, np.ndarray]:
    """The output of each clip, in the order of its tokens."""
    found = {}
    for b, slot in zip(*np.nonzero(pack.clip_ids_BS), strict=True):
        places = np.flatnonzero(pack.segments_BL[b] == slot + 1)
        places = places[np.argsort(pack.index_BL[b][places])]
        found[int(pack.clip_ids_BS[b, slot])] = np.asarray(output_BLP[b, places])
    return found


# ----------------------------------------------------------------------------------------------------------
# The network on a canvas, of library calls
# ----------------------------------------------------------------------------------------------------------


def conv2d(p, x, stride=1, time=False):
    kernel = (3, 1, 1) if time else (1, 3, 3)
    weight = p["weight"].reshape(*kernel, *p["weight"].shape[1:])
    padding, axes = [(side // 2, side // 2) for side in kernel], ("NTHWC", "THWIO", "NTHWC")
    found = jax.lax.conv_general_dilated(x[None], weight, (1, stride, stride), padding, dimension_numbers=axes)
    return found[0] + p["bias"]


def norm(p, x):
    groups = x.reshape(*x.shape[:3], -1, 8)
    groups = groups - groups.mean((1, 2, 4), keepdims=True)
    groups = groups / jnp.sqrt(jnp.square(groups).mean((1, 2, 4), keepdims=True) + 1e-6)
    return groups.reshape(x.shape) * p["scale"] + p["shift"]


def layer_norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


def turned(x, scale):
    """RMS-normalise heads (t, h, w, N, 8) and rotate the pairs (i, i + 4): the first two by t, one by y, one by x."""
    x = x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale
    t, y, z = np.meshgrid(*map(np.arange, x.shape[:3]), indexing="ij")
    angles = np.stack([t, t * 10_000.0**-0.5, y, z], -1)[..., None, :]
    pairs = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)
    return jnp.concatenate([pairs.real, pairs.imag], -1)


def attend(p, x, axes):
    q, k, v = jnp.moveaxis(jnp.einsum("thwd,dcnk->thwcnk", layer_norm(x), p["qkv"]["weight"]) + p["qkv"]["bias"], 3, 0)
    q, k = turned(q, p["q_norm"]), turned(k, p["k_norm"])
    t, h, w = x.shape[:3]
    if axes == "space":
        q, k, v = (y.reshape(t, h * w, *y.shape[3:]) for y in (q, k, v))
    else:
        q, k, v = (y.reshape(t, h * w, *y.shape[3:]).swapaxes(0, 1) for y in (q, k, v))
    y = jax.nn.dot_product_attention(q, k, v)
    y = y if axes == "space" else y.swapaxes(0, 1)
    return jnp.einsum("tsnk,nkd->tsd", y, p["merge"]["weight"]).reshape(x.shape) + p["merge"]["bias"]


def read_caption(p, x, text):
    q = jnp.einsum("thwd,dcnk->thwcnk", layer_norm(x), p["cross_q"]["weight"])[..., 0, :, :] + p["cross_q"]["bias"][0]
    k, v = jnp.moveaxis(jnp.einsum("md,dcnk->mcnk", text, p["cross_kv"]["weight"]) + p["cross_kv"]["bias"], 1, 0)
    y = jax.nn.dot_product_attention(q.reshape(1, -1, *q.shape[3:]), k[None], v[None])[0]
    merge = p["cross_merge"]
    return jnp.einsum("snk,nkd->sd", y, merge["weight"]).reshape(x.shape) + merge["bias"]


def canvas_block(p, x, row, text):
    """row (t, h, w, E): what each cell reads of noise levels."""
    h = conv2d(p["conv_1"], jax.nn.silu(norm(p["norm_1"], x)))
    scale, shift = jnp.split(row @ p["modulation"]["weight"] + p["modulation"]["bias"], 2, -1)
    h = conv2d(p["conv_2"], jax.nn.silu(norm(p["norm_2"], h) * (1 + scale) + shift))
    x = (x @ p["skip"]["weight"] + p["skip"]["bias"] if "skip" in p else x) + h
    moves = len(x) > 1
    x = x + conv2d(p["conv_time"], jax.nn.silu(norm(p["norm_time"], x)), time=True) * moves
    if "space" not in p:
        return x
    x = x + attend(p["space"], x, "space")
    x = x + read_caption(p, x, text)
    return x + attend(p["time"], x, "time") * moves


def canvas_unet(p, x, row, text):
    """Two levels with one block each, x (t, h, w, C), row (t, h, w, E): the mean of rows below is that of a box."""
    blocks = p["blocks"]
    first = jnp.zeros((*x.shape[:3], 1)).at[0].set(1)
    h = conv2d(p["conv_in"], jnp.concatenate([x, first], -1))
    high = h = canvas_block(blocks["down_0_0"], h, row, text)
    sides = [(0, side % 2) for side in x.shape[1:3]]
    padded = jnp.pad(jnp.concatenate([row, jnp.ones_like(row[..., :1])], -1), [(0, 0), *sides, (0, 0)])
    boxes = padded.reshape(len(x), padded.shape[1] // 2, 2, padded.shape[2] // 2, 2, -1).sum((2, 4))
    below = boxes[..., :-1] / boxes[..., -1:]
    low = h = canvas_block(blocks["down_1_0"], conv2d(p["shrink"]["0"], h, 2), below, text)
    for name in ("middle_0", "middle_1"):
        h = canvas_block(blocks[name], h, below, text)
    h = canvas_block(blocks["up_1_0"], jnp.concatenate([h, low], -1), below, text)
    h = h.repeat(2, 1).repeat(2, 2)[:, : x.shape[1], : x.shape[2]]
    h = canvas_block(blocks["up_0_0"], jnp.concatenate([conv2d(p["grow"]["0"], h), high], -1), row, text)
    y, gate = jnp.split(conv2d(p["conv_out"], jax.nn.silu(norm(p["norm_out"], h))), 2, -1)
    return y + gate * x


def embedded(params, time, pooled):
    """Embed the row of a noise level by hand: (E,)."""
    angles = 1000 * time * np.exp(-np.log(10_000) * np.arange(128) / 128)
    features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)])
    hidden = jax.nn.silu(features @ params["time_in"]["weight"] + params["time_in"]["bias"])
    label = layer_norm(pooled) @ params["pooled"]["weight"] + params["pooled"]["bias"]
    return jax.nn.silu(hidden @ params["time_out"]["weight"] + params["time_out"]["bias"] + label)


def test_packed_clips_of_odd_sizes_are_those_on_their_canvas(params, odd_clips, packed):
    """Two rows of noise levels a clip, one for its first column; the canvas is computed by library calls."""
    with jax.numpy_rank_promotion("allow"):
        pack = packed([odd_clips[:3], odd_clips[3:]], rows_per_clip=2, **SIZES)
        column_BL = (pack.coords_BL3[..., 2] == 0) & (pack.segments_BL > 0)
        pack = pack.replace(rows_BL=pack.rows_BL + column_BL)
        times_BR = np.where(np.arange(8) % 2, 0.25, np.asarray(times_of(pack)))
        run = jax.jit(lambda p: denoise(p, CONFIG, pack, pack.tokens_BLP, times_BR))
        found = outputs(run(params), pack)
        text = jax.jit(lambda p: encode_text(p["text"], TEXT, pack))(params)
        for number, clip in enumerate(odd_clips[:2]):  # a video and an image
            b, slot = divmod(number, 3)
            words = text.tokens_BME[b][np.asarray(pack.text_segments_BM[b]) == slot + 1]
            levels = (times_BR[b, 2 * slot], 0.25)
            one, given = (embedded(params, level, text.pooled_BSE[b, slot]) for level in levels)
            row = jnp.broadcast_to(one, (*clip.values.shape[:3], len(one))).at[:, :, 0].set(given)
            wanted = jax.jit(canvas_unet)(params["network"], clip.values, row, words)
            assert np.abs(wanted).max() > 0.1
            assert_near(found[clip.clip_id].reshape(wanted.shape), wanted, 1e-4)


# ----------------------------------------------------------------------------------------------------------
# Packs
# ----------------------------------------------------------------------------------------------------------


def test_packed_equals_one_by_one(params, odd_clips, packed):
    """Outputs, loss and the gradient of every parameter, in packs of three clips and in packs of one."""
    together = packed([odd_clips[:3], odd_clips[3:]], **SIZES)
    output_BLP, loss, weight, gradient = evaluator()(params, together)
    singles = [packed([[one], [other]], **SIZES) for one, other in (odd_clips[:2], odd_clips[2:])]
    alone = [evaluator()(params, pack) for pack in singles]
    found = outputs(output_BLP, together)
    for pack, single in zip(singles, alone, strict=True):
        for clip_id, own in outputs(single[0], pack).items():
            assert_near(found[clip_id], own)
    assert weight == sum(single[2] for single in alone) == 30 + 20 + 12 + 6
    assert_near(loss, sum(single[1] for single in alone))
    total = jax.tree.map(lambda *parts: sum(parts), *(single[3] for single in alone))
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(total))
    assert_near(gradient, total)


def test_the_order_of_tokens_does_not_matter(params, odd_clips, packed):
    """Tokens shuffled through the pack, and where its clips stand in it: coordinates decide."""
    pack = packed([odd_clips[:3], odd_clips[3:]], **SIZES)
    order = np.random.default_rng(0).permutation(100)
    names = ("tokens_BLP", "segments_BL", "coords_BL3", "index_BL", "rows_BL")
    shuffled = pack.replace(**{name: getattr(pack, name)[:, order] for name in names})
    one, other = (evaluator()(params, p) for p in (pack, shuffled))
    assert_near(other[0], one[0][:, order])
    assert_near(other[1:], one[1:])


def test_patches_are_put_back_into_latents(params, clips, packed):
    """Packs of patches of 2 x 2 latents and packs of latents: the same predictions."""
    whole = dataclasses.replace(CONFIG, patch=(1, 2, 2))
    assert whole.room_multiple == (1, 1) and CONFIG.room_multiple == (2, 2)
    fine, coarse = packed([clips], **(SIZES | {"length": 112})), packed([clips], 28)
    predict = lambda config, pack: jax.jit(lambda p: denoise(p, config, pack, pack.tokens_BLP, times_of(pack)))(params)  # noqa: E731
    wanted, found = outputs(predict(CONFIG, fine), fine), outputs(predict(whole, coarse), coarse)
    for clip in clips:
        (t, h, w, C), tokens = clip.values.shape, found[clip.clip_id]
        latent = tokens.reshape(t, h // 2, w // 2, 2, 2, C).swapaxes(2, 3).reshape(-1, C)
        assert_near(latent, wanted[clip.clip_id])


def test_other_clips_and_padding_have_exactly_no_gradient(params, odd_clips, packed):
    """Tokens, noise levels and captions: those of clip 3 alone reach the outputs of clip 3."""
    pack = packed([odd_clips[:3], odd_clips[3:]], **SIZES)
    mine_BL = np.zeros(pack.segments_BL.shape, bool)
    mine_BL[0] = pack.segments_BL[0] == 3

    @jax.jit
    @jax.grad
    def slope(inputs, params):
        x_BLP, times_BR, text = inputs
        text = TextContext(text[0], pack.text_segments_BM, text[1])
        output = denoise(params, CONFIG, pack, x_BLP, times_BR, text)
        return jnp.where(mine_BL[..., None], jnp.sin(output), 0).sum()

    context = jax.jit(lambda p: encode_text(p, TEXT, pack))(params["text"])
    x, times, (text, pooled) = slope(
        (pack.tokens_BLP, times_of(pack), (context.tokens_BME, context.pooled_BSE)), params
    )
    clip_BS = np.arange(8).reshape(2, 4) == 2
    words_BM = np.stack([pack.text_segments_BM[0] == 3, np.zeros(12, bool)])
    for gradient, own in [(x, mine_BL), (times, clip_BS), (pooled, clip_BS), (text, words_BM)]:
        gradient = np.asarray(gradient).reshape(*own.shape, -1)
        assert not gradient[~own].any()
        assert gradient[own].any(-1).all()


# ----------------------------------------------------------------------------------------------------------
# What its layers promise
# ----------------------------------------------------------------------------------------------------------


def test_at_initialisation_the_output_is_exactly_zero(odd_clips, packed):
    pack = packed([odd_clips[:3], odd_clips[3:]], **SIZES)
    params = jax.jit(lambda key: init(denoiser_specs(CONFIG), key))(jax.random.key(0))
    assert not np.asarray(evaluator()(jax.device_get(params), pack)[0]).any()


TIME = ("conv_time", "norm_time", "time")


def parts_in_time(params, of):
    """Parameters with those of layers along time replaced by `of` theirs."""
    blocks = {
        name: {part: jax.tree.map(of, own) if part in TIME else own for part, own in block.items()}
        for name, block in params["network"]["blocks"].items()
    }
    return params | {"network": params["network"] | {"blocks": blocks}}


def test_an_image_passes_layers_along_time_unchanged(params, odd_clips, packed):
    """Other weights of these layers change videos, not images; their gradients from images are zero."""
    pack = packed([odd_clips[:2], odd_clips[2:]], **SIZES)
    one, other = (evaluator()(p, pack)[0] for p in (params, parts_in_time(params, lambda x: 2 * x + 1)))
    image = odd_clips[1].clip_id
    one, other = outputs(one, pack), outputs(other, pack)
    assert [clip_id for clip_id in one if np.abs(other[clip_id] - one[clip_id]).max() < 1e-6] == [image]
    images = packed([odd_clips[1:2], [dataclasses.replace(odd_clips[1], clip_id=7)]], **SIZES)
    slopes = evaluator()(params, images)[3]["network"]["blocks"]
    for block in slopes.values():
        for part, slope in block.items():
            assert all(bool(np.any(leaf)) == (part not in TIME) for leaf in jax.tree.leaves(slope)), part


def test_with_closed_layers_in_time_frames_are_images(params, odd_clips, packed):
    """As at the start of training: a frame is denoised as that image, without the flag of first frames."""
    closed = parts_in_time(params, np.zeros_like)
    inputs = closed["network"]["conv_in"]
    weight = inputs["weight"].copy()
    weight[:, -1] = 0  # the flag
    closed = closed | {"network": closed["network"] | {"conv_in": inputs | {"weight": weight}}}
    clip = odd_clips[0]
    frames = [dataclasses.replace(clip, values=frame[None]) for frame in clip.values]
    pack = packed([[clip], frames], **SIZES)
    found, wanted = evaluator()(closed, pack)[0]
    assert np.abs(wanted).max() > 0.1
    assert_near(found, wanted)


def test_what_moves_in_the_middle_moves_in_the_output(randomised, packed):
    """Without attention, by as much as the lowest resolution can move, far from the borders."""
    config = dataclasses.replace(CONFIG, attended=(), text=None)
    rng, values = np.random.default_rng(0), np.zeros((2, 4, 96, 2), np.float32)
    values[:, :, 46:50] = rng.standard_normal((2, 4, 4, 2))
    params = jax.device_get(randomised(denoiser_specs(config)))
    run = jax.jit(lambda pack: denoise(params, config, pack, pack.tokens_BLP, np.full((1, 1), 0.5, np.float32)))

    def moved_by(shift):
        item = PackItem(np.roll(values, shift, axis=2), 1, np.zeros(1, np.int32))
        return np.asarray(run(packed([[item]], slots=1, patch=(1, 1, 1), length=768))).reshape(2, 4, 96, 2)

    one = moved_by(0)
    assert np.abs(one[:, :, 40:56] - one[:, :, 30:31]).max() > 0.1
    for shift in (2, -4):
        assert_near(moved_by(shift)[:, :, 30:66], np.roll(one, shift, axis=2)[:, :, 30:66])


def test_recomputed_blocks_give_the_same_gradient(params, odd_clips, packed):
    pack = packed([odd_clips[:3], odd_clips[3:]], **SIZES)
    *found, slopes = evaluator(dataclasses.replace(CONFIG, remat="full"))(params, pack)
    *wanted, expected = evaluator()(params, pack)
    assert_near(found, wanted)
    assert_near(slopes, expected, share=1e-3)  # those of biases of queries are small sums of large terms


def test_encoded_text_may_be_given(params, odd_clips, packed):
    pack = packed([odd_clips[:3], odd_clips[3:]], **SIZES)

    @jax.jit
    def run(params):
        text = encode_condition(params, CONFIG, pack)
        return denoise(params, CONFIG, pack, pack.tokens_BLP, times_of(pack), text)

    assert_near(run(params), evaluator()(params, pack)[0])


# ----------------------------------------------------------------------------------------------------------
# Counts
# ----------------------------------------------------------------------------------------------------------


def test_parameter_count_in_closed_form():
    """Two levels of 8 and 16 channels, one block each; attention at the second."""
    E, T = 4 * 8, 16
    conv = lambda taps, inputs, outputs: (taps * inputs + 1) * outputs  # noqa: E731

    def block(inputs, width, attends):
        own = 2 * inputs + conv(9, inputs, width) + conv(1, E, 2 * width) + 2 * width + conv(9, width, width)
        own += (conv(1, inputs, width) if inputs != width else 0) + 2 * width + conv(3, width, width)
        attention = conv(1, width, 3 * width) + 2 * 8 + conv(1, width, width)
        cross = 2 * conv(1, width, width) + conv(1, T, 2 * width)
        return own + (2 * attention + cross if attends else 0)

    rows = conv(1, 256, E) + conv(1, E, E) + conv(1, T, E)
    text = 16 * T + 4 * conv(1, T, T) + conv(1, T, 4 * T) + conv(1, 4 * T, T)
    down, middle = block(8, 8, False) + block(8, 16, True), block(16, 16, True) + block(16, 16, False)
    up = block(32, 16, True) + block(16, 8, False)
    ends = conv(9, 2 + 1, 8) + conv(9, 8, 8) + conv(9, 16, 8) + 2 * 8 + conv(9, 8, 2 * 2)
    assert count(denoiser_specs(CONFIG)) == rows + text + down + middle + up + ends
    assert [block.name for block in blocks_of(CONFIG)] == [
        "down_0_0", "down_1_0", "middle_0", "middle_1", "up_1_0", "up_0_0"
    ]  # fmt: skip


def arrays(pack) -> dict:
    return {name: values for name, values in vars(pack).items() if values is not None}


def test_flops_are_sums_over_clips(odd_clips, packed):
    batch = arrays(packed([odd_clips[:3], odd_clips[3:]], **SIZES))
    singles = [arrays(packed([[clip]], **SIZES)) for clip in odd_clips]
    assert forward_flops(CONFIG, batch) == sum(forward_flops(CONFIG, single) for single in singles)


def test_flops_agree_with_what_xla_counts(packed):
    """XLA also counts norms, softmax, activations, and attention across frames; few where convolutions are wide."""
    config = dataclasses.replace(CONFIG, width=64, head_width=32, latent_channels=2)
    for frames in (1, 2):
        item = PackItem(np.zeros((frames, 8, 12, 2), np.float32), 1, np.arange(3, 9))
        pack = packed([[item]], frames * 96, 1, 6, (1, 1, 1))
        times = np.full((1, 1), 0.5, np.float32)
        run = jax.jit(lambda p, pack, times=times: denoise(p, config, pack, pack.tokens_BLP, times))
        counted = run.lower(abstract(denoiser_specs(config)), pack).compile().cost_analysis()["flops"]
        if frames == 1:  # the layers along time run, and their results are left out
            counted -= sum(
                2 * size * 96 // 4**level
                for level, size in (
                    (block.level, 3 * block.outputs**2 + block.attends * 4 * block.outputs**2)
                    for block in blocks_of(config)
                )
            )
        assert 1.0 < counted / forward_flops(config, arrays(pack)) < 1.1


def test_mistakes_are_told():
    for changes, message in [
        ({"width": 12}, "model.width is 12; it must be a multiple of 8"),
        ({"attended": (2,)}, "model.attended names level 2; with 2 model.multipliers each must be below that"),
        ({"head_width": 12}, "model.head_width is 12; it must divide 16, the width of level 1"),
        ({"multipliers": ()}, r"model.multipliers is \(\)"),
        ({"remat": "dots"}, "model.remat"),
    ]:
        with pytest.raises(UserError, match=message):
            dataclasses.replace(CONFIG, **changes)
    with pytest.raises(UserError, match=r"packing.multiple is \(2, 2\); it must be \(1, 1\)"):
        dataclasses.replace(RUN, packing=PackingConfig(multiple=(2, 2)))
    assert RUN.packs.multiple == (2, 2)
