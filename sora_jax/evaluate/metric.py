"""Define a metric of a trained denoiser, and what it returns."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sora_jax.evaluate.evaluation import Evaluation

# Columns of the table, in order: clips of the run, of the autoencoder and of the data, and what the network itself has.
COLUMNS = ("generated", "autoencoder", "real", "model")


class Line(NamedTuple):
    """Hold a row of the printed table: its group, its label, and its text by column."""

    group: str
    label: str
    cells: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Found:
    """Hold what a metric has found.

    columns: values for `report.json`, by column and group. lines: rows of the printed table. about: how it was
    measured, for the heading. after: text below the table. files: pictures that were written.
    """

    columns: Mapping[str, Mapping[str, Any]]
    lines: Sequence[Line]
    about: str = ""
    after: Sequence[str] = ()
    notes: Sequence[str] = ()
    files: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Metric:
    """Define a metric.

    check(evaluation, options): raises a UserError where the evaluation lacks what the metric needs, before any weights
    are read. measure(evaluation, options): measures. options: the defaults of its own options, a dataclass, which
    `--NAME.FIELD=VALUE` changes; None: it has none.
    """

    check: Callable[[Evaluation, Any], None]
    measure: Callable[[Evaluation, Any], Found]
    options: Any = None
