"""Training a classifier of images: packs of labelled images of any size in, the logits of classes out."""

import dataclasses
import functools
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.config import check
from sora_jax.data.feeding.epochs import Position
from sora_jax.data.feeding.pipeline import PackedBatches
from sora_jax.data.feeding.tokenizer import NoText
from sora_jax.data.packing.packs import PackingConfig, PackItem, pack_batch, token_counts
from sora_jax.data.packing.planning import plan
from sora_jax.data.shard_spec import ShardSpec
from sora_jax.data.storing.manifest import Dataset, evenly_spread
from sora_jax.models.crate_classifier import CrateClassifierConfig, classifier_specs, classify, forward_flops
from sora_jax.nn.pack import Pack
from sora_jax.parallel.mesh import place_batch
from sora_jax.parallel.rules import parts
from sora_jax.train.adapt import split_specs
from sora_jax.train.autoencoder import to_float
from sora_jax.train.denoiser import clip_names
from sora_jax.train.loop import Job, Measure
from sora_jax.train.run_config import RunConfig
from sora_jax.train.state import MODEL, Group
from sora_jax.train.step import LossResult

MEASURED = 1000  # held-out images at most
PACKS = 8  # measured at once


@dataclasses.dataclass(frozen=True)
class ClassifierRun(RunConfig):
    """Configure the training of a classifier of images."""

    kind: Literal["classifier"] = "classifier"  # kind of run
    model: CrateClassifierConfig = CrateClassifierConfig()  # the network
    data: str = ""  # folder of `sora-jax data build`: images with a class each
    packing: PackingConfig = PackingConfig(length=784, slots=4)  # sizes of a pack; patch and text are the model's
    label_smoothing: float = 0.1  # share of the target that all classes have together

    def __post_init__(self):
        super().__post_init__()
        share = self.label_smoothing
        check(0 <= share < 1, f"label_smoothing is {share}; it must be from 0 to less than 1")
        check(
            self.mesh.sequence == 1,
            f"mesh.sequence is {self.mesh.sequence}; it must be 1: a classifier's class tokens cannot be split",
        )

    @property
    def packs(self) -> PackingConfig:
        """Return the sizes of packs, with the model's patch; a null token stands for the text of each image."""
        patch = (1, self.model.patch, self.model.patch)
        return dataclasses.replace(self.packing, patch=patch, text_length=self.packing.slots, rows_per_clip=1)


def classifier_parts(config: ClassifierRun) -> tuple[dict, dict]:
    """Return the specs of the network that are trained, and those that are fixed."""
    return split_specs(classifier_specs(config.model), config.freeze, config.init)


def classifier_groups(config: ClassifierRun) -> dict[str, Group]:
    """Return what is trained."""
    return {MODEL: Group(classifier_parts(config)[0], config.optim)}


def classifier_loss(
    config: ClassifierRun, params: dict, frozen: object, pack: Pack, step: jax.Array, part: jax.Array
) -> LossResult:
    """Sum the cross-entropy of the images of a batch of packs, with label smoothing; see `make_step`."""
    logits_BSC = logits_of(config.model, params, pack)
    target_BSC = jax.nn.one_hot(pack.labels_BS - 1, config.model.classes)  # all zero in empty slots
    known_BS = pack.labels_BS > 0
    smooth_BSC = (1 - config.label_smoothing) * target_BSC + config.label_smoothing / config.model.classes
    loss_BS = -(smooth_BSC * jax.nn.log_softmax(logits_BSC)).sum(-1)
    right_BS = known_BS & (logits_BSC.argmax(-1) == pack.labels_BS - 1)
    count = known_BS.sum().astype(jnp.float32)
    loss = jnp.where(known_BS, loss_BS, 0.0).sum()
    return {MODEL: loss}, ({MODEL: count}, {"accuracy": (right_BS.sum().astype(jnp.float32), count)})


def logits_of(model: CrateClassifierConfig, params: dict, pack: Pack) -> jax.Array:
    """Compute the logits (B, S, classes) of packs of uint8 pixels; params: by group."""
    assert pack.tokens_BLP is not None
    return classify(params[MODEL], model, pack, to_float(pack.tokens_BLP))


def classifier_job(config: ClassifierRun, dataset: Dataset, share: ShardSpec = ShardSpec()) -> Job:
    """Make the job that trains a classifier on a dataset; share: this process's part of each batch."""
    batches = PackedBatches(dataset, NoText(), config.packs, config.batch, config.seed, config.split, share)
    report = batches.report()
    held_out = HeldOutImages(config, dataset)
    return Job(
        name=config.kind,
        groups=classifier_groups(config),
        loss=functools.partial(classifier_loss, config),
        batches=lambda start, position: batches.stream(start, config.feed, Position(*position or ())),
        to_device=lambda batch: Pack(**batch),
        counts=functools.partial(batch_counts, config.model),
        clip_ids=lambda batch: clip_names(dataset, batch["clip_ids_BS"]),
        measure=Measure(config.loop.preview_every, lambda step, averages: held_out(averages), local=True)
        if len(held_out)
        else None,
        note=str(report),
        share=share,
        epoch=report.packs / report.clips * batches.clip_index.weights.sum(dtype=np.float64) / config.batch,
    )


def batch_counts(model: CrateClassifierConfig, batch: dict) -> dict[str, float]:
    """Count images, real tokens, capacity for tokens and model FLOPs of a host batch."""
    lengths = token_counts(batch)
    return {
        "clips": int((lengths > 0).sum()),
        "tokens": int(lengths.sum()),
        "capacity": batch["segments_BL"].size,
        "flops": 3 * forward_flops(model, batch),
    }


def fits(config: ClassifierRun, dataset: Dataset) -> np.ndarray:
    """Return which clips (n,) bool are images of known class, of a size that packs and the network's positions have."""
    sizes = dataset.grids
    tokens = (sizes[:, 1:] // config.model.patch).prod(1)
    small = (sizes[:, 0] == 1) & (sizes[:, 1:] <= np.array(config.model.image)).all(1) & (tokens <= config.packs.length)
    return small & (sizes[:, 1:] % config.model.patch == 0).all(1) & (dataset.labels < config.model.classes)


class HeldOutImages:
    """Measure the accuracy of images that are not trained on, at most `MEASURED`, evenly spread."""

    def __init__(self, config: ClassifierRun, dataset: Dataset):
        splits = np.array(dataset.column("split").to_pylist())
        wanted = fits(config, dataset) & (dataset.labels >= 0) & (splits != config.split)
        self._config, self._dataset = config, dataset
        self._indices = evenly_spread(np.flatnonzero(wanted).tolist(), MEASURED)
        self._logits = jax.jit(functools.partial(logits_of, config.model))

    def __len__(self) -> int:
        return len(self._indices)

    def __call__(self, averages: dict) -> dict:
        """Return the metric: the share of images whose most likely class is theirs."""
        found = self.predicted(averages)
        return {"held_out/accuracy": float(np.mean(found == self._dataset.labels[self._indices]))}

    def predicted(self, averages: dict) -> np.ndarray:
        """Return the most likely class of each image, (n,)."""
        packs, found = self._config.packs, np.zeros(len(self), np.int64)
        lengths = self._dataset.grids[self._indices].prod(1) // self._config.model.patch**2
        planned = plan(0, 0, lengths, np.ones(len(self), np.int64), packs)
        rows, mesh = [planned[row] for row in range(len(planned))], jax.sharding.get_mesh()
        most = -(-PACKS // parts("batch")) * parts("batch")
        for start in range(0, len(rows), most):
            some = rows[start : start + most]
            filled = [*some, *some[-1:] * (most - len(some))]
            batch = pack_batch([[self._item(i) for i in row] for row in filled], packs)
            logits_BSC = jax.device_get(self._logits(averages, Pack(**place_batch(batch, mesh))))
            for members, own_SC in zip(some, logits_BSC, strict=False):
                found[members] = own_SC[: len(members)].argmax(-1)
        return found

    def _item(self, i: int) -> PackItem:
        index = self._indices[i]
        clip_id, label = int(self._dataset.clip_ids[index]), int(self._dataset.labels[index])
        return PackItem(self._dataset.item(index), clip_id, NoText().encode(""), label=label)


def check_images(config: ClassifierRun, dataset: Dataset) -> None:
    """Raise UserError if the split that is trained on holds videos, or images that the network has no positions for."""
    sizes = dataset.grids[dataset.indices(config.split)]
    frames, height, width = sizes.max(0).tolist()
    check(
        frames == 1,
        f"config.data is {config.data!r}; it has clips of {frames} frames, and a classifier reads images: build it "
        "with --max-frames=1",
    )
    check(
        height <= config.model.image[0] and width <= config.model.image[1],
        f"config.model.image is {config.model.image}; it must be at least {height, width}, the largest height and "
        f"width in {str(Path(config.data))!r}",
    )
