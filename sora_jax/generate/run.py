"""A trained run, ready to use: `load_run(folder).generate(prompts, sizes)`."""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from sora_jax.config import check, from_dict, read_json
from sora_jax.data.packing import grid_of
from sora_jax.data.tokenizer import NoText, Tokenizer
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.errors import UserError
from sora_jax.files import as_path
from sora_jax.generate.sampler import Request, sample_latents
from sora_jax.models.first_stage import latent_grid
from sora_jax.models.pretrained import PretrainedText
from sora_jax.models.tiling import TilingConfig, tile_grid
from sora_jax.models.transformer import transformer_specs
from sora_jax.nn import params as param
from sora_jax.parallel.mesh import MeshConfig, make_mesh
from sora_jax.train.checkpoint import NEWEST, Checkpoints
from sora_jax.train.denoiser import DenoiserRun, load_tokenizer, migrate_config, with_fastest_attention
from sora_jax.train.frozen import FOLDER, FrozenAutoencoder, load_autoencoder

Size = tuple[int, int, int]


def changed(sampling: SamplingConfig, steps: int | str | None, solver: str | None) -> SamplingConfig:
    """`sampling` with other steps and another solver, where they are given."""
    if steps is not None:
        sampling = dataclasses.replace(sampling, steps=str(steps))
    if solver is not None:
        sampling = dataclasses.replace(sampling, solver=dataclasses.replace(sampling.solver, name=solver))
    return sampling


def validate_requests(config: DenoiserRun, prompts, classes, guidance, negative, seed: int, sampling: SamplingConfig):
    """Prompts, classes, guidance scales and negative prompts, one for each clip; UserError where a run takes no such.

    It needs no weights, so it can be asked before they are loaded.
    """
    check(not isinstance(prompts, str), f"prompts is {prompts!r}; it must be a list of texts")
    count, known = max(len(prompts), len(classes)), config.model.classes
    check(count > 0, "there is no prompt; give at least one, or a class")
    check(bool(config.model.text) or not len(prompts), "this run takes classes, not prompts; give classes")
    check(bool(known) or not len(classes), "this run takes prompts, not classes; give prompts")
    for label in classes:
        check(
            is_whole(label) and 0 <= label < known,
            f"class is {label!r}; it must be a whole number from 0 to {known - 1}",
        )
    channels, most = sampling.guidance.channels, config.model.latent_channels
    check(channels <= most, f"sampling.guidance.channels is {channels}; it must be from 0 (all) to {most}")
    check(is_whole(seed) and 0 <= seed < 2**32, f"seed is {seed!r}; it must be a whole number from 0 to 4294967295")
    prompts, classes = list(prompts) or [""] * count, list(classes) or [-1] * count
    same = len(prompts) == len(classes)
    check(same, f"there are {len(prompts)} prompts and {len(classes)} classes; give one for each")
    scales = each("guidance", sampling.guidance.scale if guidance is None else guidance, count)
    check(all(map(math.isfinite, scales)), f"guidance is {guidance}; it must be a finite number")
    negatives = each("negative", negative, count)
    if any(negatives):
        check(bool(config.model.text), f"negative is {negative!r}; this run reads no text, leave it out")
        check(any(scale != 1 for scale in scales), f"negative is {negative!r}; it needs a guidance other than 1")
    return prompts, classes, scales, negatives


def is_whole(value) -> bool:
    """Whether it is a whole number, of Python or of NumPy; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def each(name: str, values, count: int) -> list:
    """One value for each clip, from one for all or a list; UserError where there are too many or too few."""
    if np.ndim(values) == 0:
        return [values] * count
    check(
        len(values) == count, f"there are {len(values)} values of {name} for {count} clips; give one, or one for each"
    )
    return list(values)


@dataclasses.dataclass(frozen=True)
class Run:
    """A denoiser with its averaged weights, tokenizer and autoencoder, placed on a mesh."""

    config: DenoiserRun
    params: dict
    tokenizer: Tokenizer | PretrainedText | NoText
    autoencoder: FrozenAutoencoder
    mesh: Mesh
    step: int = 0

    def generate(
        self,
        prompts: Sequence[str] = (),
        sizes: Size | Sequence[Size] = (),
        steps: int | str | None = None,
        guidance: float | Sequence[float] | None = None,
        seed: int = 0,
        solver: str | None = None,
        clips: Sequence[int] | None = None,
        classes: Sequence[int] = (),
        negative: str | Sequence[str] = "",
        sampling: SamplingConfig | None = None,
        tiles: TilingConfig = TilingConfig(),
    ) -> list[np.ndarray]:
        """One clip per prompt, or per class, uint8 (frames, height, width, 3), all sampled in packs together.

        `sizes` is (frames, height, width), one for all or one each; 1 frame is an image. `sampling` says how, by
        default as the run's config does; steps, guidance (1 is none; one for all or one each) and solver change it.
        `negative` is what guidance leads away from. `clips` are the identities that key the noise (default 1, 2, ...):
        the same (seed, identity, prompt, size) gives the same clip beside any others. tiles: larger clips are decoded
        in tiles. UserError names the nearest sizes that are allowed.
        """
        sampling = changed(sampling or self.config.sampling, steps, solver)
        prompts, classes, scales, negatives = validate_requests(
            self.config, prompts, classes, guidance, negative, seed, sampling
        )
        count = len(prompts)
        check(len(sizes) > 0, "there is no size; give (frames, height, width), one for all or one for each prompt")
        sizes = [sizes] * count if is_whole(sizes[0]) else list(sizes)
        check(len(sizes) == count, f"there are {count} prompts and {len(sizes)} sizes; give one for each")
        clips = range(1, count + 1) if clips is None else clips
        check(len(clips) == count, f"there are {count} prompts and {len(clips)} clips; give one for each")
        check(
            all(is_whole(clip) and 0 < clip < 2**32 for clip in clips),
            f"clips is {list(clips)}; each must be a whole number from 1 to 4294967295",
        )
        tile_grid(self.autoencoder.config, tiles)  # UserError where it takes no such tile
        latent_sizes = [self.latent_size(*size) for size in sizes]
        requests = [Request(*one) for one in zip(prompts, latent_sizes, clips, classes, scales, negatives, strict=True)]
        with jax.set_mesh(self.mesh):
            latents = sample_latents(self.params, self.config, self.tokenizer, requests, sampling, seed, self.mesh)
            return self.decode(latents, tiles)

    def decode(self, latents: Sequence[np.ndarray], tiles: TilingConfig = TilingConfig()) -> list[np.ndarray]:
        """Clips of latents, decoded in groups of equal size, given back in order."""
        order = sorted(range(len(latents)), key=lambda i: latents[i].shape)
        decoded = self.autoencoder.decode((latents[i] for i in order), 4, tiles)
        return [clip for _, clip in sorted(zip(order, decoded, strict=True), key=lambda pair: pair[0])]

    def latent_size(self, frames: int, height: int, width: int) -> Size:
        """The latent (t, h, w) of a clip of this size; UserError with the allowed sizes if there is none."""
        _, *patch = self.config.model.patch
        factor = self.autoencoder.config.space_factor
        for name, value, step in (("height", height, factor * patch[0]), ("width", width, factor * patch[1])):
            below = max(value // step, 1) * step
            nearest = f"{below} or {below + step}"
            check(value == below, f"{name} is {value}; it must be a multiple of {step}, such as {nearest}")
        in_time = self.config.model.positions_in_time
        check(frames == 1 or in_time, f"frames is {frames}; this model tells no frames apart, it must be 1")
        latent = latent_grid(self.autoencoder.config, frames, height, width)
        grid_of(latent, self.config.model.patch)  # UserError where the frames do not fill whole patches
        return latent


def load_run(folder: str | Path, autoencoder: str | Path | None = None, checkpoint: str | int = NEWEST) -> Run:
    """A run of the denoiser from its folder, on the disk or in `gs://`: first weight average of a checkpoint.

    autoencoder: a run of one, for a run that holds none (a converted checkpoint). checkpoint: "newest", "best" (of
    those kept by config.loop.keep_best) or a step. UserError if the folder holds no denoiser, no such checkpoint, or no
    autoencoder.
    """
    folder = as_path(folder)
    config = read_run_config(folder)
    mesh = _mesh_here(config.mesh)
    config = with_fastest_attention(config, mesh, folder)
    specs = transformer_specs(config.model)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        check(checkpoints.latest() is not None, f"--workdir is {str(folder)!r}; it has no checkpoint yet")
        which = str(checkpoint)
        params = checkpoints.restore_ema(param.abstract_on(specs, mesh), len(config.optim.ema), which=which)
        step = checkpoints.candidates(which)[0]  # those found damaged are no longer among them
    return Run(config, params, load_tokenizer(config, folder), _autoencoder_of(folder, autoencoder), mesh, step)


def _autoencoder_of(folder: Path, other: str | Path | None) -> FrozenAutoencoder:
    own = (folder / FOLDER).exists()
    check(own or other is not None, f"--workdir is {str(folder)!r}; it holds no autoencoder, give one by --autoencoder")
    check(not own or other is None, f"--autoencoder is {str(other)!r}; {str(folder)!r} has its own, leave it out")
    return load_autoencoder(folder if own else other)


def _mesh_here(config: MeshConfig) -> Mesh:
    """The run's own mesh, or, where this machine has another number of devices, one that splits the batch."""
    try:
        return make_mesh(config)
    except UserError:
        return make_mesh()


def read_run_config(folder: Path) -> DenoiserRun:
    """The config that a run folder keeps; UserError if it is no run of a denoiser."""
    path = as_path(folder) / "config.json"
    inside = as_path(folder) / "transformer"
    hint = f"; did you mean {inside}?" if (inside / "config.json").exists() else ""
    check(path.exists(), f"--workdir is {str(folder)!r}; there is no config.json, so it is not a run folder{hint}")
    config = read_json(path)
    check(
        config.get("kind") == "transformer",
        f"--workdir is {str(folder)!r}; that run is of kind {config.get('kind')!r}, and it must be a 'transformer'",
    )
    return from_dict(DenoiserRun, migrate_config(config))
