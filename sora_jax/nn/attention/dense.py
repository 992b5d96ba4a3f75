"""The reference of all attention: the whole score matrix at once."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sora_jax.parallel.rules import out_sharding, reshard

OUTPUT = "attention_output"  # for `jax.checkpoint` policies: small, and spares the backward pass the forward one
MASKED = -1e30  # finite: a token that may attend to nothing gets an average, not NaN


def dense_attention(q_BLNK, k_BMNK, v_BMNK, q_segments_BL, k_segments_BM) -> jax.Array:
    """Scores (B, N, L, M) at once; see `attention`. A query without keys gets the average of all values.

    Sums of weights divide the small result, not the large matrix: on a CPU twice as fast as softmax first.
    """
    k_BMNK, v_BMNK = (reshard(x, "batch", "keys", "heads", None) for x in (k_BMNK, v_BMNK))
    k_segments_BM = reshard(k_segments_BM, "batch", "keys")
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
