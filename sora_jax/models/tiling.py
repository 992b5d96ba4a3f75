"""Cut clips that are too large, or of too many sizes, to be processed whole: tiles in space, chunks in time.

Host code. All tiles have one shape, so that one compiled program takes them as a batch, which a mesh splits; a clip
that is smaller than a tile is padded to it and masked. Chunks in time are exact (`nn.past`). Tiles in space are exact,
too, where they overlap by twice the receptive field: each position is taken from a tile that sees all of it. Where an
autoencoder attends over, or normalises, whole frames, or tiles are too small for that, results of neighbours are
blended with linear weights, as in latent diffusion's decoders of large images.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from sora_jax.config import check
from sora_jax.errors import UserError
from sora_jax.models.first_stage import FirstStageConfig, latent_grid, receptive_field

Size = tuple[int, int, int]
MOST_PIXELS = 512 * 512  # height x width of a tile that is chosen automatically


@dataclasses.dataclass(frozen=True)
class TilingConfig:
    """Size and overlap of tiles, and length of chunks. All 0: clips are processed whole.

    An autoencoder that normalises or attends over whole images gives tiles a result that only resembles the whole's.
    """

    tile: tuple[int, int, int] = (0, 0, 0)  # (frames of a chunk, height, width) in pixels; 0: all of the axis
    overlap: float = 0.25  # share of a tile, at least, that it has in common with its neighbour where it is not exact

    def __post_init__(self):
        check(
            len(self.tile) == 3 and min(self.tile) >= 0,
            f"--tile is {self.tile}; it must be (frames, height, width) in pixels, 0 for all of an axis",
        )
        check(0 <= self.overlap < 1, f"--tile-overlap is {self.overlap}; it must be at least 0 and less than 1")

    def __bool__(self) -> bool:
        return any(self.tile)

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
    """Tiles along height or width, in latent positions."""

    starts: tuple[int, ...]  # where each tile begins
    extent: int  # length of every tile; of a single tile it may be more than the clip's


Axes = tuple[Axis, Axis]  # of height and width


def tile_grid(config: FirstStageConfig, tiling: TilingConfig) -> tuple[int, ...]:
    """Return the size (t, h, w) of the latent of a chunk of a tile, 0 for all of an axis.

    Raises:
        UserError: the autoencoder cannot encode clips of the tile's size.
    """
    smallest = (1, config.space_factor, config.space_factor)
    try:
        grid = latent_grid(config, *(own or least for own, least in zip(tiling.tile, smallest, strict=True)))
    except UserError as error:
        raise UserError(f"--tile is {tiling.tile}; its {error}") from error
    return tuple(latents if own else 0 for own, latents in zip(tiling.tile, grid, strict=True))


def lay_out(config: FirstStageConfig, tiling: TilingConfig, grid: Sequence[int], direction: str) -> Axes:
    """Place the tiles of a clip whose latent has size (t, h, w): as few as the overlap allows, evenly spread.

    `direction` is "encode" or "decode".
    """
    _, radius = receptive_field(config, direction)
    _, *tile = tile_grid(config, tiling)
    rows, columns = (_place(*pair, radius, tiling.overlap) for pair in zip(grid[1:], tile, strict=True))
    return rows, columns


def _place(size: int, tile: int, radius: float, overlap: float) -> Axis:
    """Place tiles along an axis of this size; neighbours overlap so that they are exact, if tiles are that large."""
    if tile == 0 or size <= tile:
        return Axis((0,), tile or size)
    exact = 2 * radius < tile
    step = max(tile - (int(2 * radius) if exact else math.ceil(overlap * tile)), 1)
    count = math.ceil((size - tile) / step) + 1
    return Axis(tuple(np.linspace(0, size - tile, count).round().astype(int).tolist()), tile)


def count(axes: Axes) -> int:
    """Return the number of tiles."""
    return math.prod(len(axis.starts) for axis in axes)


def is_cut(config: FirstStageConfig, tiling: TilingConfig, grid: Sequence[int]) -> bool:
    """Return True if a clip whose latent has size (t, h, w) is larger than a tile along any axis."""
    return any(0 < tile < size for tile, size in zip(tile_grid(config, tiling), grid, strict=True))


def cut(array: np.ndarray, axes: Axes, factor: int = 1) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
    """Yield the tiles (T, height, width, C) of a latent, or, with the space `factor`, of a clip, and their own sizes.

    A tile's own size is the height and width of what it has of the clip; below and on the right of that are zeros.
    """
    for rows, columns in itertools.product(*_slices(axes, factor)):
        tile = array[:, rows, columns]
        own = tile.shape[1], tile.shape[2]
        missing = rows.stop - rows.start - own[0], columns.stop - columns.start - own[1]
        yield np.pad(tile, ((0, 0), (0, missing[0]), (0, missing[1]), (0, 0))) if any(missing) else tile, own


def _slices(axes: Axes, factor: int) -> list[list[slice]]:
    """Return for height and width the slices of the tiles."""
    return [[slice(factor * s, factor * (s + axis.extent)) for s in axis.starts] for axis in axes]


def join(parts: Sequence[np.ndarray], axes: Axes, factor: int, radius: float) -> np.ndarray:
    """Join results of tiles (T, height, width, C), in the order of `cut`, to a latent, or, with `factor`, to a clip.

    `radius` is that of the receptive field, in latent positions.
    """
    if len(parts) == 1:
        return parts[0]
    spans = _slices(axes, factor)
    rows, columns = (_weights(along, factor * radius) for along in spans)
    whole = np.zeros((len(parts[0]), spans[0][-1].stop, spans[1][-1].stop, parts[0].shape[-1]), np.float32)
    for part, (where, weights) in zip(
        parts, zip(itertools.product(*spans), itertools.product(rows, columns), strict=True), strict=True
    ):
        whole[:, where[0], where[1]] += part * (weights[0][:, None] * weights[1])[..., None]
    return whole


def _weights(spans: list[slice], radius: float) -> list[np.ndarray]:
    """Return the weights of every tile along one axis; at every position they sum to 1."""
    weights = [np.ones(span.stop - span.start, np.float32) for span in spans]
    for number in range(1, len(spans)):
        common = spans[number - 1].stop - spans[number].start
        if common > 0:
            rising = _rising(common, radius)
            before, after = weights[number - 1][-common:], weights[number][:common]
            np.minimum(before, 1 - rising, out=before)
            np.minimum(after, rising, out=after)
    total = np.zeros(spans[-1].stop, np.float32)
    for span, weight in zip(spans, weights, strict=True):
        total[span] += weight
    return [weight / total[span] for span, weight in zip(spans, weights, strict=True)]


def _rising(common: int, radius: float) -> np.ndarray:
    """Return weights that rise from 0 to 1: at once where both tiles are exact or, if they are nowhere, linearly.

    A tile is not exact at its first and last `radius` positions: their receptive field ends beyond its edge.
    """
    middle = np.arange(common, dtype=np.float32) + 0.5
    return (middle > common / 2).astype(np.float32) if common >= 2 * radius else middle / common


def tiling_warning(
    config: FirstStageConfig, tiling: TilingConfig, grids: Iterable[Sequence[int]], direction: str
) -> str:
    """Return a warning if tiled results of clips with these latents (t, h, w) only approximate the whole, else "".

    `direction` is "encode" or "decode".
    """
    _, radius = receptive_field(config, direction)
    laid_out = itertools.chain.from_iterable(lay_out(config, tiling, grid, direction) for grid in grids)
    if not radius or all(len(axis.starts) == 1 or 2 * radius < axis.extent for axis in laid_out):
        return ""
    approximate = "tiled results only approximate those of the whole clip; "
    if math.isinf(radius):
        return approximate + "this autoencoder has layers that see whole frames"
    side = config.space_factor * (int(2 * radius) + 1)
    return approximate + f"tiles of at least {side} pixels in height and width are exact"


def choose_tile(config: FirstStageConfig, sizes: Mapping[Size, int], direction: str = "encode") -> TilingConfig:
    """Choose the tile and the chunk of least work for clips of many sizes, so that one program takes them all.

    `sizes` are the numbers of clips of each (frames, height, width). An autoencoder that sees whole frames gets a tile
    that holds all clips.
    """
    _, radius = receptive_field(config, direction)
    grids = np.array([latent_grid(config, *size) for size in sizes])
    clips = np.array(list(sizes.values()), np.float64)
    rows, columns = (_sides(grids[:, axis], radius) for axis in (1, 2))
    costs = {}
    for pair in itertools.product(rows, columns):
        tiles = [
            [len(_place(size, tile, radius, 0).starts) for size in grids[:, axis]]
            for axis, tile in enumerate(pair, start=1)
        ]
        costs[pair] = float((clips * grids[:, 0] * np.prod(tiles, 0)).sum() * math.prod(pair))
    small = {pair: cost for pair, cost in costs.items() if math.prod(pair) * config.space_factor**2 <= MOST_PIXELS}
    height, width = min(small or costs, key=(small or costs).__getitem__)
    # A chunk costs about one latent more than it has: what its convolutions see twice, and the call.
    chunk = min(range(1, grids[:, 0].max() + 1), key=lambda k: float((clips * -(-grids[:, 0] // k)).sum() * (k + 1)))
    frames = 1 + config.time_factor * (chunk - 1)
    return TilingConfig((frames, height * config.space_factor, width * config.space_factor))


def _sides(sizes: np.ndarray, radius: float) -> list[int]:
    """Return the sides of tiles to try: those that are exact, up to that of the largest clip."""
    largest = int(sizes.max())
    smallest = largest if math.isinf(radius) else min(int(2 * radius) + 1, largest)
    return list(range(smallest, largest + 1, max(1, (largest - smallest) // 32))) + [largest]
