"""Attention of sequences that are split over devices; functions for inside `jax.shard_map`.

Ring attention (Liu et al. 2310.01889): every device keeps its queries, keys and values go round. All-to-all (DeepSpeed
Ulysses, 2309.14509): devices exchange parts of the sequence for heads, attend to whole sequences and exchange back.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sora_jax.nn.attention.blockwise import UNSEEN, Chunks


def all_to_all(function: Callable, axis, q_BLNK, k_BLNK, v_BLNK, q_segments_BL, k_segments_BL) -> jax.Array:
    """`function(q, k, v, q_segments, k_segments)` on whole sequences, each device with its share of the heads."""
    whole = functools.partial(jax.lax.all_to_all, axis_name=axis, split_axis=2, concat_axis=1, tiled=True)
    shared = functools.partial(jax.lax.all_to_all, axis_name=axis, split_axis=1, concat_axis=2, tiled=True)
    segments = (jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in (q_segments_BL, k_segments_BL))
    return shared(function(whole(q_BLNK), whole(k_BLNK), whole(v_BLNK), *segments))


@functools.cache
def ring(chunks: Chunks, axis, size: int) -> Chunks:
    """`chunks` on keys that lie on the `size` devices of a mesh axis; each pass ends where it began."""
    places = [(i, (i + 1) % size) for i in range(size)]

    def around(step: Callable, moving, sums):
        """`sums` after step(moving, sums) -> (moving, sums) beside every device, and `moving`, which is home again."""

        def one(carry, _):
            moving, sums = step(*carry)
            return (jax.tree.map(lambda x: jax.lax.ppermute(x, axis, places), moving), sums), None

        return jax.lax.scan(one, (moving, sums), None, length=size)[0]

    def forward(q_BNLK, k_BNMK, v_BNMK, q_segments_BL, k_segments_BM):
        def step(moving, sums):
            k, v, k_segments = moving
            out, lse = sums
            new, new_lse = chunks.forward(q_BNLK, k, v, q_segments_BL, k_segments)
            both = jnp.logaddexp(lse, new_lse)
            share, new_share = jnp.exp(lse - both)[..., None], jnp.exp(new_lse - both)[..., None]
            return moving, (out * share + new * new_share, both)

        nothing = jnp.zeros(q_BNLK.shape, jnp.float32), jnp.full(q_BNLK.shape[:3], UNSEEN)
        return around(step, (k_BNMK, v_BNMK, k_segments_BM), nothing)[1]

    def tangent(q_BNLK, k_BNMK, v_BNMK, q_segments_BL, k_segments_BM, lse_BNL, dq_BNLK, dk_BNMK, dv_BNMK):
        def step(moving, sums):
            k, v, k_segments, dk, dv = moving
            new = chunks.tangent(q_BNLK, k, v, q_segments_BL, k_segments, lse_BNL, dq_BNLK, dk, dv)
            return moving, jax.tree.map(jnp.add, sums, new)

        nothing = jnp.zeros(q_BNLK.shape, jnp.float32), jnp.zeros(q_BNLK.shape[:3])
        return around(step, (k_BNMK, v_BNMK, k_segments_BM, dk_BNMK, dv_BNMK), nothing)[1]

    def backward(q_BNLK, k_BNMK, v_BNMK, q_segments_BL, k_segments_BM, lse_BNL, along_BNL, do_BNLK):
        def step(moving, dq):
            k, v, k_segments, dk, dv = moving
            new = chunks.backward(q_BNLK, k, v, q_segments_BL, k_segments, lse_BNL, along_BNL, do_BNLK)
            dq, dk, dv = jax.tree.map(jnp.add, (dq, dk, dv), new)
            return (k, v, k_segments, dk, dv), dq

        dq, dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (q_BNLK, k_BNMK, v_BNMK))
        (*_, dk, dv), dq = around(step, (k_BNMK, v_BNMK, k_segments_BM, dk, dv), dq)
        return dq, dk, dv

    return Chunks(forward, tangent, backward)
