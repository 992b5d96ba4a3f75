"""Dataset folder -> latent cache: every clip through the frozen autoencoder, once."""

import dataclasses
import shutil
from pathlib import Path

from tqdm import tqdm

from sora_jax.config import check
from sora_jax.data.latents import LatentCache, LatentEntry, LatentWriter
from sora_jax.data.manifest import Dataset
from sora_jax.files import replacing
from sora_jax.train.autoencoder import check_sizes
from sora_jax.train.frozen import FOLDER, RECORD, WEIGHTS, load_autoencoder

ENTRY = tuple(field.name for field in dataclasses.fields(LatentEntry))


def encode_dataset(autoencoder_run: Path, data: Path, out: Path, batch: int = 16) -> None:
    """Writes the latent cache `out`, with a copy of the autoencoder inside; a complete one is kept as it is.

    UserError if `out` holds latents of another autoencoder or of other clips. Nothing that looks complete is left
    by a crash; the same call goes on after the last complete shard.
    """
    check(batch > 0, f"--batch is {batch}; it must be positive")
    autoencoder, dataset = load_autoencoder(autoencoder_run), Dataset(data)
    if (Path(out) / "cache.json").exists():
        cache = LatentCache(out)
        cache.check(autoencoder.fingerprint)
        same = cache.data == dataset.digest
        check(same, f"--out is {str(out)!r}; it holds latents of other clips than --data={data}; remove it")
        return
    config = autoencoder.config
    check_sizes(config, dataset)
    factors = (config.time_factor, config.space_factor, config.space_factor)
    with LatentWriter(out, autoencoder.fingerprint, dataset.digest, config.latent_channels, factors) as writer:
        rows = [row for row in _by_size(dataset) if row["id"] not in writer.done]
        latents = autoencoder.encode((dataset[row["index"]].frames for row in rows), batch)
        for row, latent in tqdm(zip(rows, latents, strict=True), "encode", len(rows), unit="clip"):
            writer.add(LatentEntry(**{name: row[name] for name in ENTRY}), latent)
        copy_autoencoder(autoencoder_run, writer.partial)


def _by_size(dataset: Dataset) -> list[dict]:
    """Manifest rows, equal sizes together, so that each size is compiled once and fills its batches."""
    return sorted(dataset.rows(), key=lambda row: (row["frames"], row["height"], row["width"], row["index"]))


def copy_autoencoder(run: Path, target: Path) -> None:
    """Keeps the frozen autoencoder beside what was made with it, so that each folder can be used alone.

    A copy that is there stays as it is.
    """
    kept = Path(target) / FOLDER
    if (kept / RECORD).exists():
        return
    source = Path(run) / FOLDER if (Path(run) / FOLDER).is_dir() else Path(run)
    check((source / RECORD).exists(), f"--autoencoder is {str(run)!r}; there is no trained autoencoder in that folder")
    for name in (WEIGHTS, RECORD):  # in this order: the record makes the copy valid
        with replacing(kept / name) as temporary:
            shutil.copyfile(source / name, temporary)
