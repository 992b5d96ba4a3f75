"""Small latent caches with chosen clips."""

import numpy as np

from sora_jax.data.guides import guide_frames
from sora_jax.data.packing.packs import unstack
from sora_jax.data.shard_spec import ShardSpec
from sora_jax.data.storing.clips import clip_id_of
from sora_jax.data.storing.latents import (
    CacheInfo,
    GuideLatents,
    LatentCache,
    TextInfo,
    add_latent,
    finish_cache,
    start_cache,
)

INFO = CacheInfo("print", "data", 2, (2, 4, 4))
TEXT = TextInfo("encoder", "weights", 3, 16)


def clip_row(number: int, grid, captions=None, **changes) -> dict:
    """A dataset's row of clip `number` whose latent has the size `grid`."""
    t, h, w = grid
    captions = {"original": f"clip {number}"} if captions is None else captions
    row = dict(id=f"clip-{number}", variant=0, frames=2 * t - 1, height=4 * h, width=4 * w, fps=8.0, label=-1)
    row |= dict(captions=list(captions.values()), kinds=list(captions), weight=1.0, split="train", grid=grid)
    return row | changes


def latent_of(row: dict, channels: int = 2) -> np.ndarray:
    """Noise that belongs to the row's id and variant."""
    name = f"{row['id']}/{row['variant']}".encode()
    draws = np.random.default_rng(list(name))
    return draws.normal(size=(*row["grid"], channels)).astype(np.float16)


def embeddings_of(row: dict) -> list[np.ndarray]:
    """For each caption as many vectors as it has words (the empty one: one), all of its own value."""
    captions = row["captions"] or [""]
    return [np.full((max(1, len(c.split())), TEXT.width), hash_of(c), np.float16) for c in captions]


def guides_of(row: dict, info: CacheInfo) -> GuideLatents:
    """Noise for each guide that the cache holds of a clip."""
    if not info.guides:
        return GuideLatents((), ())
    frames = guide_frames(info.guides, clip_id_of(row["id"]), row["frames"])
    draws = np.random.default_rng(list(row["id"].encode()))
    return GuideLatents(frames, [draws.normal(size=(1, *row["grid"][1:], 2)).astype(np.float16) for _ in frames])


def packs_of(stream, count: int) -> list[dict]:
    """The first packs of the stream of `PackedBatches`."""
    steps = -(-count // stream.batch)
    return [pack for step in range(steps) for pack in unstack(stream[step])][:count]


def hash_of(caption: str) -> float:
    return float(sum(caption.encode()) % 97)


def write_cache(
    path, rows, info: CacheInfo = INFO, each: int = 32, share: ShardSpec = ShardSpec()
) -> LatentCache | None:
    """A cache of these rows in parts of `each` clips, or the parts of one share; None where others are missing."""
    parts = start_cache(path, info, -(-len(rows) // each))
    for part in parts.missing(share):
        with parts.write(part) as writer:
            for row in rows[part * each : (part + 1) * each]:
                texts = embeddings_of(row) if info.text else []
                low = latent_of(row)[:, ::2, ::2] + np.float16(1) if info.low else None
                add_latent(writer, info, row, latent_of(row), texts, guides_of(row, info), low)
    return LatentCache(path) if finish_cache(parts, info) else None
