"""Begin a run with the weights of another, and keep what it does not train."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from sora_jax.config import check, from_dict, load, override, read_json, to_dict, value_at
from sora_jax.errors import UserError
from sora_jax.files import as_path
from sora_jax.kinds import KINDS, run_config, stored_config
from sora_jax.nn import params as param
from sora_jax.nn.lora import ADAPTER, merge_adapters
from sora_jax.parallel import distributed
from sora_jax.train.adapt import BASE, InitConfig, LoraConfig, fitting, restore_weights
from sora_jax.train.checkpoint import Checkpoints, restore_tree, save_tree
from sora_jax.train.exported import no_run
from sora_jax.train.kind import Kind
from sora_jax.train.loop import Job, log
from sora_jax.train.migrate import migrate_config
from sora_jax.train.run_config import RunConfig
from sora_jax.train.state import MODEL, Group


def given_config(
    file: str | None, changes: Sequence[str], workdir: Path, init: InitConfig, freeze: tuple[str, ...]
) -> RunConfig:
    """Build the config that the command line gives.

    file: a config file; without one the config is that of the run in `workdir` or, if there is none, of the run whose
    weights `init` names. init, freeze: replace those of the config where they are given.
    """
    here = as_path(workdir) / "config.json"
    there = stored_config(read_json(here)) if here.exists() else None
    source = source_config(init) if init.weights and not there else None
    own: dict[str, Any] = {"init": dataclasses.asdict(init)} if init.weights else {}
    own |= {"freeze": freeze} if freeze else {}
    if file:
        values = dict(load(file, changes))
        if there and there.kind == migrate_config(values)["kind"]:
            own = _left_out(values, there) | own
        config = run_config(values | own)
        check(
            source is None or source.kind == config.kind,
            f"--init-from is {init.weights!r}; that run is of kind {source and source.kind!r}, and it must be "
            f"{config.kind!r}",
        )
        return config
    if there:
        values = to_dict(there)
    else:
        check(source, "--config is not given; without --init-from=RUN, or a run in --workdir, it must be")
        values = {**to_dict(source), "init": {}, "freeze": (), "lora": {}}
    kind = KINDS[values["kind"]]
    known = {name: value for name, value in (values | own).items() if name in kind.config.__dataclass_fields__}
    try:
        return override(from_dict(kind.config, known), changes, "config")
    except UserError as error:
        whose = "" if there else f" (the config is that of {str(init.source[0])!r}, of kind {kind.name!r})"
        raise UserError(f"{error}{whose}") from error


def _left_out(values: Mapping, there: RunConfig) -> dict:
    """Return what a run that goes on began with, where the config leaves it out: it need not be told again."""
    fields = {"init": InitConfig, "freeze": tuple, "lora": LoraConfig}
    found = {}
    for name, make in fields.items():
        own = values.get(name)
        given = from_dict(make, own) if hasattr(own, "items") else tuple(own or ())
        if hasattr(there, name) and given == make():
            found[name] = to_dict(there)[name]
    return found


def source_config(init: InitConfig) -> RunConfig:
    """Read the config of the run whose weights `init` names; UserError if it is no run folder."""
    path = init.source[0] / "config.json"
    check(path.exists(), no_run("--init-from", init.weights))
    return stored_config(read_json(path))


def begin(kind: Kind, config: RunConfig, job: Job, workdir: Path, mesh: Mesh) -> Job:
    """Return the job with the weights that `config.init` names, and with the fixed ones of a run that goes on.

    Raises:
        UserError: there are no such weights, or they are of another network.
    """
    if not config.init.weights:
        return job
    trained, fixed = kind.parts(config)
    base = as_path(workdir) / BASE
    if _has_checkpoint(workdir):
        stored = stored_config(read_json(as_path(workdir) / "config.json")).init
        if stored.source != config.init.source:
            text = f"the run has begun with {stored.weights!r}, and goes on from it"
            log(f"--init-from is {config.init.weights!r}; {text}")
        kept = restore_tree(base, param.abstract_on(fixed, mesh)) if fixed else {}
        return dataclasses.replace(job, fixed={MODEL: kept} if fixed else {})
    flat_fixed, flat_trained = (flatten_dict(tree, sep="/") for tree in (fixed, trained))
    own = {path: spec for path, spec in (flat_fixed | flat_trained).items() if not path.endswith(ADAPTER)}
    found = fitting(_source_weights(kind, config, mesh), own, config.init)

    def start(random: Mapping[str, Any]) -> dict:
        flat = flatten_dict(random[MODEL], sep="/")
        return {MODEL: unflatten_dict({path: found.get(path, value) for path, value in flat.items()}, sep="/")}

    if not fixed:
        return dataclasses.replace(job, start=start)
    shardings = param.shardings(flat_fixed, mesh)
    constants = {path: spec for path, spec in flat_fixed.items() if path.endswith(ADAPTER)}
    kept = param.init(constants, jax.random.key(0)) | {path: found[path] for path in flat_fixed.keys() & found.keys()}
    placed = {path: jax.device_put(value, shardings[path]) for path, value in kept.items()}
    return dataclasses.replace(job, start=start, fixed={MODEL: unflatten_dict(placed, sep="/")})


def _source_weights(kind: Kind, config: RunConfig, mesh: Mesh) -> dict:
    """Restore the weights that a run begins with, of a run of the same kind."""
    folder, which = config.init.source
    source = source_config(config.init)
    groups = functools.partial(saved_groups, kind)
    weights, step = restore_weights(folder, groups, kind.parts(source)[1], mesh, which, "--init-from")
    log(f"{config.kind}: begins with the averaged weights of {str(folder)!r} at step {step}")
    for field in ("diffusion.process", "diffusion.prediction"):
        was, now = (value_at(to_dict(c), field) for c in (source, config))
        if was != now:
            log(f"config.{field} is {now!r}; the weights have learnt {was!r}, and begin with another task than theirs")
    adapted = any(path.endswith(ADAPTER) for path in flatten_dict(weights, sep="/"))
    return merge_adapters(distributed.on_host(weights)) if adapted else weights


def saved_groups(kind: Kind, values: dict) -> Mapping[str, Group]:
    """Return the groups that a checkpoint trained, by the config that it holds."""
    return kind.groups(stored_config(values))


def _has_checkpoint(workdir: Path) -> bool:
    with Checkpoints(as_path(workdir) / "checkpoints") as checkpoints:
        return checkpoints.latest() is not None


def save_fixed(job: Job, workdir: Path) -> None:
    """Keep what the run does not train in its folder, so that it can be used without the run that it began with."""
    if job.fixed and not _has_checkpoint(workdir):  # before the first one they may be of another start
        save_tree(as_path(workdir) / BASE, job.fixed[MODEL])
