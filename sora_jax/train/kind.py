"""A kind of run as an object: all that the commands must know of it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from sora_jax.train.loop import Job
from sora_jax.train.run_config import RunConfig
from sora_jax.train.state import Group


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Hold what a run reads, opened and checked; a kind adds its own fields.

    digest: of the data, which a run that goes on must find again. text: fingerprint of a pretrained text encoder.
    clips: how many there are of each split.
    """

    digest: str
    text: str | None = None
    clips: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Kind:
    """Describe a kind of run by functions of its config.

    config: its dataclass, whose field `kind` names it.
    groups(config): the parameters that are trained.
    parts(config): the specs of the network, of group `state.MODEL`, that are trained, and those that are fixed.
    open(config, workdir, mesh): data, frozen networks and tokenizer, as `Inputs`. User errors happen here, or in `job`:
        before anything is written.
    job(config, inputs, workdir): what the loop trains.
    programs: what `sora-jax plan` can compile, by name: functions (config, mesh) -> `plan.programs.Program`.
    may_change: fields that may change when a run goes on, beside those of all kinds, such as the path of its data, or
        its loss: all that does not change what the weights mean.
    claim(config, inputs, workdir): writes what the run folder holds from the start, beside config.json. By one process.
    finish(config, inputs, params, step, workdir): writes what a run leaves at its end, by its averaged parameters of
        that step, fixed ones among them. By all processes.
    stages(config, workdir): runs that make up this one, in order, each with its folder; empty if it is a single one.
    check_stage(config, inputs): raises a UserError where a stage does not fit the inputs of the first one.
    finish_stages(workdir, last): writes what the run leaves, by the folder of its last stage. By one process.
    """

    config: type[RunConfig]
    groups: Callable[[Any], Mapping[str, Group]]
    parts: Callable[[Any], tuple[dict, dict]]
    open: Callable[[Any, Path, Mesh], Inputs]
    job: Callable[[Any, Any, Path], Job]
    programs: Mapping[str, Callable[[Any, Mesh], Any]]
    may_change: tuple[str, ...] = ()
    claim: Callable[[Any, Any, Path], None] | None = None
    finish: Callable[[Any, Any, dict, int, Path], None] | None = None
    stages: Callable[[Any, Path], Sequence[tuple[Path, Any]]] = lambda config, workdir: ()
    check_stage: Callable[[Any, Any], None] | None = None
    finish_stages: Callable[[Path, Path], None] | None = None

    @property
    def name(self) -> str:
        """The value of `config.kind`."""
        return self.config.kind
