"""Measure a trained denoiser: do its clips of held-out prompts show what the prompts say, and stay what they are?

The same ruler is laid on the real clips of the prompts, and on those through the autoencoder: the difference to the
first is the ruler's own error, and to the second what the autoencoder costs.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sora_jax.config import check
from sora_jax.console import progress
from sora_jax.data.storing.manifest import Dataset, caption_of, evenly_spread
from sora_jax.data.viewing.write import save_png
from sora_jax.evaluate.consistency import Consistency, Measured, average, in_worlds_words, measure
from sora_jax.evaluate.page import draw_page
from sora_jax.files import as_path, write_json
from sora_jax.generate.requests import Wanted, latent_size
from sora_jax.generate.run import Run, autoencoder_folder, changed, load_run, read_run_config
from sora_jax.train.denoiser import DenoiserRun
from sora_jax.train.exported import no_run, output_folder, run_folder
from sora_jax.train.frozen import autoencoder_config

COLUMNS = ("generated", "autoencoder", "real")
# Group of `Consistency`, its key, what people read, and the format
ROWS = (
    ("agreement", "colour", "colour", ".1%"),
    ("agreement", "kind", "kind", ".1%"),
    ("agreement", "motion", "motion, with its direction", ".1%"),
    ("agreement", "count", "count of shapes", ".1%"),
    ("agreement", "background", "background", ".1%"),
    ("agreement", "camera", "camera", ".1%"),
    ("agreement", "all", "colour, kind and motion", ".1%"),
    ("constancy", "identity", "identity, whole clip", ".3f"),
    ("constancy", "identity_by_frame", "identity, frame by frame", ".3f"),
    ("constancy", "identity_last", "identity, last frame", ".3f"),
    ("constancy", "shape", "clips of constant shapes", ".1%"),
    ("constancy", "physics_error", "physics error, short sides", ".4f"),
    ("permanence", "covered", "passes that cover a shape", ".1%"),
    ("permanence", "same_after", "the same after as before", ".1%"),
    ("looks", "subject", "subject consistency", ".4f"),
    ("looks", "background", "background consistency", ".4f"),
    ("looks", "flicker", "flicker (1: none)", ".4f"),
    ("looks", "smoothness", "smoothness", ".4f"),
    ("looks", "motion", "motion, short sides a frame", ".4f"),
    ("looks", "dynamic", "dynamic degree", ".1%"),
)


@dataclasses.dataclass(frozen=True)
class DenoiserOptions:
    """Choose what a denoiser is measured on, how it is sampled, and where the files go."""

    count: int = 64  # number of held-out prompts at most, evenly spread
    steps: str | None = None  # of the solver; None: as the run's config says
    seed: int = 0  # of the samples
    frames: int | None = None  # of the generated clips; None: those of the real clips
    out: Path | None = None  # folder of report.json and consistency.png; None: RUN/evaluation

    def __post_init__(self):
        for name, least in (("count", 1), ("frames", 2)):
            value = getattr(self, name)
            check(value is None or value >= least, f"--{name} is {value}; it must be at least {least}")
        check(0 <= self.seed < 2**32, f"--seed is {self.seed}; it must be from 0 to 4294967295")


@dataclasses.dataclass(frozen=True)
class DenoiserReport:
    """Hold all measurements; `dataclasses.asdict` makes JSON of them and `text` a table for people."""

    run: str
    step: int  # of the checkpoint
    data: str
    clips: int
    available: int  # held-out clips to choose from
    steps: str  # of the solver
    seed: int
    oracle: bool  # the captions are in the words of the embedded world
    columns: dict[str, Consistency]  # by the names in COLUMNS
    notes: list[str]
    files: list[str]

    @property
    def text(self) -> str:
        """Return the measurements as lines of text."""
        return "\n".join([*_heading(self), "", *_table(self), "", *_curves(self), *_ending(self)])


def evaluate_denoiser(
    run: str | Path, data: str | Path, options: DenoiserOptions = DenoiserOptions()
) -> DenoiserReport:
    """Measure the clips that a run folder generates for the held-out prompts of a dataset folder; write the files.

    Raises:
        UserError: there is no run, it takes no captions or no clips of these sizes, or the dataset has no held-out
            video with a caption.
    """
    given, run = run, run_folder(run, "RUN")
    check((run / "config.json").exists(), no_run("RUN", given))
    dataset, config = Dataset(data), read_run_config(run)
    check(config.model.text, f"RUN is {str(run)!r}; it must be a run that is trained on captions")
    rows, available, notes = choose_rows(dataset, config.split, options.count)
    _check_sizes(config, run, rows, options)
    model = load_run(run)
    prompts, real = [caption_of(row) for row in rows], [dataset[row["index"]].frames for row in rows]
    oracle = all(map(in_worlds_words, prompts))
    if not oracle:
        notes.append("the captions are not in the words of the embedded world: the rows of its oracle are left out")
    with progress(total=(2 + len(COLUMNS)) * len(rows), desc="evaluate", unit="clip") as bar:
        clips = {"generated": _generate(model, prompts, real, options, notes)}
        bar.update(len(rows))
        clips |= {"autoencoder": _reconstruct(model, real), "real": real}
        bar.update(len(rows))
        found = {name: [measure(*pair, oracle) for pair in _counted(bar, prompts, clips[name])] for name in COLUMNS}
    out = output_folder(given) / "evaluation" if options.out is None else as_path(options.out)
    columns = {name: average(found[name]) for name in COLUMNS}
    page = draw_page(prompts, clips["generated"], real, found["generated"], columns)
    report = DenoiserReport(
        run=str(run),
        step=model.step,
        data=str(data),
        clips=len(rows),
        available=available,
        steps=str(options.steps or model.config.sampling.steps),
        seed=options.seed,
        oracle=oracle,
        columns=columns,
        notes=notes + _doubts(found["real"]),
        files=[str(save_png(out / "consistency.png", page)), str(out / "report.json")],
    )
    write_json(out / "report.json", dataclasses.asdict(report))
    return report


def choose_rows(dataset: Dataset, trained: str, count: int) -> tuple[list[dict], int, list[str]]:
    """Choose held-out videos with a caption that no training clip has; return rows, how many there are, and notes.

    The rows are ordered by size, so that each size is compiled once. Where training clips have all captions, clips with
    such captions are chosen, and a note says so.
    """
    rows = [row for row in dataset.held_out(trained) if row["frames"] > 1 and caption_of(row)]
    check(rows, f"--data is {str(dataset.path)!r}; it must hold out videos with captions, and it holds out none")
    known = {caption for row in dataset.rows(trained) for caption in row["captions"]}
    fresh = [row for row in rows if caption_of(row) not in known]
    notes = [] if fresh else ["each held-out caption is also that of a training clip"]
    chosen = evenly_spread(fresh or rows, count)
    return sorted(chosen, key=_size), len(fresh or rows), notes


def _check_sizes(config: DenoiserRun, run: str | Path, rows: Sequence[dict], options: DenoiserOptions) -> None:
    """Raise a UserError, before any weights are read, where the run does not take a clip or the frames asked for."""
    first_stage = autoencoder_config(autoencoder_folder(as_path(run), None))
    for frames, height, width in sorted(set(map(_size, rows))):
        latent_size(config, first_stage, (frames, height, width))
        latent_size(config, first_stage, (options.frames or frames, height, width))


def _size(row: dict) -> tuple[int, int, int]:
    return row["frames"], row["height"], row["width"]


def _generate(
    model: Run, prompts: Sequence[str], real: Sequence[np.ndarray], options: DenoiserOptions, notes: list[str]
) -> list[np.ndarray]:
    """Sample a clip for each prompt, of the size of the real one; add to the notes what the run has not learnt."""
    sizes = [(options.frames or len(clip), *clip.shape[1:3]) for clip in real]
    sampling = changed(model.config.sampling, options.steps, None)
    requests = model.plan(Wanted(prompts, sizes), sampling)
    notes += model.learnt.doubts(requests)
    return model.sample(requests, sampling, options.seed)


def _reconstruct(model: Run, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
    return list(model.autoencoder.decode(model.autoencoder.encode(clips, 4), 4))


def _counted(bar: tqdm, prompts: Sequence[str], clips: Iterable[np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    for pair in zip(prompts, clips, strict=True):
        yield pair
        bar.update()


def _doubts(real: Sequence[Measured]) -> list[str]:
    """Say so where the oracle misreads real clips: then it is no ruler for the generated ones."""
    found = average(real).agreement["all"]
    if found is None or found >= 0.95:
        return []
    return [f"the oracle reads colour, kind and motion right in {found:.0%} of the real clips only"]


def _heading(report: DenoiserReport) -> list[str]:
    return [
        f"run          {report.run}, step {report.step:,}",
        f"clips        {report.clips} of {report.available} held-out clips of {report.data}",
        f"sampling     {report.steps} steps, seed {report.seed}",
    ]


def _table(report: DenoiserReport) -> list[str]:
    lines, before = [f"{'':41}" + "".join(f"{name:>13}" for name in COLUMNS)], ""
    for group, key, label, form in ROWS:
        values = [getattr(report.columns[name], group).get(key) for name in COLUMNS]
        if all(value is None for value in values):
            continue
        cells = "".join(f"{'-' if value is None else format(value, form):>13}" for value in values)
        lines.append(f"{group if group != before else '':13}{label:28}{cells}")
        before = group
    return lines


def _curves(report: DenoiserReport) -> list[str]:
    """Return the curves of the generated and the real clips, a value for each frame."""
    lines = []
    for name in ("agreement", "identity", "shape"):
        for column in ("generated", "real"):
            if values := report.columns[column].curves.get(name):
                lines.append(f"{name + ' by frame':20} {column:10} " + " ".join(f"{value:.2f}" for value in values))
    return [*lines, ""] if lines else []


def _ending(report: DenoiserReport) -> list[str]:
    notes = [f"note         {note}" for note in report.notes]
    if prompts := report.columns["real"].permanence.get("prompts"):
        notes = [f"permanence   of the {prompts:.0f} prompts in which a shape passes in front of another", *notes]
    return [*notes, f"files        {', '.join(report.files)}"]
