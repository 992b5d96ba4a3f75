"""Attention inside segments against Flax and JAX with a mask: one matrix of tests that every backend passes."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.errors import UserError
from sora_jax.nn.attention import (
    OUTPUT,
    How,
    Place,
    Places,
    attention,
    blockwise,
    blockwise_attention,
    dense_attention,
    kernels,
)
from sora_jax.nn.attention.kernels import splash_attention

B, L, M, N, K = 2, 24, 10, 2, 8
BACKENDS = {
    "dense": dense_attention,
    "blocks of 6": functools.partial(blockwise_attention, block=6),
    "blocks that do not divide": functools.partial(blockwise_attention, block=7),
    "one block": blockwise_attention,
}
KERNELS = BACKENDS | {"splash": functools.partial(splash_attention, interpret=True)}


def inputs(dtype=jnp.float32, seed=0):
    """q, k, v and segments: three clips and padding, of which every query finds a key."""
    rng = np.random.default_rng(seed)
    shapes = (B, L, N, K), (B, M, N, K), (B, M, N, K)
    arrays = [jnp.asarray(2 * rng.standard_normal(shape), dtype) for shape in shapes]
    queries, keys = rng.integers(0, 4, (B, L)), rng.integers(0, 4, (B, M))
    keys[:, :4] = range(4)
    return *arrays, queries.astype(np.int32), keys.astype(np.int32)


def places(queries, keys=None):
    """Places that only segments tell; the same ones for both without `keys`."""
    return Places(Place(queries), Place(queries if keys is None else keys))


def masked(q, k, v, queries, keys):
    mask = queries[:, None, :, None] == keys[:, None, None, :]
    return nn.dot_product_attention(q, k, v, mask=mask), jax.nn.dot_product_attention(q, k, v, mask=mask)


@pytest.mark.parametrize("name", KERNELS)
def test_equals_flax_and_jax_with_a_mask(name):
    q, k, v, queries, keys = inputs()
    out = KERNELS[name](q, k, v, places(queries, keys))
    for expected in masked(q, k, v, queries, keys):
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", KERNELS)
def test_gradients_equal_those_of_jax(name):
    *arrays, queries, keys = inputs()
    probe = jnp.asarray(np.random.default_rng(1).standard_normal((B, L, N, K)), jnp.float32)

    def gradient(function):
        return jax.jit(jax.grad(lambda a: (function(*a, queries, keys) * probe).sum()))(arrays)

    reference = gradient(lambda *a: masked(*a)[1])
    found = gradient(lambda *a: KERNELS[name](*a[:3], places(*a[3:])))
    for ours, expected in zip(found, reference, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, platform", [("cudnn", "gpu"), ("splash", "tpu"), ("blockwise", "gpu")])
def test_on_its_accelerator_a_kernel_equals_dense_attention_with_gradients(name, platform):
    if jax.default_backend() != platform:
        pytest.skip(f"there is no {platform} here")
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((2, 1024, 2, 64)), jnp.bfloat16) for _ in range(4)]
    segments = jnp.asarray(rng.integers(0, 3, (2, 1024)).cumsum(1) // 300)

    def both(backend, out, *qkv):
        value, pull = jax.vjp(lambda *arrays: attention(*arrays, places(segments), how=How(backend)), *qkv)
        return [x.astype(jnp.float32) for x in (value, *pull(out))]

    compiled = jax.jit(both, static_argnums=0)
    for ours, expected in zip(compiled(name, *arrays), compiled("dense", *arrays), strict=True):
        np.testing.assert_allclose(ours, expected, atol=0.02 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("name", BACKENDS)
def test_tangents_are_those_of_jax_and_transpose_to_gradients(name):
    *arrays, queries, keys = inputs()
    arrays, moves = tuple(arrays), tuple(inputs(seed=2)[:3])
    out, push = jax.linearize(lambda *a: BACKENDS[name](*a, places(queries, keys)), *arrays)
    expected = jax.jvp(lambda *a: masked(*a, queries, keys)[1], arrays, moves)
    for ours, wanted in zip((out, push(*moves)), expected, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)
    probe = jnp.asarray(np.random.default_rng(1).standard_normal((B, L, N, K)), jnp.float32)
    pulled = jax.linear_transpose(push, *arrays)(probe)
    back = sum(jnp.vdot(a, b) for a, b in zip(pulled, moves, strict=True))
    np.testing.assert_allclose(back, jnp.vdot(probe, push(*moves)), rtol=1e-4)


@pytest.mark.parametrize("other", [300, 257])
def test_blocks_without_a_common_segment_are_never_read(other):
    """Three clips in three blocks: what is not a number in one of them stays there, forwards and backwards.

    Segments 1 and 257 have the same remainder by which blocks are told apart; their range tells, too.
    """
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 24, N, K)).astype(np.float32)
    segments = np.repeat([[1, other, 2]], 8, axis=1)
    q[:, 8:16], k[:, 8:16], v[:, 8:16] = np.nan, np.nan, np.nan
    attend = lambda *a: blockwise_attention(*a, places(segments), block=8)  # noqa: E731
    for found in (attend(q, k, v), *jax.grad(lambda *a: attend(*a).sum(), (0, 1, 2))(q, k, v)):
        assert np.isnan(found[:, 8:16]).all() and np.isfinite(found[:, :8]).all() and np.isfinite(found[:, 16:]).all()


def test_an_accelerator_takes_packs_side_by_side_with_the_same_result(monkeypatch):
    """The packs have different numbers of blocks to read."""
    *arrays, queries, keys = inputs()
    queries[0], keys[0] = np.sort(queries[0]), np.sort(keys[0])

    def found():
        attend = lambda *a: jnp.sin(blockwise_attention(*a, places(queries, keys), block=6)).sum()  # noqa: E731
        return jax.value_and_grad(attend, (0, 1, 2))(*arrays), jax.jvp(attend, tuple(arrays), tuple(arrays))

    one_after_another = found()
    monkeypatch.setattr(blockwise, "platform", lambda: "gpu")
    chex.assert_trees_all_close(found(), one_after_another, rtol=1e-4, atol=1e-5)
    # A loop that ran as often as each pack asks would let some wait by a copy of all that it sums.
    total = lambda *a: blockwise_attention(*a, places(queries, keys), block=6).sum()  # noqa: E731
    gradient = jax.make_jaxpr(jax.grad(total, (0, 1, 2)))
    loops = [eqn for eqn in equations(gradient(*arrays).jaxpr) if eqn.primitive.name == "while"]
    assert loops and all(eqn.params["cond_jaxpr"].out_avals[0].shape == () for eqn in loops)


def equations(jaxpr):
    """All of a program, also inside its loops and calls."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


@pytest.mark.parametrize("name", KERNELS)
def test_other_segments_have_exactly_no_weight(name):
    q, _, v, queries, keys = inputs()
    k = jnp.ones((B, M, N, K)) * 1e3  # scores as large as can be

    def outputs_of_segment_2(v):
        out = KERNELS[name](q, k, v, places(queries, keys))
        return jnp.where((queries == 2)[..., None, None], out, 0).sum()

    slope = np.asarray(jax.grad(outputs_of_segment_2)(v))
    assert not slope[keys != 2].any() and slope[keys == 2].all()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_query_without_keys_is_finite_and_has_a_finite_gradient(name, dtype):
    *arrays, queries, keys = inputs(dtype)
    queries[:] = 9

    def total(arrays):
        return KERNELS[name](*arrays, places(queries, keys)).astype(jnp.float32).sum()

    value, gradient = jax.value_and_grad(total)(arrays)
    assert np.isfinite(value)
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in gradient)


@pytest.mark.parametrize("name", KERNELS)
def test_bfloat16_loses_no_more_than_its_rounding(name):
    q, k, v, queries, keys = inputs(jnp.bfloat16)
    out = KERNELS[name](q, k, v, places(queries, keys))
    assert out.dtype == jnp.bfloat16
    exact = masked(*(x.astype(jnp.float32) for x in (q, k, v)), queries, keys)[1]
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, rtol=2**-6, atol=2**-6 * np.abs(v).max())


@pytest.mark.parametrize("name", KERNELS)
def test_scores_of_bfloat16_are_float32(name):
    """Scores of 256 and 257, which bfloat16 cannot tell apart, weigh 1 to e."""
    q, k = jnp.bfloat16([32, 2, 0, 0]), jnp.bfloat16([[16, 0, 0, 0], [16, 1, 0, 0]])
    v = jnp.bfloat16([[0.0] * 4, [1.0] * 4])
    segments = np.ones((1, 2), np.int32)
    out = KERNELS[name](q[None, None, None], k[None, :, None], v[None, :, None], places(segments[:, :1], segments))
    np.testing.assert_allclose(np.asarray(out, np.float32), np.e / (1 + np.e), rtol=2**-6)


def test_large_scores_do_not_overflow():
    q, k, v, queries, keys = inputs()
    out = dense_attention(100 * q, 100 * k, v, places(queries, keys))
    np.testing.assert_allclose(out, masked(100 * q, 100 * k, v, queries, keys)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length, loops", [(383, False), (384, True)])
def test_auto_takes_blocks_on_a_cpu_where_they_are_faster(length, loops):
    q, one = jax.ShapeDtypeStruct((1, length, 1, 4), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)
    assert (" while[" in str(jax.make_jaxpr(attention)(q, q, q, places(one)))) == loops


def gradient_with_checkpoint(function, kept):
    """The lowered gradient of attention whose backward pass finds what is `kept`."""
    *arrays, queries, keys = inputs()
    policy = jax.checkpoint_policies.save_only_these_names(*kept)
    run = jax.checkpoint(lambda *arrays: function(*arrays, places(queries, keys)), policy=policy)
    return jax.jit(jax.grad(lambda *arrays: jnp.square(run(*arrays)).sum(), (0, 1, 2))).lower(*arrays)


@pytest.mark.parametrize("kept, products", [((), 8), ((OUTPUT,), 7)])
def test_a_checkpoint_that_keeps_the_output_repeats_one_product_less(kept, products):
    """Forward scores and values; backward scores again, values again unless kept, and four gradients."""
    assert gradient_with_checkpoint(dense_attention, kept).as_text().count("stablehlo.dot_general") == products


@pytest.mark.parametrize("kept, products", [((), 9), ((OUTPUT,), 7)])
def test_a_checkpoint_that_keeps_the_output_spares_splash_its_forward_kernel(kept, products):
    """Its kernels make two products forward and five backward; the compiler drops a kernel that nobody asks."""
    program = gradient_with_checkpoint(functools.partial(splash_attention, interpret=True), kept)
    assert program.compile().as_text().count(" dot(") == products


@pytest.mark.parametrize("backend, dtype, said", [
    ("splash", "bfloat16", "'splash'.*TPU"), ("cudnn", "bfloat16", "'cudnn'.*NVIDIA"),
])  # fmt: skip
def test_a_kernel_for_another_machine_is_refused_in_a_sentence(backend, dtype, said):
    *arrays, queries, keys = inputs(jnp.dtype(dtype))
    with pytest.raises(UserError, match=said):
        attention(*arrays, places(queries, keys), how=How(backend))


@pytest.mark.parametrize("dtype, width, said", [
    ("float32", 8, "model.dtype is float32; it must be bfloat16"),
    ("bfloat16", 20, "head width is 20.*multiple of 8"),
    ("bfloat16", 136, "head width is 136.*at most 128"),
])  # fmt: skip
def test_what_cudnn_cannot_do_is_said_before_it_fails(monkeypatch, dtype, width, said):
    monkeypatch.setattr(kernels, "platform", lambda: "gpu")
    q, one = jnp.ones((1, 8, 1, width), dtype), jnp.ones((1, 8), jnp.int32)
    with pytest.raises(UserError, match=said):
        attention(q, q, q, places(one), how=How("cudnn"))


def test_cudnn_is_given_an_even_number_of_keys_of_which_the_last_is_of_no_segment(monkeypatch):
    """Its backward pass takes no odd number; here the same function by another implementation stands in."""
    monkeypatch.setattr(kernels, "platform", lambda: "gpu")
    given = []

    def stand_in(q, k, v, mask, implementation):
        given.append((q.shape[1], k.shape[1], implementation))
        return native(q, k, v, mask=mask, implementation="xla")

    native = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    q, k, v, queries, keys = inputs(jnp.bfloat16)
    k, v, keys, q, queries = k[:, :9], v[:, :9], keys[:, :9], q[:, :23], queries[:, :23]
    out = attention(q, k, v, places(queries, keys), how=How("cudnn"))
    assert given == [(24, 10, "cudnn")]
    np.testing.assert_array_equal(out, native(q, k, v, mask=(queries[:, :, None] == keys[:, None, :])[:, None]))


def test_an_unknown_backend_is_named():
    with pytest.raises(UserError, match="model.attention is 'sparse'.*'dense'"):
        attention(*inputs()[:3], places(*inputs()[3:]), how=How("sparse"))
