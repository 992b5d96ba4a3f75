"""The program of a classifier: its training step on packs of images."""

import functools

import numpy as np

from sora_jax.data.feeding.tokenizer import NoText
from sora_jax.data.packing.packs import PackItem, pack_batch
from sora_jax.models.crate_classifier import forward_flops
from sora_jax.nn.pack import Pack
from sora_jax.parallel.compile import abstract_batch
from sora_jax.parallel.mesh import check_split
from sora_jax.plan.programs import AnyMesh, Load, Program, Trained, many, training_program
from sora_jax.train.classifier import ClassifierRun, classifier_groups, classifier_loss, classifier_parts


def train_classifier(config: ClassifierRun, mesh: AnyMesh) -> Program:
    """Make the training step on packs of as many of the largest images as one has room for."""
    accumulate, packing, model = config.loop.accumulate, config.packs, config.model
    rows = config.batch // accumulate
    check_split(mesh, "batch", rows, "config.batch / config.loop.accumulate")
    images = min(max(packing.length // (model.grid[0] * model.grid[1]), 1), packing.slots)
    image = np.zeros((1, *model.image, 3), np.uint8)
    row = pack_batch([[PackItem(image, 1 + i, NoText().encode("")) for i in range(images)]], packing)
    batch = abstract_batch(Pack(**many(row, (accumulate, rows))), mesh, leading=1)
    flops = 3 * config.batch * forward_flops(model, row)
    shorter = lambda factor: (f"--config.batch={max(int(config.batch / factor), 1)}", "a batch fills a chip")  # noqa: E731
    load = Load(flops, config.batch * packing.length, "tokens", config.batch, shorter, {"tensor": (model.heads,)})
    loss = functools.partial(classifier_loss, config)
    trained = Trained(classifier_groups(config), loss, fixed=classifier_parts(config)[1])
    return training_program(config, trained, batch, load, mesh)
