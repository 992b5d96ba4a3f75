"""A trained autoencoder, frozen: weights, latent statistics and a fingerprint in one small folder."""

import dataclasses
import functools
import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization, traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from sora_jax.config import check, from_dict, read_json, to_dict, value_at
from sora_jax.errors import NotFinite, UserError
from sora_jax.files import as_path, local_copy, replacing, write_json
from sora_jax.models import codes
from sora_jax.models.first_stage import (
    FirstStageConfig,
    autoencoder_specs,
    codes_of,
    decode,
    encode,
    encoder_part,
    latent_fields,
    latent_grid,
)
from sora_jax.models.tiling import TilingConfig
from sora_jax.nn import params as param
from sora_jax.nn.finite import named
from sora_jax.parallel.rules import on_mesh, parts, reshard
from sora_jax.train import streaming
from sora_jax.train.autoencoder import to_float, to_uint8
from sora_jax.train.exported import ASSETS, as_dtype, read_arrays, run_folder, write_arrays
from sora_jax.train.migrate import migrate_autoencoder
from sora_jax.train.padded_shapes import Size, padded_shape_of

FOLDER = "frozen"
WEIGHTS, RECORD = "weights.npz", "autoencoder.json"
EXPORTED = "weights.safetensors"  # in place of WEIGHTS, in exported models
UNTRAINED = ("pixels", "pixels-grey")  # first stages without parameters, which come with the package
SMALLEST_STD = 0.01  # of the largest channel
VERSION = 3  # of the fingerprints of new autoencoders
# Bump the version whenever the same weights would produce different latents (tests/test_frozen.py detects it).
CODE = {
    1: "uint8 / 127.5 - 1, posterior mean, per-channel statistics; version 1",
    2: "uint8 / 127.5 - 1, posterior mean, per-channel statistics; version 2",
    3: "uint8 / 127.5 - 1, posterior mean or its code, per-channel statistics; version 3",
}
# The fields that configs had when fingerprints of version 1 were made, by the name of the config.
SHARED_1 = ("latent_channels", "l1_weight", "l2_weight", "kl_weight", "remat", "dtype")
FACTORS_1 = ("time_factor", "space_factor", "patch")
SIZES_1 = ("width", "multipliers", "encoder_blocks", "decoder_blocks", "kernels")
FIELDS_1 = {"causal": FACTORS_1 + SIZES_1 + SHARED_1, "kl": ("widths", "blocks", "groups", "quant", *SHARED_1)}


class _Clip(NamedTuple):
    """Hold a clip on its way through the network."""

    array: np.ndarray  # padded
    own: Size  # before it was padded


@dataclass(frozen=True)
class FrozenAutoencoder:
    """Encode and decode with a trained autoencoder; latents are normalised by its own statistics.

    version: of its fingerprint; an autoencoder keeps the one that it was saved with.
    """

    config: FirstStageConfig
    params: dict
    mean_C: np.ndarray
    std_C: np.ndarray
    version: int = VERSION

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of what a latent depends on: config, weights, statistics, preprocessing and code version.

        Version 1 covers all fields that configs had then. Version 2 covers those that change a latent, so that a field
        that is added, a loss weight, `remat` or `dtype` leaves caches and runs readable. Version 3 leaves out the
        weights of the decoder, which may be trained further.
        """
        config = to_dict(self.config)
        covered = FIELDS_1[config["name"]] if self.version == 1 else ("name", *latent_fields(self.config))
        digest = hashlib.sha256(CODE[self.version].encode())
        digest.update(json.dumps({name: value_at(config, name) for name in covered}, sort_keys=True).encode())
        params = encoder_part(self.params) if self.version >= 3 else self.params
        return _digest(digest, dataclasses.replace(self, params=params))

    @functools.cached_property
    def weights_digest(self) -> str:
        """Hex digest of all weights and statistics, by which damage is found."""
        return _digest(hashlib.sha256(), self)

    @functools.cached_property
    def code_values(self) -> list[np.ndarray] | None:
        """Normalised values that each channel of a latent can have; None if latents are continuous."""
        values = codes.channel_values(codes_of(self.config), self.config.latent_channels)
        return values and [(v - m) / s for v, m, s in zip(values, self.mean_C, self.std_C, strict=True)]

    def encode(
        self,
        clips: Iterable[np.ndarray],
        batch: int = 16,
        padded_shapes: Sequence[Size] | None = None,
        tiles: TilingConfig = TilingConfig(),
    ) -> Iterator[np.ndarray]:
        """Encode uint8 clips (T, H, W, 3) of any sizes into normalised float32 latents (t, h, w, C), in order.

        padded_shapes: the shapes that programs are compiled for; each clip takes the smallest that holds it, by default
        its own. The latent is the same to float error: later frames do not reach earlier ones, and what lies beside the
        clip is masked. tiles: if given, one program encodes `batch` tiles at once, chunk by chunk.
        """
        params = _on_devices(self.params)
        if tiles:
            for mean in streaming.encode_stream(params, self.config, clips, tiles, batch):
                yield self._normalised(mean)
            return

        def pad(clip: np.ndarray) -> _Clip:
            own = clip.shape[:3]
            shape = own if padded_shapes is None else padded_shape_of(own, padded_shapes)
            return _Clip(np.pad(clip, [(0, whole - side) for whole, side in zip(shape, own)] + [(0, 0)]), own)

        def run(batch: Sequence[_Clip]) -> np.ndarray:
            video_BTHWC = np.stack([clip.array for clip in batch])
            sizes_B2 = np.array([clip.own[1:] for clip in batch], np.int32)
            mean, _ = _encode(params, self.config, video_BTHWC, sizes_B2)
            return self._normalised(mean)

        for clip, z in _in_batches(run, map(pad, clips), batch):
            t, h, w = latent_grid(self.config, *clip.own)
            yield z[:t, :h, :w]

    def decode(
        self, latents: Iterable[np.ndarray], batch: int = 16, tiles: TilingConfig = TilingConfig()
    ) -> Iterator[np.ndarray]:
        """Decode normalised latents of any sizes into uint8 clips, in order; tiles: as in `encode`."""
        params = _on_devices(self.params)
        if tiles:
            scaled = map(self._scaled, latents)
            yield from map(to_uint8, streaming.decode_stream(params, self.config, scaled, tiles, batch))
            return

        def run(batch: Sequence[_Clip]) -> np.ndarray:
            return np.asarray(_decode(params, self.config, self._scaled(np.stack([clip.array for clip in batch]))))

        clips = (_Clip(z, z.shape[:3]) for z in latents)
        yield from (to_uint8(video) for _, video in _in_batches(run, clips, batch))

    def decode_chunks(
        self, z_thwC: np.ndarray, tiles: TilingConfig = TilingConfig(), batch: int = 16
    ) -> Iterator[np.ndarray]:
        """Decode one normalised latent part by part, in order: uint8 (T, H, W, 3).

        Memory does not grow with the clip. `tiles.tile` has the length of a part in frames, by default of one latent.
        """
        z = self._scaled(z_thwC)
        yield from map(to_uint8, streaming.decode_chunks(_on_devices(self.params), self.config, z, tiles, batch))

    def decode_ring(self, z_thwC: np.ndarray, tiles: TilingConfig = TilingConfig(), batch: int = 16) -> np.ndarray:
        """Decode a normalised latent whose last frame is followed by its first into a uint8 loop (f_t t, H, W, 3)."""
        z = self._scaled(z_thwC)
        return to_uint8(streaming.decode_ring(_on_devices(self.params), self.config, z, tiles, batch))

    def _normalised(self, mean: jax.Array | np.ndarray) -> np.ndarray:
        return (np.asarray(codes.quantize(codes_of(self.config), jnp.asarray(mean))) - self.mean_C) / self.std_C

    def _scaled(self, z: np.ndarray) -> np.ndarray:
        return np.asarray(z, np.float32) * self.std_C + self.mean_C


def _on_devices(params: dict) -> dict:
    """Copy the parameters to each device of the mesh that is set: once, not with every batch."""
    return jax.device_put(params, NamedSharding(jax.sharding.get_mesh(), PartitionSpec()) if on_mesh() else None)


@functools.partial(jax.jit, static_argnums=1)
def _encode(params: dict, config: FirstStageConfig, frames: jax.Array, sizes_B2: jax.Array) -> tuple:
    frames = to_float(reshard(frames, "batch", None, None, None, None))
    return encode(params, config, frames, reshard(sizes_B2, "batch", None))


@functools.partial(jax.jit, static_argnums=1)
def _decode(params: dict, config: FirstStageConfig, z: jax.Array) -> jax.Array:
    return decode(params, config, reshard(z, "batch", None, None, None, None))


def _in_batches(function: Callable, clips: Iterable[_Clip], batch: int) -> Iterator[tuple[_Clip, np.ndarray]]:
    """Apply `function` to batches of clips of one shape; yield each clip with its result, in order.

    The last batch of a shape is filled up by its last clip, so that each shape compiles once.
    """
    batch = -(-batch // parts("batch")) * parts("batch")
    held: list[_Clip] = []

    def flush() -> Iterator[tuple[_Clip, np.ndarray]]:
        results = function(held + held[-1:] * (batch - len(held)))
        yield from zip(held, results)  # what the filler gives is dropped

    for clip in clips:
        if held and (clip.array.shape != held[0].array.shape or len(held) == batch):
            yield from flush()
            held = []
        held.append(clip)
    if held:
        yield from flush()


def measure_statistics(
    params: dict,
    config: FirstStageConfig,
    clips: Iterable[np.ndarray],
    batch: int = 16,
    tiles: TilingConfig = TilingConfig(),
) -> tuple[np.ndarray, np.ndarray]:
    """Measure mean and standard deviation of each latent channel over clips; each position counts once.

    A deviation is at least SMALLEST_STD times the largest.
    """
    raw = FrozenAutoencoder(config, params, np.zeros(1, np.float32), np.ones(1, np.float32))
    count, total, squares = 0, np.zeros(config.latent_channels), np.zeros(config.latent_channels)
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
    """Write weights.npz and autoencoder.json; the JSON is written last and makes the folder valid."""
    folder, arrays = as_path(folder), _flat(autoencoder)
    _check_finite(f"the autoencoder for {str(folder)!r}", arrays)
    with replacing(folder / WEIGHTS) as temporary:
        np.savez(temporary, **arrays)
    _save_record(autoencoder, folder, notes)


def export_autoencoder(run: Path, folder: Path, dtype: str) -> None:
    """Write the frozen autoencoder of a run as safetensors of a dtype, with the record of what is read from them.

    Rounded weights are another autoencoder: their fingerprint is another, and caches of the first are not of theirs.
    """
    autoencoder = load_autoencoder(run)
    arrays, keys = _flat(autoencoder), ("mean_C", "std_C")  # the statistics are few and stay as they are
    write_arrays(folder / EXPORTED, {name: arrays.pop(name) for name in keys} | as_dtype(arrays, dtype))
    kept = {name: value for name, value in saved_record(run).items() if name in ("steps", "held_out_psnr")}
    _save_record(_with_arrays(autoencoder.config, read_arrays(folder / EXPORTED), autoencoder.version), folder, kept)


def _save_record(autoencoder: FrozenAutoencoder, folder: Path, notes: dict) -> None:
    record = {"config": to_dict(autoencoder.config), "version": autoencoder.version}
    digests = {"fingerprint": autoencoder.fingerprint, "weights_digest": autoencoder.weights_digest}
    write_json(folder / RECORD, record | digests | notes)


def frozen_folder(run: str | Path) -> Path:
    """Return where a run folder keeps its frozen autoencoder; the folder itself where it is that.

    A folder that exists goes before a first stage of `UNTRAINED`.
    """
    if str(run) in UNTRAINED and not as_path(run).exists():
        return ASSETS / str(run)
    run = run_folder(run, "--autoencoder")
    return run / FOLDER if (run / FOLDER).is_dir() else run


def recorded_fingerprint(run: str | Path) -> str | None:
    """Return the fingerprint that stands in a run folder, without reading weights; None where there is no record."""
    return _record(frozen_folder(run))["fingerprint"] if (frozen_folder(run) / RECORD).exists() else None


def autoencoder_config(run: Path) -> FirstStageConfig:
    """Read the config of the frozen autoencoder of a run folder, without its weights; UserError where there is none."""
    return from_dict(FirstStageConfig, migrate_autoencoder(saved_record(run)["config"]))


def saved_record(run: str | Path) -> dict:
    """Return the record of the frozen autoencoder of a run folder; UserError where there is none."""
    check((frozen_folder(run) / RECORD).exists(), missing_autoencoder(run))
    return _record(frozen_folder(run))


def _record(folder: Path) -> dict:
    """Read the record of a frozen autoencoder; UserError where it is damaged or of a later version."""
    record = read_json(folder / RECORD)
    whole = isinstance(record, dict) and hasattr(record.get("config"), "items") and "fingerprint" in record
    check(whole, f"the autoencoder in {str(folder)!r} is damaged: {RECORD} has no config or no fingerprint")
    version = record.setdefault("version", 1)  # records of version 1 do not name it
    known = ", ".join(map(str, CODE))
    check(version in CODE, f"the autoencoder in {str(folder)!r} is of version {version!r}; this package reads {known}")
    return record


def saved_steps(run: str | Path) -> list[int]:
    """List the steps of the checkpoints in a run folder, whole or not."""
    folder = as_path(run) / "checkpoints"
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()) if folder.exists() else []


def missing_autoencoder(run: str | Path, option: str = "--autoencoder") -> str:
    """Say that a folder holds no frozen autoencoder and, of a run that was stopped early, how to make one of it."""
    folder, config = as_path(run), as_path(run) / "config.json"
    said = f"{option} is {str(run)!r}; "
    if not config.exists() or read_json(config).get("kind") != "autoencoder":
        return f"{said}there is no trained autoencoder in that folder"
    stages = sorted(entry for entry in folder.iterdir() if entry.name.startswith("stage_"))
    begun = [(each, steps[-1]) for each in (folder, *stages) if (steps := saved_steps(each))]
    if not begun:
        return f"{said}that autoencoder has no checkpoint yet"
    stage, step = begun[-1]
    where = f"step {step}" if stage == folder else f"step {step} of {stage.name}"
    return (
        f"{said}that autoencoder is at {where} and its training has not ended: go on with it, or use it as it is now "
        f"by sora-jax train --workdir={run} --finish"
    )


def load_autoencoder(run: str | Path, option: str = "--autoencoder") -> FrozenAutoencoder:
    """Read the frozen autoencoder of a run folder (or the frozen folder itself); `option` names it in messages.

    Raises:
        UserError: there is none, or it is damaged: weights and fingerprint do not match.
    """
    folder = frozen_folder(run)
    check((folder / RECORD).exists(), missing_autoencoder(run, option))
    try:
        autoencoder, record = _read(folder)
        # Records of versions before 3 have no digest of the weights: their fingerprint is one.
        found = autoencoder.fingerprint, autoencoder.weights_digest
        whole = found == (record["fingerprint"], record.get("weights_digest", found[1]))
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"the autoencoder in {str(folder)!r} is damaged: {error}") from error
    check(whole, f"the autoencoder in {str(folder)!r} is damaged: its weights do not match its fingerprint")
    _check_finite(f"the autoencoder in {str(folder)!r}", _flat(autoencoder))
    return autoencoder


def _check_finite(what: str, arrays: dict[str, np.ndarray]) -> None:
    bad = [name for name, values in sorted(arrays.items()) if not np.isfinite(values).all()]
    if bad:
        raise NotFinite(f"{what} has values that are not finite, in {named(bad)}")


def _read(folder: Path) -> tuple[FrozenAutoencoder, dict]:
    """Read an autoencoder and its record."""
    record = _record(folder)
    config = from_dict(FirstStageConfig, migrate_autoencoder(record["config"]))
    if (folder / EXPORTED).exists():
        flat = read_arrays(folder / EXPORTED)
    else:
        with np.load(local_copy(folder / WEIGHTS)) as file:
            flat = dict(file)
    return _with_arrays(config, flat, record["version"]), record


def _with_arrays(config: FirstStageConfig, flat: dict[str, np.ndarray], version: int) -> FrozenAutoencoder:
    """Return an autoencoder of these arrays, by the names that `_flat` gives them."""
    flat = dict(flat)
    mean, std = flat.pop("mean_C"), flat.pop("std_C")
    template = param.abstract(autoencoder_specs(config))
    names = traverse_util.flatten_dict(serialization.to_state_dict(template), keep_empty_nodes=True, sep="/")
    nested = traverse_util.unflatten_dict(names | flat, sep="/")
    params = jax.tree.map(jnp.asarray, serialization.from_state_dict(template, nested))
    return FrozenAutoencoder(config, params, mean, std, version)


def _digest(digest: Any, autoencoder: FrozenAutoencoder) -> str:
    """Add all weights and statistics to a hash and return its hex digest."""
    for name, value in sorted(_flat(autoencoder).items()):
        digest.update(name.encode() + np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def _flat(autoencoder: FrozenAutoencoder) -> dict[str, Any]:
    nested = serialization.to_state_dict(autoencoder.params)
    flat = {name: np.asarray(x) for name, x in traverse_util.flatten_dict(nested, sep="/").items()}
    return flat | {"mean_C": autoencoder.mean_C, "std_C": autoencoder.std_C}
