"""The reference of all attention: the whole score matrix at once."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sora_jax.nn.attention.pattern import FULL, Pattern, Place, Places, visible
from sora_jax.parallel.rules import out_sharding, reshard

OUTPUT = "attention_output"  # for `jax.checkpoint` policies: small, and spares the backward pass the forward one
MASKED = -1e30  # finite: a token that may attend to nothing gets an average, not NaN


def dense_attention(
    q_BLNK: jax.Array, k_BMNK: jax.Array, v_BMNK: jax.Array, places: Places, pattern: Pattern = FULL
) -> jax.Array:
    """Compute the scores (B, N, L, M) at once; see `attention`.

    A query that sees no key gets zeros; with the full pattern, the average of all values.
    """
    k_BMNK, v_BMNK = (reshard(x, "batch", "keys", "heads", None) for x in (k_BMNK, v_BMNK))
    q_BNLK, k_BNMK, v_BNMK = (jnp.swapaxes(x, 1, 2) for x in (q_BLNK, k_BMNK, v_BMNK))
    seen_BLM = visible(pattern, places.q, _whole(places.k))
    scores_BNLM = jnp.einsum(
        "bnlk,bnmk->bnlm", q_BNLK * q_BNLK.shape[-1] ** -0.5, k_BNMK, preferred_element_type=jnp.float32
    )
    scores_BNLM += jnp.where(seen_BLM, 0.0, MASKED)[:, None]
    top_BNL1 = jax.lax.stop_gradient(scores_BNLM.max(-1, keepdims=True))
    weights_BNLM = jnp.exp(scores_BNLM - top_BNL1)
    # The sums divide the small result, not the large matrix: on a CPU this is twice as fast as softmax first.
    total_BNL1 = weights_BNLM.sum(-1, keepdims=True)
    sharding = out_sharding("batch", "heads", "length", None)
    out_BNLK = jnp.einsum("bnlm,bnmk->bnlk", weights_BNLM.astype(v_BMNK.dtype), v_BNMK, out_sharding=sharding)
    out_BNLK, total_BNL1 = checkpoint_name((out_BNLK, total_BNL1), OUTPUT)
    out_BLNK = jnp.swapaxes(out_BNLK / total_BNL1.astype(out_BNLK.dtype), 1, 2)
    return out_BLNK if pattern == FULL else jnp.where(seen_BLM.any(-1)[..., None, None], out_BLNK, 0)


def _whole(place: Place) -> Place:
    """Bring the places of all keys to every device, as the keys themselves."""
    return jax.tree.map(lambda x: reshard(x, "batch", "keys", *[None] * (x.ndim - 2)), place)
