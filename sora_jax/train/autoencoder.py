"""Training the autoencoder on fixed-size crops."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.config import check, choose
from sora_jax.data.shard_spec import ShardSpec
from sora_jax.data.storing.manifest import Dataset
from sora_jax.diffusion.keys import Purpose, step_key
from sora_jax.errors import NotFinite, UserError
from sora_jax.models.autoencoder import AutoencoderConfig, start_from_linear
from sora_jax.models.discriminator import DiscriminatorConfig, discriminator_specs
from sora_jax.models.first_stage import (
    FirstStageConfig,
    TrainedConfig,
    autoencoder_specs,
    block_of,
    codes_of,
    decoder_part,
    encoder_part,
    latent_grid,
)
from sora_jax.models.flops import autoencoder_train_flops
from sora_jax.models.lpips import SMALLEST, read_lpips
from sora_jax.models.tiling import TilingConfig, tile_grid
from sora_jax.nn.params import ParamSpec, zeros
from sora_jax.train.adapt import split_specs
from sora_jax.train.crops import CropBatches, CropConfig
from sora_jax.train.linear_codec import fit_linear_codec
from sora_jax.train.loop import Job, LoopConfig, Preview
from sora_jax.train.optim import OptimConfig
from sora_jax.train.reconstruction import Aids, LossConfig, Losses, fits, reconstruction_loss, resolution
from sora_jax.train.run_config import RunConfig
from sora_jax.train.state import MODEL, Group
from sora_jax.train.step import LossResult, MetricSums

WITHIN_REACH = 36.0  # dB that a small autoencoder may reach
LINEAR_BLOCKS = 100_000  # of pixels that the linear path is fitted to


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """Configure a part of a run; it begins with the averages of the stage before."""

    steps: int = 1000  # length of the stage
    crop: tuple[int, ...] = ()  # (frames, height, width) of the training crops; (): the sizes of the run
    batch: int = 0  # clips and images of a step; 0: as in the run
    trained: Literal["all", "decoder"] = "all"  # what learns; an encoder that does not keeps latent caches valid
    loss: LossConfig = LossConfig()  # further terms of the loss
    optim: OptimConfig = OptimConfig()  # its optimizer, which starts anew

    def __post_init__(self):
        check(self.steps > 0, f"stages.steps is {self.steps}; it must be positive")
        check(len(self.crop) in (0, 3), f"stages.crop is {self.crop}; it must be (frames, height, width)")
        check(self.batch >= 0, f"stages.batch is {self.batch}; it must be positive, or 0: that of the run")


@dataclasses.dataclass(frozen=True)
class AutoencoderRun(RunConfig):
    """Configure a training run of the autoencoder; `batch` counts clips and images."""

    kind: Literal["autoencoder"] = "autoencoder"
    data: str = ""  # a folder made by `sora-jax data build`
    batch: int = 16  # clips and images of a step over all devices, gradient accumulation included
    crop: tuple[int, int, int] = (9, 64, 64)  # (frames, height, width) of the training crops
    crops: tuple[tuple[int, int, int], ...] = ()  # further sizes; each step takes one of all, at random
    image_share: float = 0.1  # share of the batch that are images, single frames
    model: TrainedConfig = AutoencoderConfig()
    tiles: TilingConfig = TilingConfig()  # how large whole clips are cut in previews and measurements
    latent_scale: Literal["deviation", "effect"] = "deviation"
    """what the channels are divided by: their own deviation, or what makes equal noise on each show as much"""
    loss: LossConfig = LossConfig()  # further terms of the loss
    discriminator: DiscriminatorConfig = DiscriminatorConfig()  # trained if the loss has a weight for it
    discriminator_optim: OptimConfig = OptimConfig(b1=0.5)  # its optimizer
    start: str = ""  # run folder of an autoencoder of the same network, whose weights are the first ones
    trained: Literal["all", "decoder"] = "all"  # what learns; "decoder" needs `start`, and keeps its latents
    stages: tuple[StageConfig, ...] = ()  # parts of the run, in order; () is one part, of `loop.steps`

    def __post_init__(self):
        super().__post_init__()
        choose("trained", self.trained, {"all": 0, "decoder": 0})
        choose("latent_scale", self.latent_scale, {"deviation": 0, "effect": 0})
        check(
            self.trained == "all" or bool(self.start),
            "start is not given; with trained = 'decoder' it must be the run folder of an autoencoder",
        )
        check(
            not (self.start and self.init.weights),
            f"start is {self.start!r} and init.weights {self.init.weights!r}; give one of them",
        )
        check(not (self.stages and self.init.weights), "init.weights is given; beside stages it must be start")
        autoencoder_parts(self)
        for size in self.sizes:
            try:
                _check_crop(self.model, self.loss, self.discriminator.levels, size)
            except UserError as error:
                raise UserError(f"{'crop' if size == self.crop else 'crops'} is {size}: {error}") from error
        tile_grid(self.model, self.tiles)
        for name, rows in self.rows.items():
            check(
                rows % self.loop.accumulate == 0,
                f"batch is {self.batch} and image_share {self.image_share}, which makes {rows} {name} in a step; "
                f"their number must be a multiple of loop.accumulate = {self.loop.accumulate}",
            )
        check(
            not self.loss.kl_target or (self.trained == "all" and codes_of(self.model).name == "none"),
            f"loss.kl_target is {self.loss.kl_target}; it must be 0 where no encoder with Gaussian latents is trained",
        )
        if self.stages:
            self._check_stages()

    def _check_stages(self) -> None:
        """Raise a UserError, with the stage, where one is wrong, or an option would have no effect beside them."""
        for name, default in (("loss", LossConfig()), ("optim", OptimConfig()), ("trained", "all")):
            check(getattr(self, name) == default, f"{name} is changed; beside stages it must be stages[i].{name}")
        steps, default_steps = self.loop.steps, LoopConfig().steps
        check(steps == default_steps, f"loop.steps is {steps}; beside stages it must be stages[i].steps")
        for number in range(len(self.stages)):
            try:
                self.stage(number, Path())
            except UserError as error:
                raise UserError(f"stages[{number}]: {error}") from error

    @property
    def sizes(self) -> tuple[tuple[int, int, int], ...]:
        """All sizes of crops."""
        return (self.crop, *self.crops)

    @property
    def largest(self) -> tuple[int, int, int]:
        """The size of most pixels, of all stages."""
        crops = (stage.crop for stage in self.stages if stage.crop)
        frames, height, width = max((*self.sizes, *crops), key=math.prod)
        return frames, height, width

    @property
    def crop_config(self) -> CropConfig:
        """The config of the crops."""
        return CropConfig(*self.crop, batch=self.batch, image_share=self.image_share, further=self.crops)

    @property
    def rows(self) -> dict[str, int]:
        """The number of rows of a step that are videos, and that are images."""
        images = self.crop_config.images
        return {"videos": self.batch - images, "images": images}

    def stage(self, number: int, workdir: Path) -> "AutoencoderRun":
        """Return the config of a stage, counted from 0, whose run folder is `stage_folder(workdir, number)`."""
        stage = self.stages[number]
        given: dict[str, Any] = {
            "crop": stage.crop,
            "batch": stage.batch,
            "loss": stage.loss,
            "optim": stage.optim,
            "start": str(stage_folder(workdir, number - 1)) if number else self.start,
        }
        changed = {name: value for name, value in given.items() if value}
        crops = () if stage.crop else self.crops
        loop = dataclasses.replace(self.loop, steps=stage.steps)
        return dataclasses.replace(self, **changed, crops=crops, trained=stage.trained, loop=loop, stages=())


def stage_folder(workdir: Path, number: int) -> Path:
    """Return the run folder of a stage, counted from 0."""
    return workdir / f"stage_{number + 1}"


def _check_crop(model: TrainedConfig, loss: LossConfig, levels: int, size: tuple[int, int, int]) -> None:
    """Raise a UserError if the autoencoder or a term of the loss does not take the crop."""
    grid = latent_grid(model, *size)
    least = min(size[1:]) * (min(loss.equivariance_scales) if loss.equivariance else 1)
    shown = " x ".join(map(str, size)) + (", scaled," if loss.equivariance else "")
    if loss.adversarial:
        check(
            least >= 2**levels, f"crop {shown} is too small for a discriminator of {levels} levels: {2**levels} pixels"
        )
    if loss.lpips_weight:
        check(least >= SMALLEST, f"crop {shown} is too small for LPIPS: {SMALLEST} pixels")
    check(
        not loss.equivariance or any(fits(scale, grid[1:]) for scale in loss.equivariance_scales),
        f"loss.equivariance_scales is {loss.equivariance_scales}; one of them must make whole numbers of the "
        f"{grid[1]} x {grid[2]} latent positions of a crop of {' x '.join(map(str, size))}",
    )


DISCRIMINATOR = "discriminator"  # the group of its parameters
CONTROL = "control"  # the group of numbers that follow what is measured, by plain gradient steps
CONTROL_OPTIM = OptimConfig(method="sgd", learning_rate=0.01, warmup_steps=0, clip_norm=0.0, ema=(0.0,))


def autoencoder_parts(config: AutoencoderRun) -> tuple[dict, dict]:
    """Declare the autoencoder, or its decoder: what is trained, and what `freeze` fixes."""
    specs = autoencoder_specs(config.model)
    return split_specs(specs if config.trained == "all" else decoder_part(specs), config.freeze, config.init)


def autoencoder_groups(config: AutoencoderRun) -> dict[str, Group]:
    """Declare what is trained: the autoencoder or its decoder and, if the loss has such terms, what these need."""
    groups = {MODEL: Group(autoencoder_parts(config)[0], config.optim)}
    if config.loss.adversarial:
        groups[DISCRIMINATOR] = Group(discriminator_specs(config.discriminator), config.discriminator_optim)
    control = _control_specs(config)
    return groups | ({CONTROL: Group(control, CONTROL_OPTIM)} if control else {})


def _control_specs(config: AutoencoderRun) -> dict:
    """Declare the logarithm of the KL weight, if that is adapted, and the mean scores of the LeCam term."""
    names = ["log_kl_weight"] if config.loss.kl_target else []
    names += ["real", "fake"] if config.loss.adversarial and config.discriminator.lecam_weight else []
    start = jax.nn.initializers.constant(math.log(config.model.kl_weight or 1e-6))
    return {name: ParamSpec((), (), start if name == "log_kl_weight" else zeros) for name in names}


def to_float(frames: jax.Array) -> jax.Array:
    """Convert uint8 pixels to float32 in [-1, 1]."""
    return frames.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(video: jax.Array | np.ndarray) -> np.ndarray:
    """Convert float pixels, about [-1, 1], to uint8; NotFinite where some are NaN, which would be black."""
    video = np.asarray(video)
    if not np.isfinite(video).all():
        raise NotFinite("a decoded clip has values that are not finite")
    return np.clip(np.round((video + 1.0) * 127.5), 0, 255).astype(np.uint8)


def autoencoder_loss(
    config: AutoencoderRun, params: dict, frozen: Any, batch: dict, step: jax.Array, part: jax.Array
) -> LossResult:
    """Return the sums of the losses over clips and images, their weights, and means: see `make_step`.

    `frozen` holds what is not trained, where there is something: {"encoder": its part of the parameters, "lpips"}.
    Draws of a crop are functions of (seed, step, row), as the crop itself is, and those of a step of (seed, step): of
    how the batch is cut into micro-batches, `part`, none depends.
    """
    frozen = frozen or {}
    key = step_key(config.seed, step, Purpose.NOISE)
    whole = frozen.get("encoder", {}) | params[MODEL]
    aids = _aids(config, params, frozen, step)
    sums: dict[str, jax.Array] = {}
    count = jnp.float32(0.0)
    means: MetricSums = {}
    for number, name in enumerate(sorted(name for name in batch if name.endswith("_BTHW3"))):
        video_BTHWC, prefix = to_float(batch[name]), name.partition("_")[0]
        own = aids._replace(rows_B=batch.get(f"{prefix}_rows_B"))
        found = reconstruction_loss(whole, config.model, video_BTHWC, jax.random.fold_in(key, number), config.loss, own)
        clips = jnp.float32(video_BTHWC.shape[0])
        losses = {MODEL: found.model, DISCRIMINATOR: found.discriminator, CONTROL: _control(config, params, found)}
        sums = {group: sums.get(group, jnp.float32(0.0)) + losses[group] * clips for group in params}
        count = count + clips
        means |= {f"{prefix}/{metric}": (value * clips, clips) for metric, value in found.metrics.items()}
    learning = step >= config.loss.discriminator_start
    weights = {group: jnp.where(learning, count, 0.0) if group == DISCRIMINATOR else count for group in params}
    if aids.kl_weight is not None:
        means["kl_weight"] = aids.kl_weight, jnp.float32(1.0)
    return sums, (weights, means)


def _aids(config: AutoencoderRun, params: dict, frozen: dict, step: jax.Array) -> Aids:
    """Return what the loss needs at this step beside the autoencoder."""
    loss, control = config.loss, params.get(CONTROL, {})
    since = step - loss.adversarial_start + 1.0
    # A run that starts from weights has been through it.
    warmup = 0.0 if config.start else codes_of(config.model).warmup_noise * config.loop.steps
    return Aids(
        kl_weight=jnp.exp(control["log_kl_weight"]) if "log_kl_weight" in control else None,
        soften=jnp.where(step < warmup, 1.0, 0.0) if codes_of(config.model).name != "none" and warmup else None,
        lpips=frozen.get("lpips"),
        discriminator=(params[DISCRIMINATOR], config.discriminator) if loss.adversarial else None,
        lecam=(control["real"], control["fake"]) if "real" in control else None,
        ramp=jnp.clip(since / max(loss.adversarial_warmup, 1), 0.0, 1.0),
    )


def _control(config: AutoencoderRun, params: dict, found: Losses) -> jax.Array:
    """Return the loss whose gradient steps make the mean scores follow, and raise the KL weight with the KL."""
    control, total = params.get(CONTROL, {}), jnp.float32(0.0)
    for name in set(control) & {"real", "fake"}:
        score = jax.lax.stop_gradient(found.metrics[f"scores_{name}"])
        total = total + 0.5 * jnp.square(control[name] - score)
    if "log_kl_weight" in control:
        excess = jax.lax.stop_gradient(found.metrics["kl"]) - config.loss.kl_target
        total = total - control["log_kl_weight"] * excess
    return total


def check_sizes(config: FirstStageConfig, dataset: Dataset) -> None:
    """Raise a UserError unless the autoencoder takes every clip of the dataset whole, as encoding will."""
    columns = (dataset.table[side].to_pylist() for side in ("frames", "height", "width"))
    for size in sorted(set(zip(*columns, strict=True))):
        try:
            latent_grid(config, *size)
        except UserError as error:
            shown = " x ".join(map(str, size))
            message = f"the dataset {str(dataset.path)!r} has clips of {shown} (frames x height x width): {error}"
            raise UserError(message) from error


def autoencoder_job(
    config: AutoencoderRun,
    dataset: Dataset,
    preview: Preview | None = None,
    share: ShardSpec = ShardSpec(),
    first: dict | None = None,
) -> Job:
    """Make the job that trains an autoencoder on a dataset folder.

    share: this process's part of each batch. first: parameters to begin with, in place of random ones.
    """
    check_sizes(config.model, dataset)
    batches = CropBatches(dataset, config.crop_config, config.seed, config.split, share)
    frozen = {"encoder": encoder_part(first)} if first and config.trained == "decoder" else {}
    frozen |= {"lpips": read_lpips(config.loss.lpips_file)} if config.loss.lpips_weight else {}
    return Job(
        name=config.kind,
        groups=autoencoder_groups(config),
        loss=functools.partial(autoencoder_loss, config),
        batches=lambda start, position: ((batch, None) for batch in batches.stream(start, config.feed)),
        to_device=lambda batch: {name: x for name, x in batch.items() if name.endswith(("_BTHW3", "_rows_B"))},
        counts=functools.partial(_counts, config.model),
        clip_ids=lambda batch: [
            dataset.row(int(i))["id"] for name in sorted(batch) if name.endswith("_clips_B") for i in batch[name]
        ],
        preview=preview,
        share=share,
        frozen=frozen,
        note=_note(config),
        start=_starter(config, dataset, batches.clips, first),
        epoch=len(batches.clips) / config.batch,
    )


def _note(config: AutoencoderRun) -> str:
    """Say at which quality the KL term stops rewarding detail, where runs come near it."""
    found = resolution(config.model, config.loss)
    if found is None or found > WITHIN_REACH:
        return ""
    mend = "a smaller config.model.kl_weight keeps more"
    return f"{config.kind}: the KL weight keeps no detail finer than a PSNR of {found:.1f} dB; {mend}"


def _starter(config: AutoencoderRun, dataset: Dataset, clips: np.ndarray, first: dict | None) -> Callable | None:
    """Return the function that makes the parameters a new run begins with; None: random ones."""
    if first is not None:
        return lambda _: {MODEL: first if config.trained == "all" else decoder_part(first)}
    if not getattr(config.model, "linear", False):
        return None

    def from_linear(params: Mapping) -> dict:
        chosen = np.random.default_rng(0).permutation(clips)  # the fit reads as many as it needs
        frames = (dataset[int(i)].frames for i in chosen)
        codec = fit_linear_codec(frames, block_of(config.model), config.model.latent_channels, LINEAR_BLOCKS)
        return {MODEL: start_from_linear(params[MODEL], codec.components_PC, codec.mean_P, codec.std_C)}

    return from_linear


def _counts(model: TrainedConfig, batch: dict) -> dict[str, float]:
    shapes = [x.shape[:4] for name, x in batch.items() if name.endswith("_BTHW3")]
    return {
        "clips": sum(clips for clips, *_ in shapes),
        "frames": sum(clips * frames for clips, frames, *_ in shapes),
        "flops": sum(clips * _clip_flops(model, *size) for clips, *size in shapes),
    }


_clip_flops = functools.cache(autoencoder_train_flops)
