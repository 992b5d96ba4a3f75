"""Run `sora-jax plan`."""

import dataclasses
from typing import Any

import jax

from sora_jax.config import check, choose
from sora_jax.parallel.compile import Topology
from sora_jax.plan.report import as_json, as_text, make_plan
from sora_jax.train.kind import Kind
from sora_jax.train.run_config import RunConfig


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Hold the options of the command; see its help."""

    topology: str
    slices: int = 1
    pack_length: int | None = None  # in place of config.packing.length
    what: str = "train"  # one of the programs of the kind of run
    json: bool = False


def plan(kind: Kind, config: RunConfig, options: PlanOptions) -> str:
    """Return the report of a plan, as text or JSON."""
    jax.config.update("jax_platforms", "cpu")  # an accelerator that is here is not what is asked about
    choose(f"--what, for a config of kind {kind.name!r},", options.what, kind.programs)
    length = options.pack_length
    if length is not None:
        packs: Any = getattr(config, "packing", None)
        check(packs, f"--pack-length is {length}; a config of kind {kind.name!r} has no packs, leave it out")
        changes: dict[str, Any] = {"packing": dataclasses.replace(packs, length=length)}
        config = dataclasses.replace(config, **changes)
    topology = Topology.parse(options.topology, options.slices)
    made = make_plan(kind, config, options.what, topology)
    return (as_json if options.json else as_text)(made, topology)
