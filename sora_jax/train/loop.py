"""The training loop: one page of host code around the pure step."""

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from sora_jax import console
from sora_jax.config import check
from sora_jax.data.shard_spec import ShardSpec
from sora_jax.errors import Stopped
from sora_jax.parallel import distributed
from sora_jax.parallel.mesh import make_mesh, place_batch
from sora_jax.train import provenance
from sora_jax.train.adapt import merge
from sora_jax.train.checkpoint import Checkpoints
from sora_jax.train.history import record_config
from sora_jax.train.metrics import MetricsWriter, Stopwatch
from sora_jax.train.reporter import Instruments, MetricAccumulator, Reporter, due
from sora_jax.train.resume import ReadSaved, resume
from sora_jax.train.state import Group, TrainState, init_state, make_optimizers, start_from
from sora_jax.train.step import LossFunction, make_step
from sora_jax.train.tracking import Wandb
from sora_jax.train.watchdog import Watchdog, spent_before

Preview = Callable[[int, dict, MetricsWriter], None]  # (step, averages by group, writer)
STOPPING = b"\nsora-jax: stopping after this step, with a save; Ctrl-C again ends at once\n"


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Configure how long a run is and how often what happens; all counted in steps, 0 = never."""

    steps: int = 1000  # length of the run
    log_every: int = 20  # steps between reports
    save_every: int = 500  # steps between checkpoints; the last step is always saved
    preview_every: int = 0  # steps between previews; the last step always has one, if the run has any
    keep: int = 2  # newest checkpoints that are kept
    keep_best: int = 0  # checkpoints that are kept beside them, those with the smallest `best_metric`
    best_metric: str = "loss"  # a metric of the report before the checkpoint
    accumulate: int = 1  # micro-batches in a step, whose gradients are accumulated
    wandb: str = ""  # project of Weights & Biases that the run reports to, too; "": none

    def __post_init__(self):
        check(self.steps > 0, f"loop.steps is {self.steps}; it must be positive")
        for name in ("accumulate", "keep"):
            check(getattr(self, name) > 0, f"loop.{name} is {getattr(self, name)}; it must be positive")
        for name in ("log_every", "save_every", "preview_every"):
            value = getattr(self, name)
            check(value >= 0, f"loop.{name} is {value}; it must be 0 (never) or a number of steps")
        check(
            self.keep_best >= 0,
            f"loop.keep_best is {self.keep_best}; it must be 0 (none) or a number of checkpoints",
        )
        check(
            not self.keep_best or self.log_every > 0,
            f"loop.keep_best is {self.keep_best}; the best are known by reports, so loop.log_every must be positive",
        )


class Measure(NamedTuple):
    """Measure held-out clips every so many steps and after the last one (0: after the last alone).

    function(step, averages by group): returns metrics, the same in all processes. local: each process calls it for
    itself, on its own devices, with parameters that are gathered; otherwise all call it together on the mesh.
    """

    every: int
    function: Callable[[int, dict], dict]
    local: bool = False


@dataclasses.dataclass(frozen=True)
class Job:
    """Tell the loop what a run trains, as values and functions; it knows nothing else of the run.

    groups: what is trained, by name. loss: see `make_step`. batches(step, position): host batches from a step on, pure
    in (seed, step), every array with the batch as its first axis; each comes with its position, JSON that is kept with
    the checkpoint and finds the next one faster (None: no hint). to_device: a dict of placed arrays -> what `loss`
    takes. counts(batch): what to add up for the report ("clips", "tokens", "capacity", "flops"). clip_ids(batch): for
    the message when a loss is not finite. preview(step, averages, writer): looks at the model now and then; averages:
    of each group the tree of its first decay. note: what to print before the first step. share: this process's part of
    a batch; `batches`, `counts` and `clip_ids` are of this part. frozen: weights that the loss reads and nothing
    trains; those that are not on the mesh yet are copied to each of its devices. micro_batches: False for a loss that
    is no sum over parts of a batch, such as a contrastive one. start(params): parameters, by group, to begin a new run
    with in place of the random ones; of those groups that it returns. fixed: parameters of groups that are not trained,
    see `train.adapt`; the loss and previews get them merged with those that are. epoch: steps in which all clips are
    seen once; 0 where that is not known.
    """

    name: str
    groups: Mapping[str, Group]
    loss: LossFunction
    batches: Callable[[int, Any], Iterator[tuple[dict, Any]]]
    to_device: Callable[[dict], Any]
    counts: Callable[[dict], dict[str, float]]
    clip_ids: Callable[[dict], list]
    preview: Preview | None = None
    measure: Measure | None = None
    note: str = ""
    share: ShardSpec = ShardSpec()
    frozen: Any = ()
    micro_batches: bool = True
    start: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    fixed: Mapping[str, dict] = dataclasses.field(default_factory=dict)
    epoch: float = 0.0


def fit(
    job: Job,
    config: LoopConfig,
    seed: int,
    mesh: Mesh,
    workdir: Path,
    run: dict,
    read_saved: ReadSaved | None = None,
) -> TrainState:
    """Train to `config.steps`, from the newest checkpoint in `workdir` if there is one; return the last state.

    `run` (the config as a dict) is stored in each checkpoint. read_saved: see `resume`; None where a checkpoint is of
    the same config. Order inside a step: fetch, dispatch, read the metrics of the step before, save, preview.

    Raises:
        Stopped: after an orderly stop.
        UserError: a step is not finite, or the config asks for what the job forbids.
    """
    check_accumulation(job, config)
    watch = Stopwatch()
    optimizers = make_optimizers(job.groups, config.steps)
    with contextlib.ExitStack() as stack:
        stack.enter_context(distributed.peers())
        stack.enter_context(jax.set_mesh(mesh))
        checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints", config.keep, config.keep_best))
        stop = stack.enter_context(stop_signal())
        with watch("init"):
            state = init_state(job.groups, optimizers, seed, mesh)
            saved: dict = {}
            changes, old = "", None
            if checkpoints.latest() is not None:
                state, saved, changes, old = resume(checkpoints, state, optimizers, run, read_saved)
            elif job.start:
                state = start_from(state, job.start(state.params))
        start = int(state.step)
        if distributed.first():
            record_config(workdir, start, run, old)
        if start >= config.steps:
            where = f"of {config.steps}" if start == config.steps else f"beyond config.loop.steps = {config.steps}"
            log(f"{job.name}: already at step {start} {where}{changes and '; with '}{changes}")
            return state
        if start:
            log(f"{job.name}: goes on from step {start} of {config.steps}{changes and ' with '}{changes}")
        watch.add(spent_before(workdir, start, saved.get("seconds", {})))
        record = provenance.start(workdir, start, {"kind": job.name, "parameters": _count(state, job.fixed)})
        writer = None
        if distributed.first():
            tracker = Wandb(config.wandb, workdir, run) if config.wandb else None
            writer = stack.enter_context(MetricsWriter(workdir, start, tracker))
        bar = stack.enter_context(_bar(job.name, start, config.steps))
        dog = stack.enter_context(Watchdog(watch, workdir if distributed.first() else None, start))
        instruments = Instruments(writer, bar, watch, dog.stepped, checkpoints.latest)
        rates = {name: optimizer.rate for name, optimizer in optimizers.items()}
        reporter = Reporter(job, config, instruments, MetricAccumulator(saved.get("means")), rates)
        step_function = make_step(with_fixed(job.loss), optimizers)
        frozen = _on_mesh((job.fixed, job.frozen), mesh)
        batches = job.batches(start, saved.get("position"))
        for step in range(start + 1, config.steps + 1):
            with watch("data"):
                batch, position = next(batches)
                placed = job.to_device(place_batch(split_batch(batch, config.accumulate), mesh, leading=1))
            with watch("step" if step > start + 1 else "compile"):
                with _transfer_guard():
                    state, metrics = step_function(state, frozen, placed)
                reporter.read_previous()
            reporter.hold(step, metrics, batch)
            stopping = stop(step)  # asked once: a signal that comes after this line waits for the next step's save
            saving = stopping or due(step, config.save_every, config.steps)
            preview = job.preview if due(step, config.preview_every, config.steps) else None
            measure = job.measure if job.measure and due(step, job.measure.every, config.steps) else None
            if saving or preview or measure:
                with watch("step"):  # what is waited for here is the step, not the save
                    jax.block_until_ready(metrics)
                averages = {name: averages[0] for name, averages in state.ema.items()}
                measured = None
                if measure:
                    with watch("evaluate"), _aside(bar):
                        measured = _measure(measure, step, merge(frozen[0], averages))
                with watch("step"):
                    reporter.read_previous(measured)
            if saving:
                with watch("save"), _aside(bar):
                    notes = {"config": run, "step": step, "seed": seed, "position": position}
                    _save(checkpoints, state, notes, reporter)
                    if record:
                        record.reached(step)
            if preview:
                with watch("evaluate"), _aside(bar):
                    _preview(preview, step, merge(frozen[0], averages), writer)
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


def with_fixed(loss: LossFunction) -> LossFunction:
    """Return the loss as a function of what is trained, whose frozen weights are (fixed parameters, frozen)."""
    return lambda params, frozen, batch, step, part: loss(merge(frozen[0], params), frozen[1], batch, step, part)


def _transfer_guard() -> contextlib.AbstractContextManager:
    """Forbid transfers that nothing asked for, unless JAX's own debugging, which makes some, is switched on."""
    switches = ("jax_debug_nans", "jax_debug_infs", "jax_disable_jit")
    debugging = any(getattr(jax.config, name) for name in switches)
    return contextlib.nullcontext() if debugging else jax.transfer_guard("disallow")


def _on_mesh(tree: Any, mesh: Mesh) -> Any:
    """Copy arrays that are not on the mesh yet to each of its devices."""

    def one(x: Any) -> jax.Array:
        there = isinstance(x, jax.Array) and getattr(x.sharding, "mesh", None) == mesh
        return x if there else jax.device_put(x, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(one, tree)


def check_accumulation(job: Job, config: LoopConfig) -> None:
    """Raise a UserError where gradients would be accumulated and the job forbids it."""
    check(
        job.micro_batches or config.accumulate == 1,
        f"loop.accumulate is {config.accumulate}; the loss of this kind of run needs whole batches: it must be 1",
    )


def log(text: str) -> None:
    """Print a line, once for all processes."""
    if distributed.first():
        console.log(text)


def _save(checkpoints: Checkpoints, state: TrainState, notes: dict, reporter: Reporter) -> None:
    """Save a checkpoint, with the reports up to it before and the event files after."""
    writer, watch = reporter.instruments.writer, reporter.instruments.watch
    notes |= {"means": reporter.means.state(), "seconds": watch.now()}
    if writer:
        writer.flush_rows()
    checkpoints.save(notes["step"], state, notes, reporter.best_metric)
    if writer:
        writer.flush()


def _measure(measure: Measure, step: int, averages: dict) -> dict:
    """Measure held-out clips."""
    return _locally(measure.function, step, averages) if measure.local else measure.function(step, averages)


def _preview(preview: Preview, step: int, averages: dict, writer: MetricsWriter | None) -> None:
    """Look at the model, in the first process, which has a writer."""
    _locally(lambda step, averages: preview(step, averages, writer) if writer else None, step, averages)


def _locally(function: Callable[[int, dict], Any], step: int, averages: dict) -> Any:
    """Call a function on the devices of this process, with parameters that several processes gather."""
    averages = distributed.on_host(averages) if distributed.several() else averages
    with jax.set_mesh(make_mesh(devices=jax.sharding.get_mesh().local_devices)):
        return function(step, averages)


def _count(state: TrainState, fixed: Mapping[str, dict]) -> dict[str, int]:
    """Count the parameters of the model that are trained, and that are fixed."""
    trees = {"trained": state.params[next(iter(state.params))], "fixed": dict(fixed)}
    return {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in trees.items()}


@contextlib.contextmanager
def _aside(bar: tqdm) -> Iterator[None]:
    """Leave the seconds of a block out of the rate of the bar, which says what time is left."""
    start = time.time()
    try:
        yield
    finally:
        if not bar.disable:
            bar.last_print_t += time.time() - start


def _bar(name: str, start: int, steps: int) -> tqdm:
    look: dict[str, Any] = dict(unit="step", smoothing=0.05, disable=not distributed.first())
    return console.progress(total=steps, initial=start, desc=name, postfix="compiling the step", **look)


def split_batch(batch: dict[str, np.ndarray], parts: int) -> dict[str, np.ndarray]:
    """Cut the first axis into micro-batches: (A * B, ...) -> (A, B, ...)."""
    return {name: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]) for name, x in batch.items()}


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[int], bool]]:
    """Yield stop(step), True if SIGINT or SIGTERM asked to stop after it; a second Ctrl-C interrupts at once.

    Several processes agree on the step, whichever of them was sent the signal.
    """
    asked: list[int] = []
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
