"""Dataset folder -> latent cache: every clip through the frozen autoencoder, once."""

import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sora_jax.config import check
from sora_jax.data.latents import LatentWriter
from sora_jax.data.manifest import Dataset
from sora_jax.train.frozen import FOLDER, FrozenAutoencoder, load_autoencoder


def encode_dataset(autoencoder_run: Path, data: Path, out: Path, batch: int = 16) -> None:
    """Writes the latent cache `out`, with a copy of the autoencoder inside; a complete one is kept as it is.

    UserError if `out` holds a cache of another autoencoder. Nothing that looks complete is left by a crash.
    """
    autoencoder = load_autoencoder(autoencoder_run)
    dataset = Dataset(data)
    config = autoencoder.config
    order = np.lexsort((np.arange(len(dataset)), *(np.asarray(dataset.column(c)) for c in ("width", "height", "frames"))))
    with LatentWriter(
        out,
        fingerprint=autoencoder.fingerprint,
        latent_channels=config.latent_channels,
        time_factor=config.time_factor,
        space_factor=config.space_factor,
    ) as writer:
        frames = (dataset[int(i)].frames for i in order)
        latents = autoencoder.encode(frames, batch)
        for index, latent in tqdm(zip(order, latents, strict=True), total=len(order), desc="encode", unit="clip"):
            writer.add(dataset.entry(int(index)), latent)
        copy_autoencoder(autoencoder_run, writer.folder)


def copy_autoencoder(run: Path, target: Path) -> None:
    """Keeps the frozen autoencoder beside what was made with it, so that each folder can be used alone."""
    source = Path(run) / FOLDER if (Path(run) / FOLDER).is_dir() else Path(run)
    check(source.is_dir(), f"--autoencoder is {str(run)!r}; there is no trained autoencoder in that folder")
    shutil.copytree(source, Path(target) / FOLDER, dirs_exist_ok=True)
