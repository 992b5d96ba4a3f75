"""What a query sees: patterns and windows against slow NumPy, on packs, on every backend and on split sequences."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import sora_jax.nn.attention as room
from sora_jax.errors import UserError
from sora_jax.nn.attention import (
    FULL,
    How,
    Pattern,
    Place,
    Places,
    attention,
    blockwise_attention,
    dense_attention,
    kernels,
    visible,
)
from sora_jax.nn.attention.kernels import cudnn_attention, splash_attention
from sora_jax.nn.attention.pattern import reachable
from sora_jax.nn.windows import reorder, window_order, window_segments
from sora_jax.parallel.mesh import MeshConfig, make_mesh
from sora_jax.parallel.rules import partition

quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)
LENGTH, HEADS, WIDTH = 96, 4, 4
PACKS = (((3, 4, 4), (1, 4, 6)), ((2, 3, 5), (1, 1, 1), (4, 2, 7)))  # grids (t, h, w) of the clips of two packs
CAUSAL, NEARBY = Pattern(causal=True), Pattern(nearby=(1, 1.5, None))
PATTERNS = {"full": FULL, "causal": CAUSAL, "nearby": NEARBY, "both": Pattern(True, (1, None, 2))}
BACKENDS = {"dense": dense_attention, "blockwise": functools.partial(blockwise_attention, block=20)}


def clip_place(grid) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates and index of the tokens of a clip, in raster order."""
    coords = np.array(list(itertools.product(*map(range, grid))), np.float32)
    return coords, np.arange(len(coords), dtype=np.int32)


@functools.cache
def packed_place() -> Place:
    segments, index = np.zeros((2, len(PACKS), LENGTH), np.int32)
    coords = np.zeros((len(PACKS), LENGTH, 3), np.float32)
    for b, grids in enumerate(PACKS):
        at = 0
        for slot, grid in enumerate(grids, 1):
            own, numbers = clip_place(grid)
            here = slice(at, at := at + len(own))
            segments[b, here], coords[b, here], index[b, here] = slot, own, numbers
    return Place(segments, coords, index)


@functools.cache
def arrays() -> np.ndarray:
    """q, k, v and a cotangent."""
    return np.random.default_rng(0).standard_normal((4, len(PACKS), LENGTH, HEADS, WIDTH), np.float32)


def seen(pattern: Pattern, a, b) -> bool:
    """Whether a query at `a` sees a key at `b`, both (segment, coordinates, index): the definition in plain Python."""
    if a[0] != b[0] or (pattern.causal and b[2] > a[2]):
        return False
    radii = pattern.nearby or (None, None, None)
    return all(r is None or abs(x - y) <= r for r, x, y in zip(radii, a[1], b[1], strict=True))


def alone(mask, q, k, v, probe):
    """Attention of one clip, and its gradients along the probe, in float64: (tokens, N, K) each."""
    q, k, v, probe = (x.astype(np.float64).swapaxes(0, 1) for x in (q, k, v, probe))
    scores = np.where(mask, q @ k.swapaxes(1, 2) / np.sqrt(WIDTH), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = weights @ v
    dscores = weights * (probe @ v.swapaxes(1, 2) - (probe * out).sum(-1, keepdims=True)) / np.sqrt(WIDTH)
    found = out, dscores @ k, dscores.swapaxes(1, 2) @ q, weights.swapaxes(1, 2) @ probe
    return [x.swapaxes(0, 1) for x in found]


def assert_each_clip_is_alone(found, sees):
    """Compare (out, dq, dk, dv) of packs with those of each clip in arrays of its own; sees(a, b) of tokens."""
    for b, grids in enumerate(PACKS):
        at = 0
        for grid in grids:
            tokens = [(1, *token) for token in zip(*clip_place(grid), strict=True)]
            mask = np.array([[sees(query, key) for key in tokens] for query in tokens])
            here = slice(at, at := at + len(tokens))
            expected = alone(mask, *arrays()[:, b, here])
            for ours, wanted in zip(found, expected, strict=True):
                np.testing.assert_allclose(ours[b, here], wanted, rtol=1e-4, atol=1e-5)


@functools.partial(quick_jit, static_argnums=(0, 1))
def with_gradients(attend, pattern, place, q, k, v, probe):
    out, pull = jax.vjp(lambda *qkv: attend(*qkv, Places(place, place), pattern), q, k, v)
    return out, *pull(probe)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PATTERNS)
def test_a_clip_in_a_pack_is_attended_to_as_alone(backend, name):
    found = with_gradients(BACKENDS[backend], PATTERNS[name], packed_place(), *arrays())
    assert_each_clip_is_alone(found, functools.partial(seen, PATTERNS[name]))


@pytest.mark.parametrize("name", PATTERNS)
def test_tokens_in_any_order_see_the_same(name):
    """Places, not positions, decide; with the program of the test above."""
    order = np.random.default_rng(1).permutation(LENGTH)
    shuffled = jax.tree.map(lambda x: x[:, order], packed_place())
    attend, pattern = BACKENDS["blockwise"], PATTERNS[name]
    found = with_gradients(attend, pattern, shuffled, *(x[:, order] for x in arrays()))
    expected = with_gradients(attend, pattern, packed_place(), *arrays())
    for ours, wanted in zip(found, expected, strict=True):
        real = (packed_place().segments_BL > 0)[:, order, None, None]
        np.testing.assert_allclose(ours * real, wanted[:, order] * real, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PATTERNS)
def test_visible_is_what_a_slow_loop_says(name):
    rng = np.random.default_rng(0)

    def place(length):
        coords = rng.integers(0, 6, (2, length, 3)) / 2
        return Place(rng.integers(0, 3, (2, length)), coords.astype(np.float32), rng.integers(0, 5, (2, length)))

    q, k = place(12), place(9)
    found = visible(PATTERNS[name], *jax.tree.map(jnp.asarray, (q, k)))
    for b, i, j in np.ndindex(2, 12, 9):
        assert found[b, i, j] == seen(PATTERNS[name], *((p.segments_BL[b, x], p.coords_BL3[b, x], p.index_BL[b, x])
                                                        for p, x in ((q, i), (k, j))))  # fmt: skip


@pytest.mark.parametrize("name", PATTERNS)
def test_the_bound_of_blocks_leaves_nothing_visible_out_and_leaves_much_out(name):
    place = jax.tree.map(lambda x: jnp.asarray(x[0].reshape(12, 8, *x.shape[2:])), packed_place())
    possible = np.asarray(reachable(PATTERNS[name], place, place))
    shown = np.array([[visible(PATTERNS[name], *(jax.tree.map(lambda x, at=at: x[at], place) for at in pair)).any()
                       for pair in ((i, j) for j in range(12))] for i in range(12)])  # fmt: skip
    assert (possible | ~shown).all()
    assert (possible & ~shown).sum() <= 0.1 * possible.size


@pytest.mark.parametrize("attend", BACKENDS.values(), ids=BACKENDS)
def test_a_query_that_sees_no_key_gets_zeros(attend):
    q, k, v, probe = (x[:, :24] for x in arrays())
    one = np.ones(q.shape[:2], np.int32)
    index = np.tile(np.arange(24, dtype=np.int32), (2, 1))
    places = Places(Place(one, None, index), Place(one, None, index + 5))  # the first five see nothing
    found = quick_jit(lambda *a: jax.vjp(lambda *qkv: attend(*qkv, places, CAUSAL), *a[:3]))(q, k, v)
    out, dq, dk, dv = found[0], *found[1](probe)
    assert (
        not out[:, :5].any()
        and not dq[:, :5].any()
        and out[:, 5:].all()
        and all(map(np.isfinite, map(np.sum, (dk, dv))))
    )
    assert not dv[:, 19:].any()  # keys that no query sees


def poisoned(pattern, coords, **where):
    """(out, dq, dk, dv) by blocks of eight, the last cut, of which some of q, k and v are NaN: which are finite."""
    length = 8 * len(coords) - 3
    given = np.random.default_rng(0).standard_normal((3, 1, length, 2, 4)).astype(np.float32)
    for name, block in where.items():
        given["qkv".index(name)][:, 8 * block : 8 * block + 8] = np.nan
    coords = np.repeat(np.array(coords, np.float32), 8)[None, :length, None] * np.ones(3, np.float32)
    place = Place(np.ones((1, length), np.int32), coords, np.arange(length, dtype=np.int32)[None])
    attend = functools.partial(blockwise_attention, block=8)
    found = with_gradients(attend, pattern, place, *given, np.ones_like(given[0]))
    return [[bool(np.isfinite(x[:, at : at + 8]).all()) for at in range(0, length, 8)] for x in found]


def test_blocks_after_a_query_are_never_read_by_causal_attention():
    out, dq, _, _ = poisoned(CAUSAL, range(4), k=3, v=3)
    assert out == dq == [True, True, True, False]
    _, dq, dk, dv = poisoned(CAUSAL, range(4), q=0)
    assert dq == dk == dv == [False, True, True, True]


def test_blocks_that_are_far_are_never_read_by_nearby_attention():
    out, dq, dk, dv = poisoned(Pattern(nearby=(1, None, 1)), range(5), q=0, k=0, v=0)
    assert out == dq == [False, False, True, True, True]
    assert dk == dv == [False, False, False, True, True]  # of the queries, those of the second block are spoilt, too


def split(x, mesh, *axes):
    """An array (B, L, ...) with its length split over the mesh; `axes` names the others."""
    axes = axes or [None] * (x.ndim - 2)
    return jax.device_put(x, NamedSharding(mesh, partition("batch", "length", *axes)))


@pytest.mark.parametrize(
    "how", [("dense", "gather"), ("blockwise", "gather"), ("blockwise", "all_to_all"), ("blockwise", "ring")]
)
@pytest.mark.parametrize("name", ["causal", "nearby"])
def test_a_split_sequence_sees_what_one_device_sees(name, how):
    mesh = make_mesh(MeshConfig(data=2, sequence=4))
    with jax.set_mesh(mesh):
        attend = functools.partial(attention, how=How(*how))
        place, given = (
            jax.tree.map(lambda x: split(x, mesh), packed_place()),
            (split(x, mesh, "heads", None) for x in arrays()),
        )
        found = with_gradients(attend, PATTERNS[name], place, *given)
    real = (packed_place().segments_BL > 0)[..., None, None]
    expected = with_gradients(BACKENDS["dense"], PATTERNS[name], packed_place(), *arrays())
    for ours, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours * real, wanted * real, rtol=1e-4, atol=1e-5)


@functools.partial(quick_jit, static_argnums=(0, 1))
def tangent(attend, pattern, place, q, k, v):
    return jax.jvp(lambda *qkv: attend(*qkv, Places(place, place), pattern), (q, k, v), (v, q, k))[1]


def test_tangents_see_no_more_on_one_device_and_round_a_ring():
    pattern, real = PATTERNS["both"], (packed_place().segments_BL > 0)[..., None, None]
    expected = tangent(BACKENDS["dense"], pattern, packed_place(), *arrays()[:3])
    found = [tangent(BACKENDS["blockwise"], pattern, packed_place(), *arrays()[:3])]
    mesh = make_mesh(MeshConfig(data=2, sequence=4))
    with jax.set_mesh(mesh):
        place, given = (
            jax.tree.map(lambda x: split(x, mesh), packed_place()),
            (split(x, mesh, "heads", None) for x in arrays()[:3]),
        )
        attend = functools.partial(attention, how=How("blockwise", "ring"))
        found.append(tangent(attend, pattern, place, *given))
    for ours in found:
        np.testing.assert_allclose(ours * real, expected * real, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern, missing", [(CAUSAL, "index_BL"), (NEARBY, "coords_BL3")])
def test_a_place_without_what_a_pattern_reads_is_a_mistake(pattern, missing):
    place = packed_place()._replace(**{missing: None})
    with pytest.raises(ValueError, match=missing):
        attention(*arrays()[:3], Places(place, place), pattern)


def test_splash_knows_the_causal_pattern():
    """With gradients; and where the places of one pack are out of order, its output is no number, and only its own."""
    attend = functools.partial(splash_attention, interpret=True)
    found = with_gradients(attend, CAUSAL, packed_place(), *arrays())
    assert_each_clip_is_alone(found, functools.partial(seen, CAUSAL))
    index = packed_place().index_BL.copy()
    index[1, [3, 4]] = index[1, [4, 3]]
    out = with_gradients(attend, CAUSAL, packed_place()._replace(index_BL=index), *arrays())[0]
    np.testing.assert_array_equal(out[0], found[0][0])
    assert np.isnan(out[1]).all()


def test_what_splash_cannot_see_is_refused_in_a_sentence():
    place = packed_place()
    wrong = Places(place, place._replace(index_BL=place.index_BL[:, ::-1]))
    with pytest.raises(UserError, match="model.attention is 'splash'; a causal pattern .* take 'blockwise' or 'dense'"):
        splash_attention(*arrays()[:3], wrong, CAUSAL, interpret=True)
    with pytest.raises(UserError, match="model.attention is 'splash'; it knows no distances .* 'blockwise' or 'dense'"):
        splash_attention(*arrays()[:3], Places(place, place), NEARBY, interpret=True)


def test_cudnn_masks_what_is_not_before_and_refuses_distances(monkeypatch):
    """Another implementation stands in for it."""
    monkeypatch.setattr(kernels, "platform", lambda: "gpu")
    native = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *a, mask, implementation: native(*a, mask=mask, implementation="xla")
    )
    place = packed_place()
    half = [jnp.pad(x, [(0, 0)] * 3 + [(0, 4)]).astype(jnp.bfloat16) for x in arrays()[:3]]
    out = cudnn_attention(*half, Places(place, place), CAUSAL)
    expected = dense_attention(*half, Places(place, place), CAUSAL)
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (out, expected)), atol=0.03)
    with pytest.raises(UserError, match="model.attention is 'cudnn'; it computes all pairs .* 'blockwise' or 'dense'"):
        cudnn_attention(*half, Places(place, place), NEARBY)


def test_auto_takes_splash_on_a_tpu_for_the_full_pattern_alone(monkeypatch):
    monkeypatch.setattr(room, "platform", lambda: "tpu")
    for pattern in (CAUSAL, NEARBY):
        jax.eval_shape(
            lambda p, *qkv, pattern=pattern: attention(*qkv, Places(p, p), pattern), packed_place(), *arrays()[:3]
        )
    with pytest.raises(UserError, match="splash"):  # which this machine cannot run
        attention(*arrays()[:3], Places(packed_place(), packed_place()))


WINDOWS = {"spatial": (1, None, None), "spatiotemporal": (None, 2, 3), "all axes": (2, 3, 2)}


def window_of(coords, window):
    return tuple(int(x // size) for x, size in zip(coords, window, strict=True) if size)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_windows_are_segments_that_an_order_puts_together(window):
    place = packed_place()
    segments = np.asarray(jax.jit(window_segments, static_argnums=1)(place, window))
    order = window_order(segments)
    for b, row in enumerate(segments):
        owners = [(s, *window_of(xyz, window)) if s else 0 for s, xyz in zip(place.segments_BL[b], place.coords_BL3[b])]
        assert len(set(owners)) == len(set(row)) == len(set(zip(row.tolist(), owners)))
        assert set(row) == set(range(row.max() + 1)) and (row == 0).tolist() == [owner == 0 for owner in owners]
        sorted_ = row[order.source_BL[b]]
        real = sorted_ > 0
        assert (np.diff(sorted_[real]) >= 0).all() and not sorted_[real.sum() :].any()
        index = place.index_BL[b][order.source_BL[b]]
        assert (index[1:] > index[:-1])[(np.diff(sorted_) == 0) & real[1:]].all()
    x = arrays()[0]
    np.testing.assert_array_equal(reorder(reorder(x, order), order.inverse()), x)


@functools.partial(quick_jit, static_argnums=0)
def in_windows(window, place, q, k, v, probe):
    """(out, dq, dk, dv) of blockwise attention in window-major order, back in the order of the pack."""
    own = Place(window_segments(place, window))
    order = window_order(own.segments_BL)
    own = jax.tree.map(lambda x: reorder(x, order), own)

    def attend(q, k, v):
        q, k, v = (reorder(x, order) for x in (q, k, v))
        return reorder(BACKENDS["blockwise"](q, k, v, Places(own, own)), order.inverse())

    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(probe)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_a_window_in_a_pack_is_attended_to_as_alone(window):
    sees = lambda a, b: window_of(a[1], window) == window_of(b[1], window)  # noqa: E731
    assert_each_clip_is_alone(in_windows(window, packed_place(), *arrays()), sees)
    own = Place(window_segments(packed_place(), window))
    assert_each_clip_is_alone(with_gradients(dense_attention, FULL, own, *arrays()), sees)


def test_windows_of_a_split_sequence_are_those_of_one_device():
    window = WINDOWS["spatiotemporal"]
    mesh = make_mesh(MeshConfig(data=2, sequence=4))
    with jax.set_mesh(mesh):
        place = jax.tree.map(lambda x: split(x, mesh), packed_place())
        segments = jax.jit(window_segments, static_argnums=1)(place, window)
        moved = jax.jit(lambda x, s: reorder(x, window_order(s)))(place.coords_BL3, segments)
    np.testing.assert_array_equal(segments, window_segments(packed_place(), window))
    np.testing.assert_array_equal(moved, reorder(packed_place().coords_BL3, window_order(np.asarray(segments))))


def test_a_permutation_goes_back_by_a_permutation():
    order = window_order(packed_place().segments_BL)
    program = jax.make_jaxpr(jax.grad(lambda x: jnp.square(reorder(x, order)).sum()))(arrays()[0])
    assert "scatter" not in str(program)


@pytest.mark.parametrize("backend", BACKENDS)
def test_words_are_seen_from_all_windows_of_their_clip_and_tokens_from_their_own(backend):
    """Keys are all tokens, then five words of each of two clips, against one mask in NumPy; padding sees itself."""
    place, words = packed_place(), np.tile(np.repeat([1, 2], 5), (len(PACKS), 1)).astype(np.int32)
    windows = np.asarray(window_segments(place, (None, 2, 3)))
    own, everywhere = np.stack([windows] * 2, -1), np.stack([0 * words, 0 * words + 1000], -1)
    q = Place(place.segments_BL, windows_BL2=own)
    k = Place(np.concatenate([place.segments_BL, words], 1), windows_BL2=np.concatenate([own, everywhere], 1))
    values = [np.concatenate([x, x[:, :10] + 1], 1) for x in arrays()[1:3]]
    found = jax.jit(lambda q_, k_, v_: BACKENDS[backend](q_, k_, v_, Places(q, k), Pattern(windows=True)))
    found = np.asarray(found(arrays()[0], *values))
    same = place.segments_BL[:, :, None] == np.concatenate([place.segments_BL, words], 1)[:, None]
    mask = same & np.concatenate([windows[:, :, None] == windows[:, None], np.ones((2, LENGTH, 10), bool)], 2)
    for b in range(len(PACKS)):
        wanted = alone(mask[b], arrays()[0][b], values[0][b], values[1][b], np.zeros_like(arrays()[0][b]))[0]
        np.testing.assert_allclose(found[b], wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="windows_BL2"):
        attention(arrays()[0], *values, Places(place, place), Pattern(windows=True))


def test_more_windows_than_buckets_are_still_told_apart():
    """600 windows of a token: each sees itself alone, and a block with spoilt values spoils no other."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 600, 1, 4)).astype(np.float32)
    coords = np.stack([np.arange(600.0, dtype=np.float32)] * 3, -1)[None]
    place = Place(window_segments(Place(np.ones((1, 600), np.int32), coords), (1, 1, 1)))
    v[:, 40:80] = np.nan
    out = blockwise_attention(q, k, v, Places(place, place), block=40)
    np.testing.assert_allclose(out[:, np.r_[:40, 80:600]], v[:, np.r_[:40, 80:600]], rtol=1e-6)
    assert np.isnan(out[:, 40:80]).all()
