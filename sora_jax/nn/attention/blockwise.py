"""Attention in blocks, of which those where nothing is visible are skipped: time follows the squares of clip lengths.

Softmax is taken online, block by block (Milakov and Gimelshein 1805.02867; Rabe and Staats 2112.05682), and the
backward pass recomputes the weights from their logarithmic sums (FlashAttention-2, 2307.08691): memory is linear in
the length. With s = q k the scaled scores of one query, lse = log sum exp s, p = exp(s - lse), o = p v:

    do = p (ds v + dv) - o (p ds),  ds = dq k + q dk                                     (1)  tangents
    dv = p' do,  ds = p (do v - o do),  dq = ds k,  dk = ds' q                           (2)  cotangents

Both are sums over keys once lse is known, so keys may come in parts, from other devices too (`sequence.ring`). (2) is
the transpose of (1), and registered with JAX as such: one rule serves reverse and forward mode.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero, linear_call

from sora_jax.nn.attention.dense import MASKED, OUTPUT
from sora_jax.nn.attention.pattern import FULL, Pattern, Place, Places, reachable, visible
from sora_jax.parallel.rules import platform

BUCKETS = 256  # segments are told apart by their remainder: exact for up to so many, never too few blocks beyond
UNSEEN = MASKED / 10  # the lse of no key: above all masked scores, whose weights are so exactly zero
PACKS = "packs"  # the name of the axis of packs that are taken side by side
NO_QUERY, NO_KEY = -2, -1  # segments of what fills up the last block


class Inputs(NamedTuple):
    """Hold what attention reads, heads first, queries scaled; without the first axis where it is of one pack."""

    q_BNLK: jax.Array
    k_BNMK: jax.Array
    v_BNMK: jax.Array
    places: Places


class Chunks(NamedTuple):
    """Attention of queries to one part of the keys, which parts add up.

    forward(inputs) -> out (B, N, L, K), lse (B, N, L), float32.
    tangent(inputs, lse, (dq, dk, dv)) -> p (ds v + dv), p ds, of equation (1), float32.
    backward(inputs, lse, o do (B, N, L), do) -> dq, dk, dv, of equation (2), float32.
    """

    forward: Callable
    tangent: Callable
    backward: Callable


def blockwise_attention(
    q_BLNK: jax.Array,
    k_BMNK: jax.Array,
    v_BMNK: jax.Array,
    places: Places,
    pattern: Pattern = FULL,
    block: int | None = None,
) -> jax.Array:
    """Compute attention with `block` tokens of queries and of keys at a time; see `attention`.

    A query that sees no key gets zeros. Arrays of one device: on a mesh call it inside `jax.shard_map`. It cannot be
    vectorised by `jax.vmap` where it is differentiated.
    """
    return chunked_attention(chunks(pattern, block), q_BLNK, k_BMNK, v_BMNK, places)


def chunked_attention(
    chunks: Chunks, q_BLNK: jax.Array, k_BMNK: jax.Array, v_BMNK: jax.Array, places: Places
) -> jax.Array:
    """Compute attention by `chunks`, with its derivatives; layouts as of `attention`."""
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BLNK * q_BLNK.shape[-1] ** -0.5, k_BMNK, v_BMNK))
    return jnp.swapaxes(_chunked(chunks, Inputs(q, k, v, places)), 1, 2)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _chunked(chunks: Chunks, inputs: Inputs) -> jax.Array:
    return chunks.forward(inputs)[0].astype(inputs.q_BNLK.dtype)


# JAX cannot derive the loops itself: their number of rounds depends on data, which reverse mode refuses, and it would
# keep the weights of every block. Symbolic zeros tell which of q, k and v move.
@functools.partial(_chunked.defjvp, symbolic_zeros=True)
def _chunked_jvp(chunks: Chunks, primals, tangents):
    (inputs,), (tangents,) = primals, tangents
    out_BNLK, lse_BNL = chunks.forward(inputs)
    out_BNLK, lse_BNL = checkpoint_name((out_BNLK.astype(inputs.q_BNLK.dtype), lse_BNL), OUTPUT)
    # Only what moves is an argument of the linear map: its transpose takes no constants among them. Places never move:
    # what is visible does not change under a small change of coordinates.
    moving = [i for i in range(3) if not isinstance(tangents[i], SymbolicZero)]

    def push(known, given):
        inputs, out_BNLK, lse_BNL = known
        given = dict(zip(moving, given, strict=True))
        tangents = tuple(given.get(i, jnp.zeros_like(inputs[i])) for i in range(3))
        moved_BNLK, total_BNL = chunks.tangent(inputs, lse_BNL, tangents)
        return (moved_BNLK - total_BNL[..., None] * out_BNLK).astype(out_BNLK.dtype)

    def pull(known, cotangent_BNLK):
        inputs, out_BNLK, lse_BNL = known
        along_BNL = jnp.einsum("bnlk,bnlk->bnl", out_BNLK, cotangent_BNLK, preferred_element_type=jnp.float32)
        cotangents = chunks.backward(inputs, lse_BNL, along_BNL, cotangent_BNLK)
        return [cotangents[i].astype(inputs[i].dtype) for i in moving]

    return out_BNLK, linear_call(push, pull, (inputs, out_BNLK, lse_BNL), [tangents[i] for i in moving])


class _Setting(NamedTuple):
    """Hold what is static: the block, whether packs are taken side by side, the pattern."""

    block: int
    together: bool
    pattern: Pattern


@functools.cache  # the same object for the same arguments: it is a static argument, by which JAX knows its programs
def chunks(pattern: Pattern = FULL, block: int | None = None) -> Chunks:
    """Return the three functions of a pattern, with blocks of that size; None: one that suits the machine."""
    return Chunks(*(functools.partial(_over_packs, one, pattern, block) for one in (_forward, _tangent, _backward)))


def _over_packs(function: Callable, pattern: Pattern, block: int | None, *arrays):
    """Call function(setting, *arrays of one pack) for all packs: side by side where there is an accelerator.

    A CPU takes them one after another, since each has its own blocks to skip. Side by side they take as many rounds as
    the one with the most blocks: rounds of its own would make a loop copy all its sums to let some of them wait.
    """
    if platform() == "cpu":
        setting = _Setting(block or 128, False, pattern)
        return jax.lax.map(lambda one: function(setting, *one), arrays)
    setting = _Setting(block or 512, True, pattern)
    return jax.vmap(functools.partial(function, setting), axis_name=PACKS)(*arrays)


class _Blocks(NamedTuple):
    """Queries, or keys and values, of one pack cut into blocks: arrays (blocks, N, block, K) or (blocks, N, block)."""

    arrays: tuple
    place: Place


def _cut(setting: _Setting, place: Place, fill: int, *arrays) -> _Blocks:
    """Cut arrays (N, L, ...) and places (L,); the last block is filled up with zeros in a segment of their own.

    Their coordinates and index are the last token's: other values would widen what `reachable` takes for visible.
    """
    length = place.segments_BL.shape[0]
    block = min(setting.block, length)
    extra = -length % block

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, extra), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)

    def cut_place(x, **how):
        return jnp.pad(x, [(0, extra), *[(0, 0)] * (x.ndim - 1)], **how).reshape(-1, block, *x.shape[1:])

    segments, *others = place
    edges = (x if x is None else cut_place(x, mode="edge") for x in others)
    return _Blocks(tuple(map(cut, arrays)), Place(cut_place(segments, constant_values=fill), *edges))


def _block(place: Place, at) -> Place:
    """Return the place of one block."""
    return jax.tree.map(lambda x: x[at], place)


def _join(x, length: int):
    """(blocks, N, block, ...) -> (N, L, ...): the inverse of a cut."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]


def _apart(pattern: Pattern, q: Place, k: Place) -> jax.Array:
    """Return which blocks of queries and keys, (X, l) and (Y, m), certainly see nothing of each other: (X, Y)."""

    def present(segments):
        return (segments[..., None] % BUCKETS == jnp.arange(BUCKETS)[None, None]).any(1).astype(jnp.float32)

    # A product of sets is quick for segments in any order. Bounds alone tell apart what has the same remainder, as the
    # segments of many windows have, where they stand in order.
    return (present(q.segments_BL) @ present(k.segments_BL).T == 0) | ~reachable(pattern, q, k)


def _partners(apart: jax.Array, together: bool):
    """Return for each row the blocks that are not apart: their numbers, those first, and how many they are.

    together: the most that any of the packs beside has; blocks that share none are masked, to exactly nothing.
    """
    count = (~apart).sum(1)
    return jnp.argsort(apart, axis=1, stable=True), jax.lax.pmax(count, PACKS) if together else count


def _weights(scores, lse_Nl):
    """Return p of equation (1), of one block of queries and one of keys."""
    return jnp.exp(scores - lse_Nl[..., None])


def _scores(pattern: Pattern, q_NlK, k_NmK, q: Place, k: Place):
    mask = jnp.where(visible(pattern, q, k), 0.0, MASKED)
    return _product("nlk,nmk->nlm", q_NlK, k_NmK) + mask[None]


def _rounds(order, count, add, sums):
    """Call `add` for the first `count` of `order`; the scope's name tells `sora-jax plan` how often that is at most."""
    with jax.named_scope(f"at_most_{order.shape[0]}"):
        return jax.lax.fori_loop(0, count, add, sums)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _forward(setting: _Setting, inputs: Inputs):
    pattern, places = setting.pattern, inputs.places
    queries = _cut(setting, places.q, NO_QUERY, inputs.q_BNLK)
    (keys, values), k_place = _cut(setting, places.k, NO_KEY, inputs.k_BNMK, inputs.v_BNMK)

    def row(_, given):
        (q,), q_place, order, count = given

        def add(i, sums):
            out, top, total = sums
            at = order[i]
            scores = _scores(pattern, q, keys[at], q_place, _block(k_place, at))
            higher = jnp.maximum(top, scores.max(-1))
            weights, kept = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
            out = out * kept[..., None] + _product("nlm,nmk->nlk", weights.astype(values.dtype), values[at])
            return out, higher, total * kept + weights.sum(-1)

        start = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:2], UNSEEN), jnp.zeros(q.shape[:2])
        out, top, total = _rounds(order, count, add, start)
        total = jnp.maximum(total, 1e-30)  # of a query that sees no key: zeros, and no division by zero
        return None, (out / total[..., None], top + jnp.log(total))

    given = *queries, *_partners(_apart(pattern, queries.place, k_place), setting.together)
    _, results = jax.lax.scan(row, None, given)
    return tuple(_join(x, inputs.q_BNLK.shape[1]) for x in results)


def _tangent(setting: _Setting, inputs: Inputs, lse_NL, tangents):
    pattern, places = setting.pattern, inputs.places
    dq_NLK, dk_NMK, dv_NMK = tangents
    queries = _cut(setting, places.q, NO_QUERY, inputs.q_BNLK, lse_NL, dq_NLK)
    cut = _cut(setting, places.k, NO_KEY, inputs.k_BNMK, inputs.v_BNMK, dk_NMK, dv_NMK)
    (keys, values, dkeys, dvalues), k_place = cut

    def row(_, given):
        (q, lse, dq), q_place, order, count = given

        def add(i, sums):
            moved, total = sums
            at = order[i]
            weights = _weights(_scores(pattern, q, keys[at], q_place, _block(k_place, at)), lse)
            dscores = weights * (_product("nlk,nmk->nlm", dq, keys[at]) + _product("nlk,nmk->nlm", q, dkeys[at]))
            moved += _product("nlm,nmk->nlk", dscores.astype(q.dtype), values[at])
            moved += _product("nlm,nmk->nlk", weights.astype(q.dtype), dvalues[at])
            return moved, total + dscores.sum(-1)

        start = jnp.zeros(q.shape, jnp.float32), jnp.zeros(q.shape[:2])
        return None, _rounds(order, count, add, start)

    given = *queries, *_partners(_apart(pattern, queries.place, k_place), setting.together)
    _, results = jax.lax.scan(row, None, given)
    return tuple(_join(x, inputs.q_BNLK.shape[1]) for x in results)


def _backward(setting: _Setting, inputs: Inputs, lse_NL, along_NL, do_NLK):
    pattern, places = setting.pattern, inputs.places
    (q, lse, along, do), q_place = _cut(setting, places.q, NO_QUERY, inputs.q_BNLK, lse_NL, along_NL, do_NLK)
    keys = _cut(setting, places.k, NO_KEY, inputs.k_BNMK, inputs.v_BNMK)

    # By columns, so that dk and dv of a block are summed where they lie; dq is carried along and added to in place.
    def column(dq, given):
        (k, v), k_place, order, count = given

        def add(i, sums):
            dq, dk, dv = sums
            at = order[i]
            weights = _weights(_scores(pattern, q[at], k, _block(q_place, at), k_place), lse[at])
            dv += _product("nlm,nlk->nmk", weights.astype(do.dtype), do[at])
            dweights = _product("nlk,nmk->nlm", do[at], v)
            dscores = (weights * (dweights - along[at][..., None])).astype(k.dtype)
            dk += _product("nlm,nlk->nmk", dscores, q[at])
            return dq.at[at].add(_product("nlm,nmk->nlk", dscores, k)), dk, dv

        start = jnp.zeros(k.shape, jnp.float32)
        dq, *given = _rounds(order, count, add, (dq, start, start))
        return dq, given

    given = *keys, *_partners(_apart(pattern, q_place, keys.place).T, setting.together)
    dq, (dk, dv) = jax.lax.scan(column, jnp.zeros(q.shape, jnp.float32), given)
    return _join(dq, inputs.q_BNLK.shape[1]), *(_join(x, inputs.k_BNMK.shape[1]) for x in (dk, dv))
