"""Convolve the clips of a pack where they lie, side by side, whatever their sizes.

The *cells* of a pack are the positions of the grids of its clips, in raster order, one clip after another, padding
last. Which cell lies beside which follows from the grids by arithmetic; a convolution gathers the neighbours of every
cell and multiplies once. So a pack keeps its fixed shape, one program serves all sizes, and a clip sees zeros beyond
its own border, as if it were alone.

Arrays are those of one device: inside `jax.shard_map`, or without a mesh. K: taps of a kernel; l, m: cells.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import linear_call

from sora_jax.nn.lora import add_adapter
from sora_jax.nn.pack import Pack, per_slot, slot_of
from sora_jax.nn.params import Initializer, ParamSpec, lecun, ones, zeros

GROUP = 8  # channels that are normalised together
EPS = 1e-6  # added to their variance
CHILDREN = np.array([[0, y, x] for y in range(2) for x in range(2)])  # of a cell at twice the resolution


class Cells(NamedTuple):
    """Hold the grid (t, h, w) and the first cell of each clip, and of each cell its clip's slot and its (t, y, x).

    What is beyond the last clip is padding: real_Bl is False.
    places_Bl  place in its frame, in raster order
    areas_Bl   cells of its frame; a padding cell is a frame of its own
    """

    grids_BS3: jax.Array
    starts_BS: jax.Array
    slots_Bl: jax.Array
    at_Bl3: jax.Array
    real_Bl: jax.Array
    places_Bl: jax.Array
    areas_Bl: jax.Array
    moving_Bl: jax.Array  # True in clips of several frames

    @property
    def size(self) -> int:
        """Return l, the cells of a pack."""
        return self.real_Bl.shape[1]

    @property
    def frames_Bl(self) -> jax.Array:
        """Return the first cell of the frame of each cell."""
        return jnp.arange(self.size)[None] - self.places_Bl

    @property
    def columns_Bl(self) -> jax.Array:
        """Return a number for the cells at one (y, x) of a clip, in all its frames."""
        return per_slot(self.starts_BS, self.slots_Bl) + self.places_Bl

    def find(self, slots_Bm: jax.Array, at_BmK3: jax.Array, real_BmK: jax.Array) -> jax.Array:
        """Return the cells (B, m, K) at places (t, y, x) of clips; l where there is none, or not real_BmK."""
        grids_Bm13 = per_slot(self.grids_BS3, slots_Bm)[:, :, None]
        inside_BmK = ((at_BmK3 >= 0) & (at_BmK3 < grids_Bm13)).all(-1) & real_BmK
        t, y, x = jnp.moveaxis(at_BmK3, -1, 0)
        in_clip_BmK = (t * grids_Bm13[..., 1] + y) * grids_Bm13[..., 2] + x
        return jnp.where(inside_BmK, per_slot(self.starts_BS, slots_Bm)[..., None] + in_clip_BmK, self.size)


def cells_of(grids_BS3: jax.Array, count: int) -> Cells:
    """Lay out clips of these grids (t, h, w), 0 for an empty slot, in `count` cells; there must be room for them."""
    counts_BS = grids_BS3.prod(-1)
    ends_BS = jnp.cumsum(counts_BS, axis=1)
    starts_BS = ends_BS - counts_BS
    cell_1l = jnp.arange(count)[None]
    before_Bl = jnp.sum(cell_1l[..., None] >= ends_BS[:, None, :], axis=-1)
    real_Bl = before_Bl < grids_BS3.shape[1]
    slots_Bl = jnp.where(real_Bl, before_Bl, 0)
    frames_Bl, h_Bl, w_Bl = jnp.moveaxis(jnp.maximum(per_slot(grids_BS3, slots_Bl), 1), -1, 0)
    row_Bl, x_Bl = jnp.divmod(jnp.where(real_Bl, cell_1l - per_slot(starts_BS, slots_Bl), 0), w_Bl)
    t_Bl, y_Bl = jnp.divmod(row_Bl, h_Bl)
    at_Bl3, areas_Bl = jnp.stack([t_Bl, y_Bl, x_Bl], -1), jnp.where(real_Bl, h_Bl * w_Bl, 1)
    moving_Bl = real_Bl & (frames_Bl > 1)
    return Cells(grids_BS3, starts_BS, slots_Bl, at_Bl3, real_Bl, y_Bl * w_Bl + x_Bl, areas_Bl, moving_Bl)


def halved(grids: jax.Array) -> jax.Array:
    """Return grids (..., 3) at half the resolution in space, rounded up."""
    return jnp.stack([grids[..., 0], (grids[..., 1] + 1) // 2, (grids[..., 2] + 1) // 2], axis=-1)


class Links(NamedTuple):
    """Say which source each tap of each result takes, (B, m, K), and which taps each source is taken by, (B, l, J).

    The taps are counted over all results, m K. An index beyond the last stands for none.
    """

    to_BmK: jax.Array
    back_BlJ: jax.Array


@functools.partial(jax.jit, static_argnames=("kernel", "stride"))
def kernel_links(source: Cells, target: Cells, kernel: tuple[int, int, int], stride: int = 1) -> Links:
    """Link the cells of a convolution with zeros beyond the borders; the stride is in space.

    A kernel (t, y, x) has odd sides. Its taps are in raster order.
    """
    offsets_K3 = np.indices(kernel).reshape(3, -1).T - np.array(kernel) // 2
    taps, step = len(offsets_K3), np.array([1, stride, stride])
    at_BmK3 = (target.at_Bl3 * step[None, None])[:, :, None] + offsets_K3[None, None]
    to_BmK = source.find(target.slots_Bl, at_BmK3, target.real_Bl[..., None])
    ahead_BlK3 = source.at_Bl3[:, :, None] - offsets_K3[None, None]
    hit_BlK = (ahead_BlK3 % step[None, None, None] == 0).all(-1) & source.real_Bl[..., None]
    by_BlK = target.find(source.slots_Bl, ahead_BlK3 // step[None, None, None], hit_BlK)
    return Links(to_BmK, by_BlK * taps + jnp.where(by_BlK < target.size, jnp.arange(taps)[None, None], 0))


def parent_links(source: Cells, target: Cells) -> Links:
    """Link each cell to the one that covers it at half the resolution: upsampling to the nearest."""
    parent_Bm13 = (target.at_Bl3 // np.array([[[1, 2, 2]]]))[:, :, None]
    to_Bm1 = source.find(target.slots_Bl, parent_Bm13, target.real_Bl[..., None])
    return Links(to_Bm1, children(source, target))


def children(cells: Cells, finer: Cells) -> jax.Array:
    """Return the cells (B, l, 4) at twice the resolution that each cell covers."""
    at_Bl43 = (cells.at_Bl3 * np.array([[[1, 2, 2]]]))[:, :, None] + CHILDREN[None, None]
    return finer.find(cells.slots_Bl, at_Bl43, cells.real_Bl[..., None])


def take(x_BlC: jax.Array, index_BX: jax.Array) -> jax.Array:
    """Return the rows (B, ..., C) of x at an index (B, ...); zeros where it is beyond the last."""
    return jax.vmap(lambda x, index: x.at[index].get(mode="fill", fill_value=0))(x_BlC, index_BX)


def gather(x_BlC: jax.Array, links: Links) -> jax.Array:
    """Return what every tap takes, (B, m, K, C)."""

    # The transpose of a gather would be a scatter, which is slow everywhere.
    def back(links: Links, y_BmKC: jax.Array) -> jax.Array:
        B, m, K, C = y_BmKC.shape
        return take(y_BmKC.reshape(B, m * K, C), links.back_BlJ).sum(2)

    return linear_call(lambda links, x_BlC: take(x_BlC, links.to_BmK), back, links, x_BlC)


def conv_specs(taps: int, inputs: int, outputs: int, init: Initializer | None = None) -> dict:
    """Declare a weight (taps, inputs, outputs), LeCun normal unless `init` is given, and a zero bias."""
    return {
        "weight": ParamSpec((taps, inputs, outputs), ("kernel", "conv_in", "channels"), init or lecun((0, 1), 2)),
        "bias": ParamSpec((outputs,), ("channels",), zeros),
    }


@jax.jit
def conv(params: dict, x_BlC: jax.Array, links: Links) -> jax.Array:
    """Convolve cells: (B, l, inputs) -> (B, m, outputs), in the dtype of x."""
    taps_BmKC = gather(x_BlC, links)
    weight = params["weight"].astype(x_BlC.dtype)
    flat = taps_BmKC.reshape(-1, weight.shape[0] * weight.shape[1])  # one product, with a long sum
    y = (flat @ weight.reshape(flat.shape[1], -1)).reshape(*taps_BmKC.shape[:2], -1)
    y = add_adapter(params, taps_BmKC, y, ("bmkc,kcr->bmr", "bmr,ro->bmo"), (None, None, None), 2)
    return y + params["bias"].astype(x_BlC.dtype)[None, None]


@jax.jit
def frame_mean(x_BlC: jax.Array, cells: Cells) -> jax.Array:
    """Return for each cell the mean over its frame, (B, l, C)."""
    steps = max(cells.size - 1, 1).bit_length()

    def mean(layout: tuple, x_BlC: jax.Array) -> jax.Array:
        # Sums of 2, 4, 8... cells from each one on, inside its frame: no other frame's values are ever added.
        frames_Bl, places_Bl, areas_Bl = layout

        def widen(total: jax.Array, reach: jax.Array) -> tuple[jax.Array, None]:
            further = jnp.roll(total, -reach, axis=1)
            return total + jnp.where((places_Bl + reach < areas_Bl)[..., None], further, 0), None

        total, _ = jax.lax.scan(widen, x_BlC, jnp.asarray(2 ** np.arange(steps)))
        return take(total, frames_Bl) / areas_Bl[..., None]

    # A mean over frames is its own transpose.
    return linear_call(mean, mean, (cells.frames_Bl, cells.places_Bl, cells.areas_Bl), x_BlC)


def group_norm_specs(width: int) -> dict:
    """Declare a scale, 1 at the start, and a shift, 0, of each channel."""
    return {"scale": ParamSpec((width,), ("channels",), ones), "shift": ParamSpec((width,), ("channels",), zeros)}


@jax.jit
def group_norm(params: dict, x_BlC: jax.Array, cells: Cells) -> jax.Array:
    """Normalise groups of GROUP channels over each frame, in float32 (1803.08494), then scale and shift channels."""
    groups_BlGg = x_BlC.astype(jnp.float32).reshape(*x_BlC.shape[:2], -1, GROUP)
    sums = jnp.concatenate([groups_BlGg.mean(-1), jnp.square(groups_BlGg).mean(-1)], axis=-1)
    middle_BlG, square_BlG = jnp.split(frame_mean(sums, cells), 2, axis=-1)
    spread_BlG = jax.lax.rsqrt(jnp.maximum(square_BlG - jnp.square(middle_BlG), 0) + EPS)
    x32 = ((groups_BlGg - middle_BlG[..., None]) * spread_BlG[..., None]).reshape(x_BlC.shape)
    return (x32 * params["scale"][None, None] + params["shift"][None, None]).astype(x_BlC.dtype)


def token_links(pack: Pack, cells: Cells, patch: tuple[int, int, int]) -> tuple[Links, Links]:
    """Link cells to the parts of tokens, (B, L n, C) for n positions in a patch; and the parts to cells.

    A part's cell is told by the coordinates of its token, from the first frame of its clip on.
    """
    slots_BL, real_BL = slot_of(pack.segments_BL), pack.segments_BL > 0
    own_BLS = pack.segments_BL[..., None] == jnp.arange(1, pack.slots + 1)[None, None]
    times_BL1 = pack.coords_BL3[..., :1]
    first_BS = jnp.min(jnp.where(own_BLS, times_BL1, jnp.inf), axis=1)
    since_BL1 = times_BL1 - jnp.where(real_BL, per_slot(first_BS, slots_BL), 0)[..., None]
    token_BL3 = jnp.round(jnp.concatenate([since_BL1, pack.coords_BL3[..., 1:]], -1)).astype(jnp.int32)
    parts_n3 = np.indices(patch).reshape(3, -1).T
    at_BLn3 = (token_BL3 * np.array(patch)[None, None])[:, :, None] + parts_n3[None, None]
    of_part_BX = cells.find(slots_BL, at_BLn3, real_BL[..., None]).reshape(real_BL.shape[0], -1)
    parts = of_part_BX.shape[1]
    part_X = jnp.arange(parts)
    none_l = jnp.full((cells.size,), parts)
    of_cell_Bl = jax.vmap(lambda cell_X: none_l.at[cell_X].set(part_X, mode="drop"))(of_part_BX)
    to_cells = Links(of_cell_Bl[..., None], of_part_BX[..., None])
    return to_cells, Links(*to_cells[::-1])
