"""A trained run, ready to use: `load_run(folder).generate(prompts, sizes)`."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from sora_jax.config import check, from_dict, read_json
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.errors import UserError
from sora_jax.files import as_path
from sora_jax.generate.long import Windows, sample_long
from sora_jax.generate.packs import TrainedDenoiser
from sora_jax.generate.requests import Request, Size, Task, Wanted, check_seed, latent_size, plan_requests
from sora_jax.generate.rolling import sample_rolling
from sora_jax.generate.sampler import sample_batches
from sora_jax.models.tiling import TilingConfig, tile_grid
from sora_jax.parallel.mesh import MeshConfig, make_mesh
from sora_jax.train.adapt import restore_weights
from sora_jax.train.checkpoint import NEWEST
from sora_jax.train.denoiser import DenoiserRun, denoiser_groups, denoiser_parts, load_tokenizer
from sora_jax.train.fastest_attention import with_fastest_attention
from sora_jax.train.frozen import FOLDER, FrozenAutoencoder, load_autoencoder, missing_autoencoder, recorded_fingerprint
from sora_jax.train.migrate import migrate_stored

PART = 8  # latent frames, beside the first, that are decoded at a time


def changed(sampling: SamplingConfig, steps: int | str | None, solver: str | None) -> SamplingConfig:
    """Replace the steps and the solver of `sampling` where they are given."""
    if steps is not None:
        sampling = dataclasses.replace(sampling, steps=str(steps))
    if solver is not None:
        sampling = dataclasses.replace(sampling, solver=dataclasses.replace(sampling.solver, name=solver))
    return sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(TrainedDenoiser):
    """Generate clips with a trained denoiser and its autoencoder; step: that of its checkpoint."""

    autoencoder: FrozenAutoencoder
    step: int = 0

    def generate(
        self,
        prompts: Sequence[str] = (),
        sizes: Size | Sequence[Size] = (),
        steps: int | str | None = None,
        guidance: float | Sequence[float] | None = None,
        seed: int = 0,
        solver: str | None = None,
        clip_ids: Sequence[int] | None = None,
        classes: Sequence[int] = (),
        negative: str | Sequence[str] = "",
        sampling: SamplingConfig | None = None,
        tiles: TilingConfig = TilingConfig(),
        tasks: Sequence[Task] = (),
    ) -> list[np.ndarray]:
        """Generate one clip per prompt, or per class, uint8 (frames, height, width, 3), all in packs together.

        `sizes` is (frames, height, width), one for all or one each; 1 frame is an image. `sampling` says how, by
        default as the run's config does; steps, guidance (1 is none; one for all or one each) and solver change it.
        `negative` is what guidance leads away from. `clip_ids` key the noise (default 1, 2, ...): the same (seed, clip
        id, prompt, size) gives the same clip beside any others. tiles: larger clips are decoded in tiles. tasks: what
        is known of the clips, from `generate.tasks`, one for all or one each; sizes are then left out.

        Raises:
            UserError: the run takes no such; the sentence names the nearest sizes that are allowed.
        """
        sampling = changed(sampling or self.config.sampling, steps, solver)
        wanted = Wanted(prompts, sizes, classes, guidance, negative, clip_ids, tasks)
        check_seed(seed)
        requests = plan_requests(self.config, self.autoencoder.config, wanted, sampling)
        return self.sample(requests, sampling, seed, tiles, tasks)

    def sample(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        seed: int,
        tiles: TilingConfig = TilingConfig(),
        tasks: Sequence[Task] = (),
    ) -> list[np.ndarray]:
        """Generate the clips of requests that `plan_requests` made, of these tasks."""
        clips = dict(self.stream(requests, sampling, seed, tiles, tasks))
        return [clips[number] for number in range(len(requests))]

    def stream(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        seed: int,
        tiles: TilingConfig = TilingConfig(),
        tasks: Sequence[Task] = (),
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the clips of `sample`, each with the number of its request, as batches of packs are done.

        While the caller uses the clips of a batch (writes them to files), the next batch is sampled. A device runs its
        programs in turn, so a batch is decoded before the next one is dispatched: behind it, its clips would come one
        batch later, and the memory of both would be in use at once.
        """
        tile_grid(self.autoencoder.config, tiles)  # UserError where it takes no such tile
        each = list(tasks) * len(requests) if len(tasks) == 1 else list(tasks)
        batches = sample_batches(self, requests, sampling, seed)
        with jax.set_mesh(self.mesh):  # not around `yield`: the caller may set another
            wait = next(batches, None)
        while wait is not None:
            with jax.set_mesh(self.mesh):
                clips = self._decoded(wait(), each, tiles)
                wait = next(batches, None)
            yield from clips.items()

    def _decoded(
        self, latents: dict[int, np.ndarray], tasks: Sequence[Task], tiles: TilingConfig
    ) -> dict[int, np.ndarray]:
        """Decode latents by the number of their request, whose task is in `tasks` unless that is empty."""
        z = list(latents.values())
        clips = self._finish(z, [tasks[number] for number in latents], tiles) if tasks else self.decode(z, tiles)
        return dict(zip(latents, clips, strict=True))

    def _finish(self, latents: Sequence[np.ndarray], tasks: Sequence[Task], tiles: TilingConfig) -> list[np.ndarray]:
        """Decode the latents of tasks and complete their clips."""
        latents = [task.latent(z) for z, task in zip(latents, tasks, strict=True)]
        open_ends = iter(self.decode([z for z, task in zip(latents, tasks, strict=True) if not task.loops], tiles))
        pairs = zip(latents, tasks, strict=True)
        decoded = [self.autoencoder.decode_ring(z, tiles) if task.loops else next(open_ends) for z, task in pairs]
        return [task.clip(clip) for task, clip in zip(tasks, decoded, strict=True)]

    def decode(self, latents: Sequence[np.ndarray], tiles: TilingConfig = TilingConfig()) -> list[np.ndarray]:
        """Decode latents into clips, in groups of equal size; return them in order."""
        order = sorted(range(len(latents)), key=lambda i: latents[i].shape)
        decoded = self.autoencoder.decode((latents[i] for i in order), 4, tiles)
        return [clip for _, clip in sorted(zip(order, decoded, strict=True), key=lambda pair: pair[0])]

    def sample_long(
        self,
        requests: Sequence[Request],
        windows: Windows,
        sampling: SamplingConfig,
        seed: int,
        tiles: TilingConfig = TilingConfig(),
    ) -> list[Iterator[np.ndarray]]:
        """Generate clips longer than the model was trained on: each in parts, in order.

        In windows (`generate.long`) or, where `windows.rolls`, by rolling noise levels (`generate.rolling`). Memory
        does not grow with the length of a clip but by its latent. tiles: sides of the tiles that are decoded.
        """
        parts = TilingConfig((1 + PART * self.autoencoder.config.time_factor, *tiles.tile[1:]), tiles.overlap)
        tile_grid(self.autoencoder.config, parts)  # UserError where it takes no such tile
        with jax.set_mesh(self.mesh):
            sample = sample_rolling if windows.rolls else sample_long
            latents = sample(self, requests, windows, self.autoencoder.config.time_factor, sampling, seed)
        return [self._parts(z, parts) for z in latents]

    def _parts(self, z_thwC: np.ndarray, tiles: TilingConfig) -> Iterator[np.ndarray]:
        with jax.set_mesh(self.mesh):
            yield from self.autoencoder.decode_chunks(z_thwC, tiles, 1)

    def latent_size(self, frames: int, height: int, width: int) -> Size:
        """Return the latent (t, h, w) of a clip of this size; UserError with the sizes that are allowed."""
        return latent_size(self.config, self.autoencoder.config, (frames, height, width))


def load_run(folder: str | Path, autoencoder: str | Path | None = None, checkpoint: str | int = NEWEST) -> Run:
    """Load a run of the denoiser from its folder, on the disk or in `gs://`: the first weight average of a checkpoint.

    autoencoder: a run of one, for a run that holds none (a converted checkpoint). checkpoint: "newest", "best" (of
    those kept by config.loop.keep_best) or a step.

    Raises:
        UserError: the folder holds no denoiser, no such checkpoint, or no autoencoder.
    """
    folder = as_path(folder)
    config = read_run_config(folder)
    mesh = _mesh_here(config.mesh)
    config = with_fastest_attention(config, mesh, folder)
    fixed = denoiser_parts(config)[1]
    params, step = restore_weights(folder, denoiser_groups(config), fixed, mesh, str(checkpoint))
    first_stage = load_autoencoder(autoencoder_folder(folder, autoencoder))
    tokenizer = load_tokenizer(config, folder)
    return Run(config, params, tokenizer, mesh, autoencoder=first_stage, step=step)


def autoencoder_folder(folder: Path, other: str | Path | None) -> Path:
    """Return the folder of a run's autoencoder: its own, or the other one, which must have the same latents."""
    own = (folder / FOLDER).exists()
    check(own or other is not None, f"--workdir is {str(folder)!r}; it holds no autoencoder, give one by --autoencoder")
    if not own or other is None:
        return folder if other is None else as_path(other)
    found = recorded_fingerprint(as_path(other))
    check(found, missing_autoencoder(other))
    # A decoder that was trained further decodes the same latents, which the fingerprint says.
    check(
        found == recorded_fingerprint(folder),
        f"--autoencoder is {str(other)!r}; it has other latents than the autoencoder in {str(folder)!r}: leave it out, "
        "or give that one with a decoder that was trained further",
    )
    return as_path(other)


def _mesh_here(config: MeshConfig) -> Mesh:
    """Make the run's own mesh, or one that splits the batch where this machine has another number of devices."""
    try:
        return make_mesh(config)
    except UserError:
        return make_mesh()


def read_run_config(folder: Path) -> DenoiserRun:
    """Read the config that a run folder keeps; UserError if it is no run of a denoiser."""
    path = as_path(folder) / "config.json"
    inside = as_path(folder) / "transformer"
    hint = f"; did you mean {inside}?" if (inside / "config.json").exists() else ""
    check(path.exists(), f"--workdir is {str(folder)!r}; there is no config.json, so it is not a run folder{hint}")
    config = migrate_stored(read_json(path))
    kind, wanted = config.get("kind"), DenoiserRun.kind
    check(kind == wanted, f"--workdir is {str(folder)!r}; that run is of kind {kind!r}, and it must be {wanted!r}")
    return from_dict(DenoiserRun, config)
