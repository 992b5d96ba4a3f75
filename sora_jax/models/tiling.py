"""Clips too large to encode or decode at once, in tiles: where they lie, and their results put together.

Host code: NumPy arrays in and out. The tiles of a clip have one shape, so they go through one compiled program as a
batch, which a mesh shares out. Tiles overlap, and where they do their results are mixed with weights that rise and
fall linearly, as in latent diffusion's decoders of large pictures. Where they overlap by more than the autoencoder
sees, only what is right in both is mixed, and the result is that of the whole clip to float error.
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

LATENTS = (1, 1, 1)  # the factors between latents and latents


@dataclasses.dataclass(frozen=True)
class TilingConfig:
    """`tile` is (frames, height, width), in pixels, of a tile; 0: all there are. A clip that fits is not cut.

    Neighbours have at least the share `overlap` of a tile in common. What an autoencoder that normalises or attends
    over whole pictures makes of tiles only resembles what it makes of the whole.
    """

    tile: tuple[int, int, int] = (0, 0, 0)
    overlap: float = 0.25

    def __post_init__(self):
        check(
            len(self.tile) == 3 and min(self.tile) >= 0,
            f"tile is {self.tile}; it must be (frames, height, width) in pixels, 0 for all there are",
        )
        check(0 <= self.overlap < 1, f"tile overlap is {self.overlap}; it must be at least 0 and less than 1")

    @staticmethod
    def parse(text: str, overlap: float = 0.25) -> "TilingConfig":
        """From "FRAMESxHEIGHTxWIDTH", as on the command line; "" cuts nothing."""
        if text and not re.fullmatch(r"\d+x\d+x\d+", text):
            raise UserError(
                f"--tile is {text!r}; it must be FRAMESxHEIGHTxWIDTH in pixels (0: all), such as 17x256x256"
            )
        return TilingConfig(tuple(map(int, text.split("x"))) if text else (0, 0, 0), overlap)


@dataclasses.dataclass(frozen=True)
class Axis:
    """The tiles along one axis, counted in latents: where each begins, and how far all of them go."""

    starts: tuple[int, ...]
    extent: int


Axes = tuple[Axis, Axis, Axis]  # of time, height, width


def tile_grid(config: FirstStageConfig, tiling: TilingConfig) -> tuple[int, ...]:
    """(t, h, w) of a tile's latent, 0 where it is the clip's; UserError where the autoencoder takes no such tile."""
    frames = tiling.tile[0]
    check(
        frames != 1 or config.time_factor == 1,
        f"tile is {tiling.tile}; tiles of one frame cannot overlap, more than {config.time_factor} can",
    )
    smallest = (1, config.space_factor, config.space_factor)
    try:
        grid = latent_grid(config, *(own or least for own, least in zip(tiling.tile, smallest, strict=True)))
    except UserError as error:
        raise UserError(f"tile is {tiling.tile}; its {error}") from error
    return tuple(latents if own else 0 for own, latents in zip(tiling.tile, grid, strict=True))


def lay_out(config: FirstStageConfig, tiling: TilingConfig, grid: Sequence[int]) -> Axes:
    """The tiles of a clip whose latent is (t, h, w): as few as overlap enough, evenly spread."""
    least = (1 if config.time_factor > 1 else 0, 0, 0)  # of a tile's first latent frame there is one frame alone
    tiles = zip(grid, tile_grid(config, tiling), least, strict=True)
    return tuple(_along(size, tile, max(math.ceil(tiling.overlap * tile), common)) for size, tile, common in tiles)


def _along(size: int, tile: int, common: int) -> Axis:
    if tile == 0 or size <= tile:
        return Axis((0,), size)
    step = max(tile - common, 1)
    count = math.ceil((size - tile) / step) + 1
    return Axis(tuple(np.linspace(0, size - tile, count).round().astype(int).tolist()), tile)


def count(axes: Axes) -> int:
    """The number of tiles."""
    return math.prod(len(axis.starts) for axis in axes)


def factors(config: FirstStageConfig) -> tuple[int, int, int]:
    """Pixels of a latent: frames, rows, columns."""
    return config.time_factor, config.space_factor, config.space_factor


def cut(array: np.ndarray, axes: Axes, factors: Sequence[int] = LATENTS) -> list[np.ndarray]:
    """The tiles of a latent, or, with its factors, of a clip."""
    return [array[where] for where in places(axes, factors)]


def places(axes: Axes, factors: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Where each tile lies in a clip (or, with factors of 1, in its latent)."""
    return itertools.product(*(_spans(*pair, causal=not number) for number, pair in enumerate(zip(axes, factors))))


def _spans(axis: Axis, factor: int, causal: bool) -> list[slice]:
    """Along the axis of time the first latent of a tile is of one frame, the last of those it has in the clip."""
    size = 1 + factor * (axis.extent - 1) if causal else factor * axis.extent
    return [slice(factor * start, factor * start + size) for start in axis.starts]


def join(parts: Sequence[np.ndarray], axes: Axes, factors: Sequence[int], fields: Sequence) -> np.ndarray:
    """The whole of what was made of the tiles, in the order of `cut`: a latent, or, with its factors, a clip.

    fields: for each axis, how many latents before and after a position change it (`receptive_field`).
    """
    if len(parts) == 1:
        return parts[0]
    spans = [_spans(*pair, causal=not number) for number, pair in enumerate(zip(axes, factors))]
    margins = [(factor * before, factor * after) for factor, (before, after) in zip(factors, fields, strict=True)]
    weights = [_weights(*pair) for pair in zip(spans, margins, strict=True)]
    whole = np.zeros((*(of_axis[-1].stop for of_axis in spans), parts[0].shape[-1]), np.float32)
    for part, where, along in zip(parts, itertools.product(*spans), itertools.product(*weights), strict=True):
        whole[where] += part * np.einsum("t,y,x->tyx", *along)[..., None]
    return whole


def _weights(spans: list[slice], margin: tuple[float, float]) -> list[np.ndarray]:
    """Of every position of every tile along one axis; those of a position sum to 1."""
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
    """From 0 to 1: where both tiles are right, if they are somewhere, else over all they have in common."""
    if common <= before + after:
        before = after = 0
    return np.clip((np.arange(common, dtype=np.float32) + 0.5 - before) / (common - before - after), 0, 1)


def nearness(config: FirstStageConfig, tiling: TilingConfig, grids: Iterable[Sequence[int]], what: str) -> str:
    """What to tell of the tiles of clips with these latents (t, h, w): "" where they make the whole exactly.

    what: "encode" or "decode".
    """
    around = [before + after for before, after in receptive_fields(config, what)]
    laid_out = [zip(lay_out(config, tiling, grid), around, strict=True) for grid in grids]
    cut = {(axis, reached) for axes in laid_out for axis, reached in axes if reached and len(axis.starts) > 1}
    if all(_least_common(axis) > reached for axis, reached in cut):
        return ""
    near = "these tiles come near the whole; "
    if any(axis.extent <= reached + 1 for axis, reached in cut):
        return near + "none of their size are exact at any overlap"
    overlap = max((reached + 1) / axis.extent for axis, reached in cut)
    return near + f"exact from an overlap of {math.ceil(1000 * overlap) / 1000:g}"


def _least_common(axis: Axis) -> int:
    """What two neighbours have in common at least."""
    return axis.extent - max(np.diff(axis.starts))


def receptive_fields(config: FirstStageConfig, what: str) -> tuple:
    """How many latents before and after a position change what is made of it: of "encode" or "decode", by axis."""
    time, space = receptive_field(config, what)
    return (time, 0), (space, space), (space, space)
