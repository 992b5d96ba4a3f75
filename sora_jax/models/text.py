"""The text encoder: a small transformer over packed captions, trained with the denoiser."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from sora_jax.config import check
from sora_jax.data.feeding.tokenizer import NULL
from sora_jax.nn.attention import Place, Places, attention
from sora_jax.nn.layers import (
    dense,
    dense_specs,
    embed,
    embedding_specs,
    layer_norm,
    mlp,
    mlp_specs,
    out_proj,
    out_proj_specs,
    qkv_proj,
    qkv_proj_specs,
)
from sora_jax.nn.pack import Pack
from sora_jax.nn.params import stack
from sora_jax.nn.positions import sincos


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Configure the text encoder, whose blocks stand on a learnt table or on a pretrained encoder."""

    vocabulary: int = 512  # token ids
    pretrained: str = ""  # name or folder of a `transformers` encoder that replaces the learnt table; "": none
    pretrained_width: int = 0  # width of its embeddings
    width: int = 128  # E, channels of a text token
    depth: int = 2  # number of blocks
    head_width: int = 32  # channels of an attention head

    def __post_init__(self):
        check(self.vocabulary >= 3, f"text.vocabulary is {self.vocabulary}; it must be at least 3")
        for name in ("width", "depth", "head_width"):
            check(getattr(self, name) > 0, f"text.{name} is {getattr(self, name)}; it must be positive")
        check(self.pretrained_width >= 0, f"text.pretrained_width is {self.pretrained_width}; it must not be negative")
        check(
            (self.pretrained_width > 0) == bool(self.pretrained),
            f"text.pretrained is {self.pretrained!r} and text.pretrained_width {self.pretrained_width}; "
            "give the encoder and its width, or neither",
        )
        check(
            self.width % self.head_width == 0 and self.width % 2 == 0,
            f"text.width is {self.width}; it must be even, and a multiple of text.head_width = {self.head_width}",
        )


@struct.dataclass
class TextContext:
    """Hold encoded captions: one vector per text token, their segments, and one pooled vector per clip.

    keys_values: those of the captions in a block (B, M, N, K), or in all blocks, stacked; None: not computed yet.
    """

    tokens_BME: jax.Array
    segments_BM: jax.Array
    pooled_BSE: jax.Array
    keys_values: tuple[jax.Array, jax.Array] | None = None


def text_specs(config: TextConfig) -> dict:
    """Declare all parameters of the text encoder."""
    width = config.width
    block = {
        "qkv": qkv_proj_specs(width, 3, width // config.head_width, config.head_width),
        "merge": out_proj_specs(width // config.head_width, config.head_width, width),
        "mlp": mlp_specs(width, 4 * width),
    }
    words = embedding_specs(NULL + 1 if config.pretrained else config.vocabulary, width, std=1.0)
    project = {"project": dense_specs(config.pretrained_width, width)} if config.pretrained else {}
    return {"table": words, **project, "blocks": stack(block, config.depth)}


def encode_text(params: dict, config: TextConfig, pack: Pack, dtype: jnp.dtype = jnp.float32) -> TextContext:
    """Encode the captions of all clips of the packs, each attending to itself alone: text_BM -> TextContext."""
    segments_BM = pack.text_segments_BM
    place = Place(segments_BM)
    x_BME = _words(params, config, pack)
    x_BME = (x_BME + sincos(pack.text_positions_BM, config.width, theta=100.0)).astype(dtype)

    def block(x_BME, p):
        q, k, v = qkv_proj(p["qkv"], layer_norm(x_BME))
        x_BME += out_proj(p["merge"], attention(q, k, v, Places(place, place)))
        return x_BME + mlp(p["mlp"], layer_norm(x_BME)), None

    with jax.named_scope("text_encoder"):
        x_BME, _ = jax.lax.scan(block, x_BME, params["blocks"])
        x_BME = layer_norm(x_BME)
        return TextContext(x_BME, segments_BM, _mean_per_slot(x_BME, segments_BM, pack.slots))


def _words(params: dict, config: TextConfig, pack: Pack) -> jax.Array:
    """Look text tokens up in the learnt table, or project the embeddings of the pretrained encoder to the width.

    The null caption is learnt in both cases, so that dropping a caption is one thing.
    """
    axes = ("batch", "length", "width")
    if not config.pretrained:
        return embed(params["table"], pack.text_BM, axes)
    assert pack.embeddings_BME is not None  # packs for a model with a pretrained encoder have them
    null_BME = embed(params["table"], jnp.minimum(pack.text_BM, NULL), axes)
    given_BME = dense(params["project"], pack.embeddings_BME.astype(jnp.float32), axes)
    return jnp.where(pack.text_BM[..., None] > NULL, given_BME, null_BME)


def _mean_per_slot(x_BME: jax.Array, segments_BM: jax.Array, slots: int) -> jax.Array:
    member_BMS = jax.nn.one_hot(segments_BM - 1, slots, dtype=x_BME.dtype)  # all zero for padding
    total_BSE = jnp.einsum("bms,bme->bse", member_BMS, x_BME)
    return total_BSE / jnp.maximum(member_BMS.sum(1), 1)[..., None]
