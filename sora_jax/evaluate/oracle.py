"""The metrics `oracle` and `consistency`: do clips of held-out prompts show what these say, and stay what they are?

The same ruler is laid on the real clips of the prompts, and on those through the autoencoder: the difference to the
first is the ruler's own error, and to the second what the autoencoder costs.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sora_jax.config import check
from sora_jax.data.viewing.write import save_png
from sora_jax.evaluate.consistency import Consistency, Measured, average, in_worlds_words, measure
from sora_jax.evaluate.evaluation import CLIP_COLUMNS, Evaluation, counted, measuring
from sora_jax.evaluate.metric import Found, Line, Metric
from sora_jax.evaluate.page import draw_page

# Group of `Consistency`, its key, what people read, and the format
Row = tuple[str, str, str, str]
ORACLE_ROWS: tuple[Row, ...] = (
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
)
LOOKS_ROWS: tuple[Row, ...] = (
    ("looks", "subject", "subject consistency", ".4f"),
    ("looks", "background", "background consistency", ".4f"),
    ("looks", "flicker", "flicker (1: none)", ".4f"),
    ("looks", "smoothness", "smoothness", ".4f"),
    ("looks", "motion", "motion, short sides a frame", ".4f"),
    ("looks", "dynamic", "dynamic degree", ".1%"),
)


@dataclasses.dataclass(frozen=True)
class _Columns:
    """Hold what was measured of the clips of each column."""

    measured: Mapping[str, Sequence[Measured]]
    averages: Mapping[str, Consistency]
    picture: str


def check_videos(evaluation: Evaluation, options: None) -> None:
    """Raise a UserError unless there are videos to compare with."""
    evaluation.check_videos()


def check_words(evaluation: Evaluation, options: None) -> None:
    """Raise a UserError unless the oracle can read the prompts."""
    check_videos(evaluation, options)
    where = f"--data is {str(evaluation.data)!r}"
    check(
        all(map(in_worlds_words, evaluation.prompts)),
        f"{where}; the captions are not in the words of the embedded world, which alone its oracle reads",
    )


def _measure(evaluation: Evaluation) -> _Columns:
    """Measure the clips of all columns, and draw the page."""
    prompts, oracle = evaluation.prompts, all(map(in_worlds_words, evaluation.prompts))
    found: dict[str, list[Measured]] = {}
    columns = {"generated": evaluation.generated}  # sampled before the bar is shown
    with measuring(len(CLIP_COLUMNS) * len(prompts), "clip") as bar:
        for name in CLIP_COLUMNS:
            clips = columns.get(name) or evaluation.clips(name)
            pairs = counted(zip(prompts, clips, strict=True), bar)
            found[name] = [measure(*pair, oracle) for pair in pairs]
    averages = {name: average(each) for name, each in found.items()}
    page = draw_page(prompts, evaluation.generated, evaluation.real, found["generated"], averages)
    return _Columns(found, averages, str(save_png(evaluation.out / "consistency.png", page)))


def _oracle(evaluation: Evaluation, options: None) -> Found:
    made = evaluation.once(_measure)
    after = []
    for name in ("agreement", "identity", "shape"):
        for column in ("generated", "real"):
            if values := made.averages[column].curves.get(name):
                after.append(f"{name + ' by frame':20} {column:10} " + " ".join(f"{value:.2f}" for value in values))
    if prompts := made.averages["real"].permanence.get("prompts"):
        after += ["", f"permanence   of the {prompts:.0f} prompts in which a shape passes in front of another"]
    names = ("clips", "agreement", "constancy", "permanence", "curves")
    right, notes = made.averages["real"].agreement["all"], []
    if right is not None and right < 0.95:  # then it is no ruler for the generated clips
        notes = [f"the oracle reads colour, kind and motion right in {right:.0%} of the real clips only"]
    return Found(_values(made, names), _lines(made, ORACLE_ROWS), after=after, notes=notes, files=[made.picture])


def _consistency(evaluation: Evaluation, options: None) -> Found:
    made = evaluation.once(_measure)
    return Found(_values(made, ("clips", "looks")), _lines(made, LOOKS_ROWS), files=[made.picture])


def _values(made: _Columns, groups: Sequence[str]) -> dict[str, dict[str, Any]]:
    each = {column: dataclasses.asdict(values) for column, values in made.averages.items()}
    return {column: {group: values[group] for group in groups} for column, values in each.items()}


def _lines(made: _Columns, rows: Sequence[Row]) -> list[Line]:
    """Return the rows of which a column has a value."""
    lines = []
    for group, key, label, form in rows:
        values = {column: getattr(found, group).get(key) for column, found in made.averages.items()}
        if any(value is not None for value in values.values()):
            cells = {column: "-" if value is None else format(value, form) for column, value in values.items()}
            lines.append(Line(group, label, cells))
    return lines


ORACLE = Metric(check_words, _oracle)
CONSISTENCY = Metric(check_videos, _consistency)
