"""One `attention(q, k, v, segments)`, whatever computes it; the only room that imports attention kernels."""

import functools

import jax

from sora_jax.config import choose
from sora_jax.errors import UserError
from sora_jax.nn.attention.blockwise import blockwise_attention, chunked_attention, chunks
from sora_jax.nn.attention.dense import OUTPUT, dense_attention
from sora_jax.nn.attention.kernels import cudnn_attention, splash_attention
from sora_jax.nn.attention.sequence import all_to_all, ring
from sora_jax.parallel.rules import RULES, on_mesh, out_sharding, parts, platform, reshard

__all__ = ["BACKENDS", "OUTPUT", "SEQUENCES", "attention", "blockwise_attention", "dense_attention"]

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


def attention(
    q_BLNK, k_BMNK, v_BMNK, q_segments_BL, k_segments_BM, backend: str = "auto", sequence: str = "gather"
) -> jax.Array:
    """Softmax attention inside segments: a query sees the keys whose segment number equals its own.

    q (B, L, N, K), k and v (B, M, N, K), segments (B, L) and (B, M) of integers -> (B, L, N, K). Scores, softmax and
    its sums are float32. Vaswani et al. 2017; segments as in NaViT 2307.06304.

    backend: "dense", the reference; "blockwise", which skips what is masked; "splash" (TPU); "cudnn" (GPU); "auto"
    takes what suits the machine and the lengths. All agree to float error. sequence, where a mesh splits the length:
    "gather" brings all keys to every device; "all_to_all" and "ring" want keys that are split as the queries are;
    "auto" is all_to_all where the heads can be shared out. Dense attention gathers always, the ring takes blocks.
    """
    backend = _backend(backend, q_BLNK.shape[1] * k_BMNK.shape[1])
    function = choose("attention", backend, BACKENDS)
    with jax.named_scope(f"attention_{backend}"):
        if backend == "dense" or not on_mesh():
            return function(q_BLNK, k_BMNK, v_BMNK, q_segments_BL, k_segments_BM)
        how = _sequence(sequence, q_BLNK.shape[2])
        return _on_each_device(function, how, q_BLNK, k_BMNK, v_BMNK, q_segments_BL, k_segments_BM)


def _backend(name: str, pairs: int) -> str:
    if name != "auto":
        return name
    if platform() == "tpu":
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


def _on_each_device(function, how: str, q_BLNK, k_BMNK, v_BMNK, q_segments_BL, k_segments_BM):
    """`function` on what each device of the mesh holds: its packs and heads, and its part of the length."""
    keys = "keys" if how == "gather" else "length"
    axes = [("batch", "length", "heads", None), *[("batch", keys, "heads", None)] * 2, ("batch", "length")]
    axes.append(("batch", keys))
    arrays = (q_BLNK, k_BMNK, v_BMNK, q_segments_BL, k_segments_BM)
    arrays = (reshard(x, *names) for x, names in zip(arrays, axes, strict=True))
    if how == "all_to_all":
        function = functools.partial(all_to_all, function, RULES["length"])
    if how == "ring":
        function = functools.partial(chunked_attention, ring(chunks(), RULES["length"], parts("length")))
    specs = tuple(out_sharding(*names) for names in axes)
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)
