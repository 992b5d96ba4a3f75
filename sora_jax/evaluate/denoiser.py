"""Measure a trained denoiser by the metrics of `suite.METRICS`: one report, one table."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sora_jax.evaluate.evaluation import DenoiserOptions, Evaluation
from sora_jax.evaluate.metric import COLUMNS, Found, Line
from sora_jax.evaluate.suite import METRICS, choose_metrics
from sora_jax.files import write_json

LABELS = 41  # characters before the first column
NARROWEST = 13  # characters of a column


@dataclasses.dataclass(frozen=True)
class DenoiserReport:
    """Hold all measurements; `dataclasses.asdict` makes JSON of them, without the table, and `text` one for people."""

    run: str
    step: int  # of the checkpoint
    metrics: list[str]
    data: str | None  # the dataset, where clips are compared
    clips: int  # that are compared
    available: int  # clips to choose from
    split: str | None  # None: all but the one that is trained on
    steps: str  # of the solver
    seed: int
    oracle: bool  # the captions were read by the oracle of the embedded world
    columns: dict[str, dict[str, Any]]  # values by column, group and name
    about: dict[str, str]  # how each metric was measured
    notes: list[str]
    files: list[str]
    table: list[str]
    after: list[str]  # lines below the table

    @property
    def text(self) -> str:
        """Return the measurements as lines of text."""
        return "\n".join([*_heading(self), "", *self.table, "", *self.after, *_ending(self)])

    @property
    def values(self) -> dict[str, Any]:
        """Return the measurements as JSON values."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in ("table", "after")}


def evaluate_denoiser(
    run: str | Path, data: str | Path | None = None, options: DenoiserOptions = DenoiserOptions()
) -> DenoiserReport:
    """Measure a run folder on the clips that a dataset folder, or its latent cache, holds out; write the files.

    Raises:
        UserError: there is no run, a metric is unknown, or what it needs is not there.
    """
    evaluation = Evaluation(run, data, options)
    names = choose_metrics(options.metrics, evaluation)
    found = {name: METRICS[name].measure(evaluation, options.own.get(name, METRICS[name].options)) for name in names}
    report = _report(evaluation, found)
    write_json(evaluation.out / "report.json", report.values)
    return report


def _report(evaluation: Evaluation, found: dict[str, Found]) -> DenoiserReport:
    compared = "chosen" in vars(evaluation) and any("generated" in each.columns for each in found.values())
    rows, available, notes = evaluation.chosen if compared else ([], 0, [])
    columns: dict[str, dict[str, Any]] = {}
    for each in found.values():
        for column, values in each.columns.items():
            columns.setdefault(column, {}).update(values)
    files = dict.fromkeys(file for each in found.values() for file in each.files)
    return DenoiserReport(
        run=str(evaluation.folder),
        step=evaluation.model.step,
        metrics=list(found),
        data=str(evaluation.data) if compared else None,
        clips=len(rows),
        available=available,
        split=evaluation.options.split,
        steps=evaluation.sampling.steps,
        seed=evaluation.options.seed,
        oracle="oracle" in found,
        columns=columns,
        about={name: each.about for name, each in found.items() if each.about},
        notes=[*notes, *evaluation.notes, *(note for each in found.values() for note in each.notes)],
        files=[*files, str(evaluation.out / "report.json")],
        table=_table([line for each in found.values() for line in each.lines]),
        after=[line for each in found.values() for line in each.after],
    )


def _heading(report: DenoiserReport) -> list[str]:
    lines = [f"run          {report.run}, step {report.step:,}"]
    if report.data:
        which = report.split or "held-out"
        lines.append(f"clips        {report.clips} of {report.available} {which} clips of {report.data}")
        lines.append(f"sampling     {report.steps} steps, seed {report.seed}")
    return lines + [f"{name:12} {about}" for name, about in report.about.items()]


def _table(lines: Sequence[Line]) -> list[str]:
    columns = [name for name in COLUMNS if any(name in line.cells for line in lines)]
    widths = {c: max(NARROWEST, *(len(line.cells.get(c, "")) + 2 for line in lines)) for c in columns}
    shown, before = [" " * LABELS + "".join(f"{column:>{widths[column]}}" for column in columns)], ""
    for line in lines:
        cells = "".join(f"{line.cells.get(column, ''):>{widths[column]}}" for column in columns)
        shown.append(f"{line.group if line.group != before else '':13}{line.label:28}{cells}".rstrip())
        before = line.group
    return shown


def _ending(report: DenoiserReport) -> list[str]:
    blank = [""] if report.after else []
    return [*blank, *(f"note         {note}" for note in report.notes), f"files        {', '.join(report.files)}"]
