"""Encode a dataset folder into a latent cache: every clip passes the frozen autoencoder once."""

import dataclasses
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, tee
from pathlib import Path

import jax
import numpy as np

from sora_jax import console
from sora_jax.config import check, to_dict
from sora_jax.data.feeding.texts import CaptionCounts
from sora_jax.data.fit import shrink
from sora_jax.data.guides import GuideCounts, guide_frames
from sora_jax.data.shard_spec import ShardSpec
from sora_jax.data.storing.clips import Clip, clip_id_of
from sora_jax.data.storing.latents import CacheInfo, GuideLatents, LatentCache, add_latent, finish_cache, start_cache
from sora_jax.data.storing.manifest import Dataset
from sora_jax.files import as_path, local_copy, replacing
from sora_jax.models.codes import digit_weights
from sora_jax.models.first_stage import block_of, codes_of, latent_grid
from sora_jax.models.pretrained import PretrainedText
from sora_jax.models.tiling import TilingConfig, choose_tile, is_cut, tiling_warning
from sora_jax.parallel.mesh import make_mesh
from sora_jax.train.autoencoder import check_sizes
from sora_jax.train.drawings import guide_pictures
from sora_jax.train.frozen import (
    EXPORTED,
    FOLDER,
    RECORD,
    WEIGHTS,
    FrozenAutoencoder,
    frozen_folder,
    load_autoencoder,
    missing_autoencoder,
)
from sora_jax.train.padded_shapes import Size, choose_padded_shapes, padded_shape_of

CLIPS_PER_SHARD = 1024


@dataclasses.dataclass(frozen=True)
class EncodeOptions:
    """Choose how a dataset is encoded; only `text`, `tiles`, `guides` and `low` change what is in the cache."""

    batch: int = 16  # clips (or tiles) encoded at once; the devices share them
    shapes: int = 4  # programs compiled at most, for clips of all sizes
    share: ShardSpec = ShardSpec()  # of the shards, where several processes share the work
    text: PretrainedText | None = None  # encoder that embeds the captions, too
    clips_per_shard: int = CLIPS_PER_SHARD
    tiles: TilingConfig = TilingConfig()  # larger clips are encoded in tiles
    choose_tile: bool = False  # encode clips of all sizes by one program, in the tiles of least work
    guides: GuideCounts = GuideCounts()  # key frames and sketches of each clip that are encoded, too
    low: bool = False  # encode each clip at half its height and width, too

    def __post_init__(self):
        for name in ("batch", "shapes"):
            check(getattr(self, name) > 0, f"--{name} is {getattr(self, name)}; it must be positive")
        for name, count in vars(self.guides).items():
            check(count >= 0, f"--{name.replace('_', '-')} is {count}; it must be 0 (none) or more")


def encode_dataset(autoencoder_run: Path, data: Path, out: Path, options: EncodeOptions = EncodeOptions()) -> bool:
    """Write the latent cache `out`, with a copy of the autoencoder inside; a complete one is kept as it is.

    Returns False where other processes still work on their shards. Nothing that looks complete is left by a crash; the
    same call goes on after the last complete shard.

    Raises:
        UserError: `out` holds latents of another autoencoder, text encoder or tiling, or of other clips.
    """
    autoencoder, dataset = load_autoencoder(autoencoder_run), Dataset(data)
    config, each = autoencoder.config, options.clips_per_shard
    check_sizes(config, dataset)
    if options.low:
        _check_halves(dataset, config.space_factor)
    tiles = choose_tile(config, _sizes(dataset)) if options.choose_tile else options.tiles
    order, padded_shapes = _by_padded_shape(dataset, options.shapes)
    grids = [latent_grid(config, *shape) for shape in padded_shapes]
    info = CacheInfo(
        autoencoder.fingerprint,
        dataset.digest,
        config.latent_channels,
        block_of(config),
        options.text.info if options.text else None,
        to_dict(tiles) if any(is_cut(config, tiles, grid) for grid in grids) else None,
        guides=options.guides,
        low=options.low,
    )
    if autoencoder.code_values is not None:
        digit_weights(codes_of(config), config.latent_channels)  # UserError where a code has no index
        info = dataclasses.replace(info, codes=[values.tolist() for values in autoencoder.code_values])
    if (as_path(out) / "cache.json").exists():
        _check_same(LatentCache(out), info, data)
        return True
    layout = {"canvases": padded_shapes, "clips_per_shard": each}  # the key that caches begun by 0.1.0 have
    parts = start_cache(out, info, -(-len(order) // each), layout)
    missing = parts.missing(options.share)
    if missing and (warning := tiling_warning(config, tiles, grids, "encode")):
        print(f"sora-jax: {warning}", file=sys.stderr)
    if missing:
        copy_autoencoder(autoencoder_run, parts.folder)
    work = [order[part * each : (part + 1) * each] for part in missing]
    clips, again, small = tee(map(dataset.__getitem__, chain(*work)), 3)  # some are behind by a batch at most
    latents = autoencoder.encode((clip.frames for clip in clips), options.batch, padded_shapes, tiles=tiles)
    latents = iter(console.progress(latents, "encode", sum(map(len, work)), unit="clip"))
    guides, counts = _guides(autoencoder, again, options, padded_shapes, tiles), CaptionCounts()
    lows = _lows(autoencoder, small, options, padded_shapes, tiles)
    for part, members in zip(missing, work, strict=True):
        with parts.write(part) as writer, jax.set_mesh(make_mesh()):
            rows = [dataset.row(index) for index in members]
            counts = _count_captions(options.text, rows, counts)
            for row, texts in zip(rows, _texts(options.text, rows), strict=True):
                add_latent(writer, info, row, next(latents), texts, next(guides), next(lows))
    for note in counts.notes("--text-tokens", options.text.max_tokens if options.text else 0):
        console.note(note)
    return finish_cache(parts, info)


def _guides(
    autoencoder: FrozenAutoencoder,
    clips: Iterable[Clip],
    options: EncodeOptions,
    padded_shapes: Sequence[Size],
    tiles: TilingConfig,
) -> Iterator[GuideLatents]:
    """Yield the guides of clips, each picture encoded alone: by as many programs more, of one frame."""
    counts = options.guides
    if not counts:
        yield from (GuideLatents((), ()) for _ in clips)
        return
    clips, again = tee(clips)
    pictures = (guide_pictures(counts, clip_id_of(clip.id), clip.frames) for clip in again)
    stills = list(dict.fromkeys((1, *shape[1:]) for shape in padded_shapes))
    tiles = dataclasses.replace(tiles, tile=(min(tiles.tile[0], 1), *tiles.tile[1:]))
    latents = autoencoder.encode(chain.from_iterable(pictures), options.batch, stills, tiles=tiles)
    for clip in clips:
        frames = guide_frames(counts, clip_id_of(clip.id), len(clip.frames))
        yield GuideLatents(frames, [next(latents) for _ in frames])


def _lows(
    autoencoder: FrozenAutoencoder,
    clips: Iterable[Clip],
    options: EncodeOptions,
    padded_shapes: Sequence[Size],
    tiles: TilingConfig,
) -> Iterator[np.ndarray | None]:
    """Yield the latent of each clip at half its height and width: by as many programs more."""
    if not options.low:
        return (None for _ in clips)
    halves = [(frames, height // 2, width // 2) for frames, height, width in padded_shapes]
    return autoencoder.encode((shrink(clip.frames, 2) for clip in clips), options.batch, halves, tiles=tiles)


def _check_halves(dataset: Dataset, factor: int) -> None:
    """Raise a UserError for a clip that has no latent at half its height and width."""
    for _, *sides in _sizes(dataset):
        size, step = "x".join(map(str, sides)), 2 * factor
        rule = (
            f"with --low heights and widths must be multiples of {step}, as `data build --multiple={step}` makes them"
        )
        check(not any(side % step for side in sides), f"--data has clips of {size} (height x width); {rule}")


def _by_padded_shape(dataset: Dataset, shapes: int) -> tuple[list[int], list[Size]]:
    """Order the clips by their padded shape, then as in the dataset; return that order and the padded shapes."""
    counts = _sizes(dataset)
    padded_shapes = choose_padded_shapes(counts, shapes)
    shape = {size: padded_shapes.index(padded_shape_of(size, padded_shapes)) for size in counts}
    return np.argsort([shape[size] for size in _sides(dataset)], kind="stable").tolist(), padded_shapes


def _sides(dataset: Dataset) -> list[Size]:
    """Return (frames, height, width) of each clip."""
    columns = (dataset.table[name].to_pylist() for name in ("frames", "height", "width"))
    return list(zip(*columns, strict=True))


def _sizes(dataset: Dataset) -> Counter[Size]:
    """Count the clips of each size, smallest first."""
    return Counter(sorted(_sides(dataset)))


def _check_same(cache: LatentCache, info: CacheInfo, data: Path) -> None:
    cache.check(info.fingerprint)
    same = cache.info.data == info.data
    check(same, f"--out is {str(cache.path)!r}; it holds latents of other clips than --data={data}; remove it")
    name = info.text.name if info.text else ""
    check(
        cache.info.text == info.text,
        f"--text-encoder is {name!r}; the cache {str(cache.path)!r} has text of "
        f"{cache.info.text.name if cache.info.text else 'no encoder'!r}; remove it, or give another --out",
    )
    same = cache.info.guides == info.guides
    have = f"{cache.info.guides.key_frames} key frames and {cache.info.guides.sketches} sketches of each clip"
    other = "give these by --key-frames and --sketches, remove it, or give another --out"
    check(same, f"--out is {str(cache.path)!r}; that latent cache holds {have}: {other}")
    have = "has no low resolution, which --low asks for" if info.low else "has a low resolution, and --low is not given"
    check(cache.info.low == info.low, f"--out is {str(cache.path)!r}; that latent cache {have}: give another --out")
    given, have = (_in_words(tiles) for tiles in (info.tiles, cache.info.tiles))
    check(
        given == have,
        f"--tile and --tile-overlap make {given}; the latent cache {str(cache.path)!r} was made of {have}; remove it, "
        "or give another --out",
    )


def _in_words(tiles: dict | None) -> str:
    return f"tiles of {'x'.join(map(str, tiles['tile']))} with overlap {tiles['overlap']}" if tiles else "whole clips"


def _texts(text: PretrainedText | None, rows: Sequence[dict]) -> Iterator[list[np.ndarray]]:
    """Yield for each clip the embeddings of all its captions; of the empty one where it has none."""
    if text is None:
        yield from ([] for _ in rows)
        return
    captions = [row["captions"] or [""] for row in rows]
    found = iter(text.embed_all(list(chain(*captions))))
    yield from ([next(found) for _ in each] for each in captions)


def _count_captions(text: PretrainedText | None, rows: Sequence[dict], counts: CaptionCounts) -> CaptionCounts:
    """Add the captions of some clips to the counts of what the encoder does not read."""
    if text is None:
        return counts
    return counts.plus([text.read(caption) for row in rows for caption in row["captions"]], text.max_tokens)


def copy_autoencoder(run: str | Path, target: Path, replace: bool = False) -> None:
    """Copy the frozen autoencoder beside what was made with it, so that each folder can be used alone.

    An existing copy stays as it is, unless it is to be replaced.
    """
    kept = as_path(target) / FOLDER
    if (kept / RECORD).exists() and not replace:
        return
    for name in (RECORD, WEIGHTS, EXPORTED):
        (kept / name).unlink(missing_ok=True)
    source = frozen_folder(run)
    check((source / RECORD).exists(), missing_autoencoder(run))
    weights = EXPORTED if (source / EXPORTED).exists() else WEIGHTS
    for name in (weights, RECORD):  # in this order: the record makes the copy valid
        with replacing(kept / name) as temporary:
            shutil.copyfile(local_copy(source / name), temporary)
