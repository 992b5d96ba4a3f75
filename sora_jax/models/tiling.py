"""Cut clips that are too large to encode or decode at once into tiles, and blend the results.

Host code: NumPy arrays in and out. All tiles of a clip have one shape, so that one compiled program takes them as a
batch, which a mesh splits. Where tiles overlap, results are blended with linear weights, as in latent diffusion's
decoders of large images. If the overlap is larger than the receptive field of the autoencoder, only positions that are
exact in both tiles are blended, and the result equals that of the whole clip to float error.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from sora_jax.config import check
from sora_jax.errors import UserError
from sora_jax.models.first_stage import FirstStageConfig, latent_grid, receptive_field

LATENTS = (1, 1, 1)  # `factors` of a latent itself


@dataclasses.dataclass(frozen=True)
class TilingConfig:
    """Size and overlap of tiles. A clip that fits into a tile is not cut.

    An autoencoder that normalises or attends over whole images gives tiles a result that only resembles the whole's.
    """

    tile: tuple[int, int, int] = (0, 0, 0)  # (frames, height, width) in pixels; 0: all of the axis
    overlap: float = 0.25  # share of a tile, at least, that it has in common with its neighbour

    def __post_init__(self):
        check(
            len(self.tile) == 3 and min(self.tile) >= 0,
            f"--tile is {self.tile}; it must be (frames, height, width) in pixels, 0 for all of an axis",
        )
        check(0 <= self.overlap < 1, f"--tile-overlap is {self.overlap}; it must be at least 0 and less than 1")

    @staticmethod
    def parse(text: str, overlap: float = 0.25) -> "TilingConfig":
        """Parse "FRAMESxHEIGHTxWIDTH", as on the command line; "" cuts nothing."""
        found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text or "0x0x0")
        if found is None:
            raise UserError(
                f"--tile is {text!r}; it must be FRAMESxHEIGHTxWIDTH in pixels (0: all), such as 17x256x256"
            )
        frames, height, width = map(int, found.groups())
        return TilingConfig((frames, height, width), overlap)


@dataclasses.dataclass(frozen=True)
class Axis:
    """Tiles along one axis, in latent positions."""

    starts: tuple[int, ...]  # where each tile begins
    extent: int  # length of every tile


Axes = tuple[Axis, Axis, Axis]  # of time, height, width


def tile_grid(config: FirstStageConfig, tiling: TilingConfig) -> tuple[int, ...]:
    """Return the size (t, h, w) of a tile's latent, 0 for all of an axis.

    Raises:
        UserError: the autoencoder cannot encode clips of the tile's size.
    """
    frames = tiling.tile[0]
    check(
        frames != 1 or config.time_factor == 1,
        f"--tile is {tiling.tile}; it must have more than {config.time_factor} frames, as tiles of one cannot overlap",
    )
    smallest = (1, config.space_factor, config.space_factor)
    try:
        grid = latent_grid(config, *(own or least for own, least in zip(tiling.tile, smallest, strict=True)))
    except UserError as error:
        raise UserError(f"--tile is {tiling.tile}; its {error}") from error
    return tuple(latents if own else 0 for own, latents in zip(tiling.tile, grid, strict=True))


def lay_out(config: FirstStageConfig, tiling: TilingConfig, grid: Sequence[int]) -> Axes:
    """Place the tiles of a clip whose latent has size (t, h, w): as few as the overlap allows, evenly spread."""
    # A tile's first latent frame decodes to a single frame, so tiles must share that latent frame to leave no gap.
    least = (1 if config.time_factor > 1 else 0, 0, 0)
    tiles = zip(grid, tile_grid(config, tiling), least, strict=True)
    time, rows, columns = (
        _place(size, tile, max(math.ceil(tiling.overlap * tile), common)) for size, tile, common in tiles
    )
    return time, rows, columns


def _place(size: int, tile: int, overlap: int) -> Axis:
    """Place tiles along an axis of this size, neighbours with at least this overlap."""
    if tile == 0 or size <= tile:
        return Axis((0,), size)
    step = max(tile - overlap, 1)
    count = math.ceil((size - tile) / step) + 1
    return Axis(tuple(np.linspace(0, size - tile, count).round().astype(int).tolist()), tile)


def count(axes: Axes) -> int:
    """Return the number of tiles."""
    return math.prod(len(axis.starts) for axis in axes)


def factors(config: FirstStageConfig) -> tuple[int, int, int]:
    """Return the pixels of a latent position: (frames, rows, columns)."""
    return config.time_factor, config.space_factor, config.space_factor


def cut(array: np.ndarray, axes: Axes, factors: Sequence[int] = LATENTS) -> list[np.ndarray]:
    """Cut a latent, or, with the `factors` of the autoencoder, a clip, into its tiles."""
    return [array[where] for where in tile_slices(axes, factors)]


def tile_slices(axes: Axes, factors: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Yield the slices (time, height, width) of each tile in a clip, or, with factors of 1, in its latent."""
    return itertools.product(*_axis_slices(axes, factors))


def _axis_slices(axes: Axes, factors: Sequence[int]) -> list[list[slice]]:
    """Return for each axis the slices of its tiles."""
    return [_slices(*pair, causal=number == 0) for number, pair in enumerate(zip(axes, factors, strict=True))]


def _slices(axis: Axis, factor: int, causal: bool) -> list[slice]:
    # In time (causal) the first latent frame of a tile covers one frame: the last one of those it covers in the clip.
    size = 1 + factor * (axis.extent - 1) if causal else factor * axis.extent
    return [slice(factor * start, factor * start + size) for start in axis.starts]


def join(parts: Sequence[np.ndarray], axes: Axes, factors: Sequence[int], fields: Sequence) -> np.ndarray:
    """Blend the results of tiles, in the order of `cut`, to a latent, or, with the `factors` of it, to a clip.

    `fields` are the receptive fields along each axis, (before, after) a position (`receptive_fields`).
    """
    if len(parts) == 1:
        return parts[0]
    spans = _axis_slices(axes, factors)
    margins = [(factor * before, factor * after) for factor, (before, after) in zip(factors, fields, strict=True)]
    weights = [_weights(*pair) for pair in zip(spans, margins, strict=True)]
    whole = np.zeros((*(of_axis[-1].stop for of_axis in spans), parts[0].shape[-1]), np.float32)
    for part, where, along in zip(parts, itertools.product(*spans), itertools.product(*weights), strict=True):
        whole[where] += part * np.einsum("t,y,x->tyx", *along)[..., None]
    return whole


def _weights(spans: list[slice], margin: tuple[float, float]) -> list[np.ndarray]:
    """Return the weights of every tile along one axis; at every position they sum to 1."""
    weights = [np.ones(span.stop - span.start, np.float32) for span in spans]
    for number in range(1, len(spans)):
        common = spans[number - 1].stop - spans[number].start
        if common > 0:
            rising = _rising(common, *margin)
            before, after = weights[number - 1][-common:], weights[number][:common]
            np.minimum(before, 1 - rising, out=before)
            np.minimum(after, rising, out=after)
    total = np.zeros(spans[-1].stop, np.float32)
    for span, weight in zip(spans, weights, strict=True):
        total[span] += weight
    return [weight / total[span] for span, weight in zip(spans, weights, strict=True)]


def _rising(common: int, before: float, after: float) -> np.ndarray:
    """Return weights that rise from 0 to 1 where both tiles are exact or, if they are nowhere, over the whole overlap.

    A tile is not exact at its first `before` and last `after` positions: their receptive field ends beyond its edge.
    """
    if common <= before + after:
        before = after = 0
    return np.clip((np.arange(common, dtype=np.float32) + 0.5 - before) / (common - before - after), 0, 1)


def tiling_warning(
    config: FirstStageConfig, tiling: TilingConfig, grids: Iterable[Sequence[int]], direction: str
) -> str:
    """Return a warning if tiled results of clips with these latents (t, h, w) only approximate the whole, else "".

    `direction` is "encode" or "decode".
    """
    fields = [before + after for before, after in receptive_fields(config, direction)]
    laid_out = [zip(lay_out(config, tiling, grid), fields, strict=True) for grid in grids]
    cut = {(axis, field) for axes in laid_out for axis, field in axes if field and len(axis.starts) > 1}
    if all(_least_overlap(axis) > field for axis, field in cut):
        return ""
    approximate = "tiled results only approximate those of the whole clip; "
    if any(axis.extent <= field + 1 for axis, field in cut):
        return approximate + "tiles of this size are exact at no overlap"
    overlap = max((field + 1) / axis.extent for axis, field in cut)
    return approximate + f"they are exact from an overlap of {math.ceil(1000 * overlap) / 1000:g}"


def _least_overlap(axis: Axis) -> int:
    """Return the smallest overlap of two neighbours."""
    return axis.extent - int(max(np.diff(axis.starts)))


def receptive_fields(config: FirstStageConfig, direction: str) -> tuple[tuple[float, float], ...]:
    """Return the receptive field of "encode" or "decode" along each axis: latents (before, after) a position."""
    time, space = receptive_field(config, direction)
    return (time, 0), (space, space), (space, space)
