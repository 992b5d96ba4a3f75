"""The U-Net of video diffusion: convolutions in space, convolution and attention in time (2204.03458).

A level has half the rows and columns of the one above it, and all of its frames. A block convolves frames as images,
then along time; at the lower resolutions cells attend to their frame, to the caption, and to their own place in all
frames (Ho et al. 2204.03458; 1D convolutions after 2D ones as in Make-A-Video 2209.14792; layers between those of an
image model as in Stable Video Diffusion 2311.15127). All layers along time add to what they find, nothing at the start,
and nothing ever for a clip of one frame: an image passes through an image model.

Noise levels are kept by row of the pack. A cell of a lower level reads the mean of the rows of the cells it covers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.data.packing.packs import text_counts
from sora_jax.models.conditioning import condition, condition_specs, encode_captions
from sora_jax.models.counting import used_rows, weights
from sora_jax.models.text import TextContext, text_specs
from sora_jax.models.unet_layers import ROWS, SPACE, TAPS, TIME, Level, Rows, UNetConfig, block, block_specs, blocks_of
from sora_jax.nn.cells import (
    Cells,
    cells_of,
    children,
    conv,
    conv_specs,
    gather,
    group_norm,
    group_norm_specs,
    halved,
    kernel_links,
    parent_links,
    take,
    token_links,
)
from sora_jax.nn.layers import compute_dtype
from sora_jax.nn.pack import Pack
from sora_jax.nn.params import zeros
from sora_jax.nn.positions import rotary_angles
from sora_jax.parallel.rules import on_mesh, partition, reshard


def denoiser_specs(config: UNetConfig) -> dict:
    """Declare all parameters.

    Zero at the start are every modulation, the second convolution of a block, the layers along time, the output
    projections of attention, and the last convolution. Its outputs are the prediction, variances if they are learned,
    and the gates of the input if there are any.
    """
    text, widths = config.text, config.widths
    outputs = config.latent_channels * (1 + config.learned_variance + config.input_skip)
    return {
        **({"text": text_specs(text)} if text else {}),
        **condition_specs(ROWS * config.width, text.width if text else 0, config.classes),
        "network": {
            "conv_in": conv_specs(TAPS, config.latent_channels + 1, config.width),
            "blocks": {block.name: block_specs(config, block) for block in blocks_of(config)},
            "shrink": {str(level): conv_specs(TAPS, width, width) for level, width in enumerate(widths[:-1])},
            "grow": {
                str(level): conv_specs(TAPS, below, width)
                for level, (width, below) in enumerate(zip(widths[:-1], widths[1:], strict=True))
            },
            "norm_out": group_norm_specs(config.width),
            "conv_out": conv_specs(TAPS, config.width, outputs, zeros),
        },
    }


def encode_condition(params: dict, config: UNetConfig, pack: Pack) -> TextContext | None:
    """Encode captions; None for a model without text."""
    return encode_captions(params, config.text, pack, compute_dtype(config.dtype))


class Inputs(NamedTuple):
    """Hold what the network reads of packs: noisy tokens, their packs, noise levels by row and token, captions."""

    x_BLP: jax.Array
    pack: Pack
    rows_BRD: jax.Array
    spread_BLR: jax.Array
    text: TextContext | None


def denoise(
    params: dict,
    config: UNetConfig,
    pack: Pack,
    x_BLP: jax.Array,
    times_BR: jax.Array,
    text: TextContext | None = None,
) -> jax.Array:
    """Predict the target of every token of a pack, of whatever type the model is trained for (velocity, noise...).

    x_BLP are the noisy tokens, times_BR in [0, 1] the noise level of each row, `text` the result of
    `encode_condition`, which is computed here when None. Returns (B, L, P) float32, or (B, L, 2 P) where the variance
    is learned, too. A clip's outputs depend on that clip alone; with initial parameters they are exactly 0. Packs must
    be made with the config's `room_multiple`.

    On a mesh every device works on its packs, with all of the network's parameters: a sequence is not split.
    """
    text = encode_condition(params, config, pack) if text is None else text
    known = condition(params, pack, 1000.0 * times_BR, text, compute_dtype(config.dtype))
    rows_BRD = jax.nn.silu(known.time_BRD + known.label_BRD)
    pack = dataclasses.replace(pack, tokens_BLP=None, embeddings_BME=None)
    inputs = Inputs(x_BLP, pack, rows_BRD, known.spread_BLR, text)
    if not on_mesh():
        return _network(params["network"], config, inputs)
    whole = jax.tree.map(lambda x: reshard(x, *[None] * x.ndim), params["network"])
    inputs = jax.tree.map(lambda x: reshard(x, "batch", *[None] * (x.ndim - 1)), inputs)
    specs: Any = jax.tree.map(lambda x: partition(*[None] * x.ndim), whole)
    split: Any = jax.tree.map(lambda x: partition("batch", *[None] * (x.ndim - 1)), inputs)
    return jax.shard_map(
        lambda p, inputs: _network(p, config, inputs),
        in_specs=(specs, split),
        out_specs=partition("batch", None, None),
        check_vma=False,  # attention's kernels are opaque to it
    )(whole, inputs)


def _network(p: dict, config: UNetConfig, inputs: Inputs) -> jax.Array:
    """Compute `denoise` from the encoded conditions, on one device."""
    pack, dtype = inputs.pack, compute_dtype(config.dtype)
    (B, L, _), parts, channels = inputs.x_BLP.shape, math.prod(config.patch), config.latent_channels
    cells = cells_of(pack.grids_BS3 * np.array([[config.patch]]), L * parts)
    to_cells, to_parts = token_links(pack, cells, config.patch)
    spread_BXR = jnp.repeat(inputs.spread_BLR, parts, axis=1)
    levels = _levels(config, cells, take(spread_BXR, to_cells.to_BmK[..., 0]))
    # The first latent frame of a clip stands for one frame, the others for several, and it may have been left out.
    first_BL1 = jnp.where(pack.coords_BL3[..., :1] == 0, 1.0, 0.0)
    x_BlC = gather(inputs.x_BLP.reshape(B, -1, channels), to_cells)[:, :, 0]
    first_Bl1 = take(jnp.repeat(first_BL1, parts, axis=1), to_cells.to_BmK[..., 0])
    h_BlD = conv(p["conv_in"], jnp.concatenate([x_BlC, first_Bl1], -1).astype(dtype), levels[0].space)
    h_BlD = _trunk(p, config, h_BlD, levels, inputs)
    with jax.named_scope("head"):
        h_BlD = jax.nn.silu(group_norm(p["norm_out"], h_BlD, cells))
        y_BlC = conv(p["conv_out"], h_BlD, levels[0].space).astype(jnp.float32)
        if config.input_skip:
            y_BlC, gate_BlC = y_BlC[..., :-channels], y_BlC[..., -channels:]
            y_BlC = y_BlC.at[..., :channels].add(gate_BlC * x_BlC)
        y = gather(y_BlC, to_parts).reshape(B, L, parts, -1, channels)
        return jnp.swapaxes(y, 2, 3).reshape(B, L, -1)


def _levels(config: UNetConfig, cells: Cells, spread_BlR: jax.Array) -> list[Level]:
    """Lay out the cells of all levels; a lower one has a quarter of the cells, and what rows of levels they cover."""
    found, all_cells = [], cells.size
    for number in range(config.levels):
        if number:
            finer, cells = cells, cells_of(halved(cells.grids_BS3), all_cells // 4**number)
            covered_BlR = take(spread_BlR, children(cells, finer)).sum(2)
            spread_BlR = covered_BlR / jnp.maximum(covered_BlR.sum(-1, keepdims=True), 1)
        angles_BlK = rotary_angles(cells.at_Bl3, config.head_width, config.position_theta)
        space, time = (kernel_links(cells, cells, kernel) for kernel in (SPACE, TIME))
        found.append(Level(cells, space, time, angles_BlK, spread_BlR))
    return found


def _trunk(p: dict, config: UNetConfig, x_BlD: jax.Array, levels: list[Level], inputs: Inputs) -> jax.Array:
    """Run all blocks, with the convolutions between levels."""
    run: Callable[..., jax.Array] = functools.partial(block, config)
    if config.remat == "full":
        run = jax.checkpoint(run)
    rows = Rows(inputs.rows_BRD, inputs.text)
    at, skips = 0, list[jax.Array]()
    for name, number, *_ in blocks_of(config):
        with jax.named_scope(name):
            if number > at:
                links = kernel_links(levels[at].cells, levels[number].cells, SPACE, stride=2)
                x_BlD = conv(p["shrink"][str(at)], x_BlD, links)
            if number < at:
                links = parent_links(levels[at].cells, levels[number].cells)
                x_BlD = conv(p["grow"][str(number)], gather(x_BlD, links)[:, :, 0], levels[number].space)
            at = number
            if name.startswith("up"):
                x_BlD = jnp.concatenate([x_BlD, skips.pop()], axis=-1)
            x_BlD = run(p["blocks"][name], x_BlD, levels[number], rows)
            if name.startswith("down"):
                skips.append(x_BlD)
    return x_BlD


def forward_flops(config: UNetConfig, batch: dict, encodes_condition: bool = True) -> float:
    """Return the FLOPs (two per multiply-add) of one forward pass over the clips of a host batch.

    Products with weights count by the cells that use them, all taps of a kernel for each; layers along time for clips
    of several frames alone; attention by the pairs inside frames, places and captions. Padding, recomputation and
    spreading rows to cells are work, but not model FLOPs. encodes_condition: captions are encoded in this pass.
    """
    words_BS = text_counts(batch) if config.text else 0 * batch["grids_BS3"][..., 0]
    grids_BS3 = batch["grids_BS3"].astype(np.int64) * config.patch
    live_BS = grids_BS3[..., 0] > 0
    uses = {
        "row": used_rows(batch, live_BS).sum(),
        "clip": live_BS.sum(),
        "text": words_BS.sum() * encodes_condition,
        "caption": words_BS.sum(),
    }
    space, time, cross = np.zeros((3, config.levels))
    for level in range(config.levels):
        t_BS, h_BS, w_BS = np.moveaxis(grids_BS3, -1, 0)
        area_BS, moving_BS = h_BS * w_BS, t_BS > 1
        uses |= {f"cell {level}": (t_BS * area_BS).sum(), f"moving {level}": (t_BS * area_BS * moving_BS).sum()}
        space[level], time[level] = (t_BS * area_BS**2).sum(), (t_BS**2 * area_BS * moving_BS).sum()
        cross[level] = (t_BS * area_BS * words_BS).sum()
        grids_BS3 = np.stack([t_BS, -(-h_BS // 2), -(-w_BS // 2)], axis=-1)
    products = sum(2 * size * uses[user] for user, size in weights(denoiser_specs(config), _user(config)))
    pairs = space + time + cross
    attention = sum(4 * block.outputs * pairs[block.level] for block in blocks_of(config) if block.attends)
    if config.text and encodes_condition:
        attention += 4 * config.text.depth * config.text.width * (words_BS**2).sum()
    return float(products + attention)


def _user(config: UNetConfig) -> Callable[[Sequence[str]], str]:
    """Return what says of the path of a weight what it is applied to."""
    level_of = {block.name: block.level for block in blocks_of(config)}

    def user(names: Sequence[str]) -> str:
        if names[0] != "network":
            return {"text": "text", "pooled": "clip"}.get(names[0], "row")
        if "modulation" in names or "cross_kv" in names:
            return "row" if "modulation" in names else "caption"
        level = level_of.get(names[2], 0) if names[1] == "blocks" else 0
        if names[1] in ("shrink", "grow"):
            level = int(names[2]) + (names[1] == "shrink")
        return f"moving {level}" if {"time", "conv_time"} & set(names) else f"cell {level}"

    return user
