"""W.A.L.T: packed equals alone, windows and the identity of images by gradients, an independent oracle, exact counts.

All parameters are random, so no gate is closed; float32. The windows of CONFIG, 2 x 3 in a frame and 2 x 2 through all
frames, do not divide the clips.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_near

from sora_jax.data.packing.packs import PackItem
from sora_jax.errors import UserError
from sora_jax.models.denoiser import denoise, encode_condition, forward_flops
from sora_jax.models.text import TextConfig, encode_text
from sora_jax.models.walt import denoiser_specs
from sora_jax.models.walt_blocks import SIZES, WaltConfig
from sora_jax.nn.pack import Pack
from sora_jax.nn.params import abstract, count, init

TEXT = TextConfig(vocabulary=16, width=16, depth=1, head_width=8)
CONFIG = WaltConfig(
    depth=4,
    width=24,
    heads=2,
    latent_channels=2,
    spatial_window=(2, 3),
    spatiotemporal_window=(2, 2),
    positions=(2, 3, 4),
    text=TEXT,
    classes=3,
    remat="none",
    dtype="float32",
)
GRIDS = ((4, 3, 5), (1, 4, 7), (3, 2, 2), (1, 1, 1))
SCALE = 0.15  # of the parameters: larger ones make the network magnify what rounding leaves
WORDS = ((3, 4, 5), (6,), (7, 8, 9, 10), (11, 12))


@pytest.fixture(scope="module")
def clips():
    """Four clips, two of them images."""
    rng = np.random.default_rng(0)
    latents = [rng.standard_normal((*grid, 2), np.float32) for grid in GRIDS]
    return [PackItem(z, 11 * i + 11, np.array(w), label=i - 1) for i, (z, w) in enumerate(zip(latents, WORDS))]


@pytest.fixture(scope="module")
def pack_of(packed):
    return lambda rows, length=96, **sizes: packed(rows, length, patch=CONFIG.patch, **sizes)


@pytest.fixture(scope="module")
def single(alone):
    return lambda clip: alone(clip, patch=CONFIG.patch)


@pytest.fixture(scope="module")
def random(randomised):
    """random(config): parameters with open gates."""
    return functools.cache(lambda config: jax.device_get(randomised(denoiser_specs(config), scale=SCALE)))


def times_of(pack: Pack) -> np.ndarray:
    """Some noise level in (0, 1) for each row: a function of the clip alone, and values to every program."""
    return np.take_along_axis(np.float32((pack.clip_ids_BS % 7 + 1) / 9), pack.row_slots_BR, axis=1)


def forward(config: WaltConfig, params: dict, pack: Pack) -> np.ndarray:
    """The output for the pack's own tokens."""
    return np.asarray(forward_program(config)(params, pack, pack.tokens_BLP, times_of(pack)))


@functools.cache
def forward_program(config: WaltConfig):
    return jax.jit(lambda params, pack, x_BLP, t_BR: denoise(params, config, pack, x_BLP, t_BR))


@functools.cache
def with_gradient(config: WaltConfig):
    """Compiled (params, pack, times) -> (sum over real tokens, outputs), gradient of the sum."""

    def value(params, pack, times_BR):
        out_BLP = denoise(params, config, pack, pack.tokens_BLP, times_BR)
        return jnp.where(pack.segments_BL[..., None] > 0, jnp.sin(out_BLP), 0).sum(), out_BLP

    return jax.jit(jax.value_and_grad(value, has_aux=True))


def outputs(out_BLP, pack: Pack) -> dict[int, np.ndarray]:
    """The output of each clip, in the order of its tokens."""
    return {
        int(pack.clip_ids_BS[b, slot]): np.asarray(out_BLP[b])[np.flatnonzero(pack.segments_BL[b] == slot + 1)]
        for b, slot in zip(*np.nonzero(pack.clip_ids_BS), strict=True)
    }


WAYS = {
    "low rank": {},
    "full rank": {"adaln_rank": 0, "text": None, "depth": 2, "image_identity": False, "qk_norm": False},
    "in blocks": {"attention": "blockwise", "remat": "full", "learned_variance": True, "input_skip": True, "depth": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_packed_equals_one_by_one(random, clips, pack_of, way):
    """Outputs and the gradient of every parameter, to 1e-5; one program, so a clip alone has padding behind it."""
    config = dataclasses.replace(CONFIG, **WAYS[way])
    params, program = random(config), with_gradient(config)
    together = pack_of([[clips[1], clips[0]]])
    (_, out), gradient = program(params, together, times_of(together))
    found, slopes = outputs(out, together), []
    for clip in clips[:2]:
        pack = pack_of([[clip]])
        (_, own), slope = program(params, pack, times_of(pack))
        own = outputs(own, pack)[clip.clip_id]
        assert np.abs(own).max() > 0.1
        assert_near(found[clip.clip_id], own, 1e-5)
        slopes.append(slope)
    total = jax.tree.map(lambda *parts: sum(parts), *slopes)
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(total))
    assert_near(gradient, total, 1e-5, share=0.01)


def test_at_initialisation_the_output_is_exactly_zero(clips, pack_of):
    pack = pack_of([clips[:2]])

    @jax.jit
    def start(key):
        return denoise(init(denoiser_specs(CONFIG), key), CONFIG, pack, pack.tokens_BLP, times_of(pack))

    assert not np.asarray(start(jax.random.key(0))).any()


def reads(config, params, pack, kind: str) -> np.ndarray:
    """Which tokens (L, L) of a pack a token's output depends on, where only blocks of one kind attend.

    Without captions; in the other blocks the output projection of attention is zero.
    """
    other = {"spatial": "spatiotemporal", "spatiotemporal": "spatial"}[kind]
    closed = params["blocks"][other] | {"merge": jax.tree.map(np.zeros_like, params["blocks"][other]["merge"])}
    params = params | {"blocks": params["blocks"] | {other: closed}}
    one = jax.grad(lambda x, i, params: denoise(params, config, pack, x, times_of(pack))[0, i].sum())
    slope = jax.jit(lambda x, params: jax.lax.map(lambda i: one(x, i, params), jnp.arange(x.shape[1])))
    return np.abs(slope(pack.tokens_BLP, params))[:, 0].max(-1) > 0


def test_a_token_reads_its_window_alone_and_an_image_in_time_itself(random, clips, pack_of):
    """By exact zeros of the Jacobian, in a pack of a clip and an image."""
    config = dataclasses.replace(CONFIG, depth=2, text=None)
    pack = pack_of([[clips[1], clips[2]]], 40)
    t, y, x = np.moveaxis(pack.coords_BL3[0], -1, 0)
    clip = pack.segments_BL[0]
    at = {
        "spatial": np.stack([clip, t, y // 2, x // 3]),
        "spatiotemporal": np.stack([clip, 0 * t, y // 2, x // 2]),
    }
    image, real = clip == 1, clip > 0
    whole = dataclasses.replace(config, windows=False)
    for config, kind, windows in [*[(config, *each) for each in at.items()], (whole, "spatial", clip[None])]:
        same = (windows[:, :, None] == windows[:, None, :]).all(0)
        if kind == "spatiotemporal":
            same &= ~image[:, None] | np.eye(len(clip), dtype=bool)
        found = reads(config, random(config), pack, kind)
        np.testing.assert_array_equal(found[real][:, real], same[real][:, real])


def test_a_caption_is_read_by_all_windows_of_its_clip_and_by_no_other_clip(random, clips, pack_of):
    pack = pack_of([[clips[0], clips[2]]], 72)
    params, before = random(CONFIG), forward(CONFIG, random(CONFIG), pack)
    text = np.where(pack.text_segments_BM == 2, 15 - pack.text_BM, pack.text_BM)
    # Pooled captions modulate, too: leave that out.
    deaf = params | {"pooled": jax.tree.map(np.zeros_like, params["pooled"])}
    before, after = forward(CONFIG, deaf, pack), forward(CONFIG, deaf, pack.replace(text_BM=text))
    moved = np.abs(after - before).max(-1)[0] > 0
    np.testing.assert_array_equal(moved[pack.segments_BL[0] > 0], pack.segments_BL[0][pack.segments_BL[0] > 0] == 2)


def test_the_order_of_tokens_does_not_matter(random, clips, pack_of):
    pack = pack_of([[clips[0], clips[1]]])
    order = np.random.default_rng(0).permutation(pack.segments_BL.shape[1])
    names = ("tokens_BLP", "segments_BL", "coords_BL3", "index_BL", "rows_BL")
    shuffled = pack.replace(**{name: getattr(pack, name)[:, order] for name in names})
    assert_near(forward(CONFIG, random(CONFIG), shuffled), forward(CONFIG, random(CONFIG), pack)[:, order], 1e-5)


def test_keys_and_values_of_captions_computed_once_are_those_of_every_block(random, clips, pack_of):
    pack, params = pack_of([[clips[0], clips[1]]]), random(CONFIG)
    text = jax.jit(lambda p: encode_condition(p, CONFIG, pack))(params)
    assert text.keys_values[0].shape == (2, 2, 1, 12, CONFIG.heads, CONFIG.head_width)
    run = jax.jit(lambda p, text: denoise(p, CONFIG, pack, pack.tokens_BLP, times_of(pack), text))
    assert_near(run(params, text), forward(CONFIG, params, pack), 1e-5)
    other = dataclasses.replace(text, keys_values=jax.tree.map(lambda x: x[:, ::-1], text.keys_values))
    assert np.abs(run(params, other) - run(params, text)).max() > 1e-3  # they are what is read


# --- an independent implementation, token by token ---


def norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def turned(x, coords, theta):
    """Pairs (i, i + K / 2) rotated by the coordinates: K = 12 has 4 channels for each axis."""
    K = x.shape[-1]
    angles = np.concatenate([c * theta ** (-np.arange(0, 4, 2) / 4) for c in coords])
    a, b = x[..., : K // 2], x[..., K // 2 :]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)], -1)


def table_at(table, place):
    place = np.clip(place, 0, len(table) - 1)
    low = int(min(np.floor(place), max(len(table) - 2, 0)))
    return table[low] + (place - low) * (table[min(low + 1, len(table) - 1)] - table[low])


def softmax_mix(q, ks, vs):
    """One query (N, K), keys and values (M, N, K)."""
    scores = np.einsum("nk,mnk->nm", q, ks) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("nm,mnk->nk", weights / weights.sum(-1, keepdims=True), vs)


def heads(q, x):
    """Projections (parts, ..., N, K) of the last axis."""
    return np.einsum("...d,dcnk->c...nk", x, q["weight"]) + q["bias"].reshape(-1, *[1] * (x.ndim - 1), 2, 12)


def oracle(p, clip, words, pooled, time) -> np.ndarray:
    """W.A.L.T for one clip in NumPy, float64, with loops over tokens; words (M, E) and pooled (E,) are encoded."""
    (T, H, W), c = clip.values.shape[:3], CONFIG
    lin = lambda q, x: x @ q["weight"] + q.get("bias", 0)  # noqa: E731
    rms = lambda g, x: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * g  # noqa: E731
    where = [(t, y, x) for t in range(T) for y in range(H) for x in range(W)]
    plane = p["positions"]["plane"].reshape(3, 4, -1)
    z = lin(p["patch"], clip.values.reshape(len(where), -1).astype(np.float64))
    for i, (t, y, x) in enumerate(where):
        row = table_at(plane, (y + 0.5) * 3 / H - 0.5)
        z[i] += table_at(row, (x + 0.5) * 4 / W - 0.5) + table_at(p["positions"]["time"], t * min(1, 1 / max(T - 1, 1)))
    angles = 1000 * time * 10_000.0 ** (-np.arange(128) / 128)
    label = p["classes"][clip.label if clip.label >= 0 else 3] + lin(p["pooled"], norm(pooled))
    known = silu(lin(p["time_out"], silu(lin(p["time_in"], np.concatenate([np.cos(angles), np.sin(angles)])))) + label)
    captions = norm(lin(p["captions"], words))
    in_frame = [(t, y // 2, x // 3) for t, y, x in where]
    in_time = [(y // 2, x // 2) for _, y, x in where] if T > 1 else list(range(len(where)))
    for i in range(c.depth):
        kind, windows = (("spatial", in_frame), ("spatiotemporal", in_time))[i % 2]
        b = jax.tree.map(lambda a, i=i: a[i // 2], p["blocks"][kind])
        modulation = lin(p["modulation_1"], known)
        if i > 0:
            own = b["low_rank"] if i % 2 else jax.tree.map(lambda a, i=i: a[i // 2 - 1], p["low_rank"])
            modulation = modulation + known @ own["down"]["weight"] @ own["up"]["weight"]
        shift1, scale1, gate1, shift2, scale2, gate2 = np.split(modulation, 6)
        q, k, v = heads(b["qkv"], norm(z) * (1 + scale1) + shift1)
        q, k = rms(b["q_norm"], q), rms(b["k_norm"], k)
        q, k = (np.stack([turned(a[j], where[j], c.position_theta) for j in range(len(where))]) for a in (q, k))
        same = [[m for m in range(len(where)) if windows[m] == windows[j]] for j in range(len(where))]
        out = np.stack([softmax_mix(q[j], k[same[j]], v[same[j]]) for j in range(len(where))])
        z = z + gate1 * (np.einsum("lnk,nkd->ld", out, b["merge"]["weight"]) + b["merge"]["bias"])
        (q,) = heads(b["cross_q"], norm(z))
        k, v = heads(b["cross_kv"], np.concatenate([norm(z), captions]))
        q, k = rms(b["cross_q_norm"], q), rms(b["cross_k_norm"], k)
        out = []
        for j in range(len(where)):
            seen = [m for m in range(len(where)) if in_frame[m] == in_frame[j]]
            seen += list(range(len(where), len(where) + len(captions)))
            out.append(softmax_mix(q[j], k[seen], v[seen]))
        z = z + np.einsum("lnk,nkd->ld", np.stack(out), b["cross_merge"]["weight"]) + b["cross_merge"]["bias"]
        z = z + gate2 * lin(b["mlp"]["down"], gelu(lin(b["mlp"]["up"], norm(z) * (1 + scale2) + shift2)))
    shift, scale = np.split(lin(p["modulation"], known), 2)
    return lin(p["head"], norm(z) * (1 + scale) + shift)


def test_is_what_an_independent_implementation_computes(random, clips, pack_of):
    params, pack = random(CONFIG), pack_of([[clips[1], clips[2]]], 40)
    text = jax.device_get(jax.jit(lambda p: encode_text(p["text"], TEXT, pack))(params))
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    found = outputs(forward(CONFIG, params, pack), pack)
    for slot, clip in enumerate((clips[1], clips[2])):
        words = text.tokens_BME[0][pack.text_segments_BM[0] == slot + 1].astype(np.float64)
        pooled, time = text.pooled_BSE[0, slot].astype(np.float64), times_of(pack)[0, slot].astype(np.float64)
        assert_near(found[clip.clip_id], oracle(exact, clip, words, pooled, time), 2e-5)


# --- positions ---


def test_a_clip_of_the_size_of_the_tables_reads_their_entries(random, pack_of):
    """And one of twice the size reads between them; frames are not stretched."""
    from sora_jax.models.walt import _positions

    tables = random(CONFIG)["positions"]
    own = [PackItem(np.zeros((*grid, 2), np.float32), 1, np.array([3])) for grid in ((2, 3, 4), (1, 6, 8))]
    found = np.asarray(_positions(tables, CONFIG, pack_of([own], 72)))[0]
    plane = tables["plane"].reshape(3, 4, -1)
    wanted = (tables["time"][:, None, None] + plane[None]).reshape(24, -1)
    np.testing.assert_allclose(found[:24], wanted, rtol=1e-6)
    image = found[24:].reshape(6, 8, -1) - tables["time"][0]
    np.testing.assert_allclose(image[0, 0], plane[0, 0], rtol=1e-5)  # beyond the centre of the first entry
    np.testing.assert_allclose(image[1, 2], 0.75 * (0.75 * plane[0, 1] + 0.25 * plane[0, 0])
                               + 0.25 * (0.75 * plane[1, 1] + 0.25 * plane[1, 0]), rtol=1e-5)  # fmt: skip


# --- counts ---


def without_text(config: WaltConfig) -> int:
    """The parameters of the network; the paper's captions are embedded by a frozen T5-XL."""
    specs = denoiser_specs(config)
    return count({name: spec for name, spec in specs.items() if name != "text"})


def bias_tables(config: WaltConfig) -> int:
    """The relative position biases that the paper has in place of rotary positions: an entry for each distance."""
    (h, w), (h2, w2), frames = config.spatial_window, config.spatiotemporal_window, config.positions[0]
    entries = (2 * h - 1) * (2 * w - 1) + (2 * frames - 1) * (2 * h2 - 1) * (2 * w2 - 1)
    return config.depth // 2 * config.heads * entries


def paper(size: str = "L", **changes) -> WaltConfig:
    """The class-conditional model for UCF-101 (2312.06662, table 8), 5 x 16 x 16 latents of 8 channels."""
    depth, width, heads = SIZES[size]
    values = dict(depth=depth, width=width, heads=heads, text=None, classes=101, self_conditioning=True) | changes
    return WaltConfig(**values)


T5 = TextConfig(pretrained="t5-xl", pretrained_width=2048, width=2048, depth=1, head_width=64)
IMAGENET = dict(classes=1000, spatial_window=(32, 32), positions=(1, 32, 32), adaln_rank=0)
CASCADE = dict(text=T5, classes=0)
ENLARGES = dict(**CASCADE, low_resolution=True, positions=(5, 16, 28))
TABLE_8 = {  # millions, as printed
    "L": (paper(), 313),
    "XL": (paper("XL"), 460),
    "L with separate adaLN": (paper(adaln_rank=0), 458),
    "ImageNet": (paper(**IMAGENET), 460),
    "2 x 2 x super-resolution": (paper(**ENLARGES, patch=(1, 4, 4)), 419),
}


@pytest.mark.parametrize("name", TABLE_8)
def test_parameters_are_the_papers_to_its_digits(name):
    config, millions = TABLE_8[name]
    assert round((without_text(config) + bias_tables(config)) / 1e6) == millions


def test_parameters_of_the_billions_are_the_papers():
    assert round(without_text(paper("1.3B", **ENLARGES, patch=(1, 2, 2))) / 1e9, 1) == 1.3
    assert round(without_text(paper("3B", **CASCADE)) / 1e9) == 3


def test_captions_cost_four_squares_of_the_width_a_layer():
    """419 M - 313 M of the paper: 24 layers of 4 D^2, and what brings captions to the width."""
    D = 1024
    block = lambda config: count(denoiser_specs(config)["blocks"])  # noqa: E731
    assert block(paper(**CASCADE)) - block(paper()) == 24 * (4 * D**2 + 4 * D + 2 * 64)


def conditioning(config: WaltConfig) -> int:
    """The weights by which noise level and label reach the blocks."""
    specs = denoiser_specs(config)
    blocks = [
        specs["blocks"][kind].get(name) for kind in ("spatial", "spatiotemporal") for name in ("modulation", "low_rank")
    ]
    leaves = jax.tree_util.tree_leaves_with_path(abstract([specs.get("modulation_1"), specs.get("low_rank"), blocks]))
    return sum(x.size for path, x in leaves if path[-1].key == "weight")


def test_low_rank_modulation_takes_12_of_475_million():
    g = dict(depth=40, width=1408, heads=16)
    assert conditioning(paper(**g, adaln_rank=0)) == 40 * 6 * 1408**2 == 475_791_360
    assert conditioning(paper(**g)) == 6 * 1408**2 + 39 * 2 * 7 * 1408 == 12_663_552


@pytest.mark.parametrize("rank, millions", [(2, 313), (4, 314), (16, 316), (64, 324), (256, 357)])
def test_the_growth_with_the_rank_is_the_papers_but_for_the_first_block(rank, millions):
    """The figures of the paper's ablation are those of 24 maps; its text gives the first block none."""
    D, config = 1024, paper(adaln_rank=rank)
    assert without_text(config) - without_text(paper()) == (rank - 2) * 7 * D * 23
    assert round((without_text(config) + bias_tables(config) + rank * 7 * D) / 1e6) == millions


# --- FLOPs ---


def arrays(pack) -> dict:
    return {name: values for name, values in vars(pack).items() if values is not None}


def squares(groups) -> int:
    """The sum of the squares of how often each value occurs."""
    return sum(groups.count(one) ** 2 for one in set(groups))


def by_hand(grid, words, windows=True, D=24, F=96, P=2, E=16, depth=4, rank=2):
    """Multiply-adds of one clip, its windows counted token by token."""
    where = [(t, y, x) for t in range(grid[0]) for y in range(grid[1]) for x in range(grid[2])]
    tokens = len(where)
    in_frame = squares([(t, y // 2, x // 3) if windows else 0 for t, y, x in where])
    in_time = squares([(y // 2, x // 2) if windows else 0 for _, y, x in where]) if grid[0] > 1 else tokens
    text = words * 12 * E * E + 2 * words**2 * E + words * E * D + E * D
    row = 256 * D + D * D + 6 * D * D + (depth - 1) * rank * 7 * D + 2 * D * D
    block = tokens * (4 * D * D + 2 * D * F) + tokens * 2 * D * D + (tokens + words) * 2 * D * D
    pairs = depth // 2 * (in_frame + in_time) + depth * (in_frame + tokens * words)
    return text + row + tokens * 2 * P * D + depth * block + 2 * D * pairs


@pytest.mark.parametrize("number", range(4))
def test_flops_are_counted_window_by_window(clips, single, number):
    clip = clips[number]
    grid, words = clip.values.shape[:3], len(clip.text)
    assert forward_flops(CONFIG, arrays(single(clip))) == 2 * by_hand(grid, words)
    whole = dataclasses.replace(CONFIG, windows=False)
    assert forward_flops(whole, arrays(single(clip))) == 2 * by_hand(grid, words, windows=False)


def test_flops_of_a_batch_are_those_of_its_clips(clips, pack_of, single):
    batch = arrays(pack_of([clips[:3], clips[3:]], 104, slots=5))
    assert forward_flops(CONFIG, batch) == sum(forward_flops(CONFIG, arrays(single(clip))) for clip in clips)


@pytest.mark.parametrize(
    "field, value", [("depth", 3), ("spatial_window", (0, 4)), ("adaln_rank", -1), ("heads", 5), ("attention", "swin")]
)
def test_wrong_settings_are_named(field, value):
    named = "width" if field == "heads" else field
    with pytest.raises(UserError, match=f"model.{named} is "):
        dataclasses.replace(CONFIG, **{field: value})
