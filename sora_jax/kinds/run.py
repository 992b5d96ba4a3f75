"""Training a run of any kind in its folder: checks first, then the loop, then what the run leaves."""

import functools
from collections.abc import Sequence
from pathlib import Path

from sora_jax.config import check, first_difference, read_json, to_dict, value_at
from sora_jax.errors import UserError
from sora_jax.files import as_path, is_empty, write_json
from sora_jax.kinds import kind_of, stored_config
from sora_jax.nn import params as param
from sora_jax.parallel import distributed
from sora_jax.parallel.mesh import check_split, make_mesh
from sora_jax.train.kind import Inputs, Kind
from sora_jax.train.loop import check_accumulation, fit, log
from sora_jax.train.run_config import RunConfig

# A run may be made longer or moved to another mesh; a kind adds fields of its own.
MAY_CHANGE = ("loop", "feed", "mesh")


def train(config: RunConfig, workdir: Path) -> None:
    """Train what the config says in `workdir`, going on from the newest checkpoint there.

    Raises:
        UserError: the config, the data or the folder does not fit; nothing has been written then.
        Stopped: after an orderly stop.
    """
    workdir, kind, mesh = as_path(workdir), kind_of(config), make_mesh(config.mesh)
    for group in kind.groups(config).values():
        param.check_splits(group.specs, mesh)
    check_workdir(workdir, config)
    if stages := kind.stages(config, workdir):
        _train_stages(kind, config, workdir, stages)
        return
    inputs = kind.open(config, workdir, mesh)
    check_data(workdir, inputs.digest)
    job = kind.job(config, inputs, workdir)
    check_accumulation(job, config.loop)
    check_split(mesh, "batch", config.batch // config.loop.accumulate, "config.batch / config.loop.accumulate")
    claim_workdir(workdir, config, inputs)
    if kind.claim and distributed.first():
        kind.claim(config, inputs, workdir)
    if job.note:
        log(job.note)
    state = fit(job, config.loop, config.seed, mesh, workdir, to_dict(config))
    if kind.finish:
        kind.finish(config, inputs, state, workdir)


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


def check_workdir(workdir: Path, config: RunConfig) -> None:
    """Raise a UserError unless the folder is empty or missing, or holds a run of this config."""
    path = as_path(workdir) / "config.json"
    refuse = functools.partial("--workdir is {!r}; {}; take an empty folder".format, str(workdir))
    if not path.exists():
        check(is_empty(as_path(workdir)), refuse("it is not empty and holds no run"))
        return
    old, new = to_dict(stored_config(read_json(path))), to_dict(config)
    free = {*MAY_CHANGE, *kind_of(config).may_change}
    old, new = ({name: value for name, value in c.items() if name not in free} for c in (old, new))
    different = first_difference(old, new)
    if different:
        there, here = (value_at(c, different) for c in (old, new))
        raise UserError(refuse(f"it holds a run with another config.{different}, {there!r} there and {here!r} here"))


def check_data(workdir: Path, digest: str) -> None:
    """Raise a UserError if the run in the folder was trained on data of another digest.

    A dataset built anew, under the same name, may hold out other clips.
    """
    path = as_path(workdir) / "data.json"
    same = not path.exists() or read_json(path)["digest"] == digest
    check(
        same, f"--workdir is {str(workdir)!r}; it has learnt from other clips than are there now; take an empty folder"
    )


def claim_workdir(workdir: Path, config: RunConfig, inputs: Inputs) -> None:
    """Write config.json and data.json just before the first step: what was refused leaves no folder behind."""
    distributed.barrier("all have seen the folder as it was")
    if distributed.first():
        write_json(as_path(workdir) / "config.json", to_dict(config))
        write_json(as_path(workdir) / "data.json", {"digest": inputs.digest, "text": inputs.text})
