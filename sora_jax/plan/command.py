"""What `sora-jax plan` does."""

import dataclasses

import jax

from sora_jax.config import check
from sora_jax.parallel.compile import Topology
from sora_jax.plan.programs import maker
from sora_jax.plan.report import as_json, as_text, make_plan


def plan(config, topology: str, slices: int, pack_length: int | None, what: str, json: bool) -> str:
    """The report of a plan, as text or JSON."""
    jax.config.update("jax_platforms", "cpu")  # an accelerator that is here is not what is asked about
    maker(config, what)  # refused before anything is made
    if pack_length is not None:
        check(
            config.kind == "transformer", f"--pack-length is {pack_length}; a config of kind {config.kind!r} has none"
        )
        config = dataclasses.replace(config, packing=dataclasses.replace(config.packing, length=pack_length))
    chosen = Topology.parse(topology, slices)
    made = make_plan(config, what, chosen)
    return (as_json if json else as_text)(made, chosen)
