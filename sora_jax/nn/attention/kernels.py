"""Kernels that others keep: splash attention on TPU, cuDNN's on NVIDIA GPUs; for inside `jax.shard_map`."""

import jax
import jax.numpy as jnp

from sora_jax.config import check
from sora_jax.nn.attention.blockwise import NO_KEY, NO_QUERY
from sora_jax.nn.attention.dense import OUTPUT
from sora_jax.parallel.rules import platform


def splash_attention(q_BLNK, k_BMNK, v_BMNK, q_segments_BL, k_segments_BM, interpret: bool = False) -> jax.Array:
    """JAX's splash kernel with segment ids; see `attention`. `interpret` runs it without a TPU, slowly.

    Segments are masked inside the kernel, so time follows the square of the pack. No forward-mode derivative. UserError
    on another machine.
    """
    check(interpret or platform() == "tpu", "model.attention is 'splash'; it runs on TPUs alone, take 'auto'")
    queries, keys = q_BLNK.shape[1], k_BMNK.shape[1]
    block = next(size for size in (512, 256, 128) if size <= max(128, min(queries, keys)))
    q, k, v = (_padded(x, block) for x in (q_BLNK * q_BLNK.shape[-1] ** -0.5, k_BMNK, v_BMNK))
    q_segments, k_segments = _padded(q_segments_BL, block, NO_QUERY), _padded(k_segments_BM, block, NO_KEY)
    kernel = _splash(q.shape[2], q.shape[1], k.shape[1], block, interpret)

    def one(q_LNK, k_MNK, v_MNK, q_segments_L, k_segments_M):
        from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

        heads_first = (jnp.swapaxes(x, 0, 1) for x in (q_LNK, k_MNK, v_MNK))
        return jnp.swapaxes(kernel(*heads_first, segment_ids=SegmentIds(q_segments_L, k_segments_M)), 0, 1)

    return jax.vmap(one)(q, k, v, q_segments, k_segments)[:, :queries]


def _splash(heads: int, queries: int, keys: int, block: int, interpret: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    mask = splash.MultiHeadMask([splash.FullMask((queries, keys))] * heads)
    # One backward kernel makes dq, dk and dv together: five products, where two kernels would make seven.
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, use_fused_bwd_kernel=True
    )
    return splash.make_splash_mha_single_device(
        mask, block_sizes=sizes, residual_checkpoint_name=OUTPUT, interpret=interpret
    )


def _padded(x, block: int, fill=0):
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block), *[(0, 0)] * (x.ndim - 2)], constant_values=fill)


def cudnn_attention(q_BLNK, k_BMNK, v_BMNK, q_segments_BL, k_segments_BM) -> jax.Array:
    """cuDNN's fused attention with the segments as a mask; see `attention`. Half precision, on NVIDIA GPUs.

    Scores are never in memory, but the mask is, (B, L, M) of bfloat16, and nothing that it masks is skipped: cuDNN can
    be given where clips begin, but JAX has no public function that does. A recomputed block runs its forward kernel
    again. UserError for a dtype, a head width or a machine that it is not made for.
    """
    width = q_BLNK.shape[-1]
    check(platform() == "gpu", "model.attention is 'cudnn'; it runs on NVIDIA GPUs alone, take 'auto'")
    half = q_BLNK.dtype in (jnp.bfloat16, jnp.float16)
    check(half, f"model.attention is 'cudnn'; model.dtype is {q_BLNK.dtype.name}; it must be bfloat16")
    fits = width % 8 == 0 and width <= 128
    check(fits, f"model.attention is 'cudnn'; the head width is {width}; it must be a multiple of 8, at most 128")
    queries = q_BLNK.shape[1]
    q, k, v = (_padded(x, 2) for x in (q_BLNK, k_BMNK, v_BMNK))  # its backward pass wants even lengths
    q_segments, k_segments = _padded(q_segments_BL, 2, NO_QUERY), _padded(k_segments_BM, 2, NO_KEY)
    mask_BNLM = (q_segments[:, :, None] == k_segments[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask_BNLM, implementation="cudnn")[:, :queries]
