"""Dataset folder -> latent cache: every clip through the frozen autoencoder, once."""

import dataclasses
import shutil
from pathlib import Path

from tqdm import tqdm

from sora_jax.config import check
from sora_jax.data.latents import LatentCache, LatentEntry, LatentWriter
from sora_jax.data.manifest import Dataset
from sora_jax.train.frozen import FOLDER, FrozenAutoencoder, load_autoencoder


ENTRY = tuple(field.name for field in dataclasses.fields(LatentEntry))


def encode_dataset(autoencoder_run: Path, data: Path, out: Path, batch: int = 16) -> None:
    """Writes the latent cache `out`, with a copy of the autoencoder inside; a complete one is kept as it is.

    UserError if `out` holds a cache of another autoencoder. Nothing that looks complete is left by a crash.
    """
    autoencoder = load_autoencoder(autoencoder_run)
    if (Path(out) / "cache.json").exists():
        LatentCache(out).check(autoencoder.fingerprint)
        return
    dataset = Dataset(data)
    config = autoencoder.config
    factors = (config.time_factor, config.space_factor, config.space_factor)
    with LatentWriter(out, autoencoder.fingerprint, config.latent_channels, factors) as writer:
        rows = [row for row in _by_size(dataset) if row["id"] not in writer.done]
        latents = autoencoder.encode((dataset[row["index"]].frames for row in rows), batch)
        for row, latent in tqdm(zip(rows, latents, strict=True), "encode", len(rows), unit="clip"):
            writer.add(LatentEntry(**{name: row[name] for name in ENTRY}), latent)
        copy_autoencoder(autoencoder_run, writer.partial)


def _by_size(dataset: Dataset) -> list[dict]:
    """Manifest rows, equal sizes together, so that each size is compiled once and fills its batches."""
    return sorted(dataset.rows(), key=lambda row: (row["frames"], row["height"], row["width"], row["index"]))


def copy_autoencoder(run: Path, target: Path) -> None:
    """Keeps the frozen autoencoder beside what was made with it, so that each folder can be used alone."""
    source = Path(run) / FOLDER if (Path(run) / FOLDER).is_dir() else Path(run)
    check(source.is_dir(), f"--autoencoder is {str(run)!r}; there is no trained autoencoder in that folder")
    shutil.copytree(source, Path(target) / FOLDER, dirs_exist_ok=True)
