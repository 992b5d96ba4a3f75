"""A trained run, ready to use: `load_run(folder).generate(prompts, sizes)`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from sora_jax.config import check, frozen, read_json
from sora_jax.data.packing import grid_of
from sora_jax.data.tokenizer import Tokenizer
from sora_jax.errors import UserError
from sora_jax.generate.sampler import Request, SampleConfig, sample_latents
from sora_jax.models.autoencoder import latent_grid
from sora_jax.models.pretrained import PretrainedText
from sora_jax.models.transformer import transformer_specs
from sora_jax.nn import params as param
from sora_jax.parallel.mesh import MeshConfig, make_mesh
from sora_jax.train.checkpoint import Checkpoints
from sora_jax.train.denoiser import DenoiserRun, load_tokenizer
from sora_jax.train.frozen import FrozenAutoencoder, load_autoencoder

Size = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Run:
    """A denoiser with its averaged weights, tokenizer and autoencoder, placed on a mesh."""

    config: DenoiserRun
    params: dict
    tokenizer: Tokenizer | PretrainedText
    autoencoder: FrozenAutoencoder
    mesh: Mesh
    step: int = 0

    def generate(
        self,
        prompts: Sequence[str],
        sizes: Size | Sequence[Size],
        steps: int = 30,
        guidance: float | None = None,
        seed: int = 0,
        solver: str = "euler",
        clips: Sequence[int] | None = None,
    ) -> list[np.ndarray]:
        """One clip per prompt, uint8 (frames, height, width, 3), all sampled in packs together.

        `sizes` is (frames, height, width), one for all or one per prompt; 1 frame is an image. `guidance` is that of
        the run's previews where it is not given, 1 is none. `clips` are the
        identities that key the noise (default 1, 2, ...): the same (seed, identity, prompt, size) gives the same
        clip beside any others. UserError names the nearest sizes that are allowed.
        """
        guidance = self.config.preview.guidance if guidance is None else guidance
        check(len(prompts) > 0, "there is no prompt; give at least one")
        check(len(sizes) > 0, "there is no size; give (frames, height, width), one for all or one for each prompt")
        sizes = [sizes] * len(prompts) if isinstance(sizes[0], int) else list(sizes)
        check(len(sizes) == len(prompts), f"there are {len(prompts)} prompts and {len(sizes)} sizes; give one for each")
        clips = range(1, len(prompts) + 1) if clips is None else clips
        requests = [
            Request(prompt, self.latent_size(*size), clip)
            for prompt, size, clip in zip(prompts, sizes, clips, strict=True)
        ]
        config = SampleConfig(solver, steps, float(guidance), seed)
        with jax.set_mesh(self.mesh):
            return self.decode(sample_latents(self.params, self.config, self.tokenizer, requests, config, self.mesh))

    def decode(self, latents: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Clips of latents, decoded in groups of equal size, given back in order."""
        order = sorted(range(len(latents)), key=lambda i: latents[i].shape)
        decoded = self.autoencoder.decode((latents[i] for i in order), batch=4)
        return [clip for _, clip in sorted(zip(order, decoded, strict=True), key=lambda pair: pair[0])]

    def latent_size(self, frames: int, height: int, width: int) -> Size:
        """The latent (t, h, w) of a clip of this size; UserError with the allowed sizes if there is none."""
        _, *patch = self.config.model.patch
        factor = self.autoencoder.config.space_factor
        for name, value, step in (("height", height, factor * patch[0]), ("width", width, factor * patch[1])):
            below = max(value // step, 1) * step
            nearest = f"{below} or {below + step}"
            check(value == below, f"{name} is {value}; it must be a multiple of {step}, such as {nearest}")
        latent = latent_grid(self.autoencoder.config, frames, height, width)
        grid_of(latent, self.config.model.patch)  # UserError where the frames do not fill whole patches
        return latent


def load_run(folder: str | Path) -> Run:
    """A run of the denoiser from its folder: newest checkpoint, first weight average.

    UserError if the folder holds no denoiser, or no checkpoint yet.
    """
    folder = Path(folder)
    config = read_run_config(folder)
    mesh = _mesh_here(config.mesh)
    specs = transformer_specs(config.model)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        step = checkpoints.latest()
        check(step is not None, f"--workdir is {str(folder)!r}; it has no checkpoint yet")
        params = checkpoints.restore_ema(param.abstract_on(specs, mesh), len(config.optim.ema))
    return Run(config, params, load_tokenizer(config, folder), load_autoencoder(folder), mesh, step)


def _mesh_here(config: MeshConfig) -> Mesh:
    """The run's own mesh, or, where this machine has another number of devices, one that splits the batch."""
    try:
        return make_mesh(config)
    except UserError:
        return make_mesh()


def read_run_config(folder: Path) -> DenoiserRun:
    """The config that a run folder keeps; UserError if it is no run of a denoiser."""
    path = Path(folder) / "config.json"
    inside = Path(folder) / "transformer"
    hint = f"; did you mean {inside}?" if (inside / "config.json").exists() else ""
    check(path.exists(), f"--workdir is {str(folder)!r}; there is no config.json, so it is not a run folder{hint}")
    config = read_json(path)
    check(
        config.get("kind") == "transformer",
        f"--workdir is {str(folder)!r}; that run is of kind {config.get('kind')!r}, and only a transformer samples",
    )
    return frozen(DenoiserRun, config)
