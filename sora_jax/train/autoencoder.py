"""Training the autoencoder on fixed-size crops."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.config import check
from sora_jax.data.crops import CropConfig, crop_batches, sizes_and_clips
from sora_jax.data.manifest import Dataset
from sora_jax.data.share import Share
from sora_jax.diffusion.keys import Purpose, step_key
from sora_jax.errors import UserError
from sora_jax.models.autoencoder import AutoencoderConfig
from sora_jax.models.first_stage import FirstStageConfig, autoencoder_specs, latent_grid, reconstruction_loss
from sora_jax.models.flops import autoencoder_train_flops
from sora_jax.models.tiling import TilingConfig, tile_grid
from sora_jax.train.loop import Job, Preview
from sora_jax.train.run_config import RunConfig
from sora_jax.train.state import MODEL, Group
from sora_jax.train.step import LossResult, MetricSums


@dataclasses.dataclass(frozen=True)
class AutoencoderRun(RunConfig):
    """Configure a training run of the autoencoder; `batch` counts clips and images."""

    kind: Literal["autoencoder"] = "autoencoder"
    data: str = ""  # a folder made by `sora-jax data build`
    batch: int = 16
    crop: tuple[int, int, int] = (9, 64, 64)  # (frames, height, width) of the training crops
    image_share: float = 0.1  # share of the batch that are images, single frames
    model: FirstStageConfig = AutoencoderConfig()
    tiles: TilingConfig = TilingConfig()  # how large whole clips are cut in previews and measurements

    def __post_init__(self):
        super().__post_init__()
        latent_grid(self.model, *self.crop)
        tile_grid(self.model, self.tiles)
        for name, rows in self.rows.items():
            check(
                rows % self.loop.accumulate == 0,
                f"batch is {self.batch} and image_share {self.image_share}, which makes {rows} {name} in a step; "
                f"their number must be a multiple of loop.accumulate = {self.loop.accumulate}",
            )

    @property
    def crops(self) -> CropConfig:
        """The config of the crops."""
        return CropConfig(*self.crop, batch=self.batch, image_share=self.image_share)

    @property
    def rows(self) -> dict[str, int]:
        """The number of rows of a step that are videos, and that are images."""
        return {"videos": self.batch - self.crops.images, "images": self.crops.images}


def autoencoder_groups(config: AutoencoderRun) -> dict[str, Group]:
    """Declare what is trained: the autoencoder."""
    return {MODEL: Group(autoencoder_specs(config.model), config.optim)}


def to_float(frames: jax.Array) -> jax.Array:
    """Convert uint8 pixels to float32 in [-1, 1]."""
    return frames.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(video: jax.Array | np.ndarray) -> np.ndarray:
    """Convert float pixels, about [-1, 1], to uint8."""
    return np.clip(np.round((np.asarray(video) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def autoencoder_loss(
    config: AutoencoderRun, params: dict, frozen: Any, batch: dict, step: jax.Array, part: jax.Array
) -> LossResult:
    """Return the sum of the reconstruction loss over clips and images, its weight, and means: see `make_step`."""
    key = jax.random.fold_in(step_key(config.seed, step, Purpose.NOISE), part)
    total, count = jnp.float32(0.0), jnp.float32(0.0)
    means: MetricSums = {}
    for number, name in enumerate(sorted(batch)):
        video_BTHWC = to_float(batch[name])
        loss, parts = reconstruction_loss(params[MODEL], config.model, video_BTHWC, jax.random.fold_in(key, number))
        clips = jnp.float32(video_BTHWC.shape[0])
        total, count = total + loss * clips, count + clips
        group = name.partition("_")[0]
        means |= {f"{group}/{part_name}": (value * clips, clips) for part_name, value in parts.items()}
    return {MODEL: total}, ({MODEL: count}, means)


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
    config: AutoencoderRun, dataset: Dataset, preview: Preview | None = None, share: Share = Share()
) -> Job:
    """Make the job that trains an autoencoder on a dataset folder; share: this process's part of each batch."""
    check_sizes(config.model, dataset)
    sizes, clips = sizes_and_clips(dataset, config.split)
    check(len(clips) > 0, f"config.split is {config.split!r}; the dataset {str(dataset.path)!r} has no such clip")
    batches = crop_batches(dataset, config.crops, config.seed, sizes, clips, share)
    return Job(
        name=config.kind,
        groups=autoencoder_groups(config),
        loss=functools.partial(autoencoder_loss, config),
        batches=lambda start, position: ((batch, None) for batch in batches.stream(start, config.feed)),
        to_device=lambda batch: {name: x for name, x in batch.items() if name.endswith("_BTHW3")},
        counts=functools.partial(_counts, config.model),
        clip_ids=lambda batch: [
            dataset.row(int(i))["id"] for name in sorted(batch) if name.endswith("_clips_B") for i in batch[name]
        ],
        preview=preview,
        share=share,
    )


def _counts(model: FirstStageConfig, batch: dict) -> dict[str, float]:
    shapes = [x.shape[:4] for name, x in batch.items() if name.endswith("_BTHW3")]
    return {
        "clips": sum(clips for clips, *_ in shapes),
        "frames": sum(clips * frames for clips, frames, *_ in shapes),
        "flops": sum(clips * _clip_flops(model, *size) for clips, *size in shapes),
    }


_clip_flops = functools.cache(autoencoder_train_flops)
