"""Bring noise level, class and caption of a clip to the blocks, in the four ways of DiT (2212.09748, 3.2).

name               noise level and label                                                     a block has
adaln_zero         modulate every norm and gate every residual, closed at the start          6 D of modulation
adaln              modulate every norm                                                       4 D of modulation
cross_attention    are a sequence of two, which a cross-attention of its own reads           4 D^2 more weights
in_context         are two more tokens of the clip, taken away after the last block          nothing

All of it is kept by row of the pack's conditioning table (a clip at a noise level), so that it costs a token nothing
but a look-up. "Label" is the sum of what is known of the clip: its class, its pooled caption.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from sora_jax.models.text import TextConfig, TextContext, encode_text
from sora_jax.nn.attention import How, Place, Places, attention
from sora_jax.nn.layers import (
    dense,
    dense_specs,
    embed,
    embedding_specs,
    layer_norm,
    out_proj,
    out_proj_specs,
    qkv_proj,
    qkv_proj_specs,
    time_features,
)
from sora_jax.nn.pack import Pack, per_slot
from sora_jax.nn.params import normal, zeros
from sora_jax.parallel.rules import one_device, out_sharding, reshard

TIME_FEATURES = 256
MODULATED = {"adaln_zero": 6, "adaln": 4, "cross_attention": 0, "in_context": 0}  # widths of modulation in a block


@struct.dataclass
class Condition:
    """Hold the embeddings of noise level and label of each row, and the row of each token, as number and one-hot."""

    time_BRD: jax.Array
    label_BRD: jax.Array
    rows_BL: jax.Array
    spread_BLR: jax.Array

    @property
    def pair_BXD(self) -> jax.Array:
        """Noise levels, then labels, of all rows as a sequence: X = 2 R."""
        return jnp.concatenate([self.time_BRD, self.label_BRD], axis=1)


def condition_specs(width: int, text_width: int, classes: int, low: bool = False) -> dict:
    """Declare the embeddings of noise level, class (one more row: none) and pooled caption; 0 leaves these two out.

    low: embed the noise level of the low resolution of a clip together with that of its row.
    """
    small = normal(0.02)
    return {
        "time_in": dense_specs(TIME_FEATURES, width, (None, "hidden"), small),
        "time_out": dense_specs(width, width, ("hidden", "embed"), small),
        **({"low_time": dense_specs(TIME_FEATURES, width, (None, "hidden"), small, bias=False)} if low else {}),
        **({"classes": embedding_specs(classes + 1, width)} if classes else {}),
        **({"pooled": dense_specs(text_width, width, (None, "embed"))} if text_width else {}),
    }


def condition(params: dict, pack: Pack, number_BR: jax.Array, text: TextContext | None, dtype: jnp.dtype) -> Condition:
    """Embed noise level and label of all rows; number_BR: the noise levels as the network is shown them."""
    axes = ("batch", None, None)
    features = time_features(number_BR, TIME_FEATURES).astype(dtype)
    hidden_BRD = dense(params["time_in"], features, axes)
    if "low_time" in params:
        clean_BS = jnp.zeros_like(pack.clip_ids_BS, jnp.float32)
        low_BS = clean_BS if pack.low_times_BS is None else 1000.0 * pack.low_times_BS
        low_BSD = dense(params["low_time"], time_features(low_BS, TIME_FEATURES).astype(dtype), axes)
        hidden_BRD += per_slot(low_BSD, pack.row_slots_BR)
    time_BRD = dense(params["time_out"], jax.nn.silu(hidden_BRD), axes)
    label_BRD = jnp.zeros_like(time_BRD)
    if "classes" in params:
        table = params["classes"].astype(dtype)
        none = table.shape[0] - 1
        classes_BS = jnp.where(pack.labels_BS > 0, pack.labels_BS - 1, none)
        label_BRD += per_slot(embed(table, classes_BS, axes), pack.row_slots_BR)
    if text is not None:
        pooled_BSD = dense(params["pooled"], layer_norm(text.pooled_BSE), axes)  # a mean of many words is small
        label_BRD += per_slot(pooled_BSD, pack.row_slots_BR)
    return Condition(time_BRD, label_BRD, pack.rows_BL, jax.nn.one_hot(pack.rows_BL, number_BR.shape[1], dtype=dtype))


def step_number(times_BR: jax.Array) -> jax.Array:
    """Return 1000 t - 1, the number of a discrete step: exactly whole at its time, unlike plain float32."""
    number = 1000.0 * times_BR - 1.0
    whole = jnp.round(number)
    return jnp.where(jnp.abs(number - whole) < 1e-3, whole, number)


def modulation_specs(width: int, parts: int) -> dict:
    """Declare the layer that turns a row into `parts` shifts, scales and gates; zero at the start."""
    return {"modulation": dense_specs(width, parts * width, ("embed", None), zeros)} if parts else {}


def modulation(params: dict, condition: Condition, parts: int) -> list[jax.Array]:
    """Compute `parts` tables over rows, spread to tokens: a list of (B, L, D); of (B, 1, D) where there is one row."""
    return spread_table(modulation_table(params["modulation"], condition), condition, parts)


def modulation_table(p: dict, condition: Condition) -> jax.Array:
    """Return the shifts, scales and gates of each row, (B, R, parts * D)."""
    return dense(p, jax.nn.silu(condition.time_BRD + condition.label_BRD), ("batch", None, None))


def low_rank_specs(width: int, parts: int, rank: int) -> dict:
    """Declare the map D -> rank -> parts * D that a block adds to the modulation of the first one: AdaLN-LoRA.

    It has no biases and is zero at the start (W.A.L.T, 2312.06662, 3.3).
    """
    return {
        "down": dense_specs(width, rank, ("embed", None), bias=False),
        "up": dense_specs(rank, parts * width, (None, "embed"), zeros, bias=False),
    }


def low_rank_table(p: dict, condition: Condition) -> jax.Array:
    """Return what a block adds to the table of the first one, (B, R, parts * D)."""
    return dense(p["up"], modulation_table(p["down"], condition), ("batch", None, None))


def spread_table(table_BRX: jax.Array, condition: Condition, parts: int) -> list[jax.Array]:
    """Split a table over rows in parts and spread each to tokens: (B, L, D), or (B, 1, D) where there is one row."""
    tables = jnp.split(table_BRX, parts, axis=-1)
    if table_BRX.shape[1] == 1:
        return tables
    spread = _look_up if one_device() else _product
    return [spread(table_BRD, condition.rows_BL, condition.spread_BLR) for table_BRD in tables]


def _product(table_BRD: jax.Array, _rows_BL: jax.Array, spread_BLR: jax.Array) -> jax.Array:
    """Spread rows to tokens, (B, L, D), by a product with one-hot rows, which every mesh can split."""
    sharding = out_sharding("batch", "length", None)
    return jnp.einsum("blr,brd->bld", spread_BLR, table_BRD, out_sharding=sharding)


@jax.custom_jvp
def _look_up(table_BRD: jax.Array, rows_BL: jax.Array, _spread_BLR: jax.Array) -> jax.Array:
    """Spread rows to tokens by a gather, which fuses with what uses it.

    Its derivative is defined as the product's: that of a gather would be a scatter, which is slow.
    """
    rows = jax.vmap(lambda table, row: table.at[row].get(mode="promise_in_bounds"))(table_BRD, rows_BL)
    return reshard(rows, "batch", "length", None)


@_look_up.defjvp
def _look_up_jvp(primals, tangents):
    return _look_up(*primals), _product(tangents[0], *primals[1:])


def block_modulation(params: dict, condition: Condition, conditioning: str) -> list:
    """Return (shift, scale, gate) of attention, then of the MLP; neutral numbers where the conditioning has none."""
    parts = MODULATED[conditioning]
    if parts == 0:
        return [0.0, 0.0, 1.0] * 2
    values = modulation(params, condition, parts)
    return values if parts == 6 else [*values[:2], 1.0, *values[2:], 1.0]


def condition_cross_attention_specs(width: int, heads: int) -> dict:
    """Declare the cross-attention to noise level and label."""
    head_width = width // heads
    return {
        "pair_q": qkv_proj_specs(width, 1, heads, head_width),
        "pair_kv": qkv_proj_specs(width, 2, heads, head_width),
        "pair_merge": out_proj_specs(heads, head_width, width),
    }


def condition_cross_attention(params: dict, x_BLD: jax.Array, condition: Condition, backend: str) -> jax.Array:
    """Let every token read the noise level and the label of its own row, a sequence of two: (B, L, D) -> same."""
    rows_BL = condition.rows_BL
    rows = condition.time_BRD.shape[1]
    own_BX = jnp.broadcast_to(jnp.tile(jnp.arange(rows, dtype=rows_BL.dtype), 2), (rows_BL.shape[0], 2 * rows))
    (q,) = qkv_proj(params["pair_q"], layer_norm(x_BLD))
    k, v = qkv_proj(params["pair_kv"], condition.pair_BXD)
    places = Places(Place(rows_BL), Place(own_BX))
    return out_proj(params["pair_merge"], attention(q, k, v, places, how=How(backend)))


def caption_attention_specs(width: int, heads: int, text_width: int) -> dict:
    """Declare the cross-attention to captions; its output projection is zero at the start."""
    head_width = width // heads
    return {
        "cross_q": qkv_proj_specs(width, 1, heads, head_width),
        "cross_kv": qkv_proj_specs(text_width, 2, heads, head_width),
        "cross_merge": out_proj_specs(heads, head_width, width, zeros),
    }


def encode_captions(params: dict, config: TextConfig | None, pack: Pack, dtype: jnp.dtype) -> TextContext | None:
    """Encode the captions of all clips; None for a network without text."""
    return None if config is None else encode_text(params["text"], config, pack, dtype)


def with_keys_values(blocks: dict, text: TextContext | None) -> TextContext | None:
    """Add the keys and values of captions in every block, for a pack that is denoised many times.

    blocks: stacked parameters. Keys and values take 2 * depth * B * M * D numbers of the computation's dtype: 63 MB
    for each pack of 256 text tokens in 30 blocks of width 2,048 in bfloat16.
    """
    if text is None:
        return None
    with jax.named_scope("cross_attention"):
        keys_values = jax.vmap(lambda p: caption_keys_values(p, text))(blocks["cross_kv"])
    return dataclasses.replace(text, keys_values=keys_values)


def caption_keys_values(p: dict, text: TextContext) -> tuple[jax.Array, jax.Array]:
    """Project captions onto the keys and values (B, M, N, K) of a block."""
    k, v = qkv_proj(p, text.tokens_BME)
    return k, v


def caption_attention(p: dict, x_BLD: jax.Array, segments_BL: jax.Array, text: TextContext, backend: str) -> jax.Array:
    """Let every token read the caption of its clip: (B, L, D) -> same; `text` may hold the block's keys and values."""
    (q,) = qkv_proj(p["cross_q"], layer_norm(x_BLD))
    k, v = text.keys_values or caption_keys_values(p["cross_kv"], text)
    places = Places(Place(segments_BL), Place(text.segments_BM))
    return out_proj(p["cross_merge"], attention(q, k, v, places, how=How(backend)))


def context_segments(pack: Pack) -> jax.Array:
    """Return the segments (B, 2 R) of the two tokens that a row adds to its clip; rows of empty slots are padding."""
    slots_BR = jnp.where(per_slot(pack.clip_ids_BS, pack.row_slots_BR) > 0, pack.row_slots_BR + 1, 0)
    return jnp.tile(slots_BR, (1, 2)).astype(pack.segments_BL.dtype)
