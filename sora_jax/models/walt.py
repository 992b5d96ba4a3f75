"""W.A.L.T: a denoiser with attention in windows, spatial and spatiotemporal in turn (2312.06662), over packs of clips.

Blocks come in pairs. The first of a pair attends inside spatial windows, 1 x h x w of a frame; the second inside
spatiotemporal ones, all frames x h' x w'. Clips that windows do not divide have smaller ones at their lower and right
edges. An image passes the second attention by the identity: each token reads itself alone, so it gets its own value.

What the paper leaves open, or was made for clips of one size:

- Positions inside windows are rotary, where the paper has Swin's table of biases: a product of rotated queries and keys
  depends on their distance alone, too, needs no parameters, and every kernel of attention computes it. A bias would
  have to be gathered for each pair of tokens, since a pack has no fixed grid of windows.
- The tables of positions are stretched over the plane of each clip by linear interpolation, which is how the paper goes
  from square clips to 9:16; a clip of the table's own size reads its entries. In time frame i reads entry i, so that an
  image reads the first one as in the paper; only clips with more frames than entries are squeezed.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.config import check, choose
from sora_jax.data.packing.packs import token_counts
from sora_jax.models.conditioning import (
    Condition,
    condition,
    condition_specs,
    low_rank_specs,
    low_rank_table,
    modulation_specs,
    modulation_table,
    spread_table,
)
from sora_jax.models.counting import text_lengths, used_rows, weights
from sora_jax.models.head import head_specs, predict
from sora_jax.models.text import TextConfig, TextContext, encode_text, text_specs
from sora_jax.models.transformer import REMAT
from sora_jax.nn.attention import BACKENDS, SEQUENCES, How, Pattern, Place, Places, attention
from sora_jax.nn.layers import (
    compute_dtype,
    dense,
    dense_specs,
    embedding_specs,
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
from sora_jax.nn.pack import Pack, per_slot, slot_of
from sora_jax.nn.params import stack, zeros
from sora_jax.nn.positions import axis_widths, interpolated, rotary_angles, rotate
from sora_jax.nn.windows import Order, apart, reorder, window_order, window_segments
from sora_jax.parallel.rules import reshard

MODULATIONS = 6  # shift, scale and gate of attention, then of the MLP
ALL_WINDOWS = np.iinfo(np.int32).max // 2
SIZES = {  # depth, width, heads (2312.06662, table 8)
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "3B": (52, 1920, 16),  # the paper prints 9216 for the width, which has 70 billion parameters
}


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
    image_identity: bool = True  # images pass spatiotemporal attention by the identity; False: inside its windows
    positions: tuple[int, int, int] = (5, 16, 16)  # (t, y, x) entries of the learnt tables of positions
    position_theta: float = 100.0  # rotary wavelengths run from 2 pi to this many times as many tokens
    adaln_rank: int = 2  # rank of the modulation of all blocks but the first; 0: each block has its own, of full rank
    text: TextConfig | None = TextConfig()  # text encoder, for cross-attention and, pooled, modulation; None: no text
    classes: int = 0  # number of classes; 0: none
    qk_norm: bool = True  # RMS norm of queries and keys
    self_conditioning: bool = False  # read an estimate of the clean tokens beside the noisy ones
    input_skip: bool = False  # add the noisy tokens to the prediction, times a gate for each value
    learned_variance: bool = False  # predict the variance of a step, too, between its bounds: 2 P outputs
    attention: str = "auto"  # what computes attention: auto, dense, blockwise, splash (TPU), cudnn (GPU)
    sequence: str = "auto"  # how parts of a split sequence meet: auto, gather, all_to_all, ring
    remat: str = "full"  # activations that are recomputed in the backward pass: none, dots, attention, full
    unroll: int = 1  # pairs of blocks that one iteration of the scan over depth holds
    dtype: str = "auto"  # of the computation: float32, bfloat16; auto is bfloat16 on accelerators
    name: Literal["walt"] = "walt"  # tells this network from others in files

    def __post_init__(self):
        for name in ("depth", "width", "heads", "latent_channels", "unroll"):
            check(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}; it must be positive")
        check(self.depth % 2 == 0, f"model.depth is {self.depth}; it must be even: blocks come in pairs")
        for name in ("mlp_ratio", "position_theta"):
            value = getattr(self, name)
            check(0 < value < math.inf, f"model.{name} is {value}; it must be positive and finite")
        for name in ("patch", "spatial_window", "spatiotemporal_window", "positions"):
            value = getattr(self, name)
            check(min(value) > 0, f"model.{name} is {value}; its entries must be positive")
        check(
            self.width % self.heads == 0 and self.head_width % 2 == 0 and axis_widths(self.head_width)[1] > 0,
            f"model.width is {self.width}; it must be an even multiple, of at least 6, of model.heads = {self.heads}",
        )
        for name in ("adaln_rank", "classes"):
            check(getattr(self, name) >= 0, f"model.{name} is {getattr(self, name)}; it must be 0 (none) or more")
        choose("model.attention", self.attention, {"auto": attention, **BACKENDS})
        choose("model.sequence", self.sequence, dict.fromkeys(("auto", *SEQUENCES)))
        choose("model.remat", self.remat, REMAT)
        choose("model.dtype", self.dtype, {"auto": 0, "float32": 0, "bfloat16": 0})

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def positions_in_time(self) -> bool:
        """True: tables and rotary positions tell frames apart."""
        return True

    @property
    def guides(self) -> bool:
        """False: windows hold the tokens of clips alone."""
        return False

    @property
    def patch_values(self) -> int:
        """The number P of values in a token."""
        return math.prod(self.patch) * self.latent_channels


def denoiser_specs(config: WaltConfig) -> dict:
    """Declare all parameters.

    Zero at the start are every modulation and gate, the output projection of cross-attention, and the last layer.
    `modulation_1` is that of the first block, to which the others add a map of low rank: those of the first blocks of
    all later pairs are `low_rank`, those of the second blocks stand in `blocks`.
    """
    width, text, rank, pairs = config.width, config.text, config.adaln_rank, config.depth // 2
    frames, rows, columns = config.positions
    low_rank = low_rank_specs(width, MODULATIONS, rank) if rank else {}
    spatial, spatiotemporal = block_specs(config), block_specs(config)
    if rank:
        spatiotemporal["low_rank"] = low_rank
    return {
        **({"text": text_specs(text), "captions": dense_specs(text.width, width, (None, "embed"))} if text else {}),
        "patch": dense_specs(config.patch_values * (1 + config.self_conditioning), width, (None, "embed")),
        "positions": {"time": embedding_specs(frames, width), "plane": embedding_specs(rows * columns, width)},
        **condition_specs(width, text.width if text else 0, config.classes),
        **({"modulation_1": modulation_specs(width, MODULATIONS)["modulation"]} if rank else {}),
        **({"low_rank": stack(low_rank, pairs - 1)} if rank and pairs > 1 else {}),
        "blocks": stack({"spatial": spatial, "spatiotemporal": spatiotemporal}, pairs),
        **head_specs(config),
    }


def encode_condition(params: dict, config: WaltConfig, pack: Pack) -> TextContext | None:
    """Encode what does not change while a pack is denoised: captions, with their keys and values in every block.

    Keys and values are stacked by pair, then by block of the pair. None for a model without text.
    """
    text = _encode_captions(params, config, pack)
    if text is None:
        return None
    both = (params["blocks"][kind] for kind in ("spatial", "spatiotemporal"))
    with jax.named_scope("cross_attention"):
        found = [jax.vmap(lambda p: _cross_keys_values(p, text.tokens_BME))(blocks) for blocks in both]
    keys, values = (jnp.stack(parts, axis=1) for parts in zip(*found, strict=True))
    return dataclasses.replace(text, keys_values=(keys, values))


def _encode_captions(params: dict, config: WaltConfig, pack: Pack) -> TextContext | None:
    """Encode captions and bring their tokens to the width of the network: cross-attention reads both by one map."""
    if config.text is None:
        return None
    text = encode_text(params["text"], config.text, pack, compute_dtype(config.dtype))
    tokens_BMD = dense(params["captions"], text.tokens_BME, ("batch", "length", "width"))
    return dataclasses.replace(text, tokens_BME=layer_norm(tokens_BMD))


Trunk = Callable[[jax.Array], jax.Array]  # all blocks: tokens (B, L, D) -> same


def trunk_zeros(config: WaltConfig, pack: Pack) -> jax.Array:
    """Return zeros with the shape, dtype and sharding of the tokens (B, L, D) that the blocks work on."""
    zero_BLD = jnp.zeros((*pack.segments_BL.shape, config.width), compute_dtype(config.dtype))
    return reshard(zero_BLD, "batch", "length", "width")


class Windows(NamedTuple):
    """Hold windows in window-major order: the order that leads there, and what attention reads of each token."""

    order: Order
    segments_BL: jax.Array
    angles_BLK: jax.Array


class Context(NamedTuple):
    """Hold what every block reads beside its tokens, all in the order of spatial windows but `spatiotemporal`.

    shared_BRX: the modulation of the first block by row, where the others add to it. places: of cross-attention.
    """

    known: Condition
    shared_BRX: jax.Array | None
    spatial: Windows
    spatiotemporal: Windows
    text: TextContext | None
    places: Places | None


def denoise(
    params: dict,
    config: WaltConfig,
    pack: Pack,
    x_BLP: jax.Array,
    times_BR: jax.Array,
    text: TextContext | None = None,
    run_trunk: Callable[[Trunk, jax.Array], jax.Array] | None = None,
    previous_BLP: jax.Array | None = None,
) -> jax.Array:
    """Predict the target of every token of a pack, as `transformer.denoise` does.

    previous_BLP: with `self_conditioning`, an estimate of the clean tokens; None: there is none, as at the first step.
    """
    dtype = compute_dtype(config.dtype)
    text = _encode_captions(params, config, pack) if text is None else text
    known = condition(params, pack, 1000.0 * times_BR, text, dtype)
    if config.self_conditioning:
        previous_BLP = jnp.zeros_like(x_BLP) if previous_BLP is None else previous_BLP.astype(x_BLP.dtype)
        x_BLQ = jnp.concatenate([x_BLP, previous_BLP], axis=-1)
    else:
        x_BLQ = x_BLP
    x_BLD = dense(params["patch"], x_BLQ.astype(dtype), ("batch", "length", "width"))
    x_BLD += _positions(params["positions"], config, pack).astype(dtype)
    context = _context(params, config, pack, known, text)
    layers = params["blocks"], _low_ranks(params), text.keys_values if text else None

    def pair(x_BLD, xs):
        p, low_rank, keys_values = xs
        return block_pair(p | {"low_rank": low_rank}, config, x_BLD, context, keys_values), None

    if config.remat != "none":
        pair = jax.checkpoint(pair, policy=REMAT[config.remat], prevent_cse=False)  # a scan is barrier enough

    def trunk(x_BLD: jax.Array) -> jax.Array:
        x_BLD = reorder(x_BLD, context.spatial.order)
        x_BLD, _ = jax.lax.scan(pair, x_BLD, layers, unroll=config.unroll)
        return reorder(x_BLD, context.spatial.order.inverse())

    x_BLD = run_trunk(trunk, x_BLD) if run_trunk else trunk(x_BLD)
    return predict(params, config, x_BLD, x_BLP, known)


def _positions(tables: dict, config: WaltConfig, pack: Pack) -> jax.Array:
    """Return the learnt position of every token, (B, L, D) float32: that of its frame and that in the plane."""
    frames, rows, columns = config.positions
    grids_BL3 = jnp.maximum(per_slot(pack.grids_BS3, slot_of(pack.segments_BL)), 1).astype(jnp.float32)
    (t, y, x), (T, H, W) = (jnp.moveaxis(each, -1, 0) for each in (pack.coords_BL3, grids_BL3))
    squeeze = jnp.minimum((frames - 1) / jnp.maximum(T - 1, 1), 1.0)
    in_time = interpolated(tables["time"], [t * squeeze], (frames,))
    return in_time + interpolated(tables["plane"], [_stretched(y, H, rows), _stretched(x, W, columns)], (rows, columns))


def _stretched(at: jax.Array, size: jax.Array, entries: int) -> jax.Array:
    """Return where the centre of a token lies on a table that is stretched over `size` tokens."""
    return (at + 0.5) * (entries / size) - 0.5


def _context(params: dict, config: WaltConfig, pack: Pack, known: Condition, text: TextContext | None) -> Context:
    """Bring what the blocks read of each token to the order of its windows, once for all of them."""
    spatial_BL = window_segments(Place(pack.segments_BL, pack.coords_BL3), (1, *config.spatial_window))
    order = window_order(spatial_BL)
    segments_BL, coords_BL3, windows_BL = (reorder(x, order) for x in (pack.segments_BL, pack.coords_BL3, spatial_BL))
    joint_BL = window_segments(Place(segments_BL, coords_BL3), (None, *config.spatiotemporal_window))
    if config.image_identity:
        frames_BL = per_slot(pack.grids_BS3[..., 0], slot_of(segments_BL))
        joint_BL = apart(joint_BL, (frames_BL == 1) & (segments_BL > 0))
    onwards = window_order(joint_BL)
    angles_BLK = rotary_angles(coords_BL3, config.head_width, config.position_theta)
    rows = {name: reorder(getattr(known, name), order) for name in ("rows_BL", "spread_BLR")}
    joint_BL, joint_angles_BLK = (reorder(x, onwards) for x in (joint_BL, angles_BLK))
    return Context(
        known.replace(**rows),
        modulation_table(params["modulation_1"], known) if "modulation_1" in params else None,
        Windows(order, windows_BL, angles_BLK),
        Windows(onwards, joint_BL, joint_angles_BLK),
        text,
        text and _cross_places(segments_BL, windows_BL, text.segments_BM),
    )


def _cross_places(segments_BL: jax.Array, windows_BL: jax.Array, text_segments_BM: jax.Array) -> Places:
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


def _low_ranks(params: dict) -> dict | None:
    """Return the low-rank maps of the first blocks of all pairs: zeros for the very first, which needs none."""
    if "modulation_1" not in params:
        return None
    first = jax.tree.map(lambda x: jnp.zeros_like(x[:1]), params["blocks"]["spatiotemporal"]["low_rank"])
    if "low_rank" not in params:
        return first
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), first, params["low_rank"])


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


def block_pair(p: dict, config: WaltConfig, x_BLD: jax.Array, context: Context, keys_values) -> jax.Array:
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


def _block(p: dict, config: WaltConfig, x_BLD: jax.Array, attend: Trunk, context: Context, keys_values) -> jax.Array:
    """Apply one block: attention in windows, cross-attention where there is text, MLP."""
    known = context.known
    if context.shared_BRX is None:
        table_BRX = modulation_table(p["modulation"], known)
    else:
        table_BRX = context.shared_BRX + low_rank_table(p["low_rank"], known)
    shift1, scale1, gate1, shift2, scale2, gate2 = spread_table(table_BRX, known, MODULATIONS)
    with jax.named_scope("self_attention"):
        x_BLD += gate1 * attend(layer_norm(x_BLD) * (1 + scale1) + shift1)
    if context.text is not None:
        with jax.named_scope("cross_attention"):
            x_BLD += _cross_attention(p, config, x_BLD, context, keys_values)
    with jax.named_scope("mlp"):
        return x_BLD + gate2 * mlp(p["mlp"], layer_norm(x_BLD) * (1 + scale2) + shift2)


def _window_attention(p: dict, config: WaltConfig, h_BLD: jax.Array, windows: Windows) -> jax.Array:
    """Attend inside windows, tokens in their order: (B, L, D) -> same."""
    q, k, v = qkv_proj(p["qkv"], h_BLD)
    q, k = (rotate(_normed(p, name, x), windows.angles_BLK) for name, x in (("q_norm", q), ("k_norm", k)))
    place = Place(windows.segments_BL)
    return out_proj(p["merge"], attention(q, k, v, Places(place, place), how=How(config.attention, config.sequence)))


def _cross_attention(p: dict, config: WaltConfig, x_BLD: jax.Array, context: Context, keys_values) -> jax.Array:
    """Let every token read its spatial window and the caption of its clip, by one softmax: (B, L, D) -> same."""
    h_BLD = layer_norm(x_BLD)
    (q,) = qkv_proj(p["cross_q"], h_BLD)
    own, words = _cross_keys_values(p, h_BLD), keys_values or _cross_keys_values(p, context.text.tokens_BME)
    k, v = (_joined(*both, "heads", None) for both in zip(own, words, strict=True))
    how = How("auto" if config.attention == "splash" else config.attention)  # splash has no such pattern
    out = attention(_normed(p, "cross_q_norm", q), k, v, context.places, Pattern(windows=True), how)
    return out_proj(p["cross_merge"], out)


def _cross_keys_values(p: dict, x_BMD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Project tokens or words onto the keys and values (B, M, N, K) of cross-attention."""
    k, v = qkv_proj(p["cross_kv"], x_BMD)
    return _normed(p, "cross_k_norm", k), v


def _normed(p: dict, name: str, x_BLNK: jax.Array) -> jax.Array:
    """Normalise queries or keys where there is a scale."""
    return rms_norm(p[name], x_BLNK) if name in p else x_BLNK


def forward_flops(config: WaltConfig, batch: dict, encodes_condition: bool = True) -> float:
    """Return the FLOPs of one forward pass over the clips of a host batch, counted as `transformer.forward_flops` does.

    Attention counts by the squares of the windows' sizes; an image in spatiotemporal windows has one pair for a token.
    """
    lengths = token_counts(batch)
    words = text_lengths(batch, lengths.shape[1]) if config.text else 0 * lengths
    uses = {
        "token": lengths.sum(),
        "text": words.sum() * encodes_condition,
        "both": lengths.sum() + words.sum() * encodes_condition,
        "row": used_rows(batch, lengths).sum(),
        "clip": (lengths > 0).sum(),
    }
    products = sum(2 * size * uses[user] for user, size in weights(denoiser_specs(config), _user))
    t, h, w = np.moveaxis(batch["grids_BS3"].astype(np.int64), -1, 0)
    squares = lambda window: _squares(h, window[0]) * _squares(w, window[1])  # noqa: E731
    spatial = t * squares(config.spatial_window)
    joint = t**2 * squares(config.spatiotemporal_window)
    joint = np.where(t == 1, lengths, joint) if config.image_identity else joint
    pairs = (spatial + joint).sum() / 2
    if config.text:
        pairs += (spatial + lengths * words).sum()
    attention = 4 * config.depth * config.width * pairs
    if config.text and encodes_condition:
        attention += 4 * config.text.depth * config.text.width * (words**2).sum()
    return float(products + attention)


def _squares(side: np.ndarray, window: int) -> np.ndarray:
    """Return the sum of the squares of the parts that windows cut a side into."""
    return side // window * window**2 + (side % window) ** 2


def _user(names: Sequence[str]) -> str:
    if names[0] in ("text", "captions"):
        return "text"
    if "pooled" in names:
        return "clip"
    if "cross_kv" in names:
        return "both"
    rows = {"modulation", "modulation_1", "low_rank", "time_in", "time_out"}
    return "row" if rows & set(names) else "token"
