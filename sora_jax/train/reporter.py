"""Reports of a run: means over steps, rates, and the check that every step is finite."""

import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from sora_jax.config import check
from sora_jax.errors import UserError
from sora_jax.parallel import distributed
from sora_jax.train.metrics import MetricsWriter, Stopwatch, flatten
from sora_jax.train.step import fetch

if TYPE_CHECKING:
    from sora_jax.train.loop import Job, LoopConfig

FINITE = ("loss", "parameter_norm")  # metrics that end a run where they are not finite
SKIPS = 10  # losses in a row that may be not finite where their updates are skipped
ADVICE = (
    "the same command ends here again: give it a smaller --config.optim.learning_rate or clip_norm, "
    "--config.optim.skip_spikes=3, another --config.batch, or another --config.seed, which draws other batches"
)
TOTALS = ("skipped_updates",)  # metrics that count since the beginning; of all others a report has means


def due(step: int, every: int, last: int) -> bool:
    """Return True every `every` steps and at the last step."""
    return step == last or (every > 0 and step % every == 0)


class Instruments(NamedTuple):
    """Hold what the loop reports to: metrics file, progress bar, stopwatch, watchdog, step of the newest checkpoint."""

    writer: MetricsWriter | None
    bar: tqdm
    watch: Stopwatch
    stepped: Callable[[int], None]
    newest_save: Callable[[], int | None]


class Reporter:
    """Read each step's metrics only after the next step has been dispatched, and report every `log_every` steps.

    A report holds means over the steps since the last one, and the learning rate of its step. The first step, which
    compiles, counts in no rate of time, and neither does the time of previews and saves.
    """

    def __init__(
        self,
        job: "Job",
        config: "LoopConfig",
        instruments: Instruments,
        means: "MetricAccumulator",
        rates: Mapping[str, Callable[[int], float]],
    ):
        self._learning_rates = rates
        self.instruments = instruments
        self.means = means
        self.best_metric: float | None = None
        self._job = job
        self._config = config
        self._held: tuple[int, dict, dict] | None = None
        self._totals: dict = {}
        self._counts: dict[str, float] = {}
        self._since: float | None = None
        self._bad_losses = 0  # in a row

    def hold(self, step: int, metrics: dict, batch: dict) -> None:
        """Keep what a step was dispatched with, for `read_previous`."""
        self._held = (step, metrics, batch)

    def read_previous(self, measured: dict | None = None) -> None:
        """Wait for the held step, check that it is finite, and write a report if one is due.

        measured: metrics of held-out clips after that step; they make a report due.
        """
        if self._held is None:
            return
        (step, metrics, batch), self._held = self._held, None
        metrics = fetch(metrics)
        self.instruments.stepped(step)
        if self._config.best_metric.startswith("held_out/"):
            self.best_metric = None  # it is of the weights of the step that was measured alone
        self._check_finite(step, metrics, batch)
        _advance(self.instruments.bar, first=self._since is None)
        self._totals = {name: metrics.pop(name) for name in list(metrics) if name.partition("/")[0] in TOTALS}
        self.means.add(metrics)
        counts = self._job.counts(batch)
        if self._since is None:
            self._since = self._clock()
        else:
            self._counts = {name: self._counts.get(name, 0) + value for name, value in counts.items()}
        if measured is not None or (self._config.log_every and due(step, self._config.log_every, self._config.steps)):
            self._report(step, measured or {})

    def _check_finite(self, step: int, metrics: dict, batch: dict) -> None:
        """Raise a UserError where the loss or the parameters are not finite.

        Where spikes are skipped, such a loss has changed nothing: only SKIPS of them in a row end the run. A loss may
        be finite where its gradient is not; the norm shows that the update spoilt the parameters.
        """
        groups = ["", *(f"/{group}" for group in self._job.groups)]
        wrong = [
            n for n in (f"{what}{group}" for what in FINITE for group in groups) if not math.isfinite(metrics.get(n, 0))
        ]
        self._bad_losses = self._bad_losses + 1 if wrong else 0
        skips = any(name.startswith("skipped_updates") for name in metrics)
        if not wrong or (skips and wrong[-1].startswith("loss") and self._bad_losses < SKIPS):
            return
        save = self.instruments.newest_save()
        where = "there is no checkpoint yet" if save is None else f"the last good checkpoint is of step {save}"
        again = f"so were the {SKIPS - 1} before it, all skipped" if skips and self._bad_losses >= SKIPS else where
        raise UserError(
            f"the {wrong[0].replace('_', ' ')} of step {step} is {metrics[wrong[0]]}; clips of that batch: "
            f"{self._job.clip_ids(batch)}; {again}; {ADVICE}"
        )

    def _report(self, step: int, measured: dict) -> None:
        assert self._since is not None  # `read_previous` sets it before
        metrics = self.means.take()
        seconds = self._clock() - self._since
        counts, again = distributed.total(self._counts), jax.process_count() / self._job.share.count
        rates = {f"{name}_per_second": n / again / seconds for name, n in counts.items() if name != "capacity"}
        if "capacity" in counts:
            rates["padding_share"] = 1 - counts["tokens"] / counts["capacity"]
        rates |= self._rates(step)
        spent = {f"seconds/{cause}": value for cause, value in self.instruments.watch.seconds.items()}
        if self.instruments.writer:
            self.instruments.writer.write(step, metrics | self._totals | rates | spent | measured)
        if self._config.keep_best:
            self._rank(flatten(metrics), flatten(measured))
        self.instruments.bar.set_postfix_str(f"loss {metrics['loss']:.4f}")
        self._counts, self._since = {}, self._clock()

    def _rank(self, metrics: dict[str, float], measured: dict[str, float]) -> None:
        """Set what checkpoints are ranked by; one of a step without a measurement of held-out clips has no rank."""
        name, known = self._config.best_metric, metrics | measured
        if name in known:
            self.best_metric = known[name]
        else:
            measures = self._job.measure is not None and name.startswith("held_out/")
            check(measures, f"loop.best_metric is {name!r}; this run reports {', '.join(known)}")

    def _rates(self, step: int) -> dict[str, float]:
        """Return the learning rate of each group at a step; skipped updates do not count in a schedule."""
        found = {}
        for name, rate in self._learning_rates.items():
            suffix = f"/{name}" if len(self._learning_rates) > 1 else ""
            skipped = int(self._totals.get(f"skipped_updates{suffix}", 0))
            found[f"learning_rate{suffix}"] = float(rate(step - 1 - skipped))
        return found

    def _clock(self) -> float:
        """Return seconds that pass while steps are made; the clock stands still during previews and saves."""
        paused = sum(self.instruments.watch.seconds.get(cause, 0.0) for cause in ("evaluate", "save"))
        return time.perf_counter() - paused


def _advance(bar: tqdm, first: bool) -> None:
    """Count a step in the bar. Its rate is of the steps after the first one, which compiles."""
    if not first or bar.disable:
        bar.update(1)
        return
    bar.n = bar.initial = bar.n + 1
    bar.last_print_n, bar.start_t, bar.last_print_t = bar.n, bar._time(), bar._time()
    bar.set_postfix_str("")


class MetricAccumulator:
    """Average metrics over steps, entry by entry; an entry that is NaN in a step counted nothing in it.

    `state` is for the checkpoint: after a stop a report is the same as without one.
    """

    def __init__(self, state: dict | None = None):
        self._sums = {name: np.array(pair) for name, pair in (state or {}).items()}

    def add(self, metrics: dict) -> None:
        """Add the metrics of a step."""
        for name, value in metrics.items():
            value = np.asarray(value, np.float64)
            counted = np.isfinite(value)
            self._sums[name] = self._sums.get(name, 0.0) + np.stack([np.where(counted, value, 0.0), counted])

    def take(self) -> dict:
        """Return the means since the last call."""
        with np.errstate(invalid="ignore"):
            means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means

    def state(self) -> dict:
        """Return the sums so far as JSON values."""
        return {name: pair.tolist() for name, pair in self._sums.items()}
