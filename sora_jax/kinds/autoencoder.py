"""Runs of the autoencoder: trained on crops, at the end frozen with the statistics of its latents."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sora_jax.config import check, read_json, to_dict, value_at
from sora_jax.console import progress
from sora_jax.data.shard_spec import ShardSpec
from sora_jax.data.storing.manifest import Dataset, caption_of, evenly_spread
from sora_jax.generate.preview import Reconstructions, held_out_psnr, reconstruction_preview
from sora_jax.models.first_stage import FirstStageConfig, autoencoder_specs, encoder_part, latent_fields
from sora_jax.models.lpips import read_lpips
from sora_jax.nn import params as param
from sora_jax.parallel import distributed
from sora_jax.parallel.mesh import check_split, make_mesh
from sora_jax.plan.autoencoder import reconstruct, train_autoencoder
from sora_jax.train.autoencoder import (
    AutoencoderRun,
    autoencoder_groups,
    autoencoder_job,
    autoencoder_parts,
    check_sizes,
    stage_folder,
)
from sora_jax.train.crops import CropBatches
from sora_jax.train.encode import copy_autoencoder
from sora_jax.train.frozen import (
    FOLDER,
    RECORD,
    FrozenAutoencoder,
    load_autoencoder,
    measure_statistics,
    save_autoencoder,
)
from sora_jax.train.kind import Inputs, Kind
from sora_jax.train.latent_scale import scale_by_effect
from sora_jax.train.loop import Job, Measure, log

STATISTICS_CLIPS = 512
HELD_OUT_CLIPS = 64
EFFECT_CLIPS = 16
PREVIEW_CLIPS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderInputs(Inputs):
    """Hold the inputs of a run.

    dataset: the clips; held_out: some that are not trained on; captions: theirs; share: this process's part of a
    batch; first: the autoencoder that the run starts from.
    """

    dataset: Dataset
    held_out: list[np.ndarray]
    captions: list[str]
    share: ShardSpec
    first: FrozenAutoencoder | None = None


def open_inputs(config: AutoencoderRun, workdir: Path, mesh: Mesh) -> AutoencoderInputs:
    """Open the dataset and check that the autoencoder and the mesh can take it."""
    check(config.data, "--config.data is not given; it must be a folder made by `sora-jax data build`")
    dataset = Dataset(config.data)
    for name, rows in config.rows.items():
        option = f"the number of {name} in config.batch / loop.accumulate"
        check_split(mesh, "batch", rows // config.loop.accumulate, option)
    check_sizes(config.model, dataset)
    chosen = _some(dataset.held_out(config.split), HELD_OUT_CLIPS)
    share = distributed.share_of_batch(mesh)
    first = _first(config) if config.start else None
    return AutoencoderInputs(
        digest=dataset.digest,
        clips=dataset.splits,
        dataset=dataset,
        held_out=_frames(dataset, chosen),
        captions=[caption_of(row) for row in chosen],
        share=share,
        first=first,
    )


def _first(config: AutoencoderRun) -> FrozenAutoencoder:
    """Read the autoencoder that the run starts from; UserError unless it is the same network."""
    first = load_autoencoder(config.start, "--config.start")
    wanted, found = (
        jax.tree.map(lambda x: x.shape, param.abstract(autoencoder_specs(model)))
        for model in (config.model, first.config)
    )
    same = wanted == found and _latent_values(config.model) == _latent_values(first.config)
    check(same, f"--config.start is {config.start!r}; its network is not that of config.model")
    check(
        config.trained == "all" or first.version >= 3,
        f"--config.start is {config.start!r}; caches of its latents name its decoder, too, so that must not change: "
        "it must be an autoencoder trained by this version of sora_jax",
    )
    return first


def _latent_values(model: FirstStageConfig) -> dict:
    values = to_dict(model)
    return {name: value_at(values, name) for name in latent_fields(model)}


def make_job(config: AutoencoderRun, inputs: AutoencoderInputs, workdir: Path) -> Job:
    """Make the job, with reconstructions of held-out clips as previews."""
    shown, captions = (evenly_spread(values, PREVIEW_CLIPS) for values in (inputs.held_out, inputs.captions))
    if not shown:
        log("the dataset holds out no clip: no reconstructions are shown and no PSNR is measured")
    first = inputs.first.params if inputs.first else None
    whole = functools.partial(_whole, config, inputs)
    job = autoencoder_job(config, inputs.dataset, None, inputs.share, first)
    if not shown:
        return job
    reconstruct = Reconstructions(config, shown, whole)
    measure = Measure(config.loop.preview_every, reconstruct.psnr, local=True)
    return dataclasses.replace(job, preview=reconstruction_preview(reconstruct, captions, workdir), measure=measure)


def _whole(config: AutoencoderRun, inputs: AutoencoderInputs, trained: dict) -> dict:
    """Return all parameters of the autoencoder, those that are not trained among them."""
    if config.trained == "all" or inputs.first is None:
        return trained
    return encoder_part(inputs.first.params) | trained


def finish(config: AutoencoderRun, inputs: AutoencoderInputs, params: dict, step: int, workdir: Path) -> None:
    """Measure the latents of the averaged parameters and write workdir/frozen, unless it is of this step already."""
    if distributed.all_true(_finished_before(workdir, step)):
        return  # written anew it could differ in a last bit, and caches made with it would no longer match
    here = jax.tree.leaves(params)[0].sharding.mesh.local_devices
    params = distributed.on_host(params)
    if distributed.first():
        with jax.set_mesh(make_mesh(devices=here)):
            _freeze(config, inputs, params, step, workdir)
    distributed.barrier("autoencoder kept")


def _freeze(config: AutoencoderRun, inputs: AutoencoderInputs, params: Any, step: int, workdir: Path) -> None:
    params = _whole(config, inputs, params)
    if config.trained == "all" or inputs.first is None:
        measured = _frames(inputs.dataset, _some(inputs.dataset.rows(config.split), STATISTICS_CLIPS))
        bar = progress(measured, "latent statistics", unit="clip")
        mean, std = measure_statistics(params, config.model, bar, tiles=config.tiles)
        if config.latent_scale == "effect":
            some = FrozenAutoencoder(config.model, params, np.zeros(1, np.float32), np.ones(1, np.float32))
            latents = list(some.encode(evenly_spread(measured, EFFECT_CLIPS), tiles=config.tiles))
            std = scale_by_effect(params, config.model, latents, std, config.tiles)
    else:
        mean, std = inputs.first.mean_C, inputs.first.std_C
    autoencoder = FrozenAutoencoder(config.model, params, mean, std)
    quality = held_out_psnr(autoencoder, inputs.held_out, config.tiles) if inputs.held_out else None
    save_autoencoder(autoencoder, workdir / FOLDER, {"steps": step, "held_out_psnr": quality})


def _finished_before(workdir: Path, step: int) -> bool:
    record = workdir / FOLDER / RECORD
    return record.exists() and read_json(record)["steps"] == step


def _some(rows: list[dict], most: int) -> list[dict]:
    """Choose at most so many of the clips, evenly spread, ordered by size so that each size is compiled once."""
    return sorted(evenly_spread(rows, most), key=lambda row: (row["frames"], row["height"], row["width"]))


def _frames(dataset: Dataset, rows: list[dict]) -> list[np.ndarray]:
    return [dataset[row["index"]].frames for row in rows]


def stages(config: AutoencoderRun, workdir: Path) -> list[tuple[Path, AutoencoderRun]]:
    """Return the folder and the config of each stage."""
    return [(stage_folder(workdir, i), config.stage(i, workdir)) for i in range(len(config.stages))]


def check_stage(config: AutoencoderRun, inputs: AutoencoderInputs) -> None:
    """Raise a UserError where a stage cannot train on the dataset."""
    CropBatches(inputs.dataset, config.crop_config, config.seed, config.split, inputs.share)
    if config.loss.lpips_weight:
        read_lpips(config.loss.lpips_file)


def keep_stage(workdir: Path, last: Path) -> None:
    """Copy the autoencoder that the last stage left into the folder of the run."""
    kept, left = workdir / FOLDER / RECORD, last / FOLDER / RECORD
    if not kept.exists() or read_json(kept)["weights_digest"] != read_json(left)["weights_digest"]:
        copy_autoencoder(last, workdir, replace=True)


AUTOENCODER = Kind(
    config=AutoencoderRun,
    groups=autoencoder_groups,
    parts=autoencoder_parts,
    open=open_inputs,
    job=make_job,
    programs={"train": train_autoencoder, "autoencoder": reconstruct},
    may_change=(
        "data",
        "tiles",
        "start",
        "crop",
        "crops",
        "image_share",
        "latent_scale",
        "loss",
        "stages",
        "discriminator_optim",
        *(f"model.{field}" for field in ("l1_weight", "l2_weight", "kl_weight", "remat", "dtype")),
    ),
    finish=finish,
    stages=stages,
    check_stage=check_stage,
    finish_stages=keep_stage,
)
