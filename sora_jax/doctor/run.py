"""Examine a run folder: its files, checkpoints, weights, reports, data, packs and gradients."""

import contextlib
import dataclasses
import functools
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from sora_jax.config import check, read_json
from sora_jax.data.packing.advice import POOR
from sora_jax.data.storing.manifest import evenly_spread
from sora_jax.doctor.finding import ERROR, OK, WARNING, Finding, guarded
from sora_jax.files import as_path
from sora_jax.kinds import kind_of, stored_config
from sora_jax.kinds.begin import saved_groups
from sora_jax.kinds.dry_run import first_job
from sora_jax.nn.finite import named, not_finite
from sora_jax.parallel.mesh import mesh_here, place_batch
from sora_jax.train.checkpoint import Checkpoints
from sora_jax.train.denoiser import DenoiserRun, open_latents
from sora_jax.train.exported import no_run
from sora_jax.train.frozen import load_autoencoder, missing_autoencoder, recorded_fingerprint, saved_steps
from sora_jax.train.loop import Job, split_batch, with_fixed
from sora_jax.train.metrics import read_metrics
from sora_jax.train.run_config import RunConfig
from sora_jax.train.run_lock import holder
from sora_jax.train.state import TrainState, abstract_state, make_optimizers
from sora_jax.train.step import gradients

RECENT = 0.1  # share of the reports at the end, and at the beginning, that are compared
OVERFITTED = 1.3  # held-out loss over training loss
RISEN = 1.05  # held-out loss over its smallest value
BATCHES = 4  # whose padding is counted
LATENTS, ROUND_TRIPS = 64, 4  # clips whose latents are measured; that are decoded and encoded again
FAR_MEAN, FAR_STD = 0.5, 2.0  # of latents, which are normalised
ROUND_TRIP_ERROR = 0.7  # of latents that are decoded and encoded again, over their deviation
FAR_GRADIENT = 1e4  # times above or below the median of gradient norm over parameter norm


@dataclasses.dataclass
class Patient:
    """Hold what is known of a run: its folder (of the newest stage, of a run with stages), config and mesh."""

    folder: Path
    config: RunConfig
    mesh: Mesh
    state: TrainState | None = None  # of the newest whole checkpoint
    job: Job | None = None


def examine_run(folder: Path) -> Iterator[Finding]:
    """Yield the findings of a run folder; UserError if it is none."""
    path = as_path(folder)
    there = (path / "config.json").exists()
    check(there, no_run("RUN", folder))
    found = _opened(path)
    if isinstance(found, Finding):
        yield found
        return
    yield Finding(
        OK, "config", f"a run of kind {found.config.kind!r}" + f", {found.folder.name}" * (found.folder != path)
    )
    checks = {"lock": _lock, "step": _step, "checkpoints": _checkpoints, "weights": _weights, "loss": _loss}
    checks |= {"held out": _held_out, "autoencoder": _autoencoder, "data": _data, "latents": _latents}
    checks |= {"packs": _packs, "gradients": _gradients}
    with jax.set_mesh(found.mesh):
        for topic, examine in checks.items():
            yield from guarded(topic, functools.partial(examine, found))


def _opened(path: Path) -> Patient | Finding:
    try:
        config = stored_config(read_json(path / "config.json"))
        stages = [stage for stage in kind_of(config).stages(config, path) if saved_steps(stage[0])]
    except Exception as error:
        return Finding(ERROR, "config", f"config.json cannot be read: {error}")
    folder, config = stages[-1] if stages else (path, config)
    return Patient(folder, config, mesh_here(config.mesh))


def _lock(run: Patient) -> Iterator[Finding]:
    who, lives = holder(run.folder)
    if who and lives:
        yield Finding(OK, "lock", f"{who} trains in it since {who.since}")
    elif who:
        yield Finding(OK, "lock", f"left by {who}, which has ended; the next start takes it over")
    else:
        yield Finding(OK, "lock", "no process trains in it")


def _step(run: Patient) -> Iterator[Finding]:
    saved, last = saved_steps(run.folder), run.config.loop.steps
    if not saved:
        yield Finding(ERROR, "step", f"there is no checkpoint yet: sora-jax train --workdir={run.folder}")
    elif saved[-1] < last:
        text = f"step {saved[-1]:,} of {last:,}: sora-jax train --workdir={run.folder} goes on"
        yield Finding(OK, "step", text)
    else:
        yield Finding(OK, "step", f"step {saved[-1]:,} of {last:,}: the training is complete")


def _checkpoints(run: Patient) -> Iterator[Finding]:
    """Read every checkpoint, compare its arrays with the digests that were saved, and keep the newest whole one."""
    kind = kind_of(run.config)

    def structure(notes: dict) -> TrainState:
        groups = saved_groups(kind, notes["config"])
        return abstract_state(groups, make_optimizers(groups, notes["config"]["loop"]["steps"]), run.mesh)

    whole = []
    with Checkpoints(run.folder / "checkpoints") as checkpoints:
        for step in checkpoints.candidates():
            state, reason = checkpoints.examine(step, structure)
            if reason:
                mend = "the next start of `train` uses another and trains these steps again"
                yield Finding(ERROR, "checkpoints", f"checkpoint {step} is damaged ({reason}); {mend}")
            else:
                whole.append(step)
                run.state = run.state or state
    if whole:
        text = f"{len(whole)} whole: {', '.join(f'step {step:,}' for step in sorted(whole))}"
        yield Finding(OK, "checkpoints", text)


def _weights(run: Patient) -> Iterator[Finding]:
    if run.state is None:
        return
    parts = {"parameters": run.state.params, "averages": run.state.ema, "optimizer": run.state.opt_state}
    bad = {name: found for name, tree in parts.items() if (found := not_finite(tree))}
    for name, paths in bad.items():
        mend = "resume from an older checkpoint: move the newest away, and give a smaller --config.optim.learning_rate"
        yield Finding(ERROR, "weights", f"{name} are not finite, in {named(paths)}; {mend}")
    if not bad:
        yield Finding(OK, "weights", f"{', '.join(parts)} of step {int(run.state.step):,} are finite")


def _loss(run: Patient) -> Iterator[Finding]:
    rows = [row for row in read_metrics(run.folder) if "loss" in row]
    if not rows:
        yield Finding(WARNING, "loss", "nothing is reported yet; set --config.loop.log_every")
        return
    if lost := [row["step"] for row in rows if row["loss"] is None]:
        yield Finding(WARNING, "loss", f"the loss was not finite at {len(lost)} reports, first at step {lost[0]:,}")
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    count = max(1, round(RECENT * len(losses)))
    first, last = np.mean(losses[:count]), np.mean(losses[-count:])
    if len(losses) < 2 / RECENT:
        yield Finding(OK, "loss", f"{last:.4g}; {len(losses)} reports are too few to say if it falls")
    elif last < first:
        yield Finding(OK, "loss", f"it fell from {first:.4g} to {last:.4g}")
    else:
        mend = "look at the gradients below, and try another --config.optim.learning_rate"
        yield Finding(WARNING, "loss", f"it did not fall: {first:.4g} at the beginning, {last:.4g} now; {mend}")


def _held_out(run: Patient) -> Iterator[Finding]:
    rows = read_metrics(run.folder)
    found = [(row["held_out/loss"], row["step"]) for row in rows if row.get("held_out/loss") is not None]
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    if not found or not losses:
        return
    (last, _), (best, step) = found[-1], min(found)
    train = float(np.mean(losses[-max(1, round(RECENT * len(losses))) :]))
    mend = (
        "more data, fewer steps, a smaller model, or --config.loop.keep_best=1 --config.loop.best_metric=held_out/loss"
    )
    if last > RISEN * best:
        text = f"it rises: {last:.4g}, from {best:.4g} at step {step:,}: the run overfits; {mend}"
        yield Finding(WARNING, "held out", text)
    elif last > OVERFITTED * train:
        text = f"the loss of held-out clips is {last:.4g}, that of training {train:.4g}: the run overfits; {mend}"
        yield Finding(WARNING, "held out", text)
    else:
        yield Finding(OK, "held out", f"the loss of held-out clips is {last:.4g}, that of training {train:.4g}")


def _autoencoder(run: Patient) -> Iterator[Finding]:
    fingerprint = recorded_fingerprint(run.folder)
    if fingerprint is None:
        yield Finding(WARNING, "autoencoder", missing_autoencoder(run.folder, "RUN"))
        return
    load_autoencoder(run.folder)
    yield Finding(OK, "autoencoder", f"it is whole, with the fingerprint {fingerprint[:12]}")


def _data(run: Patient) -> Iterator[Finding]:
    """Open the data as training does, and make its job."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        first_job(kind_of(run.config), run.config, run.folder, run.mesh) as (job, _),
    ):
        run.job = job
        batches = list(itertools.islice((batch for batch, _ in job.batches(0, None)), BATCHES))
    run.job = dataclasses.replace(job, batches=lambda start, position: ((batch, None) for batch in batches))
    epochs = f"; the run has {run.config.loop.steps / job.epoch:,.1f} epochs" if job.epoch else ""
    yield Finding(OK, "data", f"they are those that the run began with{epochs}")


def _latents(run: Patient) -> Iterator[Finding]:
    """Look at the statistics of latents, and decode some and encode them again."""
    if not isinstance(run.config, DenoiserRun) or run.job is None:
        return
    cache, autoencoder = open_latents(run.config), load_autoencoder(run.config.first_stage)
    indices = evenly_spread(range(len(cache)), LATENTS)
    values = np.concatenate([np.asarray(cache[i], np.float32).reshape(-1, cache.info.latent_channels) for i in indices])
    mean, std = np.abs(values.mean(0)).max(), values.std(0)
    normal = mean < FAR_MEAN and 1 / FAR_STD < std.min() and std.max() < FAR_STD
    text = f"channels have means up to {mean:.2f} and deviations of {std.min():.2f} to {std.max():.2f}"
    mend = "; they should be near 0 and 1: encode the data again, with an autoencoder that was trained on such clips"
    yield Finding(OK if normal else WARNING, "latents", text + mend * (not normal))
    some = [
        np.asarray(cache[i], np.float32) for i in sorted(indices, key=lambda i: cache.grids[i].prod())[:ROUND_TRIPS]
    ]
    again = autoencoder.encode(autoencoder.decode(some, 1), 1)
    errors = [np.sqrt(np.square(a - b).mean() / b.var()) for a, b in zip(again, some, strict=True)]
    near = max(errors) < ROUND_TRIP_ERROR
    text = f"decoded and encoded again they come back within {max(errors):.2f} of their deviation"
    mend = ": the autoencoder does not know such clips; train it further, or on these"
    yield Finding(OK if near else WARNING, "latents", text + mend * (not near))


def _packs(run: Patient) -> Iterator[Finding]:
    if run.job is None:
        return
    counts = [run.job.counts(batch) for batch, _ in run.job.batches(0, None)]
    if "capacity" not in counts[0]:
        return
    padding = 1 - sum(each["tokens"] for each in counts) / sum(each["capacity"] for each in counts)
    advice = next((line for line in run.job.note.splitlines() if line.startswith("padding ")), "")
    text = f"padding is {padding:.0%} of the tokens of {len(counts)} batches"
    yield Finding(WARNING if padding > POOR else OK, "packs", text + f": {advice}" * bool(padding > POOR and advice))


def _gradients(run: Patient) -> Iterator[Finding]:
    """Compute the gradients of the first batch, and compare the norms of the parts of the network."""
    if run.job is None or run.state is None:
        return
    job, state = run.job, run.state
    batch, _ = next(job.batches(0, None))
    placed = job.to_device(place_batch(split_batch(batch, 1), run.mesh, leading=1))
    loss = with_fixed(job.loss)

    def norms(params: dict, frozen: Any, batch: Any, step: jax.Array) -> Any:
        one = jax.tree.map(lambda x: x[0], batch)
        found, _, weights, _ = gradients(loss, params, frozen, one, step, jnp.int32(0))
        return {
            group: {
                name: (optax.tree.norm(tree) / jnp.maximum(weights[group], 1e-9), optax.tree.norm(params[group][name]))
                for name, tree in found[group].items()
            }
            for group in found
            if params[group]
        }

    frozen = jax.device_put((job.fixed, job.frozen))
    found = jax.device_get(jax.jit(norms)(state.params, frozen, placed, state.step))
    parts = {
        name if len(found) == 1 else f"{group}/{name}": x for group, own in found.items() for name, x in own.items()
    }
    yield from _judged({name: (float(gradient), float(size)) for name, (gradient, size) in parts.items()})


def _judged(parts: dict[str, tuple[float, float]]) -> Iterator[Finding]:
    """Judge (gradient norm, parameter norm) by part of the network."""
    bad = [name for name, (gradient, _) in parts.items() if not np.isfinite(gradient)]
    dead = [name for name, (gradient, _) in parts.items() if gradient == 0]
    ratios = {n: g / max(p, 1e-9) for n, (g, p) in parts.items() if n not in (*bad, *dead)}
    middle = float(np.median(list(ratios.values()))) if ratios else 0.0
    far = [name for name, ratio in ratios.items() if not 1 / FAR_GRADIENT < ratio / middle < FAR_GRADIENT]
    for level, names, text in (
        (
            ERROR,
            bad,
            "the gradient is not finite: give a smaller --config.optim.learning_rate",
        ),
        (WARNING, dead, "the gradient is 0: these parameters do not learn"),
        (WARNING, far, f"the gradient is {FAR_GRADIENT:.0e} times off that of the others, by the size of parameters"),
    ):
        if names:
            yield Finding(level, "gradients", f"{', '.join(names)}: {text}")
    if not bad and not dead and not far:
        shown = ", ".join(f"{name} {gradient:.2g}" for name, (gradient, _) in parts.items())
        yield Finding(OK, "gradients", f"all are alive; their norms: {shown}")
