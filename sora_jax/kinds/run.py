"""Training a run of any kind in its folder: checks first, then the loop, then what the run leaves."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from sora_jax.config import check, differences, read_json, to_dict, value_at
from sora_jax.errors import Stopped, UserError
from sora_jax.files import as_path, is_empty, write_json
from sora_jax.kinds import kind_of, stored_config
from sora_jax.kinds.begin import begin, save_fixed, saved_groups
from sora_jax.nn import params as param
from sora_jax.parallel import distributed
from sora_jax.parallel.mesh import check_split, make_mesh
from sora_jax.train.adapt import merge, restore_weights
from sora_jax.train.card import write_card
from sora_jax.train.frozen import saved_steps
from sora_jax.train.kind import Inputs, Kind
from sora_jax.train.loop import check_accumulation, fit, log
from sora_jax.train.optim import check_schedule
from sora_jax.train.run_config import RunConfig
from sora_jax.train.run_lock import run_lock
from sora_jax.train.state import MODEL, Group
from sora_jax.train.tracking import check_wandb

# What does not change what the weights mean may change when a run goes on; a kind adds fields of its own.
MAY_CHANGE = ("loop", "feed", "mesh", "optim", "batch", "seed", "init.weights")
DATA = ("latents", "data", "drawn")  # fields that name what a kind of run reads, of which one is given
MUST_STAY = ("optim.method",)  # among those: its state is of no use to another method


def train(config: RunConfig, workdir: Path) -> None:
    """Train what the config says in `workdir`, going on from the newest checkpoint there.

    Raises:
        UserError: the config, the data or the folder does not fit; nothing has been written then.
        Stopped: after an orderly stop.
    """
    with run_lock(workdir):
        try:
            _train(config, as_path(workdir))
            write_card(as_path(workdir))
        except Stopped as stopped:
            write_card(as_path(workdir))
            if not kind_of(config).finish:
                raise
            hint = f"; to use it as it is now: sora-jax train --workdir={workdir} --finish"
            raise Stopped(stopped.step, hint) from None


def finish(config: RunConfig, workdir: Path) -> None:
    """Write what a run leaves at its end by its newest checkpoint, without training; it can still go on.

    Raises:
        UserError: the run is of a kind that leaves nothing, or has no checkpoint.
    """
    workdir, kind = as_path(workdir), kind_of(config)
    if kind.finish is None:
        raise UserError(
            f"--finish is given; --workdir is {str(workdir)!r}, a run of kind {kind.name!r}: there is nothing to "
            "finish, `sora-jax sample` takes any checkpoint"
        )
    with run_lock(workdir):
        check_workdir(workdir, config)
        stages = kind.stages(config, workdir)
        begun = [(folder, stage) for folder, stage in stages if saved_steps(folder)]
        folder, own = begun[-1] if begun else (workdir, config)
        mesh = make_mesh(own.mesh)
        inputs = kind.open(own, folder, mesh)
        check_data(folder, inputs.digest)
        groups = functools.partial(saved_groups, kind)
        params, step = restore_weights(folder, groups, kind.parts(own)[1], mesh)
        kind.finish(own, inputs, params, step, folder)
        if stages and kind.finish_stages and distributed.first():
            kind.finish_stages(workdir, folder)
        distributed.barrier("finished")
    log(f"{kind.name}: {workdir} can be used as it is at step {step}; the ordinary command trains it further")


def _train(config: RunConfig, workdir: Path) -> None:
    kind, mesh = kind_of(config), make_mesh(config.mesh)
    check_wandb(config.loop.wandb)
    for group in kind.groups(config).values():
        param.check_splits(group.specs, mesh)
    for line in check_schedules(kind, config, workdir):
        log(line)
    check_workdir(workdir, config)
    if stages := kind.stages(config, workdir):
        _train_stages(kind, config, workdir, stages)
        return
    log(f"{kind.name}: opening {next((found for name in DATA if (found := getattr(config, name, ''))), 'the data')}")
    inputs = kind.open(config, workdir, mesh)
    check_data(workdir, inputs.digest)
    job = begin(kind, config, kind.job(config, inputs, workdir), workdir, mesh)
    check_accumulation(job, config.loop)
    check_split(mesh, "batch", config.batch // config.loop.accumulate, "config.batch / config.loop.accumulate")
    claim_workdir(workdir, config, inputs)
    if kind.claim and distributed.first():
        kind.claim(config, inputs, workdir)
    if job.note:
        log(job.note)
    save_fixed(job, workdir)
    state = fit(job, config.loop, config.seed, mesh, workdir, to_dict(config), functools.partial(_read_saved, kind))
    if kind.finish:
        params = merge(job.fixed.get(MODEL, {}), state.ema[MODEL][0])
        kind.finish(config, inputs, params, int(state.step), workdir)


def _train_stages(kind: Kind, config: RunConfig, workdir: Path, stages: Sequence[tuple[Path, RunConfig]]) -> None:
    """Train stage after stage, each as a run in a folder of its own."""
    _, first = stages[0]
    inputs = kind.open(first, workdir, make_mesh(config.mesh))  # what it refuses leaves no folder behind
    check_data(workdir, inputs.digest)
    for _, stage in stages:
        if kind.check_stage:
            kind.check_stage(stage, inputs)
    claim_workdir(workdir, config, inputs)
    for folder, stage in stages:
        log(f"{config.kind}: {folder.name} of {len(stages)}")
        train(stage, folder)
    if kind.finish_stages and distributed.first():
        kind.finish_stages(workdir, stages[-1][0])
    distributed.barrier("the last stage")


def check_schedules(kind: Kind, config: RunConfig, workdir: Path) -> list[str]:
    """Return what `check_schedule` says of the groups of a run, or of its stages."""
    lines = [
        check_schedule(group.optim, each.loop.steps, "optim" if name == MODEL else f"{name}_optim")
        for each in [stage for _, stage in kind.stages(config, workdir)] or [config]
        for name, group in kind.groups(each).items()
    ]
    return list(filter(None, lines))


def _read_saved(kind: Kind, values: dict) -> tuple[dict, Mapping[str, Group]]:
    """Read the config that a checkpoint holds, and the groups that it trained."""
    return to_dict(stored_config(values)), saved_groups(kind, values)


def check_workdir(workdir: Path, config: RunConfig) -> None:
    """Raise a UserError unless the folder is empty or missing, or holds a run that can go on with this config."""
    path = as_path(workdir) / "config.json"
    refuse = functools.partial("--workdir is {!r}; {}; take an empty folder{}".format, str(workdir))
    if not path.exists():
        check(is_empty(as_path(workdir)), refuse("it is not empty and holds no run", ""))
        return
    old, new = to_dict(stored_config(read_json(path))), to_dict(config)
    free = (*MAY_CHANGE, *kind_of(config).may_change)
    for field in differences(old, new):
        if _below(field, free) and not _below(field, MUST_STAY):
            continue
        there, here = (value_at(c, field) for c in (old, new))
        way_out = f", and --init-from={workdir} to begin with the weights of this one" if field != "kind" else ""
        raise UserError(
            refuse(f"it holds a run with another config.{field}, {there!r} there and {here!r} here", way_out)
        )


def _below(field: str, names: Sequence[str]) -> bool:
    return any(field == name or field.startswith(f"{name}.") for name in names)


def check_data(workdir: Path, digest: str) -> None:
    """Raise a UserError if the run in the folder was trained on data of another digest.

    A dataset built anew, under the same name, may hold out other clips.
    """
    path = as_path(workdir) / "data.json"
    same = not path.exists() or read_json(path)["digest"] == digest
    check(
        same,
        f"--workdir is {str(workdir)!r}; it has learnt from other clips than are there now; take an empty folder, and "
        f"--init-from={workdir} to begin with the weights of this one",
    )


def claim_workdir(workdir: Path, config: RunConfig, inputs: Inputs) -> None:
    """Write config.json and data.json just before the first step: what was refused leaves no folder behind."""
    distributed.barrier("all have seen the folder as it was")
    if distributed.first():
        write_json(as_path(workdir) / "config.json", to_dict(config))
        data = {"digest": inputs.digest, "text": inputs.text, "clips": dict(inputs.clips)}
        write_json(as_path(workdir) / "data.json", data)
