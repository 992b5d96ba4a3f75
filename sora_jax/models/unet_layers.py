"""The blocks of the U-Net and its config, see `models.unet`."""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from sora_jax.config import check
from sora_jax.models.checks import check_network
from sora_jax.models.conditioning import caption_attention, caption_attention_specs
from sora_jax.models.text import TextConfig, TextContext
from sora_jax.nn.attention import How, Place, Places, attention
from sora_jax.nn.cells import GROUP, Cells, Links, conv, conv_specs, group_norm, group_norm_specs
from sora_jax.nn.layers import (
    dense,
    dense_specs,
    layer_norm,
    out_proj,
    out_proj_specs,
    qkv_proj,
    qkv_proj_specs,
    rms_norm,
    rms_norm_specs,
)
from sora_jax.nn.params import zeros
from sora_jax.nn.positions import axis_widths, rotate

SPACE, TIME = (1, 3, 3), (3, 1, 1)  # kernels (t, y, x)
TAPS = math.prod(SPACE)
ROWS = 4  # width of the embedding of a row of noise levels, over `width`
LOCAL = (None, None, None)


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Configure the factorised space-time U-Net."""

    width: int = 128  # channels at the highest resolution
    multipliers: tuple[int, ...] = (1, 2, 4)  # channels of each level over `width`, the highest resolution first
    blocks: int = 2  # residual blocks of a level, on the way down and as many on the way up
    attended: tuple[int, ...] = (1, 2)  # levels with attention, from 0, the highest resolution
    head_width: int = 32  # channels of an attention head; even
    patch: tuple[int, int, int] = (1, 1, 1)  # (t, y, x) latent positions in a token of a pack; convolutions see latents
    latent_channels: int = 16  # C, channels of the latents
    text: TextConfig | None = TextConfig()  # text encoder, for cross-attention and, pooled, modulation; None: no text
    classes: int = 0  # number of classes; 0: none
    position_theta: float = 10_000.0  # wavelengths of rotary positions in attention run from 2 pi to so many times more
    input_skip: bool = False  # add the noisy latents to the prediction, times a gate for each value
    learned_variance: bool = False  # predict the variance of a step, too, between its bounds: 2 P outputs
    attention: str = "auto"  # what computes attention: auto, dense, blockwise, splash (TPU), cudnn (GPU)
    remat: str = "full"  # what is recomputed in the backward pass: none, full (the inside of each block)
    dtype: str = "auto"  # of the computation: float32, bfloat16; auto is bfloat16 on accelerators
    name: Literal["unet"] = "unet"  # tells this network from others in files

    def __post_init__(self):
        check_network(self, remat=("none", "full"))
        multipliers = self.multipliers
        check(
            bool(multipliers) and min(multipliers) > 0,
            f"model.multipliers is {multipliers}; it must be positive numbers, one for each level",
        )
        check(self.width % GROUP == 0, f"model.width is {self.width}; it must be a multiple of {GROUP}")
        for level in self.attended:
            check(
                0 <= level < self.levels,
                f"model.attended names level {level}; with {self.levels} model.multipliers each must be below that",
            )
            check(
                self.widths[level] % self.head_width == 0,
                f"model.head_width is {self.head_width}; it must divide {self.widths[level]}, the width of level "
                f"{level}",
            )
        even = self.head_width % 2 == 0 and axis_widths(self.head_width)[1] > 0
        check(even, f"model.head_width is {self.head_width}; it must be even and at least 6")

    @property
    def levels(self) -> int:
        """Return the number of resolutions."""
        return len(self.multipliers)

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the channels of each level."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    @property
    def positions_in_time(self) -> bool:
        """Return True: frames are told apart by their neighbours."""
        return True

    @property
    def guides(self) -> bool:
        """Return False: a frame beside a clip has no cell in its grid."""
        return False

    @property
    def patch_values(self) -> int:
        """Return P, the values in a token."""
        return math.prod(self.patch) * self.latent_channels

    @property
    def room_multiple(self) -> tuple[int, int]:
        """Return the rows and columns of tokens that every level can halve."""
        whole = 2 ** (self.levels - 1)
        rows, columns = (whole // math.gcd(whole, side) for side in self.patch[1:])
        return rows, columns


class Block(NamedTuple):
    """Say where a block stands, how many channels it reads and makes, and if it attends."""

    name: str
    level: int
    inputs: int
    outputs: int
    attends: bool


def blocks_of(config: UNetConfig) -> list[Block]:
    """List the blocks in order: on the way down, in the middle, and on the way up, which read those of the way down."""
    found, inputs = [], config.width
    levels = range(config.levels)
    for level in levels:
        for number in range(config.blocks):
            width = config.widths[level]
            found.append(Block(f"down_{level}_{number}", level, inputs, width, level in config.attended))
            inputs = width
    last = config.levels - 1
    found.append(Block("middle_0", last, inputs, inputs, last in config.attended))
    found.append(Block("middle_1", last, inputs, inputs, False))
    for level in reversed(levels):
        width = config.widths[level]
        for number in range(config.blocks):
            found.append(Block(f"up_{level}_{number}", level, 2 * width, width, level in config.attended))
    return found


class Level(NamedTuple):
    """Hold what the blocks of a level read: its cells, their neighbours, angles, and shares in rows of noise levels."""

    cells: Cells
    space: Links
    time: Links
    angles_BlK: jax.Array
    spread_BlR: jax.Array

    def segments(self, numbers_Bl: jax.Array) -> jax.Array:
        """Return numbers of groups of cells as segments for attention, 0 for padding."""
        return jnp.where(self.cells.real_Bl, 1 + numbers_Bl, 0)


class Rows(NamedTuple):
    """Hold what blocks of all levels read: the embedding of each row of noise levels, and captions."""

    rows_BRD: jax.Array
    text: TextContext | None


def block_specs(config: UNetConfig, block: Block) -> dict:
    """Declare the parameters of one block."""
    inputs, width, heads = block.inputs, block.outputs, block.outputs // config.head_width
    specs = {
        "norm_1": group_norm_specs(inputs),
        "conv_1": conv_specs(TAPS, inputs, width),
        "modulation": dense_specs(ROWS * config.width, 2 * width, ("embed", None), zeros),
        "norm_2": group_norm_specs(width),
        "conv_2": conv_specs(TAPS, width, width, zeros),
        **({"skip": dense_specs(inputs, width, (None, None))} if inputs != width else {}),
        "norm_time": group_norm_specs(width),
        "conv_time": conv_specs(math.prod(TIME), width, width, zeros),
    }
    if block.attends:
        specs["space"] = _attention_specs(config, width)
        specs |= caption_attention_specs(width, heads, config.text.width) if config.text else {}
        specs["time"] = _attention_specs(config, width)
    return specs


def block(config: UNetConfig, p: dict, x_BlD: jax.Array, level: Level, rows: Rows) -> jax.Array:
    """Apply one block, (B, l, inputs) -> (B, l, outputs): convolve in space and time, then attend if it does."""
    cells = level.cells
    with jax.named_scope("space"):
        h = conv(p["conv_1"], jax.nn.silu(group_norm(p["norm_1"], x_BlD, cells)), level.space)
        table_BRX = dense(p["modulation"], rows.rows_BRD, LOCAL)
        rows_BlX = jnp.einsum("blr,brx->blx", level.spread_BlR.astype(table_BRX.dtype), table_BRX)
        scale, shift = jnp.split(rows_BlX, 2, axis=-1)
        h = jax.nn.silu(group_norm(p["norm_2"], h, cells) * (1 + scale) + shift)
        x_BlD = dense(p["skip"], x_BlD, LOCAL) if "skip" in p else x_BlD
        x_BlD += conv(p["conv_2"], h, level.space)
    with jax.named_scope("time"):
        h = conv(p["conv_time"], jax.nn.silu(group_norm(p["norm_time"], x_BlD, cells)), level.time)
        x_BlD += jnp.where(cells.moving_Bl[..., None], h, 0)
    if "space" not in p:
        return x_BlD
    with jax.named_scope("attention"):
        x_BlD += _attend(p["space"], config, x_BlD, level, cells.frames_Bl)
        if rows.text is not None:
            segments_Bl = level.segments(cells.slots_Bl)
            x_BlD += caption_attention(p, x_BlD, segments_Bl, rows.text, config.attention)
        h = _attend(p["time"], config, x_BlD, level, cells.columns_Bl)
        return x_BlD + jnp.where(cells.moving_Bl[..., None], h, 0)


def _attention_specs(config: UNetConfig, width: int) -> dict:
    heads, head_width = width // config.head_width, config.head_width
    return {
        "qkv": qkv_proj_specs(width, 3, heads, head_width),
        "q_norm": rms_norm_specs(head_width),
        "k_norm": rms_norm_specs(head_width),
        "merge": out_proj_specs(heads, head_width, width, zeros),
    }


def _attend(p: dict, config: UNetConfig, x_BlD: jax.Array, level: Level, numbers_Bl: jax.Array) -> jax.Array:
    """Let cells attend to those with their number: of their frame, or of their place in all frames."""
    q, k, v = qkv_proj(p["qkv"], layer_norm(x_BlD))
    q, k = (rotate(rms_norm(p[name], x), level.angles_BlK) for name, x in (("q_norm", q), ("k_norm", k)))
    place = Place(level.segments(numbers_Bl))
    return out_proj(p["merge"], attention(q, k, v, Places(place, place), how=How(config.attention)))
