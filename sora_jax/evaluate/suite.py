"""The table of the metrics of a denoiser. A new metric is one module with a `Metric`, and one line in `METRICS`.

Its name stands in the help of `--metrics`, too, and in `FIELDS` of the parser if it has options.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sora_jax.config import check_word, override
from sora_jax.errors import UserError
from sora_jax.evaluate.distances import FID, FVD, OWN
from sora_jax.evaluate.evaluation import Evaluation
from sora_jax.evaluate.likelihood import LIKELIHOOD
from sora_jax.evaluate.loss import LOSS
from sora_jax.evaluate.metric import Metric
from sora_jax.evaluate.oracle import CONSISTENCY, ORACLE

METRICS: dict[str, Metric] = {
    "oracle": ORACLE,
    "consistency": CONSISTENCY,
    "loss": LOSS,
    "likelihood": LIKELIHOOD,
    "fvd": FVD,
    "fid": FID,
    "own": OWN,
}
ALL = "all"
USUAL = ("oracle", "consistency")  # where none is named; oracle if it can read the prompts


def parse_metrics(text: str | None) -> tuple[str, ...]:
    """Return the names between the commas of `--metrics`; () where it is not given. UserError for unknown ones."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(","))) if text is not None else ()
    for name in names:
        check_word("--metrics", name, (*METRICS, ALL))
    return names


def own_options(metrics: Sequence[str], changes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return the options of each metric, changed by FIELD=VALUE; UserError for those of one that is not measured."""
    measured = tuple(METRICS) if ALL in metrics else tuple(metrics)
    for name, words in changes.items():
        if words and name not in measured:
            raise UserError(f"--{name}.{words[0]} is given; it is for --metrics={name}")
    chosen = {name: METRICS[name].options for name in measured}
    return {name: override(o, changes.get(name, ()), name) for name, o in chosen.items() if o is not None}


def choose_metrics(names: Sequence[str], evaluation: Evaluation) -> list[str]:
    """Return the metrics that will be measured: those named, which must be possible, or those that are.

    Of `all`, and of the usual ones, those that cannot be had are left out; the notes of the evaluation say why.

    Raises:
        UserError: a named metric cannot be had, or none can.
    """
    everything = ALL in names
    wanted = tuple(METRICS) if everything else tuple(names) or USUAL
    chosen, errors = [], []
    for name in wanted:
        try:
            METRICS[name].check(evaluation, evaluation.options.own.get(name, METRICS[name].options))
            chosen.append(name)
        except UserError as error:
            if names and not everything:
                raise
            errors.append(error)
            evaluation.notes.append(f"{name} is left out: {error}")
    if not chosen:
        raise errors[0]
    return chosen
