"""Runs of the autoencoder: trained on crops, at the end frozen with the statistics of its latents."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from sora_jax.config import check, read_json
from sora_jax.data.manifest import Dataset
from sora_jax.data.share import Share
from sora_jax.generate.preview import held_out_psnr, reconstruction_preview
from sora_jax.parallel import distributed
from sora_jax.parallel.mesh import check_split, make_mesh
from sora_jax.plan.autoencoder import reconstruct, train_autoencoder
from sora_jax.train.autoencoder import AutoencoderRun, autoencoder_groups, autoencoder_job, check_sizes
from sora_jax.train.frozen import FOLDER, RECORD, FrozenAutoencoder, measure_statistics, save_autoencoder
from sora_jax.train.kind import Inputs, Kind
from sora_jax.train.loop import Job, log
from sora_jax.train.state import MODEL, TrainState

STATISTICS_CLIPS = 512
HELD_OUT_CLIPS = 64
PREVIEW_CLIPS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderInputs(Inputs):
    """dataset: the clips; held_out: some that are not trained on; share: this process's part of a batch."""

    dataset: Dataset
    held_out: list[np.ndarray]
    share: Share


def open_inputs(config: AutoencoderRun, workdir: Path, mesh: Mesh) -> AutoencoderInputs:
    """Open the dataset and check that the autoencoder and the mesh can take it."""
    check(config.data, "--config.data is not given; it must be a folder made by `sora-jax data build`")
    dataset = Dataset(config.data)
    for name, rows in config.rows.items():
        option = f"the number of {name} in config.batch / loop.accumulate"
        check_split(mesh, "batch", rows // config.loop.accumulate, option)
    check_sizes(config.model, dataset)
    held_out = _some(dataset, dataset.held_out(config.split), HELD_OUT_CLIPS)
    return AutoencoderInputs(
        digest=dataset.digest, dataset=dataset, held_out=held_out, share=distributed.share_of_batch(mesh)
    )


def make_job(config: AutoencoderRun, inputs: AutoencoderInputs, workdir: Path) -> Job:
    """Make the job, with reconstructions of held-out clips as previews."""
    shown = _spread(inputs.held_out, PREVIEW_CLIPS)
    if not shown:
        log("the dataset holds out no clip: no reconstructions are shown and no PSNR is measured")
    preview = reconstruction_preview(config, shown, workdir) if shown else None
    return autoencoder_job(config, inputs.dataset, preview, inputs.share)


def finish(config: AutoencoderRun, inputs: AutoencoderInputs, state: TrainState, workdir: Path) -> None:
    """Measure the latents of the averaged parameters and write workdir/frozen, unless it is of this step already."""
    step = int(state.step)
    if distributed.all_true(_finished_before(workdir, step)):
        return  # written anew it could differ in a last bit, and caches made with it would no longer match
    params = distributed.on_host(state.ema[MODEL][0])
    if distributed.first():
        here = jax.tree.leaves(state.params)[0].sharding.mesh.local_devices
        with jax.set_mesh(make_mesh(devices=here)):
            _freeze(config, inputs, params, step, workdir)
    distributed.barrier("autoencoder kept")


def _freeze(config: AutoencoderRun, inputs: AutoencoderInputs, params: Any, step: int, workdir: Path) -> None:
    measured = _some(inputs.dataset, inputs.dataset.rows(config.split), STATISTICS_CLIPS)
    measured = tqdm(measured, "latent statistics", unit="clip")
    mean, std = measure_statistics(params, config.model, measured, tiles=config.tiles)
    autoencoder = FrozenAutoencoder(config.model, params, mean, std)
    quality = held_out_psnr(autoencoder, inputs.held_out, config.tiles) if inputs.held_out else None
    save_autoencoder(autoencoder, workdir / FOLDER, {"steps": step, "held_out_psnr": quality})


def _finished_before(workdir: Path, step: int) -> bool:
    record = workdir / FOLDER / RECORD
    return record.exists() and read_json(record)["steps"] == step


def _some(dataset: Dataset, rows: list[dict], most: int) -> list[np.ndarray]:
    """Read at most so many of the clips, evenly spread, ordered by size so that each size is compiled once."""
    chosen = _spread(rows, most)
    chosen.sort(key=lambda row: (row["frames"], row["height"], row["width"]))
    return [dataset[row["index"]].frames for row in chosen]


def _spread(items: list, most: int) -> list:
    """Choose at most so many of the items, evenly spread, the first and the last among them."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, most).astype(int))] if items else []


AUTOENCODER = Kind(
    config=AutoencoderRun,
    groups=autoencoder_groups,
    open=open_inputs,
    job=make_job,
    programs={"train": train_autoencoder, "autoencoder": reconstruct},
    may_change=("data", "tiles"),
    finish=finish,
)
