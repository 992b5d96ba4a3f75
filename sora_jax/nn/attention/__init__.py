"""One `attention(q, k, v, places, pattern)`, whatever computes it; the only package that imports attention kernels."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax

from sora_jax.config import choose
from sora_jax.errors import UserError
from sora_jax.nn.attention.blockwise import blockwise_attention, chunked_attention, chunks
from sora_jax.nn.attention.dense import OUTPUT, dense_attention
from sora_jax.nn.attention.kernels import cudnn_attention, splash_attention
from sora_jax.nn.attention.pattern import FULL, Pattern, Place, Places, needed, visible
from sora_jax.nn.attention.sequence import all_to_all, ring
from sora_jax.parallel.rules import RULES, on_mesh, out_sharding, parts, platform, reshard
from sora_jax.shapes import PyTree

__all__ = [
    "BACKENDS",
    "FULL",
    "OUTPUT",
    "SEQUENCES",
    "How",
    "Pattern",
    "Place",
    "Places",
    "attention",
    "blockwise_attention",
    "dense_attention",
    "visible",
]

BACKENDS = {
    "dense": dense_attention,
    "blockwise": blockwise_attention,
    "splash": splash_attention,
    "cudnn": cudnn_attention,
}
SEQUENCES = ("gather", "all_to_all", "ring")
# From so many queries x keys on blocks pay: experiments/bench/attention.py on a CPU. Elsewhere they save memory only.
BLOCKS_FROM = {"cpu": 384**2}
BLOCKS_FROM_ELSEWHERE = 1024**2


class How(NamedTuple):
    """Select what computes attention; the values of `model.attention` and `model.sequence`.

    backend: "dense", the reference; "blockwise", which skips what is masked; "splash" (TPU); "cudnn" (GPU); "auto"
    takes what suits the machine, the lengths and the pattern. All agree to float error.

    sequence, where a mesh splits the length: "gather" brings all keys to every device; "all_to_all" and "ring" want
    keys that are split as the queries are; "auto" is all_to_all where the heads can be shared out. Dense attention
    gathers always, the ring takes blocks.
    """

    backend: str = "auto"
    sequence: str = "gather"


def attention(
    q_BLNK: jax.Array,
    k_BMNK: jax.Array,
    v_BMNK: jax.Array,
    places: Places,
    pattern: Pattern = FULL,
    how: How = How(),
) -> jax.Array:
    """Compute softmax attention to what is `visible`: inside segments, all of them unless a pattern says less.

    q (B, L, N, K), k and v (B, M, N, K), places (B, L) and (B, M) -> (B, L, N, K). Scores, softmax and its sums are
    float32. With a pattern a query that sees no key gets zeros. Vaswani et al. 2017; segments as in NaViT 2307.06304.
    """
    places = needed(pattern, places)
    backend = _backend(how.backend, q_BLNK.shape[1] * k_BMNK.shape[1], pattern)
    function = functools.partial(choose("model.attention", backend, BACKENDS), pattern=pattern)
    with jax.named_scope(f"attention_{backend}"):
        if backend == "dense" or not on_mesh():
            return function(q_BLNK, k_BMNK, v_BMNK, places)
        sequence = _sequence(how.sequence, q_BLNK.shape[2])
        keys = "keys" if sequence == "gather" else "length"
        if sequence == "all_to_all":
            function = functools.partial(all_to_all, function, RULES["length"])
        if sequence == "ring":
            around = ring(chunks(pattern), RULES["length"], parts("length"))
            function = functools.partial(chunked_attention, around)
        return _on_each_device(function, keys, q_BLNK, k_BMNK, v_BMNK, places)


def _backend(name: str, pairs: int, pattern: Pattern) -> str:
    if name != "auto":
        return name
    if platform() == "tpu" and pattern == FULL:  # splash wants more of places than can be known here
        return "splash"
    return "blockwise" if pairs >= BLOCKS_FROM.get(platform(), BLOCKS_FROM_ELSEWHERE) else "dense"


def _sequence(name: str, heads: int) -> str:
    split, share = parts("length"), heads // parts("heads")
    if split == 1:
        return "gather"
    if name == "auto":
        return "ring" if share % split else "all_to_all"
    if name == "all_to_all" and share % split:
        raise UserError(
            f"model.sequence is 'all_to_all'; {share} heads cannot be shared by mesh.sequence = {split}, take 'ring'"
        )
    return name


def _on_each_device(function: Callable, keys: str, q_BLNK, k_BMNK, v_BMNK, places: Places) -> jax.Array:
    """Call `function` on what each device holds: its packs and heads, its queries, and its keys or all of them."""

    def axes(length: str, place: Place) -> PyTree:
        return jax.tree.map(lambda x: ("batch", length, *[None] * (x.ndim - 2)), place)

    arrays = q_BLNK, k_BMNK, v_BMNK, places
    heads = (("batch", length, "heads", None) for length in ("length", keys, keys))
    names: PyTree = *heads, Places(axes("length", places.q), axes(keys, places.k))
    arrays = jax.tree.map(lambda x, names: reshard(x, *names), arrays, names)
    specs = jax.tree.map(lambda _, names: out_sharding(*names), arrays, names)
    # Kernels are opaque to the type system of shardings, so no replication is checked.
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)
