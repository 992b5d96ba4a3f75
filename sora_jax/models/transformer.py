"""The denoiser: DiT blocks with adaLN-Zero over packed spacetime patches of any size (2212.09748, 2307.06304)."""

import dataclasses

import jax
import jax.numpy as jnp

from sora_jax.config import check, choose
from sora_jax.models.text import TextConfig, TextContext, encode_text, text_specs
from sora_jax.nn.attention import BACKENDS, attention
from sora_jax.nn.layers import (
    compute_dtype,
    dense,
    dense_specs,
    heads_specs,
    layer_norm,
    merge_heads,
    merge_specs,
    mlp,
    mlp_specs,
    rms_norm,
    rms_norm_specs,
    time_features,
    to_heads,
)
from sora_jax.nn.pack import Pack, per_slot
from sora_jax.nn.params import normal, stack, zeros
from sora_jax.nn.positions import axis_widths, factorised_sincos, rotary_angles, rotate
from sora_jax.parallel.rules import out_sharding

TIME_FEATURES = 256
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
SIZES = {  # depth, width, heads (DiT, table 1)
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The denoiser. `patch` is (t, y, x) in latent positions; widths in channels.

    `sincos_positions` adds factorised sin-cos tables to the tokens, beside the rotary positions in every block.
    Wavelengths of both run from 2 pi to `position_theta` times as many tokens: with far longer ones than the largest
    clip most channels hardly tell its tokens apart, and a small model is slow to learn motion.
    `remat` names what the backward pass keeps: "none" everything, "dots" matrix products, "full" block inputs.
    """

    depth: int = 12
    width: int = 384
    heads: int = 6
    mlp_ratio: float = 4.0
    patch: tuple[int, int, int] = (1, 2, 2)
    latent_channels: int = 16
    position_theta: float = 10_000.0
    sincos_positions: bool = False
    text: TextConfig = TextConfig()
    attention: str = "auto"
    remat: str = "full"
    unroll: int = 1
    dtype: str = "auto"

    def __post_init__(self):
        check(
            self.width % self.heads == 0 and (self.width // self.heads) % 2 == 0,
            f"model.width is {self.width}; it must be an even multiple of model.heads = {self.heads}",
        )
        for name in ("depth", "mlp_ratio", "unroll"):
            check(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}; it must be positive")
        check(all(p > 0 for p in self.patch), f"model.patch is {self.patch}; its entries must be positive")
        check(axis_widths(self.head_width)[1] > 0, f"model.width / model.heads is {self.head_width}; at least 6")
        choose("model.attention", self.attention, {"auto": attention, **BACKENDS})
        choose("model.remat", self.remat, REMAT)
        choose("model.dtype", self.dtype, {"auto": 0, "float32": 0, "bfloat16": 0})

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def patch_values(self) -> int:
        """P, the number of values in a token."""
        pt, ph, pw = self.patch
        return pt * ph * pw * self.latent_channels


def transformer_specs(config: TransformerConfig) -> dict:
    """All parameters. Zero at the start: every modulation and gate, cross-attention's way out, the last layer."""
    width, text = config.width, config.text
    small = normal(0.02)
    return {
        "text": text_specs(text),
        "patch": dense_specs(config.patch_values, width, (None, "embed")),
        "time_in": dense_specs(TIME_FEATURES, width, (None, "hidden"), small),
        "time_out": dense_specs(width, width, ("hidden", "embed"), small),
        "pooled": dense_specs(text.width, width, (None, "embed")),
        "blocks": stack(block_specs(config), config.depth),
        "modulation": dense_specs(width, 2 * width, ("embed", None), zeros),
        "head": dense_specs(width, config.patch_values, ("embed", None), zeros),
    }


def denoise(params: dict, config: TransformerConfig, pack: Pack, x_BLP, times_BR, text: TextContext | None = None):
    """Predicts for every token of a pack, in whatever kind the model is trained for (velocity, noise...).

    x_BLP are the noisy tokens, times_BR in [0, 1] the noise level of each row, `text` the encoded captions (from
    `encode_text`; computed here when None). Returns (B, L, P) float32. A token attends to its own clip alone and
    depends on its coordinates, not on its place in the pack; with initial parameters the result is exactly 0.
    """
    dtype = compute_dtype(config.dtype)
    text = encode_text(params["text"], config.text, pack, dtype) if text is None else text
    condition_BRD = jax.nn.silu(_condition(params, pack, times_BR, text, dtype))
    rows_BLR = _one_hot(pack.rows_BL, times_BR.shape[1], dtype)
    angles_BLK = rotary_angles(pack.coords_BL3, config.head_width, config.position_theta)
    x_BLD = dense(params["patch"], x_BLP.astype(dtype), ("batch", "length", "width"))
    if config.sincos_positions:
        x_BLD += factorised_sincos(pack.coords_BL3, config.width, config.position_theta).astype(dtype)

    def layer(x_BLD, p):
        return block(p, config, x_BLD, condition_BRD, rows_BLR, angles_BLK, pack.segments_BL, text), None

    if config.remat != "none":
        layer = jax.checkpoint(layer, policy=REMAT[config.remat])
    x_BLD, _ = jax.lax.scan(layer, x_BLD, params["blocks"], unroll=config.unroll)
    with jax.named_scope("head"):
        shift, scale = _modulation(params["modulation"], condition_BRD, rows_BLR, 2)
        x_BLD = layer_norm(x_BLD) * (1 + scale) + shift
        return dense(params["head"], x_BLD, ("batch", None, None)).astype(jnp.float32)


def block_specs(config: TransformerConfig) -> dict:
    width, heads, head_width = config.width, config.heads, config.head_width
    return {
        "modulation": dense_specs(width, 6 * width, ("embed", None), zeros),
        "qkv": heads_specs(width, 3, heads, head_width),
        "q_norm": rms_norm_specs(head_width),
        "k_norm": rms_norm_specs(head_width),
        "merge": merge_specs(heads, head_width, width),
        "cross_q": heads_specs(width, 1, heads, head_width),
        "cross_kv": heads_specs(config.text.width, 2, heads, head_width),
        "cross_merge": merge_specs(heads, head_width, width, zeros),
        "mlp": mlp_specs(width, int(config.mlp_ratio * width)),
    }


def block(p, config, x_BLD, condition_BRD, rows_BLR, angles_BLK, segments_BL, text: TextContext) -> jax.Array:
    """One DiT block: modulated self-attention, cross-attention to the caption, modulated MLP; (B, L, D) -> same."""
    shift1, scale1, gate1, shift2, scale2, gate2 = _modulation(p["modulation"], condition_BRD, rows_BLR, 6)
    with jax.named_scope("self_attention"):
        q, k, v = to_heads(p["qkv"], layer_norm(x_BLD) * (1 + scale1) + shift1)
        q = rotate(rms_norm(p["q_norm"], q), angles_BLK)
        k = rotate(rms_norm(p["k_norm"], k), angles_BLK)
        out = attention(q, k, v, segments_BL, segments_BL, config.attention)
        x_BLD += gate1 * merge_heads(p["merge"], out)
    with jax.named_scope("cross_attention"):
        (q,) = to_heads(p["cross_q"], layer_norm(x_BLD))
        k, v = to_heads(p["cross_kv"], text.tokens_BME)
        out = attention(q, k, v, segments_BL, text.segments_BM, config.attention)
        x_BLD += merge_heads(p["cross_merge"], out)
    with jax.named_scope("mlp"):
        return x_BLD + gate2 * mlp(p["mlp"], layer_norm(x_BLD) * (1 + scale2) + shift2)


def _condition(params, pack: Pack, times_BR, text: TextContext, dtype) -> jax.Array:
    """Noise level plus pooled caption of each row: (B, R, D)."""
    axes = ("batch", None, None)
    features = time_features(times_BR, TIME_FEATURES).astype(dtype)
    time_BRD = dense(params["time_out"], jax.nn.silu(dense(params["time_in"], features, axes)), axes)
    pooled_BSD = dense(params["pooled"], layer_norm(text.pooled_BSE), axes)  # a mean of many words is small
    return time_BRD + per_slot(pooled_BSD, pack.row_slots_BR)


def _modulation(p: dict, condition_BRD, rows_BLR, parts: int) -> list[jax.Array]:
    """`parts` tables over rows, spread to tokens: a list of (B, L, D).

    The spread is a product with one-hot rows: a gather's gradient is a scatter, slow on every backend.
    """
    table_BRX = dense(p, condition_BRD, ("batch", None, None))
    tokens_BLX = jnp.einsum("blr,brx->blx", rows_BLR, table_BRX, out_sharding=out_sharding("batch", "length", None))
    return jnp.split(tokens_BLX, parts, axis=-1)


def _one_hot(rows_BL, rows: int, dtype) -> jax.Array:
    return (rows_BL[..., None] == jnp.arange(rows)).astype(dtype)
