"""Blocks of W.A.L.T (`models.walt`): attention in windows, captions, MLP, and the modulation of all of them."""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.config import check
from sora_jax.models.checks import check_network
from sora_jax.models.conditioning import (
    Condition,
    low_rank_table,
    modulation_specs,
    modulation_table,
    spread_table,
)
from sora_jax.models.text import TextConfig
from sora_jax.nn.attention import How, Pattern, Place, Places, attention
from sora_jax.nn.layers import (
    layer_norm,
    mlp,
    mlp_specs,
    out_proj,
    out_proj_specs,
    qkv_proj,
    qkv_proj_specs,
    rms_norm,
    rms_norm_specs,
)
from sora_jax.nn.params import zeros
from sora_jax.nn.positions import axis_widths, rotate
from sora_jax.nn.windows import Order, reorder
from sora_jax.parallel.rules import reshard

MODULATIONS = 6  # shift, scale and gate of attention, then of the MLP
ALL_WINDOWS = np.iinfo(np.int32).max // 2
SIZES = {  # depth, width, heads (2312.06662, table 8)
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "1.3B": (40, 1408, 16),  # of the super-resolution to twice the size; that to four times has the size L
    "3B": (52, 1920, 16),  # the paper prints 9216 for the width, which has 70 billion parameters
}
KeysValues = tuple[jax.Array, jax.Array] | None  # of captions; None: not computed yet, or no captions
Trunk = Callable[[jax.Array], jax.Array]  # tokens (B, L, D) -> same


@dataclasses.dataclass(frozen=True)
class WaltConfig:
    """Configure the W.A.L.T denoiser."""

    depth: int = 12  # number of blocks, even: spatial and spatiotemporal in turn
    width: int = 384  # D, channels of a token
    heads: int = 6  # N, attention heads; width / heads must be even
    mlp_ratio: float = 4.0  # hidden width of the MLP over `width`
    patch: tuple[int, int, int] = (1, 1, 1)  # (t, y, x) latent positions in one token
    latent_channels: int = 8  # C, channels of the latents
    spatial_window: tuple[int, int] = (16, 16)  # (y, x) tokens of the windows of single frames
    spatiotemporal_window: tuple[int, int] = (8, 8)  # (y, x) tokens of the windows of all frames
    windows: bool = True  # False: blocks of both kinds attend to whole clips, as in an ablation of the paper
    image_identity: bool = True  # images pass spatiotemporal attention by the identity; False: inside its windows
    positions: tuple[int, int, int] = (5, 16, 16)  # (t, y, x) entries of the learnt tables of positions
    position_theta: float = 100.0  # rotary wavelengths run from 2 pi to this many times as many tokens
    adaln_rank: int = 2  # rank of the modulation of all blocks but the first; 0: each block has its own, of full rank
    text: TextConfig | None = TextConfig()  # text encoder, for cross-attention and, pooled, modulation; None: no text
    classes: int = 0  # number of classes; 0: none
    qk_norm: bool = True  # RMS norm of queries and keys
    self_conditioning: bool = False  # read an estimate of the clean tokens beside the noisy ones
    # Read the clip at half its rows and columns, with noise of its own level: super-resolution to twice the size.
    low_resolution: bool = False
    input_skip: bool = False  # add the noisy tokens to the prediction, times a gate for each value
    learned_variance: bool = False  # predict the variance of a step, too, between its bounds: 2 P outputs
    # What computes attention: auto, dense, blockwise, splash (TPU, but for cross-attention), cudnn (GPU).
    attention: str = "auto"
    sequence: str = "auto"  # how parts of a split sequence meet: auto, gather, all_to_all, ring
    remat: str = "full"  # activations that are recomputed in the backward pass: none, dots, attention, full
    unroll: int = 1  # pairs of blocks that one iteration of the scan over depth holds
    dtype: str = "auto"  # of the computation: float32, bfloat16; auto is bfloat16 on accelerators
    name: Literal["walt"] = "walt"  # tells this network from others in files

    def __post_init__(self):
        check_network(self)
        check(self.depth % 2 == 0, f"model.depth is {self.depth}; it must be even: blocks come in pairs")
        for name in ("spatial_window", "spatiotemporal_window", "positions"):
            value = getattr(self, name)
            check(min(value) > 0, f"model.{name} is {value}; its entries must be positive")
        even = self.patch[1] % 2 == self.patch[2] % 2 == 0
        check(
            even or not self.low_resolution,
            f"model.patch is {self.patch}; with model.low_resolution its rows and columns must be even",
        )
        check(
            self.width % self.heads == 0 and self.head_width % 2 == 0 and axis_widths(self.head_width)[1] > 0,
            f"model.width is {self.width}; it must be an even multiple, of at least 6, of model.heads = {self.heads}",
        )
        check(self.adaln_rank >= 0, f"model.adaln_rank is {self.adaln_rank}; it must be 0 (none) or more")

    @property
    def head_width(self) -> int:
        """Return the channels of an attention head."""
        return self.width // self.heads

    @property
    def positions_in_time(self) -> bool:
        """Return True: tables and rotary positions tell frames apart."""
        return True

    @property
    def guides(self) -> bool:
        """Return False: windows hold the tokens of clips alone."""
        return False

    @property
    def patch_values(self) -> int:
        """Return P, the values in a token."""
        return math.prod(self.patch) * self.latent_channels


class Windows(NamedTuple):
    """Hold windows in window-major order: the order that leads there, and what attention reads of each token."""

    order: Order
    segments_BL: jax.Array
    angles_BLK: jax.Array


class Captions(NamedTuple):
    """Hold captions, brought to the width of the network, and the places of cross-attention, see `cross_places`."""

    tokens_BMD: jax.Array
    places: Places


class Context(NamedTuple):
    """Hold what every block reads beside its tokens, all in the order of spatial windows but `spatiotemporal`.

    shared_BRX: the modulation of the first block by row, where the others add to it.
    """

    known: Condition
    shared_BRX: jax.Array | None
    spatial: Windows
    spatiotemporal: Windows
    captions: Captions | None


def cross_places(segments_BL: jax.Array, windows_BL: jax.Array, text_segments_BM: jax.Array) -> Places:
    """Return the places of tokens, and those of the keys that they read: all tokens, then all captions.

    The words of a clip belong to all of its windows.
    """
    own_BL2 = jnp.stack([windows_BL, windows_BL], axis=-1)
    nothing_BM = jnp.zeros_like(text_segments_BM)
    all_BM2 = jnp.stack([nothing_BM, nothing_BM + ALL_WINDOWS], axis=-1)
    keys = Place(_joined(segments_BL, text_segments_BM), windows_BL2=_joined(own_BL2, all_BM2))
    return Places(Place(segments_BL, windows_BL2=own_BL2), keys)


def _joined(tokens: jax.Array, words: jax.Array, *axes: str | None) -> jax.Array:
    """Concatenate what is known of tokens and words, (B, L, ...) and (B, M, ...), whole on every device."""
    axes = axes or (None,) * (tokens.ndim - 2)
    return jnp.concatenate([reshard(x, "batch", "keys", *axes) for x in (tokens, words)], axis=1)


def block_specs(config: WaltConfig) -> dict:
    """Declare the parameters of one block, without a modulation of low rank."""
    width, heads, head_width = config.width, config.heads, config.head_width
    norms = {"q_norm": rms_norm_specs(head_width), "k_norm": rms_norm_specs(head_width)} if config.qk_norm else {}
    cross = {
        "cross_q": qkv_proj_specs(width, 1, heads, head_width),
        "cross_kv": qkv_proj_specs(width, 2, heads, head_width),
        **{f"cross_{name}": spec for name, spec in norms.items()},
        "cross_merge": out_proj_specs(heads, head_width, width, zeros),
    }
    return {
        **modulation_specs(width, 0 if config.adaln_rank else MODULATIONS),
        "qkv": qkv_proj_specs(width, 3, heads, head_width),
        **norms,
        "merge": out_proj_specs(heads, head_width, width),
        **(cross if config.text else {}),
        "mlp": mlp_specs(width, int(config.mlp_ratio * width)),
    }


def block_pair(p: dict, config: WaltConfig, x_BLD: jax.Array, context: Context, keys_values: KeysValues) -> jax.Array:
    """Apply a spatial and a spatiotemporal block to tokens in the order of spatial windows, (B, L, D) -> same.

    p: the parameters of both, and the low-rank map of the first; keys_values: of captions, for both, if there are any.
    """
    spatial, joint = p["spatial"] | {"low_rank": p["low_rank"]}, p["spatiotemporal"]
    own = [None, None] if keys_values is None else [jax.tree.map(lambda x, i=i: x[i], keys_values) for i in range(2)]

    def in_frames(h_BLD: jax.Array) -> jax.Array:
        return _window_attention(spatial, config, h_BLD, context.spatial)

    def in_time(h_BLD: jax.Array) -> jax.Array:
        windows = context.spatiotemporal
        out_BLD = _window_attention(joint, config, reorder(h_BLD, windows.order), windows)
        return reorder(out_BLD, windows.order.inverse())

    x_BLD = _block(spatial, config, x_BLD, in_frames, context, own[0])
    return _block(joint, config, x_BLD, in_time, context, own[1])


def _block(
    p: dict, config: WaltConfig, x_BLD: jax.Array, attend: Trunk, context: Context, keys_values: KeysValues
) -> jax.Array:
    """Apply one block: attention in windows, cross-attention where there is text, MLP."""
    known = context.known
    if context.shared_BRX is None:
        table_BRX = modulation_table(p["modulation"], known)
    else:
        table_BRX = context.shared_BRX + low_rank_table(p["low_rank"], known)
    shift1, scale1, gate1, shift2, scale2, gate2 = spread_table(table_BRX, known, MODULATIONS)
    with jax.named_scope("self_attention"):
        x_BLD += gate1 * attend(layer_norm(x_BLD) * (1 + scale1) + shift1)
    if context.captions is not None:
        with jax.named_scope("cross_attention"):
            x_BLD += _cross_attention(p, config, x_BLD, context.captions, keys_values)
    with jax.named_scope("mlp"):
        return x_BLD + gate2 * mlp(p["mlp"], layer_norm(x_BLD) * (1 + scale2) + shift2)


def _window_attention(p: dict, config: WaltConfig, h_BLD: jax.Array, windows: Windows) -> jax.Array:
    """Attend inside windows, tokens in their order: (B, L, D) -> same."""
    q, k, v = qkv_proj(p["qkv"], h_BLD)
    q, k = (rotate(_normed(p, name, x), windows.angles_BLK) for name, x in (("q_norm", q), ("k_norm", k)))
    place = Place(windows.segments_BL)
    return out_proj(p["merge"], attention(q, k, v, Places(place, place), how=How(config.attention, config.sequence)))


def _cross_attention(
    p: dict, config: WaltConfig, x_BLD: jax.Array, captions: Captions, keys_values: KeysValues
) -> jax.Array:
    """Let every token read its spatial window and the caption of its clip, by one softmax: (B, L, D) -> same."""
    h_BLD = layer_norm(x_BLD)
    (q,) = qkv_proj(p["cross_q"], h_BLD)
    own, words = cross_keys_values(p, h_BLD), keys_values or cross_keys_values(p, captions.tokens_BMD)
    k, v = (_joined(*both, "heads", None) for both in zip(own, words, strict=True))
    how = How("auto" if config.attention == "splash" else config.attention)  # splash has no such pattern
    out = attention(_normed(p, "cross_q_norm", q), k, v, captions.places, Pattern(windows=True), how)
    return out_proj(p["cross_merge"], out)


def cross_keys_values(p: dict, x_BMD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Project tokens or words onto the keys and values (B, M, N, K) of cross-attention."""
    k, v = qkv_proj(p["cross_kv"], x_BMD)
    return _normed(p, "cross_k_norm", k), v


def _normed(p: dict, name: str, x_BLNK: jax.Array) -> jax.Array:
    """Normalise queries or keys where there is a scale."""
    return rms_norm(p[name], x_BLNK) if name in p else x_BLNK
