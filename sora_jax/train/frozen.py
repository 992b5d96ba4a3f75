"""A trained autoencoder, frozen: weights, latent statistics and a fingerprint in one small folder."""

import dataclasses
import functools
import hashlib
import itertools
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization, traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from sora_jax.config import check, from_dict, to_dict
from sora_jax.data.canvases import Size, canvas_of
from sora_jax.errors import UserError
from sora_jax.files import as_path, local_copy, read_text, replacing, write_json
from sora_jax.models import tiling
from sora_jax.models.first_stage import FirstStageConfig, autoencoder_specs, decode, encode, latent_grid
from sora_jax.models.tiling import TilingConfig
from sora_jax.nn import params as param
from sora_jax.parallel.rules import on_mesh, parts, reshard
from sora_jax.train.autoencoder import to_float, to_uint8

FOLDER = "frozen"
WEIGHTS, RECORD = "weights.npz", "autoencoder.json"
SMALLEST_STD = 0.01  # of the largest channel
# To be changed with whatever changes a latent of the same weights; tests/test_frozen.py knows when.
CODE = "uint8 / 127.5 - 1, posterior mean, per-channel statistics; version 1"


@dataclasses.dataclass(frozen=True)
class FrozenAutoencoder:
    """An autoencoder to use, not to train: latents in and out of it are normalised by its own statistics."""

    config: FirstStageConfig
    params: dict
    mean_C: np.ndarray
    std_C: np.ndarray

    @property
    def fingerprint(self) -> str:
        """Hex digest of config, weights, statistics, preprocessing and code version: what a latent depends on."""
        digest = hashlib.sha256(CODE.encode())
        digest.update(json.dumps(to_dict(self.config), sort_keys=True).encode())
        for name, value in sorted(_flat(self).items()):
            digest.update(name.encode() + np.ascontiguousarray(value).tobytes())
        return digest.hexdigest()

    def encode(
        self,
        clips: Iterable[np.ndarray],
        batch: int = 16,
        canvases: Sequence[Size] | None = None,
        tiles: TilingConfig = TilingConfig(),
    ) -> Iterator[np.ndarray]:
        """uint8 clips (T, H, W, 3) of any sizes -> normalised float32 latents (t, h, w, C), in order.

        canvases: the shapes that programs are compiled for, each clip taking the smallest that holds it; default its
        own. The latent is the same to float error: later frames do not reach earlier ones, and what lies beside the
        clip is masked. tiles: what is larger is cut into tiles, `batch` of which are encoded at once.
        """
        pixels, seen = tiling.factors(self.config), tiling.seen(self.config, "encode")
        whole: list[tuple[Size, tiling.Axes]] = []  # clips that are on their way
        sizes: list[tuple[int, int]] = []  # of what the tiles that are on their way have of their clips
        params = _placed(self.params)

        def placed():
            for clip in clips:
                own = clip.shape[:3]
                canvas = own if canvases is None else canvas_of(own, canvases)
                axes = tiling.lay_out(self.config, tiles, latent_grid(self.config, *canvas))
                whole.append((own, axes))
                sizes.extend(_own_sizes(own, tiling.places(axes, pixels)))
                yield from tiling.cut(clip if canvas == own else _on_canvas(clip, canvas), axes, pixels)

        def run(video_BTHWC):
            own = sizes[: len(video_BTHWC)]
            own += own[-1:] * (len(video_BTHWC) - len(own))  # the filler, whose latents are dropped
            mean, _ = _encode(params, self.config, video_BTHWC, np.array(own, np.int32))
            return (np.asarray(mean) - self.mean_C) / self.std_C

        found = (part for part in _in_batches(run, placed(), batch) if sizes.pop(0))
        for first in found:
            own, axes = whole.pop(0)
            parts = first, *itertools.islice(found, tiling.count(axes) - 1)
            t, h, w = latent_grid(self.config, *own)
            yield tiling.join(parts, axes, tiling.LATENTS, seen)[:t, :h, :w]

    def decode(
        self, latents: Iterable[np.ndarray], batch: int = 16, tiles: TilingConfig = TilingConfig()
    ) -> Iterator[np.ndarray]:
        """Normalised latents of any sizes -> uint8 clips, in order; tiles: as in `encode`."""
        pixels, seen = tiling.factors(self.config), tiling.seen(self.config, "decode")
        whole: list[tiling.Axes] = []
        params = _placed(self.params)

        def placed():
            for z_thwC in latents:
                whole.append(tiling.lay_out(self.config, tiles, z_thwC.shape[:3]))
                yield from tiling.cut(z_thwC, whole[-1])

        def run(z_BthwC):
            z_BthwC = np.asarray(z_BthwC, np.float32) * self.std_C + self.mean_C
            return np.asarray(_decode(params, self.config, z_BthwC))

        found = _in_batches(run, placed(), batch)
        for first in found:
            axes = whole.pop(0)
            parts = first, *itertools.islice(found, tiling.count(axes) - 1)
            yield to_uint8(tiling.join(parts, axes, pixels, seen))


def _placed(params: dict) -> dict:
    """The parameters on each device of the mesh that is set: once, not with every batch."""
    return jax.device_put(params, NamedSharding(jax.sharding.get_mesh(), PartitionSpec()) if on_mesh() else None)


def _own_sizes(clip: Size, places: Iterable[tuple[slice, ...]]) -> Iterator[tuple[int, int]]:
    """Height and width of what each tile of a canvas has of the clip, in its first corner."""
    for where in places:
        pairs = zip(clip[1:], where[1:], strict=True)
        yield tuple(min(max(size - span.start, 0), span.stop - span.start) for size, span in pairs)


def _on_canvas(clip: np.ndarray, canvas: Size) -> np.ndarray:
    """The clip in the first corner of a larger shape."""
    return np.pad(clip, [(0, whole - own) for whole, own in zip(canvas, clip.shape)] + [(0, 0)])


@functools.partial(jax.jit, static_argnums=1)
def _encode(params, config, frames, sizes_B2):
    frames = to_float(reshard(frames, "batch", None, None, None, None))
    return encode(params, config, frames, reshard(sizes_B2, "batch", None))


@functools.partial(jax.jit, static_argnums=1)
def _decode(params, config, z):
    return decode(params, config, reshard(z, "batch", None, None, None, None))


def _in_batches(function, arrays: Iterable[np.ndarray], batch: int) -> Iterator[np.ndarray]:
    """Applies `function` to runs of equal shape, filled up to `batch` so that each shape compiles once."""
    batch = -(-batch // parts("batch")) * parts("batch")
    held: list[np.ndarray] = []
    for array in arrays:
        if held and (array.shape != held[0].shape or len(held) == batch):
            yield from _flush(function, held, batch)
            held = []
        held.append(array)
    if held:
        yield from _flush(function, held, batch)


def _flush(function, held: list[np.ndarray], batch: int) -> np.ndarray:
    filled = held + [held[-1]] * (batch - len(held))
    return function(np.stack(filled))[: len(held)]


def measure_statistics(
    params,
    config: FirstStageConfig,
    clips: Iterable[np.ndarray],
    batch: int = 16,
    tiles: TilingConfig = TilingConfig(),
):
    """Mean and standard deviation of each latent channel over clips, each position counting once.

    No deviation is taken for less than SMALLEST_STD times the largest.
    """
    raw = FrozenAutoencoder(config, params, np.zeros(1, np.float32), np.ones(1, np.float32))
    count, total, squares = 0, 0.0, 0.0
    for z_thwC in raw.encode(clips, batch, tiles=tiles):
        flat = z_thwC.reshape(-1, z_thwC.shape[-1]).astype(np.float64)
        count, total, squares = count + len(flat), total + flat.sum(0), squares + np.square(flat).sum(0)
    check(count > 0, "the dataset has no clips to measure latent statistics on")
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - np.square(mean), 0))
    # A channel that the KL term has emptied stays small: at deviation 1 it would be noise for the denoiser to learn.
    std = np.maximum(std, SMALLEST_STD * max(std.max(), 1e-6))
    return mean.astype(np.float32), std.astype(np.float32)


def save_autoencoder(autoencoder: FrozenAutoencoder, folder: Path, notes: dict) -> None:
    """Writes weights.npz and autoencoder.json; the JSON is written last and makes the folder valid."""
    folder = as_path(folder)
    with replacing(folder / WEIGHTS) as temporary:
        np.savez(temporary, **_flat(autoencoder))
    record = {"config": to_dict(autoencoder.config), "fingerprint": autoencoder.fingerprint, **notes}
    write_json(folder / RECORD, record)


def frozen_folder(run: Path) -> Path:
    """Where a run folder keeps its frozen autoencoder; the folder itself where it is that."""
    run = as_path(run)
    return run / FOLDER if (run / FOLDER).is_dir() else run


def load_autoencoder(run: Path) -> FrozenAutoencoder:
    """The frozen autoencoder of a run folder (or the frozen folder itself)."""
    folder = frozen_folder(run)
    exists = (folder / RECORD).exists()
    check(exists, f"--autoencoder is {str(run)!r}; there is no trained autoencoder in that folder")
    try:
        autoencoder, fingerprint = _read(folder)
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"the autoencoder in {str(folder)!r} is damaged: {error}") from error
    check(
        autoencoder.fingerprint == fingerprint,
        f"the autoencoder in {str(folder)!r} is damaged: its weights do not match its fingerprint",
    )
    return autoencoder


def _read(folder: Path) -> tuple[FrozenAutoencoder, str]:
    record = json.loads(read_text(folder / RECORD))
    config = from_dict(FirstStageConfig, record["config"])
    with np.load(local_copy(folder / WEIGHTS)) as file:
        flat = dict(file)
    mean, std = flat.pop("mean_C"), flat.pop("std_C")
    template = param.abstract(autoencoder_specs(config))
    names = traverse_util.flatten_dict(serialization.to_state_dict(template), keep_empty_nodes=True, sep="/")
    nested = traverse_util.unflatten_dict(names | flat, sep="/")
    params = jax.tree.map(jnp.asarray, serialization.from_state_dict(template, nested))
    return FrozenAutoencoder(config, params, mean, std), record["fingerprint"]


def _flat(autoencoder: FrozenAutoencoder) -> dict[str, np.ndarray]:
    nested = serialization.to_state_dict(autoencoder.params)
    flat = {name: np.asarray(x) for name, x in traverse_util.flatten_dict(nested, sep="/").items()}
    return flat | {"mean_C": autoencoder.mean_C, "std_C": autoencoder.std_C}
