"""The programs of the autoencoder: its training step, and encoding with decoding."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp

from sora_jax.models.first_stage import autoencoder_specs, decode, encode, encoder_part
from sora_jax.models.flops import autoencoder_train_flops
from sora_jax.nn import params as param
from sora_jax.parallel.compile import abstract_batch
from sora_jax.parallel.mesh import check_split
from sora_jax.parallel.rules import parts, reshard
from sora_jax.plan.programs import AnyMesh, Load, Program, Trained, training_program
from sora_jax.train.autoencoder import AutoencoderRun, autoencoder_groups, autoencoder_loss, autoencoder_parts


def heaviest(config: AutoencoderRun) -> tuple[str, AutoencoderRun]:
    """Return the stage of the largest crop, or the run if it has none, and the name of the option for its crop."""
    parts = [("crop", config)] if not config.stages else []
    for i, stage in enumerate(config.stages):
        parts.append((f"stages[{i}].crop" if stage.crop else "crop", config.stage(i, Path())))
    return max(parts, key=lambda part: (math.prod(part[1].largest), part[1].batch))


def train_autoencoder(config: AutoencoderRun, mesh: AnyMesh) -> Program:
    """Make the training step on crops of the largest size, which needs most memory."""
    smaller = functools.partial(_smaller_crop, config)
    _, config = heaviest(config)
    frames, height, width = config.largest
    accumulate, batch, flops, pixels = config.loop.accumulate, {}, 0.0, 0
    for (name, rows), length in zip(config.rows.items(), (frames, 1), strict=True):
        if not rows:
            continue
        check_split(mesh, "batch", rows // accumulate, f"the number of {name} in config.batch / loop.accumulate")
        shape = (accumulate, rows // accumulate, length, height, width, 3)
        batch[f"{name}_BTHW3"] = jax.ShapeDtypeStruct(shape, jnp.uint8)
        batch[f"{name}_rows_B"] = jax.ShapeDtypeStruct(shape[:2], jnp.int32)
        flops += rows * autoencoder_train_flops(config.model, length, height, width)
        pixels += rows * length * height * width
    load = Load(flops, pixels, "pixels", config.batch, smaller)
    batch = abstract_batch(batch, mesh, leading=1)
    loss = functools.partial(autoencoder_loss, config)
    frozen = {}
    if config.trained == "decoder":
        frozen["encoder"] = param.abstract_on(encoder_part(autoencoder_specs(config.model)), mesh)
    trained = Trained(autoencoder_groups(config), loss, frozen, autoencoder_parts(config)[1])
    return training_program(config, trained, batch, load, mesh)


def reconstruct(config: AutoencoderRun, mesh: AnyMesh) -> Program:
    """Make the program that encodes and decodes a batch of clips of the largest training size."""
    smaller = functools.partial(_smaller_crop, config)
    _, config = heaviest(config)
    frames, height, width = config.largest
    split = parts("batch", mesh)
    clips = -(-config.batch // split) * split
    params = param.abstract_on(autoencoder_specs(config.model), mesh)
    video = abstract_batch(jax.ShapeDtypeStruct((clips, frames, height, width, 3), jnp.float32), mesh)
    axes = ("batch", None, None, None, None)
    there = lambda params, x: reshard(encode(params, config.model, x)[0], *axes)  # noqa: E731
    function = jax.jit(lambda params, x: decode(params, config.model, there(params, x)))
    flops = clips * autoencoder_train_flops(config.model, frames, height, width) / 3
    pixels = math.prod(video.shape[:-1])
    load = Load(flops, pixels, "pixels", config.batch, smaller)
    return Program(function, (params, video), {"parameters": params, "batch": video}, load)


def _smaller_crop(config: AutoencoderRun, factor: float) -> tuple[str, str]:
    """Return the option for crops with fewer pixels by a factor, and why."""
    name, part = heaviest(config)
    if part.largest != part.crop:
        return "--config.crops=()", "the activations of the largest of them fill a chip"
    frames, height, width = part.crop
    side = 2 * max(int(min(height, width) / math.sqrt(factor) / 2 // 8 * 8), 8)
    return f"--config.{name}={frames},{side},{side}", "the activations of a crop fill a chip"
