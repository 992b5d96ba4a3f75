"""Say what a run would be, after the checks that training makes, without a step and without a file."""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from sora_jax.config import to_dict
from sora_jax.data.feeding.feed import FeedConfig
from sora_jax.kinds import kind_of
from sora_jax.kinds.begin import begin
from sora_jax.kinds.run import DATA, check_data, check_schedules, check_workdir
from sora_jax.nn import params as param
from sora_jax.parallel.compile import bytes_per_device
from sora_jax.parallel.mesh import make_mesh
from sora_jax.train.kind import Kind
from sora_jax.train.loop import Job, check_accumulation
from sora_jax.train.run_config import RunConfig
from sora_jax.train.state import Group, abstract_state, make_optimizers

MIB = 2**20


def describe(config: RunConfig, workdir: Path) -> dict[str, Any]:
    """Describe the config, its parameters, the memory that they need and, if its data are given, a step and an epoch.

    Raises:
        UserError: training would raise it before its first step.
    """
    kind, mesh = kind_of(config), make_mesh(config.mesh)
    groups = kind.groups(config)
    check_workdir(workdir, config)
    doubts = check_schedules(kind, config, workdir)
    fixed = kind.parts(config)[1]
    fields = [name for name in DATA if hasattr(config, name)]
    given = not fields or any(getattr(config, field) for field in fields)
    return {
        "config": to_dict(config),
        "parameters": _parameters(groups, fixed),
        "memory": _memory(config, groups, fixed, mesh),
        "doubts": list(doubts),
        "data": _data(kind, config, workdir, mesh) if given else {"missing": f"--config.{fields[0]}"},
    }


def as_text(found: dict[str, Any]) -> str:
    """Return what `describe` found as lines of text."""
    memory, data = found["memory"], found["data"]
    axes = " x ".join(f"{axis}={size}" for axis, size in memory["mesh"].items())
    where = f"{memory['devices']} devices, mesh {axes}" if axes else "one device"
    lines = [json.dumps(found["config"], indent=1), "parameters"]
    lines += [f"  {name:12} {count:>14,}" for name, count in found["parameters"].items()]
    lines.append(f"memory of a device without activations ({where})")
    lines += [f"  {name:12} {size / MIB:>14,.2f} MiB" for name, size in memory["bytes"].items()]
    lines += found["doubts"]
    if "missing" in data:
        return "\n".join([*lines, f"data: not checked, since {data['missing']} is not given"])
    return "\n".join([*lines, *_data_lines(data)])


def _data_lines(data: dict[str, Any]) -> Iterator[str]:
    yield f"data: {data['note']}" if data["note"] else "data"
    if data["epoch_steps"]:
        yield f"  epoch        {data['epoch_steps']:>14,.2f} steps; the run has {data['epochs']:,.1f} epochs"
    counts = dict(data["first_step"])
    if "capacity" in counts:
        real, places = counts.pop("tokens"), counts.pop("capacity")
        yield f"  tokens       {real:>14,} in the first step, of {places:,} places: {1 - real / places:.1%} padding"
    flops = counts.pop("flops", None)
    yield from (f"  {name:12} {count:>14,} in the first step" for name, count in counts.items())
    if flops is not None:
        yield f"  FLOPs        {flops:>14.3g} of the model in the first step"


def _parameters(groups: Mapping[str, Group], fixed: dict) -> dict[str, int]:
    trees = {
        name if len(groups) == 1 else f"{group}/{name}": tree
        for group, declared in groups.items()
        for name, tree in declared.specs.items()
    }
    counts = {name: param.count(tree) for name, tree in trees.items()} | {"total": param.count(trees)}
    return counts | ({"not trained": param.count(fixed)} if fixed else {})


def _memory(config: RunConfig, groups: Mapping[str, Group], fixed: dict, mesh: Mesh) -> dict[str, Any]:
    """Count what the state of a run takes on each device; activations come on top, which `sora-jax plan` estimates."""
    state = abstract_state(groups, make_optimizers(groups, config.loop.steps), mesh)
    held = {"parameters": state.params, "optimizer": state.opt_state, "averages": state.ema}
    held |= {"not trained": param.abstract_on(fixed, mesh)} if fixed else {}
    sizes = {name: bytes_per_device(tree) for name, tree in held.items()}
    sizes["total"] = sum(sizes.values())
    axes = {axis: size for axis, size in mesh.shape.items() if size > 1}
    return {"devices": mesh.size, "mesh": axes, "bytes": sizes}


def _data(kind: Kind, config: RunConfig, workdir: Path, mesh: Mesh) -> dict[str, Any]:
    with first_job(kind, config, workdir, mesh) as (job, config):
        batch, _ = next(job.batches(0, None))
        epochs = config.loop.steps / job.epoch if job.epoch else None
        return {"note": job.note, "epoch_steps": job.epoch, "epochs": epochs, "first_step": job.counts(batch)}


@contextlib.contextmanager
def first_job(kind: Kind, config: RunConfig, workdir: Path, mesh: Mesh) -> Iterator[tuple[Job, RunConfig]]:
    """Yield the job of the run, or of its first stage, with its config, as training makes it.

    What a job keeps for its next start goes to a folder that is removed.
    """
    stages = [stage for _, stage in kind.stages(config, workdir)] or [config]
    inputs = kind.open(stages[0], workdir, mesh)
    check_data(workdir, inputs.digest)
    for stage in stages[1:]:
        if kind.check_stage:
            kind.check_stage(stage, inputs)
    first = dataclasses.replace(stages[0], feed=FeedConfig(threads=0))
    with tempfile.TemporaryDirectory() as folder:
        job = begin(kind, first, kind.job(first, inputs, Path(folder)), workdir, mesh)
        check_accumulation(job, first.loop)
        yield job, first
