"""Attention in blocks, of which those without a common segment are skipped: time follows the squares of clip lengths.

Softmax is taken online, block by block (Milakov and Gimelshein 1805.02867; Rabe and Staats 2112.05682), and the
backward pass makes the weights again from their logarithmic sums (FlashAttention-2, 2307.08691): memory is linear in
the length. With s = q k the scaled scores of one query, lse = log sum exp s, p = exp(s - lse), o = p v:

    do = p (ds v + dv) - o (p ds),  ds = dq k + q dk                                     (1)  tangents
    dv = p' do,  ds = p (do v - o do),  dq = ds k,  dk = ds' q                           (2)  cotangents

Both are sums over keys once lse is known, so keys may come in parts, from other devices too (`sequence.ring`). (2) is
the transpose of (1), and told to JAX as such: one rule serves reverse and forward mode.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero, linear_call

from sora_jax.nn.attention.dense import MASKED, OUTPUT
from sora_jax.parallel.rules import platform

BUCKETS = 256  # segments are told apart by their remainder: exact for up to so many, never too few blocks beyond
UNSEEN = MASKED / 10  # the lse of no key: above all masked scores, whose weights are so exactly zero
PACKS = "packs"  # the name of the axis of packs that are taken side by side
NO_QUERY, NO_KEY = -2, -1  # segments of what fills up the last block


class Chunks(NamedTuple):
    """Attention of queries to one part of the keys, which parts add up; heads first, queries scaled.

    forward(q_BNLK, k_BNMK, v_BNMK, q_segments_BL, k_segments_BM) -> out (B, N, L, K), lse (B, N, L), float32.
    tangent(the same five, lse, dq, dk, dv) -> p (ds v + dv), p ds, of equation (1), float32.
    backward(the same five, lse, o do (B, N, L), do) -> dq, dk, dv, of equation (2), float32.
    """

    forward: Callable
    tangent: Callable
    backward: Callable


def blockwise_attention(q_BLNK, k_BMNK, v_BMNK, q_segments_BL, k_segments_BM, block: int | None = None) -> jax.Array:
    """See `attention`; `block` tokens of queries and of keys at a time. A query without keys gets zeros.

    Arrays of one device: on a mesh call it inside `jax.shard_map`. It cannot be vectorised by `jax.vmap` where it is
    differentiated.
    """
    return chunked_attention(chunks(block), q_BLNK, k_BMNK, v_BMNK, q_segments_BL, k_segments_BM)


def chunked_attention(chunks: Chunks, q_BLNK, k_BMNK, v_BMNK, q_segments_BL, k_segments_BM) -> jax.Array:
    """Attention made of `chunks`, with its derivatives; layouts as of `attention`."""
    q_BNLK, k_BNMK, v_BNMK = (jnp.swapaxes(x, 1, 2) for x in (q_BLNK * q_BLNK.shape[-1] ** -0.5, k_BMNK, v_BMNK))
    return jnp.swapaxes(_chunked(chunks, q_BNLK, k_BNMK, v_BNMK, q_segments_BL, k_segments_BM), 1, 2)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _chunked(chunks: Chunks, *inputs) -> jax.Array:
    return chunks.forward(*inputs)[0].astype(inputs[0].dtype)


@functools.partial(_chunked.defjvp, symbolic_zeros=True)
def _chunked_jvp(chunks: Chunks, inputs, tangents):
    out_BNLK, lse_BNL = chunks.forward(*inputs)
    out_BNLK, lse_BNL = checkpoint_name((out_BNLK.astype(inputs[0].dtype), lse_BNL), OUTPUT)
    # Only what moves is an argument of the linear map: its transpose takes no constants among them.
    moving = [i for i in range(3) if not isinstance(tangents[i], SymbolicZero)]

    def push(known, given):
        *inputs, out_BNLK, lse_BNL = known
        given = dict(zip(moving, given, strict=True))
        tangents = (given.get(i, jnp.zeros_like(inputs[i])) for i in range(3))
        moved_BNLK, total_BNL = chunks.tangent(*inputs, lse_BNL, *tangents)
        return (moved_BNLK - total_BNL[..., None] * out_BNLK).astype(out_BNLK.dtype)

    def pull(known, cotangent_BNLK):
        *inputs, out_BNLK, lse_BNL = known
        along_BNL = jnp.einsum("bnlk,bnlk->bnl", out_BNLK, cotangent_BNLK, preferred_element_type=jnp.float32)
        cotangents = chunks.backward(*inputs, lse_BNL, along_BNL, cotangent_BNLK)
        return [cotangents[i].astype(inputs[i].dtype) for i in moving]

    return out_BNLK, linear_call(push, pull, (*inputs, out_BNLK, lse_BNL), [tangents[i] for i in moving])


@functools.cache
def chunks(block: int | None = None) -> Chunks:
    """The three functions with blocks of that size; None: one that suits the machine."""
    return Chunks(*(functools.partial(_over_packs, one, block) for one in (_forward, _tangent, _backward)))


def _over_packs(function: Callable, block: int | None, *arrays):
    """function(block, *arrays of one pack) over the packs: side by side where there is an accelerator.

    A CPU takes them one after another, since each has its own blocks to skip. Side by side they take as many rounds as
    the one with the most blocks: rounds of its own would make a loop copy all its sums to let some of them wait.
    """
    if platform() == "cpu":
        return jax.lax.map(lambda one: function(block or 128, False, *one), arrays)
    return jax.vmap(functools.partial(function, block or 512, True), axis_name=PACKS)(*arrays)


class _Blocks(NamedTuple):
    """Queries, or keys and values, of one pack cut into blocks: arrays (blocks, N, block, K) or (blocks, N, block)."""

    arrays: tuple
    segments: jax.Array


def _cut(block: int, segments_L, fill: int, *arrays) -> _Blocks:
    """Arrays (N, L, ...) and segments (L,) in blocks; the last is filled up with zeros in a segment of their own."""
    length = segments_L.shape[0]
    block = min(block, length)
    extra = -length % block

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, extra), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)

    segments = jnp.pad(segments_L, (0, extra), constant_values=fill).reshape(-1, block)
    return _Blocks(tuple(map(cut, arrays)), segments)


def _join(x, length: int):
    """(blocks, N, block, ...) -> (N, L, ...): the inverse of a cut."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]


def _partners(of: jax.Array, among: jax.Array, together: bool):
    """For each block of segments the blocks that may share one: their numbers, those first, and how many they are.

    together: the most that any of the packs beside has; blocks that share none are masked, to exactly nothing.
    """

    def present(segments):
        return (segments[..., None] % BUCKETS == jnp.arange(BUCKETS)).any(1).astype(jnp.float32)

    apart = present(of) @ present(among).T == 0
    count = (~apart).sum(1)
    return jnp.argsort(apart, axis=1, stable=True), jax.lax.pmax(count, PACKS) if together else count


def _weights(q_NlK, k_NmK, q_segments, k_segments, lse_Nl):
    """p of equation (1), of one block of queries and one of keys."""
    return jnp.exp(_scores(q_NlK, k_NmK, q_segments, k_segments) - lse_Nl[..., None])


def _scores(q_NlK, k_NmK, q_segments, k_segments):
    mask = jnp.where(q_segments[:, None] == k_segments[None, :], 0.0, MASKED)
    return _product("nlk,nmk->nlm", q_NlK, k_NmK) + mask


def _rounds(order, count, add, sums):
    """`add` for the first `count` of `order`; the scope's name tells `sora-jax plan` how often that is at most."""
    with jax.named_scope(f"at_most_{order.shape[0]}"):
        return jax.lax.fori_loop(0, count, add, sums)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _forward(block, together, q_NLK, k_NMK, v_NMK, q_segments_L, k_segments_M):
    queries = _cut(block, q_segments_L, NO_QUERY, q_NLK)
    (keys, values), k_segments = _cut(block, k_segments_M, NO_KEY, k_NMK, v_NMK)

    def row(_, given):
        (q,), q_segments, order, count = given

        def add(i, sums):
            out, top, total = sums
            at = order[i]
            scores = _scores(q, keys[at], q_segments, k_segments[at])
            higher = jnp.maximum(top, scores.max(-1))
            weights, kept = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
            out = out * kept[..., None] + _product("nlm,nmk->nlk", weights.astype(values.dtype), values[at])
            return out, higher, total * kept + weights.sum(-1)

        start = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:2], UNSEEN), jnp.zeros(q.shape[:2])
        out, top, total = _rounds(order, count, add, start)
        total = jnp.maximum(total, 1e-30)
        return None, (out / total[..., None], top + jnp.log(total))

    given = *queries, *_partners(queries.segments, k_segments, together)
    _, results = jax.lax.scan(row, None, given)
    return tuple(_join(x, q_NLK.shape[1]) for x in results)


def _tangent(block, together, q_NLK, k_NMK, v_NMK, q_segments_L, k_segments_M, lse_NL, dq_NLK, dk_NMK, dv_NMK):
    queries = _cut(block, q_segments_L, NO_QUERY, q_NLK, lse_NL, dq_NLK)
    (keys, values, dkeys, dvalues), k_segments = _cut(block, k_segments_M, NO_KEY, k_NMK, v_NMK, dk_NMK, dv_NMK)

    def row(_, given):
        (q, lse, dq), q_segments, order, count = given

        def add(i, sums):
            moved, total = sums
            at = order[i]
            weights = _weights(q, keys[at], q_segments, k_segments[at], lse)
            dscores = weights * (_product("nlk,nmk->nlm", dq, keys[at]) + _product("nlk,nmk->nlm", q, dkeys[at]))
            moved += _product("nlm,nmk->nlk", dscores.astype(q.dtype), values[at])
            moved += _product("nlm,nmk->nlk", weights.astype(q.dtype), dvalues[at])
            return moved, total + dscores.sum(-1)

        start = jnp.zeros(q.shape, jnp.float32), jnp.zeros(q.shape[:2])
        return None, _rounds(order, count, add, start)

    given = *queries, *_partners(queries.segments, k_segments, together)
    _, results = jax.lax.scan(row, None, given)
    return tuple(_join(x, q_NLK.shape[1]) for x in results)


def _backward(block, together, q_NLK, k_NMK, v_NMK, q_segments_L, k_segments_M, lse_NL, along_NL, do_NLK):
    (q, lse, along, do), q_segments = _cut(block, q_segments_L, NO_QUERY, q_NLK, lse_NL, along_NL, do_NLK)
    keys = _cut(block, k_segments_M, NO_KEY, k_NMK, v_NMK)

    def column(dq, given):
        (k, v), k_segments, order, count = given

        def add(i, sums):
            dq, dk, dv = sums
            at = order[i]
            weights = _weights(q[at], k, q_segments[at], k_segments, lse[at])
            dv += _product("nlm,nlk->nmk", weights.astype(do.dtype), do[at])
            dweights = _product("nlk,nmk->nlm", do[at], v)
            dscores = (weights * (dweights - along[at][..., None])).astype(k.dtype)
            dk += _product("nlm,nlk->nmk", dscores, q[at])
            return dq.at[at].add(_product("nlm,nmk->nlk", dscores, k)), dk, dv

        start = jnp.zeros(k.shape, jnp.float32)
        dq, *given = _rounds(order, count, add, (dq, start, start))
        return dq, given

    given = *keys, *_partners(keys.segments, q_segments, together)
    dq, (dk, dv) = jax.lax.scan(column, jnp.zeros(q.shape, jnp.float32), given)
    return _join(dq, q_NLK.shape[1]), *(_join(x, k_NMK.shape[1]) for x in (dk, dv))
