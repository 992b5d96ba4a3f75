"""Hold a trained denoiser and what it is measured on; what is costly is made when a metric first asks for it."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from sora_jax.config import check, override
from sora_jax.console import progress
from sora_jax.data.storing.latents import LatentCache
from sora_jax.data.storing.manifest import Dataset, caption_of, evenly_spread
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.errors import UserError
from sora_jax.evaluate.samples import KeptClips, sample_kept
from sora_jax.files import as_path
from sora_jax.generate.requests import Wanted, latent_size
from sora_jax.generate.run import Run, autoencoder_folder, changed, load_run, read_run_config
from sora_jax.models.denoiser import reads_low
from sora_jax.train.checkpoint import NEWEST
from sora_jax.train.denoiser import DenoiserRun, check_text, open_latents
from sora_jax.train.exported import no_run, output_folder, run_folder
from sora_jax.train.frozen import autoencoder_config, recorded_fingerprint
from sora_jax.train.held_out import HeldOutClips

PROMPTS = 64  # at most, where no number is given
CLIP_COLUMNS = ("generated", "autoencoder", "real")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class DenoiserOptions:
    """Choose what a denoiser is measured by and on, how it is sampled, and where the files go."""

    metrics: tuple[str, ...] = ()  # names of `suite.METRICS`; (): oracle and consistency, ("all",): all that can be had
    count: int | None = None  # clips at most, evenly spread; None: 64 prompts, of latents config.held_out.clips
    split: str | None = None  # of the clips; None: all but the one that the run is trained on
    latents: Path | None = None  # latent cache; None: that of the run's config
    checkpoint: str = NEWEST  # or best, or a step
    steps: str | None = None  # of the solver; None: as the run's config says
    sampling: tuple[str, ...] = ()  # changes of the run's config.sampling, such as "guidance.scale=2"
    seed: int = 0  # of the samples, and of the probes of a likelihood
    frames: int | None = None  # of the generated clips; None: those of the real clips
    out: Path | None = None  # folder of report.json, pictures and generated clips; None: RUN/evaluation
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # options of metrics, by their name

    def __post_init__(self):
        for name, least in (("count", 1), ("frames", 2)):
            value = getattr(self, name)
            check(value is None or value >= least, f"--{name} is {value}; it must be at least {least}")
        check(0 <= self.seed < 2**32, f"--seed is {self.seed}; it must be from 0 to 4294967295")


class Chosen(NamedTuple):
    """Hold the rows of the clips that are compared, how many there are to choose from, and remarks on them."""

    rows: list[dict]
    available: int
    notes: list[str]


class Evaluation:
    """Hold a run and what it is measured on. What does not fit together is a UserError when it is asked for.

    folder: of the run. sampling: how it is sampled. out: for files. notes: for the report; metrics add to them.
    """

    def __init__(self, run: str | Path, data: str | Path | None, options: DenoiserOptions):
        self.folder, self.data, self.options = run_folder(run, "RUN"), data, options
        check((self.folder / "config.json").exists(), no_run("RUN", run))
        self.config: DenoiserRun = read_run_config(self.folder)
        self.out = output_folder(run) / "evaluation" if options.out is None else as_path(options.out)
        steps = changed(self.config.sampling, options.steps, None)
        self.sampling: SamplingConfig = override(steps, options.sampling, "sampling")
        self.notes: list[str] = []
        self._once: dict[Callable, Any] = {}

    def once(self, function: Callable[["Evaluation"], T]) -> T:
        """Return function(self), called once whichever metrics ask."""
        if function not in self._once:
            self._once[function] = function(self)
        return self._once[function]

    @cached_property
    def dataset(self) -> Dataset:
        """Return the dataset of the real clips."""
        check(self.data is not None, "--data is not given; it must be a dataset folder, whose clips are compared with")
        assert self.data is not None
        return Dataset(self.data)

    @cached_property
    def chosen(self) -> Chosen:
        """Choose the clips of the dataset whose prompts, or classes, are sampled."""
        given, model = self.options.count or PROMPTS, self.config.model
        classes = None if model.text else model.classes
        return Chosen(*choose_rows(self.dataset, self.config.split, given, self.options.split, classes))

    def check_videos(self) -> None:
        """Raise a UserError unless the chosen clips are videos with captions that the run takes."""
        check(self.config.model.text, f"RUN is {str(self.folder)!r}; it must be a run that is trained on captions")
        images = any(row["frames"] == 1 for row in self.chosen.rows)
        check(not images, f"--data is {str(self.data)!r}; it must hold out videos with captions, and it holds out none")
        self.check_clips()

    def check_clips(self) -> None:
        """Raise a UserError unless the run takes the sizes of the chosen clips."""
        own = "that run makes clips of those of half the size (model.low_resolution), and is not sampled here"
        check(not reads_low(self.config.model), f"RUN is {str(self.folder)!r}; {own}")
        first_stage = autoencoder_config(autoencoder_folder(self.folder, None))
        for size in sorted(set(map(_size, self.chosen.rows))):
            latent_size(self.config, first_stage, size)
            latent_size(self.config, first_stage, self._generated_size(size))

    def check_latents(self) -> None:
        """Raise a UserError unless there is a latent cache that the run's network takes."""
        text = self.config.model.text
        self.cache.check(recorded_fingerprint(autoencoder_folder(self.folder, None)) or "")
        if text:
            check_text(self.cache, text.pretrained, text.pretrained_width, self.config.tokenizer.max_tokens)
        if self.options.split is not None:
            self.cache.indices(self.options.split)  # UserError that names the splits there are

    @cached_property
    def prompts(self) -> list[str]:
        """Return the prompts of the chosen clips."""
        return [caption_of(row) for row in self.chosen.rows]

    @cached_property
    def model(self) -> Run:
        """Load the averaged weights of the checkpoint."""
        return load_run(self.folder, checkpoint=self.options.checkpoint)

    @cached_property
    def cache(self) -> LatentCache:
        """Return the latent cache: the given one, or that of the run's config."""
        if self.options.latents is not None:
            try:
                return LatentCache(self.options.latents)
            except UserError as error:
                raise UserError(f"--latents is {str(self.options.latents)!r}; {error}") from error
        if self.config.drawn:
            return open_latents(self.config)
        mend = "give the folder of one, which `sora-jax data encode --autoencoder=RUN` makes"
        check(self.config.latents, f"--latents is not given, and the run's config names none; {mend}")
        try:
            return LatentCache(self.config.latents)
        except UserError as error:
            raise UserError(f"--latents is not given, and that of the run's config is gone: {error}; {mend}") from error

    @cached_property
    def latent_clips(self) -> HeldOutClips:
        """Choose the clips of the latent cache that are measured; call it under the mesh of the run."""
        clips = HeldOutClips(self.held_out_config, self.cache, self.model.tokenizer, split=self.options.split)
        what = "holds out no clip" if self.options.split is None else f"has no clip of the split {self.options.split!r}"
        check(len(clips) > 0, f"the latent cache {str(self.cache.path)!r} {what} that fits the run's packs")
        return clips

    @property
    def held_out_config(self) -> DenoiserRun:
        """Return the config of the run with the number of clips that are asked for."""
        config = self.model.config
        clips = self.options.count or config.held_out.clips
        return dataclasses.replace(config, held_out=dataclasses.replace(config.held_out, clips=clips))

    def about_latents(self) -> str:
        """Say which latents are measured."""
        clips, split = self.latent_clips, self.options.split or "held-out"
        return f"{len(clips)} of {clips.available} {split} clips of the latents {self.cache.path}"

    @property
    def real(self) -> "RealClips":
        """Return the chosen clips of the dataset; each is read when it is asked for."""
        return RealClips(self.dataset, self.chosen.rows)

    @cached_property
    def generated(self) -> KeptClips:
        """Sample a clip for each prompt or class, of the size of the real one; note what the run has not learnt."""
        sizes = [self._generated_size(_size(row)) for row in self.chosen.rows]
        text, classes = self.config.model.text, self.config.model.classes
        labels = [row["label"] for row in self.chosen.rows] if classes and not text else []
        requests = self.model.plan(Wanted(self.prompts if text else [], sizes, labels), self.sampling)
        self.notes += self.model.learnt.doubts(requests)
        return sample_kept(self.model, requests, self.sampling, self.options.seed, self.out / "clips")

    def clips(self, column: str) -> Iterator[np.ndarray]:
        """Yield the clips of a column in the order of the prompts, uint8 (T, H, W, 3)."""
        if column == "autoencoder":
            autoencoder = self.model.autoencoder
            return autoencoder.decode(autoencoder.encode(self.real, 4), 4)
        return iter(self.generated if column == "generated" else self.real)

    def _generated_size(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        return (self.options.frames or size[0], *size[1:])


@dataclasses.dataclass(frozen=True)
class RealClips(Sequence):
    """Read clips of a dataset by their place in a list of rows."""

    dataset: Dataset
    rows: Sequence[dict]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        return self.dataset[self.rows[place]["index"]].frames


def choose_rows(
    dataset: Dataset, trained: str, count: int, split: str | None = None, classes: int | None = None
) -> tuple[list[dict], int, list[str]]:
    """Choose held-out clips with a caption that no training clip has; return rows, how many there are, and notes.

    Videos, or images where there are no videos. The rows are ordered by size, so that each size is compiled once. Where
    training clips have all captions, clips with such captions are chosen, and a note says so. split: choose from this
    split alone. classes: of a run that reads labels below it in place of captions; 0: it reads neither.
    """
    own = dataset.held_out(trained) if split is None else dataset.rows(split)
    named = [row for row in own if _is_named(row, classes)]
    rows = [row for row in named if row["frames"] > 1] or named
    what = {None: "clips with captions", 0: "clips"}.get(classes, f"clips of the classes 0 to {(classes or 1) - 1}")
    where = f"hold out {what}, and it holds out none"
    where = where if split is None else f"have {what} in the split {split!r}, and it has none"
    check(rows, f"--data is {str(dataset.path)!r}; it must {where}")
    fresh, notes = rows, []
    if split == trained:
        notes = ["the run was trained on these clips"]
    elif classes is None:
        known = {caption for row in dataset.rows(trained) for caption in row["captions"]}
        fresh = [row for row in rows if caption_of(row) not in known]
        notes = [] if fresh else ["each held-out caption is also that of a training clip"]
    chosen = evenly_spread(fresh or rows, count)
    return sorted(chosen, key=_size), len(fresh or rows), notes


def _is_named(row: dict, classes: int | None) -> bool:
    """Return True if a run can be asked for a clip: by its caption or, with so many classes, by its label."""
    return bool(caption_of(row)) if classes is None else not classes or 0 <= row["label"] < classes


def counted(items: Iterable[T], bar: Any) -> Iterator[T]:
    """Yield items, and move a bar when each has been used."""
    for item in items:
        yield item
        bar.update()


def measuring(total: int, unit: str) -> Any:
    """Return a bar for measurements."""
    return progress(total=total, desc="evaluate", unit=unit)


def _size(row: dict) -> tuple[int, int, int]:
    return row["frames"], row["height"], row["width"]
