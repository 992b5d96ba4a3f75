"""A trained run, ready to use: `load_run(folder).generate(prompts, sizes)`."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, overload

import jax
import numpy as np

from sora_jax.config import check, from_dict, read_json
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.errors import NotFinite
from sora_jax.files import as_path
from sora_jax.generate.doubts import Learnt
from sora_jax.generate.long import Windows, sample_long
from sora_jax.generate.packs import TrainedDenoiser
from sora_jax.generate.progress import Progress, Watch
from sora_jax.generate.requests import Request, Size, Task, Wanted, check_seed, latent_size, plan_requests
from sora_jax.generate.rolling import sample_rolling
from sora_jax.generate.sampler import sample_batches
from sora_jax.models.tiling import TilingConfig, tile_grid
from sora_jax.parallel.mesh import mesh_here
from sora_jax.parallel.settings import use_compilation_cache
from sora_jax.train.adapt import restore_weights
from sora_jax.train.checkpoint import NEWEST
from sora_jax.train.denoiser import DenoiserRun, denoiser_groups, denoiser_parts, load_tokenizer
from sora_jax.train.exported import no_run, run_folder
from sora_jax.train.fastest_attention import with_fastest_attention
from sora_jax.train.frozen import FOLDER, FrozenAutoencoder, load_autoencoder, missing_autoencoder, recorded_fingerprint
from sora_jax.train.migrate import migrate_stored
from sora_jax.train.seen import Seen, read_seen
from sora_jax.train.state import Group

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
    """Generate clips with a trained denoiser and its autoencoder.

    step: that of its checkpoint. seen: what it is trained on, None where that is not known.
    """

    autoencoder: FrozenAutoencoder
    step: int = 0
    seen: Seen | None = None

    @overload
    def generate(self, prompts: str, *arguments: Any, **options: Any) -> np.ndarray: ...

    @overload
    def generate(self, prompts: Sequence[str] = (), *arguments: Any, **options: Any) -> list[np.ndarray]: ...

    def generate(
        self,
        prompts: str | Sequence[str] = (),
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
        progress: Progress | None = None,
        bar: bool | None = None,
    ) -> np.ndarray | list[np.ndarray]:
        """Generate one clip per prompt, or per class, uint8 (frames, height, width, 3), all in packs together.

        A single prompt, a str, gives the clip itself; a sequence gives a list of clips.
        `sizes` is (frames, height, width), one for all or one each, by default that of the run's first preview; 1 frame
        is an image. `sampling` says how, by
        default as the run's config does; steps, guidance (1 is none; one for all or one each) and solver change it.
        `negative` is what guidance leads away from. `clip_ids` key the noise (default 1, 2, ...): the same (seed, clip
        id, prompt, size) gives the same clip beside any others. tiles: larger clips are decoded in tiles. tasks: what
        is known of the clips, from `generate.tasks`, one for all or one each; sizes are then left out.

        progress(done, total) is called with the denoising steps that are done, first with 0, then about four times a
        second; an exception that it raises ends the sampling. bar: show a bar; None: in a notebook or a terminal,
        unless there is `progress`. Neither changes a clip.

        Warns of what the run does not read of the prompts, and of words and sizes that are far from its training.

        Raises:
            UserError: the run takes no such; the sentence names the nearest sizes that are allowed.
            NotFinite: a clip has values that are NaN or infinite.
        """
        sampling = changed(sampling or self.config.sampling, steps, solver)
        one = isinstance(prompts, str)
        texts = [prompts] if isinstance(prompts, str) else prompts
        right = hasattr(texts, "__len__") and all(isinstance(text, str) for text in texts)
        check(right, f"prompts is {prompts!r}; it must be a text, or a list of texts")
        sizes = sizes if sizes or tasks or not self.config.preview.sizes else self.config.preview.sizes[0]
        wanted = Wanted(texts, sizes, classes, guidance, negative, clip_ids, tasks)
        check_seed(seed)
        requests = self.plan(wanted, sampling)
        self.learnt.check_spelt(requests)
        for line in self.learnt.doubts(requests):
            warnings.warn(line, stacklevel=2)
        clips = self.sample(requests, sampling, seed, tiles, tasks, progress, bar)
        return clips[0] if one else clips

    @property
    def learnt(self) -> Learnt:
        """Return what the run has learnt, to compare requests with."""
        return Learnt(self.config, self.autoencoder.config, self.tokenizer, self.seen)

    def plan(self, wanted: Wanted, sampling: SamplingConfig) -> list[Request]:
        """Check what is asked for and return a request for each clip."""
        return plan_requests(self.config, self.autoencoder.config, wanted, sampling)

    def sample(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        seed: int,
        tiles: TilingConfig = TilingConfig(),
        tasks: Sequence[Task] = (),
        progress: Progress | None = None,
        bar: bool | None = False,
    ) -> list[np.ndarray]:
        """Generate the clips of requests that `plan_requests` made, of these tasks; progress, bar: as in `generate`."""
        clips = dict(self.stream(requests, sampling, seed, tiles, tasks, progress, bar))
        return [clips[number] for number in range(len(requests))]

    def stream(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        seed: int,
        tiles: TilingConfig = TilingConfig(),
        tasks: Sequence[Task] = (),
        progress: Progress | None = None,
        bar: bool | None = False,
        done: Set[int] = frozenset(),
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the clips of `sample`, each with the number of its request, as batches of packs are done.

        done: numbers of requests whose clips an earlier call has yielded; batches of such alone are left out.

        While the caller uses the clips of a batch (writes them to files), the next batch is sampled. A device runs its
        programs in turn, so a batch is decoded before the next one is dispatched: behind it, its clips would come one
        batch later, and the memory of both would be in use at once.
        """
        tile_grid(self.autoencoder.config, tiles)  # UserError where it takes no such tile
        each = list(tasks) * len(requests) if len(tasks) == 1 else list(tasks)
        batches = sample_batches(self, requests, sampling, seed, Watch(progress, bar), done)
        with jax.set_mesh(self.mesh):  # not around `yield`: the caller may set another
            wait = next(batches, None)
        while wait is not None:
            with jax.set_mesh(self.mesh):
                clips = self._decoded(wait(), requests, each, tiles)
                wait = next(batches, None)
            yield from clips.items()

    def _decoded(
        self, latents: dict[int, np.ndarray], requests: Sequence[Request], tasks: Sequence[Task], tiles: TilingConfig
    ) -> dict[int, np.ndarray]:
        """Decode latents by the number of their request, whose task is in `tasks` unless that is empty."""
        latents = dict(sorted(latents.items()))  # they come in the order of packs
        names = [str(requests[number]) for number in latents]
        _check_finite(latents.values(), names)
        z = list(latents.values())
        if tasks:
            clips = self._finish(z, [tasks[number] for number in latents], tiles, names)
        else:
            clips = self.decode(z, tiles, names)
        return dict(zip(latents, clips, strict=True))

    def _finish(
        self, latents: Sequence[np.ndarray], tasks: Sequence[Task], tiles: TilingConfig, names: Sequence[str]
    ) -> list[np.ndarray]:
        """Decode the latents of tasks and complete their clips."""
        latents = [task.latent(z) for z, task in zip(latents, tasks, strict=True)]
        which = [i for i, task in enumerate(tasks) if not task.loops]
        clips = dict(
            zip(which, self.decode([latents[i] for i in which], tiles, [names[i] for i in which]), strict=True)
        )
        for i in (i for i, task in enumerate(tasks) if task.loops):
            with _naming(names[i]):
                clips[i] = self.autoencoder.decode_ring(latents[i], tiles)
        return [task.clip(clips[i]) for i, task in enumerate(tasks)]

    def decode(
        self, latents: Sequence[np.ndarray], tiles: TilingConfig = TilingConfig(), names: Sequence[str] = ()
    ) -> list[np.ndarray]:
        """Decode latents into clips, in groups of equal size; return them in order. names: for NotFinite."""
        order = sorted(range(len(latents)), key=lambda i: latents[i].shape)
        decoded = self.autoencoder.decode((latents[i] for i in order), 4, tiles)
        clips = {}
        for i in order:
            with _naming(names[i] if names else f"clip {i}"):
                clips[i] = next(decoded)
        return [clips[i] for i in range(len(clips))]

    def sample_long(
        self,
        requests: Sequence[Request],
        windows: Windows,
        sampling: SamplingConfig,
        seed: int,
        tiles: TilingConfig = TilingConfig(),
        progress: Progress | None = None,
        bar: bool | None = False,
    ) -> list[Iterator[np.ndarray]]:
        """Generate clips longer than the model was trained on: each in parts, in order.

        In windows (`generate.long`) or, where `windows.rolls`, by rolling noise levels (`generate.rolling`). Memory
        does not grow with the length of a clip but by its latent. tiles: sides of the tiles that are decoded.
        """
        parts = TilingConfig((1 + PART * self.autoencoder.config.time_factor, *tiles.tile[1:]), tiles.overlap)
        tile_grid(self.autoencoder.config, parts)  # UserError where it takes no such tile
        with jax.set_mesh(self.mesh):
            sample = sample_rolling if windows.rolls else sample_long
            watch = Watch(progress, bar)
            latents = sample(self, requests, windows, self.autoencoder.config.time_factor, sampling, seed, watch)
        names = list(map(str, requests))
        _check_finite(latents, names)
        return [self._parts(z, parts, name) for z, name in zip(latents, names, strict=True)]

    def _parts(self, z_thwC: np.ndarray, tiles: TilingConfig, name: str) -> Iterator[np.ndarray]:
        with jax.set_mesh(self.mesh), _naming(name):
            yield from self.autoencoder.decode_chunks(z_thwC, tiles, 1)

    def latent_size(self, frames: int, height: int, width: int) -> Size:
        """Return the latent (t, h, w) of a clip of this size; UserError with the sizes that are allowed."""
        return latent_size(self.config, self.autoencoder.config, (frames, height, width))


def _check_finite(latents: Iterable[np.ndarray], names: Iterable[str]) -> None:
    """Raise NotFinite for the first latent with values that are NaN or infinite."""
    for z, name in zip(latents, names):
        if not np.isfinite(z).all():
            raise NotFinite(f"{name}: the sampled latent has values that are not finite")


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Name the clip of a NotFinite that decoding raises."""
    try:
        yield
    except NotFinite as error:
        raise NotFinite(f"{name}: {error}") from error


def load_run(
    folder: str | Path | None = None, autoencoder: str | Path | None = None, checkpoint: str | int = NEWEST
) -> Run:
    """Load a run of the denoiser: the first weight average of a checkpoint, or an exported model.

    folder: of the run or model, on the disk or in `gs://`; a file that `sora-jax export` wrote; or the name of a model
    that comes with the package, which is `world` where none is given. autoencoder: a run of one, for a run that holds
    none (a converted checkpoint). checkpoint: "newest", "best" (of those kept by config.loop.keep_best) or a step.

    Raises:
        UserError: the folder holds no denoiser, no such checkpoint, or no autoencoder.
        NotFinite: the weights are not finite.
    """
    folder = run_folder(folder, "folder")
    config = read_run_config(folder, "folder")
    if jax.config.values["jax_compilation_cache_dir"] is None:  # a folder of the user stays
        use_compilation_cache()
    mesh = mesh_here(config.mesh)
    config = with_fastest_attention(config, mesh, folder)
    params, step = restore_weights(folder, saved_groups, denoiser_parts(config)[1], mesh, str(checkpoint))
    first_stage = load_autoencoder(autoencoder_folder(folder, autoencoder))
    tokenizer = load_tokenizer(config, folder)
    return Run(config, params, tokenizer, mesh, autoencoder=first_stage, step=step, seen=read_seen(folder))


def saved_groups(values: dict) -> Mapping[str, Group]:
    """Return the groups that a checkpoint of a denoiser trained, by the config that it holds."""
    return denoiser_groups(from_dict(DenoiserRun, migrate_stored(values)))


def autoencoder_folder(folder: Path, other: str | Path | None) -> Path:
    """Return the folder of a run's autoencoder: its own, or the other one, which must have the same latents."""
    own = (folder / FOLDER).exists()
    check(own or other is not None, f"--workdir is {str(folder)!r}; it holds no autoencoder, give one by --autoencoder")
    if not own or other is None:
        return folder if other is None else run_folder(other, "--autoencoder")
    found = recorded_fingerprint(as_path(other))
    check(found, missing_autoencoder(other))
    # A decoder that was trained further decodes the same latents, which the fingerprint says.
    check(
        found == recorded_fingerprint(folder),
        f"--autoencoder is {str(other)!r}; it has other latents than the autoencoder in {str(folder)!r}: leave it out, "
        "or give that one with a decoder that was trained further",
    )
    return run_folder(other, "--autoencoder")


def read_run_config(folder: Path, option: str = "--workdir") -> DenoiserRun:
    """Read the config that a run folder keeps; UserError if it is no run of a denoiser."""
    path = as_path(folder) / "config.json"
    check(path.exists(), no_run(option, folder))
    config = migrate_stored(read_json(path))
    kind, wanted = config.get("kind"), DenoiserRun.kind
    check(kind == wanted, f"{option} is {str(folder)!r}; that run is of kind {kind!r}, and it must be {wanted!r}")
    return from_dict(DenoiserRun, config)
