"""Runs of a classifier of images, trained on a dataset whose clips have classes."""

import dataclasses
from pathlib import Path

from jax.sharding import Mesh

from sora_jax.config import check
from sora_jax.data.shard_spec import ShardSpec
from sora_jax.data.storing.manifest import Dataset
from sora_jax.kinds.denoiser import check_labels
from sora_jax.parallel import distributed
from sora_jax.parallel.mesh import check_split
from sora_jax.plan.classifier import train_classifier
from sora_jax.train.classifier import (
    ClassifierRun,
    check_images,
    classifier_groups,
    classifier_job,
    classifier_parts,
)
from sora_jax.train.kind import Inputs, Kind
from sora_jax.train.loop import Job


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierInputs(Inputs):
    """Hold the inputs of a run: the images; share: this process's part of a batch."""

    dataset: Dataset
    share: ShardSpec


def open_inputs(config: ClassifierRun, workdir: Path, mesh: Mesh) -> ClassifierInputs:
    """Open the dataset and check that every image has a class, and a size that the network takes."""
    check(config.data, "--config.data is not given; it must be a folder made by `sora-jax data build`")
    dataset = Dataset(config.data)
    check_labels(dataset, config.model.classes, config.split)
    check_images(config, dataset)
    check_split(mesh, "batch", config.batch // config.loop.accumulate, "config.batch / config.loop.accumulate")
    share = distributed.share_of_batch(mesh)
    return ClassifierInputs(digest=dataset.digest, clips=dataset.splits, dataset=dataset, share=share)


def make_job(config: ClassifierRun, inputs: ClassifierInputs, workdir: Path) -> Job:
    """Make the job; the accuracy of held-out images is measured every `loop.preview_every` steps."""
    return classifier_job(config, inputs.dataset, inputs.share)


CLASSIFIER = Kind(
    config=ClassifierRun,
    groups=classifier_groups,
    parts=classifier_parts,
    open=open_inputs,
    job=make_job,
    programs={"train": train_classifier},
    may_change=("data", "packing", "label_smoothing", *(f"model.{name}" for name in ("attention", "remat", "dtype"))),
)
