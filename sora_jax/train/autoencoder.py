"""Training the autoencoder on fixed-size crops, and what is kept of it afterwards."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.config import check
from sora_jax.data.crops import CropConfig, crop_batches, sizes_and_clips
from sora_jax.data.feed import FeedConfig
from sora_jax.data.manifest import Dataset
from sora_jax.diffusion.keys import Purpose, step_key
from sora_jax.errors import UserError
from sora_jax.models.autoencoder import AutoencoderConfig
from sora_jax.models.first_stage import FirstStageConfig, autoencoder_specs, latent_grid, reconstruction_loss
from sora_jax.models.flops import autoencoder_train_flops
from sora_jax.models.tiling import TilingConfig, tile_grid
from sora_jax.parallel.mesh import MeshConfig
from sora_jax.train.loop import Job, LoopConfig
from sora_jax.train.optim import OptimConfig


@dataclasses.dataclass(frozen=True)
class AutoencoderRun:
    """A whole training run of the autoencoder. `data` is a folder made by `sora-jax data build`.

    `crop` is (frames, height, width) of the training crops, `batch` their number in a step over all devices. In
    previews and measurements, which see whole clips, those larger than `tiles` are cut.
    """

    kind: str = "autoencoder"
    data: str = ""
    seed: int = 0
    batch: int = 16
    split: str = "train"
    crop: tuple[int, int, int] = (9, 64, 64)
    image_share: float = 0.1
    model: FirstStageConfig = AutoencoderConfig()
    optim: OptimConfig = OptimConfig()
    loop: LoopConfig = LoopConfig()
    feed: FeedConfig = FeedConfig()
    mesh: MeshConfig = MeshConfig()
    tiles: TilingConfig = TilingConfig()

    def __post_init__(self):
        check(self.kind == "autoencoder", f"kind is {self.kind!r}; an AutoencoderRun is of kind 'autoencoder'")
        check(0 <= self.seed < 2**32, f"seed is {self.seed}; it must be from 0 to 4294967295")
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
        return CropConfig(*self.crop, batch=self.batch, image_share=self.image_share)

    @property
    def rows(self) -> dict[str, int]:
        """How many rows of a step are videos, and how many images."""
        return {"videos": self.batch - self.crops.images, "images": self.crops.images}


def to_float(frames: jax.Array) -> jax.Array:
    """uint8 pixels as float32 in [-1, 1]."""
    return frames.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(video) -> np.ndarray:
    """Float pixels, about [-1, 1], as uint8."""
    return np.clip(np.round((np.asarray(video) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def autoencoder_loss(config: AutoencoderRun, params: dict, batch: dict, step, part):
    """Sum over clips and images of the reconstruction loss, (count, means): see `make_step`."""
    key = jax.random.fold_in(step_key(config.seed, step, Purpose.NOISE), part)
    total, count, means = 0.0, jnp.float32(0.0), {}
    for number, name in enumerate(sorted(batch)):
        video_BTHWC = to_float(batch[name])
        loss, parts = reconstruction_loss(params, config.model, video_BTHWC, jax.random.fold_in(key, number))
        clips = jnp.float32(video_BTHWC.shape[0])
        total, count = total + loss * clips, count + clips
        kind = name.partition("_")[0]
        means |= {f"{kind}/{part_name}": (value * clips, clips) for part_name, value in parts.items()}
    return total, (count, means)


def check_sizes(config: FirstStageConfig, dataset: Dataset) -> None:
    """UserError unless the autoencoder takes every clip of the dataset whole, as encoding them will."""
    columns = (dataset.table[side].to_pylist() for side in ("frames", "height", "width"))
    for size in sorted(set(zip(*columns, strict=True))):
        try:
            latent_grid(config, *size)
        except UserError as error:
            shown = " x ".join(map(str, size))
            message = f"the dataset {str(dataset.path)!r} has clips of {shown} (frames x height x width): {error}"
            raise UserError(message) from error


def autoencoder_job(config: AutoencoderRun, dataset: Dataset, preview=None, share: tuple[int, int] = (0, 1)) -> Job:
    """What the loop needs to train an autoencoder on a dataset folder.

    share: this process's part of each batch, see `distributed.share_of_batch`.
    """
    check_sizes(config.model, dataset)
    sizes, clips = sizes_and_clips(dataset, config.split)
    check(len(clips) > 0, f"config.split is {config.split!r}; the dataset {str(dataset.path)!r} has no such clip")
    batches = crop_batches(dataset, config.crops, config.seed, sizes, clips, *share)
    return Job(
        name="autoencoder",
        specs=autoencoder_specs(config.model),
        loss=functools.partial(autoencoder_loss, config),
        batches=lambda start, position: ((batch, None) for batch in batches.stream(start, config.feed)),
        to_device=lambda batch: {name: x for name, x in batch.items() if name.endswith("_BTHW3")},
        counts=functools.partial(_counts, config.model),
        clip_ids=lambda batch: [
            dataset.row(int(i))["id"] for name in sorted(batch) if name.endswith("_clips_B") for i in batch[name]
        ],
        preview=preview,
        shares=share[1],
    )


def _counts(model: FirstStageConfig, batch: dict) -> dict[str, float]:
    shapes = [x.shape[:4] for name, x in batch.items() if name.endswith("_BTHW3")]
    return {
        "clips": sum(clips for clips, *_ in shapes),
        "frames": sum(clips * frames for clips, frames, *_ in shapes),
        "flops": sum(clips * _clip_flops(model, *size) for clips, *size in shapes),
    }


_clip_flops = functools.cache(autoencoder_train_flops)
