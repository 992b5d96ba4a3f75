"""One `attention(q, k, v, segments)`; the only file that may import attention kernels."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sora_jax.config import choose
from sora_jax.parallel.rules import out_sharding, parts, reshard

OUTPUT = "attention_output"  # for `jax.checkpoint` policies: small, and spares the backward pass a product
MASKED = -1e30  # finite: a token that may attend to nothing gets an average, not NaN


def attention(q_BLNK, k_BMNK, v_BMNK, q_segments_BL, k_segments_BM, backend: str = "auto") -> jax.Array:
    """Softmax attention inside segments: a query sees the keys whose segment number equals its own.

    q (B, L, N, K), k and v (B, M, N, K), segments (B, L) and (B, M) of integers -> (B, L, N, K).
    Scores, softmax and its sums are float32. Backends: "dense", "blockwise" (less memory, the same numbers to
    float error), "auto" (blockwise from 1024 queries on). Vaswani et al. 2017; segments as in NaViT 2307.06304.
    """
    k_BMNK = reshard(k_BMNK, "batch", "keys", "heads", None)
    v_BMNK = reshard(v_BMNK, "batch", "keys", "heads", None)
    k_segments_BM = reshard(k_segments_BM, "batch", "keys")
    if backend == "auto":
        backend = "blockwise" if q_BLNK.shape[1] >= 1024 else "dense"
    function = choose("attention", backend, BACKENDS)
    with jax.named_scope(f"attention_{backend}"):
        return function(q_BLNK, k_BMNK, v_BMNK, q_segments_BL, k_segments_BM)


def dense_attention(q_BLNK, k_BMNK, v_BMNK, q_segments_BL, k_segments_BM) -> jax.Array:
    """The reference: the whole score matrix (B, N, L, M) at once.

    Sums of weights divide the small result, not the large matrix: on a CPU twice as fast as softmax first.
    """
    q_BNLK, k_BNMK, v_BNMK = (jnp.swapaxes(x, 1, 2) for x in (q_BLNK, k_BMNK, v_BMNK))
    apart_BLM = q_segments_BL[:, :, None] != k_segments_BM[:, None, :]
    scores_BNLM = jnp.einsum(
        "bnlk,bnmk->bnlm", q_BNLK * q_BNLK.shape[-1] ** -0.5, k_BNMK, preferred_element_type=jnp.float32
    )
    scores_BNLM += jnp.where(apart_BLM, MASKED, 0.0)[:, None]
    top_BNL1 = jax.lax.stop_gradient(scores_BNLM.max(-1, keepdims=True))
    weights_BNLM = jnp.exp(scores_BNLM - top_BNL1)
    total_BNL1 = weights_BNLM.sum(-1, keepdims=True)
    sharding = out_sharding("batch", "heads", "length", None)
    out_BNLK = jnp.einsum("bnlm,bnmk->bnlk", weights_BNLM.astype(v_BMNK.dtype), v_BNMK, out_sharding=sharding)
    out_BNLK, total_BNL1 = checkpoint_name((out_BNLK, total_BNL1), OUTPUT)
    return jnp.swapaxes(out_BNLK / total_BNL1.astype(out_BNLK.dtype), 1, 2)


def blockwise_attention(q_BLNK, k_BMNK, v_BMNK, q_segments_BL, k_segments_BM, block: int = 256) -> jax.Array:
    """Blocks of queries one after another, recomputed in the backward pass: memory (B, N, block, M).

    A block is at most `block` queries (the largest size that divides the length and the mesh). It takes every
    n-th query, not neighbours, so that a length split over devices stays split inside each block.
    """
    length, split = q_BLNK.shape[1], parts("length")
    block = next(n for n in range(max(min(block, length), split), 0, -1) if length % n == 0 and n % split == 0)

    def blocks(x, *axes):
        shape = (x.shape[0], block, length // block, *x.shape[2:])
        x = reshard(x, "batch", "length", *axes)
        x = jnp.reshape(x, shape, out_sharding=out_sharding("batch", "length", None, *axes))
        return jnp.moveaxis(x, 2, 0)

    @jax.checkpoint
    def one(_, queries):
        return None, dense_attention(queries[0], k_BMNK, v_BMNK, queries[1], k_segments_BM)

    _, out = jax.lax.scan(one, None, (blocks(q_BLNK, "heads", None), blocks(q_segments_BL)))
    axes = out_sharding("batch", "length", "heads", None)
    return jnp.reshape(jnp.moveaxis(out, 0, 2), q_BLNK.shape, out_sharding=axes)


BACKENDS = {"dense": dense_attention, "blockwise": blockwise_attention}
