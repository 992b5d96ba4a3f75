"""Kernels of other libraries: splash attention (TPU) and cuDNN's (NVIDIA GPUs). Call them inside `jax.shard_map`."""

import jax
import jax.numpy as jnp

from sora_jax.config import check
from sora_jax.nn.attention.blockwise import NO_KEY, NO_QUERY
from sora_jax.nn.attention.dense import OUTPUT
from sora_jax.nn.attention.pattern import FULL, Pattern, Places, visible
from sora_jax.parallel.rules import platform

OUT_OF_ORDER = (
    "a causal pattern there wants the tokens of a clip in the order of their index, the same for queries and keys, "
    "take 'blockwise' or 'dense'"
)


def splash_attention(
    q_BLNK: jax.Array,
    k_BMNK: jax.Array,
    v_BMNK: jax.Array,
    places: Places,
    pattern: Pattern = FULL,
    interpret: bool = False,
) -> jax.Array:
    """Call JAX's splash kernel with segment ids; see `attention`. `interpret` runs it without a TPU, slowly.

    Segments are masked inside the kernel, so time follows the square of the pack. The causal pattern is half of it, and
    wants queries and keys to be the same tokens, those of a clip in the order of their index: `data.packing` lays them
    so. Where the compiled program meets others, the pack's outputs are NaN. No forward-mode derivative.

    Raises UserError on another machine, for a nearby pattern, and for known places in another order.
    """
    check(interpret or platform() == "tpu", "model.attention is 'splash'; it runs on TPUs alone, take 'auto'")
    check(
        pattern.nearby is None and not pattern.windows,
        "model.attention is 'splash'; it knows no distances between tokens and no windows beside segments, "
        "take 'blockwise' or 'dense'",
    )
    queries, keys = q_BLNK.shape[1], k_BMNK.shape[1]
    if pattern.causal:
        check(queries == keys and _may_be_in_order(places), f"model.attention is 'splash'; {OUT_OF_ORDER}")
    block = next(size for size in (512, 256, 128) if size <= max(128, min(queries, keys)))
    q, k, v = (_padded(x, block) for x in (q_BLNK * q_BLNK.shape[-1] ** -0.5, k_BMNK, v_BMNK))
    q_segments = _padded(places.q.segments_BL, block, NO_QUERY)
    k_segments = _padded(places.k.segments_BL, block, NO_KEY)
    kernel = _splash(pattern.causal, q.shape[2], (q.shape[1], k.shape[1]), block, interpret)

    def one(q_LNK, k_MNK, v_MNK, q_segments_L, k_segments_M):
        from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

        heads_first = (jnp.swapaxes(x, 0, 1) for x in (q_LNK, k_MNK, v_MNK))
        return jnp.swapaxes(kernel(*heads_first, segment_ids=SegmentIds(q_segments_L, k_segments_M)), 0, 1)

    out = jax.vmap(one)(q, k, v, q_segments, k_segments)[:, :queries]
    return jnp.where(_in_order(places)[:, None, None, None], out, jnp.nan) if pattern.causal else out


def _in_order(places: Places) -> jax.Array:
    """Return which packs have the same queries and keys, and those of each clip by growing index: (B,)."""
    (q_segments, _, q_index, _), (k_segments, _, k_index, _) = places
    assert q_index is not None  # of a causal pattern, whose places have it
    same = (q_segments == k_segments) & (q_index == k_index)
    by_clip = jnp.argsort(q_segments, axis=1, stable=True)
    segments, index = (jnp.take_along_axis(x, by_clip, axis=1) for x in (q_segments, q_index))
    # All padding has index 0; what it sees is never read.
    grows = (segments[:, 1:] != segments[:, :-1]) | (index[:, 1:] > index[:, :-1]) | (segments[:, 1:] == 0)
    return same.all(1) & grows.all(1)


def _may_be_in_order(places: Places) -> bool:
    """Return False where the arrays are there to be read, and out of order; in a traced program nobody can tell."""
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(places))
    return traced or bool(_in_order(places).all())


def _splash(causal: bool, heads: int, shape: tuple[int, int], block: int, interpret: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    mask = splash.MultiHeadMask([(splash.CausalMask if causal else splash.FullMask)(shape)] * heads)
    # One backward kernel makes dq, dk and dv together: five products, where two kernels would make seven.
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, use_fused_bwd_kernel=True
    )
    return splash.make_splash_mha_single_device(
        mask, block_sizes=sizes, residual_checkpoint_name=OUTPUT, interpret=interpret
    )


def _padded(x, block: int, fill=0):
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block), *[(0, 0)] * (x.ndim - 2)], constant_values=fill)


def cudnn_attention(
    q_BLNK: jax.Array, k_BMNK: jax.Array, v_BMNK: jax.Array, places: Places, pattern: Pattern = FULL
) -> jax.Array:
    """Call cuDNN's fused attention with a mask of what is visible; see `attention`. Half precision, on NVIDIA GPUs.

    Scores are never in memory, but the mask is, (B, L, M) of bfloat16, and nothing that it masks is skipped: cuDNN can
    be given where clips begin, but JAX has no public function that does. A recomputed block runs its forward kernel
    again. UserError for a dtype, a head width, a pattern or a machine that it is not made for.
    """
    width = q_BLNK.shape[-1]
    check(platform() == "gpu", "model.attention is 'cudnn'; it runs on NVIDIA GPUs alone, take 'auto'")
    half = q_BLNK.dtype in (jnp.bfloat16, jnp.float16)
    check(half, f"model.attention is 'cudnn'; model.dtype is {q_BLNK.dtype.name}; it must be bfloat16")
    fits = width % 8 == 0 and width <= 128
    check(fits, f"model.attention is 'cudnn'; the head width is {width}; it must be a multiple of 8, at most 128")
    check(
        pattern.nearby is None,
        "model.attention is 'cudnn'; it computes all pairs of which a nearby pattern wants few, "
        "take 'blockwise' or 'dense'",
    )
    queries, keys = q_BLNK.shape[1], k_BMNK.shape[1]
    q, k, v = (_padded(x, 2) for x in (q_BLNK, k_BMNK, v_BMNK))  # its backward pass wants even lengths
    seen_BLM = visible(pattern, *places)
    mask_BNLM = jnp.pad(seen_BLM, [(0, 0), (0, queries % 2), (0, keys % 2)])[:, None]
    out = jax.nn.dot_product_attention(q, k, v, mask=mask_BNLM, implementation="cudnn")[:, :queries]
    # What a query without keys gets is cuDNN's; with a pattern it is zeros, as of all backends.
    return out if pattern == FULL else jnp.where(seen_BLM.any(-1)[..., None, None], out, 0)
