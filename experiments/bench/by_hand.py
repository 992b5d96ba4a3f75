"""The denoiser as one would write it for clips of one size: one clip a row, dense attention, no masks, no mesh.

Takes the parameter tree of `sora_jax.models.transformer`; attention is `jax.nn.dot_product_attention`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import dot_product_attention, gelu, silu

from sora_jax.nn.remat import REMAT


def linear(p, x):
    return x @ p["weight"].astype(x.dtype) + p["bias"].astype(x.dtype)


def heads(p, x):
    y = jnp.einsum("bld,dpnk->pblnk", x, p["weight"].astype(x.dtype))
    return y + p["bias"].astype(x.dtype)[:, None, None]


def merge(p, x):
    return jnp.einsum("blnk,nkd->bld", x, p["weight"].astype(x.dtype)) + p["bias"].astype(x.dtype)


def norm(x, eps=1e-6):
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    return (y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + eps)).astype(x.dtype)


def rotated(gain, x, cos, sin, eps=1e-6):
    y = x.astype(jnp.float32)
    a, b = jnp.split(y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + eps) * gain, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x.dtype)


def feed_forward(p, x):
    return linear(p["down"], gelu(linear(p["up"], x)))


def tables(model, grid, words):
    """Constants of a clip size: cosines and sines of the rotary angles, sin-cos positions of tokens and of words."""
    coords = np.indices(grid).reshape(3, -1).T
    space = 2 * (model.head_width // 6)
    axes = (model.head_width - 2 * space, space, space)
    turns = [coords[:, i, None] * model.position_theta ** (-np.arange(0, w, 2) / w) for i, w in enumerate(axes)]
    angles = np.concatenate(turns, 1)[:, None].astype(np.float32)
    each = 2 * (model.width // 6)
    positions = np.concatenate([waves(coords[:, i], each, model.position_theta) for i in range(3)], 1)
    positions = np.pad(positions, ((0, 0), (0, model.width - 3 * each))) * model.sincos_positions
    return np.cos(angles), np.sin(angles), positions, waves(np.arange(words), model.text.width, 100.0)


def waves(x, width, theta):
    angles = x[:, None] * theta ** (-np.arange(width // 2) / (width // 2))
    return np.concatenate([np.sin(angles), np.cos(angles)], 1).astype(np.float32)


def denoise(params, model, constants, x, times, ids, dtype):
    """Noisy tokens (B, L, P), times (B,), word ids (B, M) -> prediction (B, L, P) float32."""
    cos, sin, positions, word_positions = constants
    noisy = x

    def text_block(x, p):
        x = x + merge(p["merge"], dot_product_attention(*heads(p["qkv"], norm(x))))
        return x + feed_forward(p["mlp"], norm(x)), None

    text = (params["text"]["table"][ids] + word_positions).astype(dtype)
    text = norm(jax.lax.scan(text_block, text, params["text"]["blocks"])[0])
    angles = 1000 * times[:, None] * np.exp(-np.log(1e4) * np.arange(128) / 128).astype(np.float32)
    time = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1).astype(dtype)
    time = linear(params["time_out"], silu(linear(params["time_in"], time)))
    condition = silu(time + linear(params["pooled"], norm(text.mean(1))))[:, None]

    def block(x, p):
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(linear(p["modulation"], condition), 6, -1)
        q, k, v = heads(p["qkv"], norm(x) * (1 + scale1) + shift1)
        q, k = rotated(p["q_norm"], q, cos, sin), rotated(p["k_norm"], k, cos, sin)
        x = x + gate1 * merge(p["merge"], dot_product_attention(q, k, v))
        (q,), (k, v) = heads(p["cross_q"], norm(x)), heads(p["cross_kv"], text)
        x = x + merge(p["cross_merge"], dot_product_attention(q, k, v))
        return x + gate2 * feed_forward(p["mlp"], norm(x) * (1 + scale2) + shift2), None

    if model.remat != "none":
        block = jax.checkpoint(block, policy=REMAT[model.remat])
    x = linear(params["patch"], x.astype(dtype)) + positions.astype(dtype)
    x, _ = jax.lax.scan(block, x, params["blocks"], unroll=model.unroll)
    shift, scale = jnp.split(linear(params["modulation"], condition), 2, -1)
    y = linear(params["head"], norm(x) * (1 + scale) + shift).astype(jnp.float32)
    if not model.input_skip:
        return y
    predicted, gate = jnp.split(y, 2, -1)
    return predicted + gate * noisy
