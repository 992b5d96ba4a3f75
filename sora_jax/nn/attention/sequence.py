"""Attention of sequences that are split over devices; functions for inside `jax.shard_map`.

Ring attention (Liu et al. 2310.01889): every device keeps its queries, keys and values go round. All-to-all (DeepSpeed
Ulysses, 2309.14509): devices exchange parts of the sequence for heads, attend to whole sequences and exchange back.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sora_jax.nn.attention.blockwise import UNSEEN, Chunks, Inputs
from sora_jax.nn.attention.pattern import Places


def all_to_all(
    function: Callable, axis, q_BLNK: jax.Array, k_BLNK: jax.Array, v_BLNK: jax.Array, places: Places
) -> jax.Array:
    """Call `function(q, k, v, places)` on whole sequences, each device with its share of the heads."""
    whole = functools.partial(jax.lax.all_to_all, axis_name=axis, split_axis=2, concat_axis=1, tiled=True)
    shared = functools.partial(jax.lax.all_to_all, axis_name=axis, split_axis=1, concat_axis=2, tiled=True)
    places = jax.tree.map(lambda x: jax.lax.all_gather(x, axis, axis=1, tiled=True), places)
    return shared(function(whole(q_BLNK), whole(k_BLNK), whole(v_BLNK), places))


@functools.cache
def ring(chunks: Chunks, axis, size: int) -> Chunks:
    """Return `chunks` for keys that lie on the `size` devices of a mesh axis; each pass ends where it began.

    The places of keys go round with them, so a device skips the blocks of every part by itself.
    """
    neighbours = [(i, (i + 1) % size) for i in range(size)]

    def around(step: Callable, moving, sums):
        """Return `sums` after step(moving, sums) -> (moving, sums) on every device, and `moving`, home again."""

        def one(carry, _):
            moving, sums = step(*carry)
            return (jax.tree.map(lambda x: jax.lax.ppermute(x, axis, neighbours), moving), sums), None

        return jax.lax.scan(one, (moving, sums), None, length=size)[0]

    def keys_of(inputs: Inputs):
        return inputs.k_BNMK, inputs.v_BNMK, inputs.places.k

    def with_keys(inputs: Inputs, k_BNMK, v_BNMK, k_place) -> Inputs:
        return Inputs(inputs.q_BNLK, k_BNMK, v_BNMK, Places(inputs.places.q, k_place))

    def forward(inputs: Inputs):
        def step(moving, sums):
            out, lse = sums
            new, new_lse = chunks.forward(with_keys(inputs, *moving))
            both = jnp.logaddexp(lse, new_lse)
            share, new_share = jnp.exp(lse - both)[..., None], jnp.exp(new_lse - both)[..., None]
            return moving, (out * share + new * new_share, both)

        nothing = jnp.zeros(inputs.q_BNLK.shape, jnp.float32), jnp.full(inputs.q_BNLK.shape[:3], UNSEEN)
        return around(step, keys_of(inputs), nothing)[1]

    def tangent(inputs: Inputs, lse_BNL, tangents):
        dq_BNLK, *dkeys = tangents

        def step(moving, sums):
            keys, dkeys = moving
            new = chunks.tangent(with_keys(inputs, *keys), lse_BNL, (dq_BNLK, *dkeys))
            return moving, jax.tree.map(jnp.add, sums, new)

        nothing = jnp.zeros(inputs.q_BNLK.shape, jnp.float32), jnp.zeros(inputs.q_BNLK.shape[:3])
        return around(step, (keys_of(inputs), dkeys), nothing)[1]

    def backward(inputs: Inputs, lse_BNL, along_BNL, do_BNLK):
        # Sums of dk and dv travel with their keys: when they are home, every device has added its queries' part.
        def step(moving, dq):
            keys, *dkeys = moving
            new = chunks.backward(with_keys(inputs, *keys), lse_BNL, along_BNL, do_BNLK)
            dq, *dkeys = jax.tree.map(jnp.add, (dq, *dkeys), new)
            return (keys, *dkeys), dq

        dq, *dkeys = (jnp.zeros(x.shape, jnp.float32) for x in inputs[:3])
        (_, *dkeys), dq = around(step, (keys_of(inputs), *dkeys), dq)
        return dq, *dkeys

    return Chunks(forward, tangent, backward)
