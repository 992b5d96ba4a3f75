"""Encode and decode clips of any length and size by one compiled program: chunk by chunk in time, tile by tile.

The memory on the device does not grow with a clip's length. Chunks are exact (`nn.past`); of tiles see `models.tiling`.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from sora_jax.models import tiling
from sora_jax.models.first_stage import FirstStageConfig, decode, encode, latent_grid, receptive_field
from sora_jax.models.tiling import TilingConfig
from sora_jax.nn.past import Past
from sora_jax.parallel.rules import on_mesh, parts, reshard

Chunks = Iterator[list[np.ndarray]]  # for each chunk the results of all tiles


class _Clip(NamedTuple):
    """Hold a clip, or a latent, cut into tiles."""

    tiles: list[np.ndarray]  # (T, height, width, C) of each
    sizes: list[tuple[int, int]]  # own height and width of each, in pixels
    axes: tiling.Axes
    grid: tuple[int, int, int]  # of its latent


def encode_stream(
    params: dict, config: FirstStageConfig, clips: Iterable[np.ndarray], tiles: TilingConfig, batch: int
) -> Iterator[np.ndarray]:
    """Encode uint8 clips (T, H, W, 3) into the means (t, h, w, C) of their posteriors, in order, `batch` tiles at once.

    Clips that share a batch are processed as long as the longest: clips of similar lengths in a row save work.
    """
    _, radius = receptive_field(config, "encode")
    for group in _groups((_cut_clip(config, tiles, clip) for clip in clips), batch):
        chunk = config.time_factor * _chunk(config, tiles, group)
        found = _whole(_advance(_encode_chunk, params, config, group, chunk, batch))
        for clip in group:
            t, h, w = clip.grid
            yield tiling.join([next(found)[:t] for _ in clip.tiles], clip.axes, 1, radius)[:, :h, :w]


def decode_stream(
    params: dict, config: FirstStageConfig, latents: Iterable[np.ndarray], tiles: TilingConfig, batch: int
) -> Iterator[np.ndarray]:
    """Decode latents (t, h, w, C), not normalised, into float clips (T, H, W, 3), in order, `batch` tiles at once."""
    for group in _groups((_cut_latent(config, tiles, z) for z in latents), batch):
        found = _whole(_advance(_decode_chunk, params, config, group, _chunk(config, tiles, group), batch))
        for clip in group:
            yield _joined(config, clip, [next(found) for _ in clip.tiles], config.time_factor - 1, clip.grid[0])


def decode_chunks(
    params: dict, config: FirstStageConfig, z_thwC: np.ndarray, tiles: TilingConfig, batch: int
) -> Iterator[np.ndarray]:
    """Decode one latent, not normalised, chunk by chunk: yield parts (T, H, W, 3) of its float clip, in order.

    No memory grows with the clip's length but that of the latent. Without `tiles`, a chunk is one latent.
    """
    tiles = tiles if tiles.tile[0] else TilingConfig((1, *tiles.tile[1:]), tiles.overlap)
    clip = _cut_latent(config, tiles, z_thwC)
    chunk, begin = _chunk(config, tiles, [clip]), 0
    for results in _advance(_decode_chunk, params, config, [clip], chunk, batch):
        drop = config.time_factor - 1 if begin == 0 else 0
        yield _joined(config, clip, results, drop, clip.grid[0] - begin)
        begin += chunk


def decode_ring(
    params: dict, config: FirstStageConfig, z_thwC: np.ndarray, tiles: TilingConfig, batch: int
) -> np.ndarray:
    """Decode a latent, not normalised, whose last frame is followed by its first: a loop (f_t t, H, W, 3) without seam.

    A rotation of the latent by k rotates the loop by f_t k frames. The decoder is first run over as many latents as it
    looks back, so that where it began has no influence.
    """
    back, _ = receptive_field(config, "decode")
    lead = np.arange(-int(back), len(z_thwC)) % len(z_thwC)
    clip = np.concatenate(list(decode_chunks(params, config, z_thwC[lead], tiles, batch)))
    return clip[-config.time_factor * len(z_thwC) :]


def _cut_clip(config: FirstStageConfig, tiles: TilingConfig, clip_THWC: np.ndarray) -> _Clip:
    grid = latent_grid(config, *clip_THWC.shape[:3])
    axes = tiling.lay_out(config, tiles, grid, "encode")
    # The first frame fills the first group of frames.
    whole = np.concatenate([clip_THWC[:1]] * (config.time_factor - 1) + [clip_THWC])
    arrays, sizes = zip(*tiling.cut(whole, axes, config.space_factor), strict=True)
    return _Clip(list(arrays), list(sizes), axes, grid)


def _cut_latent(config: FirstStageConfig, tiles: TilingConfig, z_thwC: np.ndarray) -> _Clip:
    t, h, w = z_thwC.shape[:3]
    axes = tiling.lay_out(config, tiles, (t, h, w), "decode")
    arrays, sizes = zip(*tiling.cut(np.asarray(z_thwC, np.float32), axes), strict=True)
    factor = config.space_factor
    return _Clip(list(arrays), [(factor * rows, factor * columns) for rows, columns in sizes], axes, (t, h, w))


def _joined(
    config: FirstStageConfig, clip: _Clip, results: Sequence[np.ndarray], drop: int, latents: int
) -> np.ndarray:
    """Join decoded tiles, without the first `drop` frames and those after so many latents."""
    _, radius = receptive_field(config, "decode")
    _, h, w = clip.grid
    factor = config.space_factor
    results = [frames[drop : latents * config.time_factor] for frames in results]
    return tiling.join(results, clip.axes, factor, radius)[:, : h * factor, : w * factor]


def _chunk(config: FirstStageConfig, tiles: TilingConfig, group: Sequence[_Clip]) -> int:
    """Return the latents of a chunk."""
    return tiling.tile_grid(config, tiles)[0] or max(clip.grid[0] for clip in group)


def _groups(clips: Iterable[_Clip], batch: int) -> Iterator[list[_Clip]]:
    """Collect clips in a row whose tiles have one shape and fit into a batch, at least one."""
    group: list[_Clip] = []
    for clip in clips:
        tiles = sum(len(other.tiles) for other in [*group, clip])
        if group and (tiles > batch or clip.tiles[0].shape[1:] != group[0].tiles[0].shape[1:]):
            yield group
            group = []
        group.append(clip)
    if group:
        yield group


def _whole(chunks: Chunks) -> Iterator[np.ndarray]:
    """Yield of each tile the results of all its chunks as one array."""
    return (np.concatenate(results) for results in zip(*chunks, strict=True))


def _advance(
    function: Callable, params: dict, config: FirstStageConfig, group: Sequence[_Clip], chunk: int, batch: int
) -> Chunks:
    """Apply `function` to all tiles of a group, `chunk` frames at a time, up to the end of the longest.

    Tiles that end before, and rows that fill the last batch, are given frames that they already had.
    """
    tiles = [tile for clip in group for tile in clip.tiles]
    sizes = np.array([size for clip in group for size in clip.sizes], np.int32)
    batch = -(-batch // parts("batch")) * parts("batch")
    rows = [np.arange(start, start + batch).clip(max=len(tiles) - 1) for start in range(0, len(tiles), batch)]
    caches: list = [None] * len(rows)
    for begin in range(0, max(map(len, tiles)), chunk):
        results: list[np.ndarray] = []
        for number, members in enumerate(rows):
            frames = [_frames(tiles[i], begin, chunk) for i in members]
            first = np.full(batch, begin == 0)
            arguments = params, config, np.stack(frames), sizes[members], first
            if caches[number] is None:
                caches[number] = _empty_cache(function, *arguments)
            result, caches[number] = function(*arguments, caches[number])
            results.extend(np.asarray(result))
        yield results[: len(tiles)]


def _frames(tile: np.ndarray, begin: int, count: int) -> np.ndarray:
    """Return `count` frames from `begin` on; behind the last one, the last one."""
    return tile[np.arange(begin, begin + count).clip(max=len(tile) - 1)]


def _empty_cache(function: Any, *arguments: Any) -> list[jax.Array]:
    """Return zeros for the cache of clips that begin: it is not read, but with it they need no program of their own."""
    _, cache = function.eval_shape(*arguments, None)
    mesh = jax.sharding.get_mesh() if on_mesh() else None
    return [
        jax.device_put(np.zeros(x.shape, x.dtype), NamedSharding(mesh, x.sharding.spec) if mesh else None)
        for x in cache
    ]


@functools.partial(jax.jit, static_argnums=1, donate_argnums=5)
def _encode_chunk(
    params: dict,
    config: FirstStageConfig,
    frames: jax.Array,
    sizes_B2: jax.Array,
    first_B: jax.Array,
    cache: list[jax.Array] | None,
) -> tuple[jax.Array, list[jax.Array]]:
    past = Past(reshard(first_B, "batch"), cache)
    video = reshard(frames, "batch", None, None, None, None).astype(jnp.float32) / 127.5 - 1.0
    mean, _ = encode(params, config, video, reshard(sizes_B2, "batch", None), past)
    return mean, past.next


@functools.partial(jax.jit, static_argnums=1, donate_argnums=5)
def _decode_chunk(
    params: dict,
    config: FirstStageConfig,
    frames: jax.Array,
    sizes_B2: jax.Array,
    first_B: jax.Array,
    cache: list[jax.Array] | None,
) -> tuple[jax.Array, list[jax.Array]]:
    past = Past(reshard(first_B, "batch"), cache)
    z = reshard(frames, "batch", None, None, None, None)
    return decode(params, config, z, reshard(sizes_B2, "batch", None), past), past.next
