"""Training the autoencoder on fixed-size crops, and what is kept of it afterwards."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.config import check
from sora_jax.data.manifest import Dataset
from sora_jax.data.pipeline import crop_batches
from sora_jax.diffusion.keys import Purpose, step_key
from sora_jax.models.autoencoder import AutoencoderConfig, autoencoder_specs, latent_grid, reconstruction_loss
from sora_jax.parallel.mesh import MeshConfig
from sora_jax.train.loop import Job, LoopConfig
from sora_jax.train.optim import OptimConfig


@dataclasses.dataclass(frozen=True)
class AutoencoderRun:
    """A whole training run of the autoencoder. `data` is a folder made by `sora-jax data build`.

    `crop` is (frames, height, width) of the training crops, `batch` their number in a step over all devices.
    """

    kind: str = "autoencoder"
    data: str = ""
    seed: int = 0
    batch: int = 16
    split: str = "train"
    crop: tuple[int, int, int] = (9, 64, 64)
    image_share: float = 0.1
    model: AutoencoderConfig = AutoencoderConfig()
    optim: OptimConfig = OptimConfig()
    loop: LoopConfig = LoopConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        check(self.kind == "autoencoder", f"kind is {self.kind!r}; an AutoencoderRun is of kind 'autoencoder'")
        latent_grid(self.model, *self.crop)
        check(
            self.batch > 0 and self.batch % self.loop.accumulate == 0,
            f"batch is {self.batch}; it must be a multiple of loop.accumulate = {self.loop.accumulate}",
        )


def to_float(frames: jax.Array) -> jax.Array:
    """uint8 pixels as float32 in [-1, 1]."""
    return frames.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(video) -> np.ndarray:
    """Float pixels, about [-1, 1], as uint8."""
    return np.clip(np.round((np.asarray(video) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def autoencoder_loss(config: AutoencoderRun, params: dict, batch: dict, step, part):
    """Sum over clips of the reconstruction loss, (clips, means): see `make_step`."""
    video_BTHWC = to_float(batch["video_BTHWC"])
    key = jax.random.fold_in(step_key(config.seed, step, Purpose.NOISE), part)
    loss, parts = reconstruction_loss(params, config.model, video_BTHWC, key)
    clips = jnp.float32(video_BTHWC.shape[0])
    return loss * clips, (clips, {name: (value * clips, clips) for name, value in parts.items()})


def autoencoder_job(config: AutoencoderRun, dataset: Dataset, preview=None) -> Job:
    """What the loop needs to train an autoencoder on a dataset folder."""
    batches = crop_batches(
        dataset, config.crop, config.batch, config.seed, image_share=config.image_share, split=config.split,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip

    def stream(step: int) -> Iterator[dict]:
        return iter(batches.iterate(step))

    return Job(
        name="autoencoder",
        specs=autoencoder_specs(config.model),
        loss=functools.partial(autoencoder_loss, config),
        batches=stream,
        to_device=lambda batch: batch,
        counts=lambda batch: {"clips": len(batch["video_BTHWC"]), "frames": int(np.prod(batch["video_BTHWC"].shape[:2]))},
        clip_ids=lambda batch: batch["clips_B"].tolist(),
        preview=preview,
    )

