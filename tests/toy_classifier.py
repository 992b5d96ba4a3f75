"""A kind of run in less than eighty lines: classes of clips from the mean of their patches of pixels."""

import dataclasses
import functools
import json
from typing import Literal

import jax
import jax.numpy as jnp

from sora_jax.config import check
from sora_jax.data.epochs import Position
from sora_jax.data.manifest import Dataset
from sora_jax.data.packing import PackingConfig
from sora_jax.data.pipeline import packed_batches
from sora_jax.data.tokenizer import NoText
from sora_jax.nn.pack import Pack
from sora_jax.nn.params import ParamSpec, normal
from sora_jax.parallel.compile import abstract_batch
from sora_jax.plan.programs import Load, Trained, many, training_program
from sora_jax.train.kind import Inputs, Kind
from sora_jax.train.loop import Job
from sora_jax.train.run_config import RunConfig
from sora_jax.train.state import MODEL, Group


@dataclasses.dataclass(frozen=True)
class ClassifierRun(RunConfig):
    kind: Literal["classifier"] = "classifier"
    data: str = ""
    classes: int = 2
    packing: PackingConfig = PackingConfig(length=96, slots=4, text_length=4, patch=(1, 8, 8))


def groups(config):
    weight = ParamSpec((8 * 8 * 3, config.classes), (None, None), normal(0.1))
    return {MODEL: Group({"weight": weight}, config.optim)}


def loss(config, params, frozen, pack, step, part):
    member_BSL = pack.segments_BL[:, None] == jnp.arange(1, config.packing.slots + 1)[None, :, None]
    pixels_BLP = pack.tokens_BLP.astype(jnp.float32) / 127.5 - 1
    share_BSL = member_BSL / jnp.maximum(member_BSL.sum(-1, keepdims=True), 1)
    logits = jax.nn.log_softmax(jnp.einsum("bsl,blp->bsp", share_BSL, pixels_BLP) @ params[MODEL]["weight"])
    real_BS = pack.labels_BS > 0
    picked = jnp.take_along_axis(logits, jnp.maximum(pack.labels_BS - 1, 0)[..., None], -1)[..., 0]
    right = (logits.argmax(-1) == pack.labels_BS - 1) & real_BS
    return {MODEL: -(picked * real_BS).sum()}, ({MODEL: real_BS.sum()}, {"accuracy": (right.sum(), real_BS.sum())})


def open_inputs(config, workdir, mesh):
    check(config.data, "--config.data is not given; it must be a folder made by `sora-jax data build`")
    return Inputs(digest=Dataset(config.data).digest)


def make_job(config, inputs, workdir):
    batches = packed_batches(Dataset(config.data), NoText(), config.packing, config.batch, config.seed, config.split)
    return Job(
        name=config.kind,
        groups=groups(config),
        loss=functools.partial(loss, config),
        batches=lambda start, position: batches.stream(start, config.feed, Position(*position or ())),
        to_device=lambda batch: Pack(**batch),
        counts=lambda batch: {"clips": int((batch["clip_ids_BS"] > 0).sum())},
        clip_ids=lambda batch: batch["clip_ids_BS"].tolist(),
    )


def plan_training(config, mesh):
    row = packed_batches(Dataset(config.data), NoText(), config.packing, 1, 0, config.split)[0]
    batch = abstract_batch(Pack(**many(row, (1, config.batch))), mesh, leading=1)
    load = Load(1.0, config.batch * config.packing.length, "tokens", config.batch, lambda factor: ("", ""))
    return training_program(config, Trained(groups(config), functools.partial(loss, config)), batch, load, mesh)


def finish(config, inputs, state, workdir):
    (workdir / "classes.json").write_text(json.dumps({"classes": config.classes, "step": int(state.step)}))


CLASSIFIER = Kind(ClassifierRun, groups, open_inputs, make_job, {"train": plan_training}, finish=finish)
