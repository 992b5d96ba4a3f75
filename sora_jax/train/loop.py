"""The training loop: one page of host code around the pure step."""

import contextlib
import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from sora_jax.config import check
from sora_jax.errors import Stopped, UserError
from sora_jax.parallel import distributed
from sora_jax.parallel.mesh import make_mesh, place_batch
from sora_jax.train.checkpoint import Checkpoints
from sora_jax.train.metrics import MetricsWriter, Stopwatch, flatten
from sora_jax.train.optim import OptimConfig, make_optimizer
from sora_jax.train.state import init_state
from sora_jax.train.step import LossFunction, make_step
from sora_jax.train.watchdog import Watchdog, spent_before

TOTALS = ("skipped_updates",)  # metrics that count since the beginning; of all others a report has means
STOPPING = b"\nsora-jax: stopping after this step, with a save; Ctrl-C again ends at once\n"


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long, and how often what happens; all counted in steps, 0 = never (the last step always saves).

    The newest `keep` checkpoints are kept, and the `keep_best` whose `best_metric`, in the report before, was least.
    """

    steps: int = 1000
    log_every: int = 20
    save_every: int = 500
    preview_every: int = 0
    keep: int = 2
    keep_best: int = 0
    best_metric: str = "loss"
    accumulate: int = 1

    def __post_init__(self):
        check(self.steps > 0, f"loop.steps is {self.steps}; it must be positive")
        for name in ("accumulate", "keep"):
            check(getattr(self, name) > 0, f"loop.{name} is {getattr(self, name)}; it must be positive")
        for name in ("log_every", "save_every", "preview_every"):
            check(getattr(self, name) >= 0, f"loop.{name} is {getattr(self, name)}; 0 (never) or a number of steps")
        check(self.keep_best >= 0, f"loop.keep_best is {self.keep_best}; 0 (none) or a number of checkpoints")
        check(
            not self.keep_best or self.log_every > 0,
            f"loop.keep_best is {self.keep_best}; the best are known by reports, so loop.log_every must be positive",
        )


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run trains, as functions; the loop knows nothing else of it.

    specs: the parameters. loss: see `make_step`. batches(step, position): host batches from a step on, pure in
    (seed, step), every array with the batch as its first axis; each comes with its position, JSON that is kept with
    the checkpoint and finds the next one faster (None: no hint). to_device: a dict of placed arrays -> what `loss`
    takes.
    counts(batch): what to add up for the report ("clips", "tokens", "places", "flops"). clip_ids(batch): for the
    message when a loss is not finite. preview(step, ema_params, writer): looks at the model now and then.
    note: what to print before the first step. shares: into how many the processes cut a batch, see `share_of_batch`;
    `batches`, `counts` and `clip_ids` are of this process's share.
    """

    name: str
    specs: dict
    loss: LossFunction
    batches: Callable[[int, object], Iterator[tuple[dict, object]]]
    to_device: Callable[[dict], object]
    counts: Callable[[dict], dict[str, float]]
    clip_ids: Callable[[dict], list]
    preview: Callable[[int, dict, MetricsWriter], None] | None = None
    note: str = ""
    shares: int = 1


def fit(job: Job, config: LoopConfig, optim: OptimConfig, seed: int, mesh: Mesh, workdir: Path, run: dict):
    """Trains to `config.steps`, from the newest checkpoint in `workdir` if there is one; returns the TrainState.

    `run` (the plain config) is stored in each checkpoint. Raises Stopped after an orderly stop, UserError when a
    step is not finite. Order inside a step: fetch, dispatch, read the step before, save, preview.
    """
    watch = Stopwatch()
    optimizer = make_optimizer(dataclasses.replace(optim, decay_steps=optim.decay_steps or config.steps))
    with contextlib.ExitStack() as stack:
        stack.enter_context(distributed.peers())
        stack.enter_context(jax.set_mesh(mesh))
        checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints", config.keep, config.keep_best))
        stop = stack.enter_context(stop_signal())
        with watch("init"):
            state = init_state(job.specs, optimizer, len(optim.ema), seed, mesh)
            saved = {}
            if checkpoints.latest() is not None:
                state, saved = checkpoints.restore(state)
        start = int(state.step)
        if start >= config.steps:
            log(f"{job.name}: already at step {start} of {config.steps}")
            return state
        if start:
            log(f"{job.name}: goes on from step {start} of {config.steps}")
        watch.add(spent_before(workdir, start, saved.get("seconds", {})))
        writer = stack.enter_context(MetricsWriter(workdir, start)) if distributed.first() else None
        bar = stack.enter_context(_bar(job.name, start, config.steps))
        dog = stack.enter_context(Watchdog(watch, workdir if distributed.first() else None, start))
        reporter = Reporter(
            job, writer, bar, watch, config, MetricAccumulator(saved.get("means")), dog.stepped, checkpoints.latest
        )
        step_function = make_step(job.loss, optimizer, optim.ema, optim.ema_warmup)
        batches = job.batches(start, saved.get("position"))
        for step in range(start + 1, config.steps + 1):
            with watch("data"):
                batch, position = next(batches)
                placed = job.to_device(place_batch(split_batch(batch, config.accumulate), mesh, leading=1))
            with watch("step" if step > start + 1 else "compile"):
                with jax.transfer_guard("disallow"):
                    state, metrics = step_function(state, placed)
                reporter.read_previous()
            reporter.hold(step, metrics, batch)
            stopping = stop(step)  # asked once: a signal that comes after this line waits for the next step's save
            saving = stopping or due(step, config.save_every, config.steps)
            previewing = job.preview and due(step, config.preview_every, config.steps)
            if saving or previewing:
                with watch("step"):  # what is waited for here is the step, not the save
                    reporter.read_previous()
            if saving:
                with watch("save"):
                    means = reporter.means.state()
                    notes = {"config": run, "step": step, "seed": seed, "means": means, "position": position}
                    notes["seconds"] = watch.now()
                    if writer:
                        writer.keep_rows()
                    checkpoints.save(step, state, notes, reporter.best_metric)
                    if writer:
                        writer.keep()
            if previewing:
                with watch("evaluate"):
                    _preview(job, step, state.ema[0], writer)
            if stopping:
                break
        with watch("save"):
            checkpoints.wait()
        distributed.barrier("the end of the run")  # a process that leaves early is taken for dead
        bar.close()  # else the line that follows is glued to it
        log(f"{job.name}: step {step} of {config.steps}; {watch}")
    if stopping:
        raise Stopped(step)
    return state


def log(text: str) -> None:
    """Prints it, once for all processes."""
    if distributed.first():
        print(text, flush=True)


def _preview(job: Job, step: int, params: dict, writer: MetricsWriter | None) -> None:
    """Several processes gather the parameters, and the first alone looks at the model, on its own devices."""
    params = distributed.on_host(params) if distributed.several() else params
    if distributed.first():
        with jax.set_mesh(make_mesh(devices=jax.sharding.get_mesh().local_devices)):
            job.preview(step, params, writer)


def _bar(name: str, start: int, steps: int) -> tqdm:
    look = dict(unit="step", dynamic_ncols=True, smoothing=0.05, disable=not distributed.first())
    return tqdm(total=steps, initial=start, desc=name, **look)


def due(step: int, every: int, last: int) -> bool:
    """Whether something done every so many steps, and at the last one, is to be done now."""
    return step == last or (every > 0 and step % every == 0)


def split_batch(batch: dict, parts: int) -> dict:
    """Cuts the first axis into micro-batches: (A * B, ...) -> (A, B, ...)."""
    return {name: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]) for name, x in batch.items()}


class Reporter:
    """Reads each step's metrics only after the next step has been dispatched, and reports every `log_every` steps.

    A report holds means over the steps since the last one. The first step, which compiles, counts in no rate, and
    neither does the time of previews and saves.
    """

    def __init__(
        self,
        job: Job,
        writer: MetricsWriter | None,
        bar: tqdm,
        watch: Stopwatch,
        config: LoopConfig,
        means: "Means",
        stepped: Callable[[int], None],
        newest_save: Callable[[], int | None],
    ):
        self._job, self._writer, self._bar, self._watch, self._config = job, writer, bar, watch, config
        self._stepped, self._newest_save, self._totals = stepped, newest_save, {}
        self._held = None
        self.means = means
        self._counts: dict[str, float] = {}
        self._since: float | None = None
        self.best_metric: float | None = None

    def hold(self, step: int, metrics: dict, batch: dict) -> None:
        self._held = (step, metrics, batch)

    def read_previous(self) -> None:
        """Waits for the held step, checks that it is finite, and writes a report if one is due."""
        if self._held is None:
            return
        (step, metrics, batch), self._held = self._held, None
        metrics = jax.device_get(metrics)
        self._stepped(step)
        self._check_finite(step, metrics, batch)
        self._bar.update(1)
        self._totals = {name: metrics.pop(name) for name in TOTALS if name in metrics}
        self.means.add(metrics)
        counts = self._job.counts(batch)
        if self._since is None:
            self._since = self._clock()
        else:
            self._counts = {name: self._counts.get(name, 0) + value for name, value in counts.items()}
        if self._config.log_every and due(step, self._config.log_every, self._config.steps):
            self._report(step)

    def _check_finite(self, step: int, metrics: dict, batch: dict) -> None:
        # A loss may be finite where its gradient is not; the norm shows that the update spoilt the parameters.
        for name in ("loss", "parameter_norm"):
            if not math.isfinite(metrics[name]):
                save = self._newest_save()
                raise UserError(
                    f"the {name.replace('_', ' ')} of step {step} is {metrics[name]}; clips of that batch: "
                    f"{self._job.clip_ids(batch)}; "
                    f"{'there is no checkpoint yet' if save is None else f'the last good checkpoint is of step {save}'}"
                )

    def _report(self, step: int) -> None:
        metrics = self.means.take()
        seconds = self._clock() - self._since
        counts, again = distributed.total(self._counts), jax.process_count() / self._job.shares
        rates = {f"{name}_per_second": n / again / seconds for name, n in counts.items() if name != "places"}
        if "places" in counts:
            rates["padding_share"] = 1 - counts["tokens"] / counts["places"]
        spent = {f"seconds/{cause}": value for cause, value in self._watch.seconds.items()}
        if self._writer:
            self._writer.write(step, metrics | self._totals | rates | spent)
        if self._config.keep_best:
            name = self._config.best_metric
            known = flatten(metrics)
            check(name in known, f"loop.best_metric is {name!r}; this run reports {', '.join(known)}")
            self.best_metric = known[name]
        self._bar.set_postfix_str(f"loss {metrics['loss']:.4f}")
        self._counts, self._since = {}, self._clock()

    def _clock(self) -> float:
        """Seconds that pass while steps are made; stands still during previews and saves."""
        paused = sum(self._watch.seconds.get(cause, 0.0) for cause in ("evaluate", "save"))
        return time.perf_counter() - paused


class MetricAccumulator:
    """Means of metrics over steps, entry by entry; an entry that is NaN in a step counted nothing in it.

    `state` is for the checkpoint: after a stop a report is the same as without one.
    """

    def __init__(self, state: dict | None = None):
        self._sums = {name: np.array(pair) for name, pair in (state or {}).items()}

    def add(self, metrics: dict) -> None:
        for name, value in metrics.items():
            value = np.asarray(value, np.float64)
            counted = np.isfinite(value)
            self._sums[name] = self._sums.get(name, 0.0) + np.stack([np.where(counted, value, 0.0), counted])

    def take(self) -> dict:
        """The means since the last call."""
        with np.errstate(invalid="ignore"):
            means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means

    def state(self) -> dict:
        return {name: pair.tolist() for name, pair in self._sums.items()}


@contextlib.contextmanager
def stop_signal():
    """Yields stop(step): whether to stop after it, because SIGINT or SIGTERM came; a second Ctrl-C interrupts at once.

    Several processes agree on the step, whichever of them was sent the signal.
    """
    asked = []
    previous = {}

    def handle(number, _frame):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        os.write(2, STOPPING)  # not print: the handler may have cut into a write to the same stream
        if distributed.several():
            os.kill(os.getpid(), signal.SIGTERM)  # which JAX tells the other processes

    # With several processes JAX has its own handler for SIGTERM.
    numbers = (signal.SIGINT,) if distributed.several() else (signal.SIGINT, signal.SIGTERM)
    with contextlib.suppress(ValueError):  # not in the main thread (a notebook's helper): no handlers there
        previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield distributed.stop_agreed if distributed.several() else lambda step: bool(asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
