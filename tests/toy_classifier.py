"""A kind of run in less than eighty lines of code: classes of clips from the mean of their patches of pixels."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from sora_jax.data.feeding.epochs import Position
from sora_jax.data.feeding.pipeline import PackedBatches
from sora_jax.data.feeding.tokenizer import NoText
from sora_jax.data.packing.packs import PackingConfig
from sora_jax.data.storing.manifest import Dataset
from sora_jax.nn.pack import Pack
from sora_jax.nn.params import ParamSpec, normal
from sora_jax.parallel import distributed
from sora_jax.parallel.compile import abstract_batch
from sora_jax.parallel.mesh import make_mesh
from sora_jax.plan.programs import Load, Trained, many, training_program
from sora_jax.train.autoencoder import to_float
from sora_jax.train.kind import Inputs, Kind
from sora_jax.train.loop import Job
from sora_jax.train.run_config import RunConfig
from sora_jax.train.state import MODEL, Group


@dataclasses.dataclass(frozen=True)
class ClassifierRun(RunConfig):
    kind: Literal["toy_classifier"] = "toy_classifier"
    data: str = ""
    classes: int = 2
    packing: PackingConfig = PackingConfig(length=96, slots=4, text_length=4, patch=(1, 8, 8))


def groups(config):
    return {MODEL: Group({"weight": ParamSpec((192, config.classes), (None, None), normal(0.1))}, config.optim)}


def loss(config, params, frozen, pack, step, part):
    member_BLS = jax.nn.one_hot(pack.segments_BL - 1, config.packing.slots)
    mean_BSP = jnp.einsum("bls,blp->bsp", member_BLS, to_float(pack.tokens_BLP)) / (member_BLS.sum(1) + 1e-6)[..., None]
    logits = jax.nn.log_softmax(mean_BSP @ params[MODEL]["weight"])
    chosen = jax.nn.one_hot(pack.labels_BS - 1, config.classes)  # all zero in empty slots
    right = (chosen * (logits == logits.max(-1, keepdims=True))).sum()
    return {MODEL: -(logits * chosen).sum()}, ({MODEL: chosen.sum()}, {"accuracy": (right, chosen.sum())})


def open_inputs(config, workdir, mesh):
    return Inputs(digest=Dataset(config.data).digest)


def make_job(config, inputs, workdir):
    how = config.packing, config.batch, config.seed, config.split, distributed.share_of_batch(make_mesh(config.mesh))
    batches = PackedBatches(Dataset(config.data), NoText(), *how)
    return Job(
        name=config.kind,
        groups=groups(config),
        loss=functools.partial(loss, config),
        batches=lambda start, position: batches.stream(start, config.feed, Position(*position or ())),
        to_device=lambda batch: Pack(**batch),
        counts=lambda batch: {"clips": int((batch["clip_ids_BS"] > 0).sum())},
        clip_ids=lambda batch: batch["clip_ids_BS"].tolist(),
        share=batches.share,
    )


def plan_training(config, mesh):
    row = PackedBatches(Dataset(config.data), NoText(), config.packing, 1, 0, config.split)[0]
    batch = abstract_batch(Pack(**many(row, (1, config.batch))), mesh, leading=1)
    trained, load = (
        Trained(groups(config), functools.partial(loss, config)),
        Load(1, 1, "tokens", 1, lambda _: ("", "")),
    )
    return training_program(config, trained, batch, load, mesh)


def finish(config, inputs, params, step, workdir):
    if distributed.first():
        (workdir / "classes.json").write_text(f'{{"classes": {config.classes}, "step": {step}}}')


def parts(config):
    return groups(config)[MODEL].specs, {}


CLASSIFIER = Kind(ClassifierRun, groups, parts, open_inputs, make_job, {"train": plan_training}, finish=finish)
