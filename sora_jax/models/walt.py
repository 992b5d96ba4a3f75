"""W.A.L.T: a denoiser with attention in windows, spatial and spatiotemporal in turn (2312.06662), over packs of clips.

Blocks come in pairs. The first of a pair attends inside spatial windows, 1 x h x w of a frame; the second inside
spatiotemporal ones, all frames x h' x w'. Clips that windows do not divide have smaller ones at their lower and right
edges. An image passes the second attention by the identity: each token reads itself alone, so it gets its own value.

What the paper leaves open, or was made for clips of one size:

- Positions inside windows are rotary, where the paper has Swin's table of biases: a product of rotated queries and keys
  depends on their distance alone, too, needs no parameters, and every kernel of attention computes it. A bias would
  have to be gathered for each pair of tokens, since a pack has no fixed grid of windows.
- Cross-attention reads the tokens of the spatial window and the caption of the clip by one softmax: a key says to which
  windows it belongs (`Pattern.windows`), one for a token, all of its clip for a word.
- Super-resolution (`low_resolution`) reads the clip at half its rows and columns. The paper brings this to the size of
  the clip by a convolution to four times the channels and depth-to-space. With a convolution of 1 x 1, that and the
  embedding of patches with even sides are one linear map of the values under a token; so these stand beside the noisy
  ones, and neighbours meet in attention.
- The tables of positions are stretched over the plane of each clip by linear interpolation, which is how the paper goes
  from square clips to 9:16; a clip of the table's own size reads its entries. In time frame i reads entry i, so that an
  image reads the first one as in the paper; only clips with more frames than entries are squeezed.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.data.packing.packs import text_counts, token_counts
from sora_jax.models.conditioning import (
    Condition,
    condition,
    condition_specs,
    low_rank_specs,
    modulation,
    modulation_specs,
    modulation_table,
)
from sora_jax.models.counting import used_rows, weights
from sora_jax.models.ends import head_specs, predict
from sora_jax.models.text import TextContext, encode_text, text_specs
from sora_jax.models.walt_blocks import (
    MODULATIONS,
    Captions,
    Context,
    Trunk,
    WaltConfig,
    Windows,
    block_pair,
    block_specs,
    cross_keys_values,
    cross_places,
)
from sora_jax.nn.attention import Place
from sora_jax.nn.layers import compute_dtype, dense, dense_specs, embedding_specs, layer_norm
from sora_jax.nn.pack import Pack, per_slot, slot_of
from sora_jax.nn.params import stack
from sora_jax.nn.positions import interpolated, rotary_angles
from sora_jax.nn.remat import REMAT
from sora_jax.nn.windows import Window, apart, reorder, window_order, window_segments
from sora_jax.parallel.rules import reshard


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
        "patch": dense_specs(_values_read(config), width, (None, "embed")),
        "positions": {"time": embedding_specs(frames, width), "plane": embedding_specs(rows * columns, width)},
        **condition_specs(width, text.width if text else 0, config.classes, config.low_resolution),
        **({"modulation_1": modulation_specs(width, MODULATIONS)["modulation"]} if rank else {}),
        **({"low_rank": stack(low_rank, pairs - 1)} if rank and pairs > 1 else {}),
        "blocks": stack({"spatial": spatial, "spatiotemporal": spatiotemporal}, pairs),
        **modulation_specs(width, 2),
        **head_specs(config),
    }


def _values_read(config: WaltConfig) -> int:
    """Return the number of values that the embedding of a token reads: noisy, estimated, of the low resolution."""
    return config.patch_values * (1 + config.self_conditioning) + config.low_resolution * config.patch_values // 4


def encode_condition(params: dict, config: WaltConfig, pack: Pack) -> TextContext | None:
    """Encode what does not change while a pack is denoised: captions, with their keys and values in every block.

    Keys and values are stacked by pair, then by block of the pair. None for a model without text.
    """
    text = _encode_captions(params, config, pack)
    if text is None:
        return None
    both = (params["blocks"][kind] for kind in ("spatial", "spatiotemporal"))
    with jax.named_scope("cross_attention"):
        found = [jax.vmap(lambda p: cross_keys_values(p, text.tokens_BME))(blocks) for blocks in both]
    keys, values = (jnp.stack(parts, axis=1) for parts in zip(*found, strict=True))
    return dataclasses.replace(text, keys_values=(keys, values))


def _encode_captions(params: dict, config: WaltConfig, pack: Pack) -> TextContext | None:
    """Encode captions and bring their tokens to the width of the network: cross-attention reads both by one map."""
    if config.text is None:
        return None
    text = encode_text(params["text"], config.text, pack, compute_dtype(config.dtype))
    tokens_BMD = dense(params["captions"], text.tokens_BME, ("batch", "length", "width"))
    return dataclasses.replace(text, tokens_BME=layer_norm(tokens_BMD))


def trunk_zeros(config: WaltConfig, pack: Pack) -> jax.Array:
    """Return zeros with the shape, dtype and sharding of the tokens (B, L, D) that the blocks work on."""
    zero_BLD = jnp.zeros((*pack.segments_BL.shape, config.width), compute_dtype(config.dtype))
    return reshard(zero_BLD, "batch", "length", "width")


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
    read = [x_BLP]
    if config.self_conditioning:
        read.append(jnp.zeros_like(x_BLP) if previous_BLP is None else previous_BLP.astype(x_BLP.dtype))
    if config.low_resolution:
        assert pack.low_BLQ is not None  # what the model reads is packed
        read.append(pack.low_BLQ.astype(x_BLP.dtype))
    x_BLD = dense(params["patch"], jnp.concatenate(read, axis=-1).astype(dtype), ("batch", "length", "width"))
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
    return predict(params, config, x_BLD, x_BLP, modulation(params, known, 2))


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
    spatial, spatiotemporal = _windows(config)
    spatial_BL = window_segments(Place(pack.segments_BL, pack.coords_BL3), spatial)
    order = window_order(spatial_BL)
    segments_BL, coords_BL3, windows_BL = (reorder(x, order) for x in (pack.segments_BL, pack.coords_BL3, spatial_BL))
    joint_BL = window_segments(Place(segments_BL, coords_BL3), spatiotemporal)
    if config.image_identity:
        image_BL = (per_slot(pack.grids_BS3[..., 0], slot_of(pack.segments_BL)) == 1) & (pack.segments_BL > 0)
        joint_BL = apart(joint_BL, reorder(image_BL, order))
    onwards = window_order(joint_BL)
    angles_BLK = rotary_angles(coords_BL3, config.head_width, config.position_theta)
    # Whole, as in a pack: a look-up by an index that is split would not know the layout of its result.
    rows = {
        "rows_BL": reshard(reorder(known.rows_BL, order), "batch", None),
        "spread_BLR": reshard(reorder(known.spread_BLR, order), "batch", None, None),
    }
    joint_BL, joint_angles_BLK = (reorder(x, onwards) for x in (joint_BL, angles_BLK))
    return Context(
        dataclasses.replace(known, **rows),
        modulation_table(params["modulation_1"], known) if "modulation_1" in params else None,
        Windows(order, windows_BL, angles_BLK),
        Windows(onwards, joint_BL, joint_angles_BLK),
        Captions(text.tokens_BME, cross_places(segments_BL, windows_BL, text.segments_BM)) if text else None,
    )


def _windows(config: WaltConfig) -> tuple[Window, Window]:
    """Return the sizes (t, y, x) of spatial and spatiotemporal windows; None is all of an axis."""
    if not config.windows:
        return (None, None, None), (None, None, None)
    return (1, *config.spatial_window), (None, *config.spatiotemporal_window)


def _low_ranks(params: dict) -> dict | None:
    """Return the low-rank maps of the first blocks of all pairs: zeros for the very first, which needs none."""
    if "modulation_1" not in params:
        return None
    first = jax.tree.map(lambda x: jnp.zeros_like(x[:1]), params["blocks"]["spatiotemporal"]["low_rank"])
    if "low_rank" not in params:
        return first
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), first, params["low_rank"])


def forward_flops(config: WaltConfig, batch: dict, encodes_condition: bool = True) -> float:
    """Return the FLOPs of one forward pass over the clips of a host batch, counted as `transformer.forward_flops` does.

    Attention counts by the squares of the windows' sizes; an image in spatiotemporal windows has one pair for a token.
    """
    lengths = token_counts(batch)
    words = text_counts(batch) if config.text else 0 * lengths
    uses = {
        "token": lengths.sum(),
        "text": words.sum() * encodes_condition,
        "both": lengths.sum() + words.sum() * encodes_condition,
        "row": used_rows(batch, lengths).sum(),
        "clip": (lengths > 0).sum(),
    }
    products = sum(2 * size * uses[user] for user, size in weights(denoiser_specs(config), _user))
    sides = np.moveaxis(batch["grids_BS3"].astype(np.int64), -1, 0)
    spatial, joint = (np.prod([*map(_squares, sides, window)], axis=0) for window in _windows(config))
    joint = np.where(sides[0] == 1, lengths, joint) if config.image_identity else joint
    pairs = (spatial + joint).sum() / 2
    if config.text:
        pairs += (spatial + lengths * words).sum()
    attention = 4 * config.depth * config.width * pairs
    if config.text and encodes_condition:
        attention += 4 * config.text.depth * config.text.width * (words**2).sum()
    return float(products + attention)


def _squares(side: np.ndarray, window: float | None) -> np.ndarray:
    """Return the sum of the squares of the parts that windows cut a side into; None: it is whole."""
    return side**2 if window is None else side // window * window**2 + (side % window) ** 2


def _user(names: Sequence[str]) -> str:
    if names[0] in ("text", "captions"):
        return "text"
    if {"pooled", "low_time"} & set(names):
        return "clip"
    if "cross_kv" in names:
        return "both"
    rows = {"modulation", "modulation_1", "low_rank", "time_in", "time_out"}
    return "row" if rows & set(names) else "token"
