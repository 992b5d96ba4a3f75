"""Say which activations a layer keeps for its backward pass; the others are recomputed."""

import jax

from sora_jax.nn.attention import OUTPUT

ATTENTION_KEPT = jax.checkpoint_policies.save_only_these_names(OUTPUT)
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, ATTENTION_KEPT
    ),
    "attention": ATTENTION_KEPT,
    "full": jax.checkpoint_policies.nothing_saveable,
}
