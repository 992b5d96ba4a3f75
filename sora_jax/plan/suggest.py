"""Suggest what to change when a program does not fit: the first change that is estimated to be enough."""

import dataclasses
import math

from sora_jax.plan.programs import Load
from sora_jax.train.run_config import RunConfig

KEPT = 0.95  # of a chip's memory that a suggestion may fill: estimates are rough


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes of a chip: state, which grows with the parameters; work, which grows with what is in a call."""

    state: int
    work: int
    usable: int
    load: Load

    @property
    def factor(self) -> float:
        """Ratio of a call's temporary memory to the memory left beside the train state; above 1."""
        return max(self.work / max(self.usable - self.state, 1), 1.01)


def suggest(config: RunConfig, plan, load: Load) -> str:
    """Return one sentence for a plan that does not fit, "" for one that does.

    The cheapest change comes first: recompute, split, shorten.

    plan: a `report.Plan`.
    """
    if plan.fits:
        return ""
    state = sum(plan.memory.get(name, 0) for name in ("parameters", "optimizer", "averages", "frozen"))
    need = Need(state, plan.needed - state, int(KEPT * plan.usable), load)
    return next(sentence for rule in RULES if (sentence := rule(config, plan, need)))


def _parameters(config: RunConfig, plan, need: Need) -> str:
    """Split the state further, where it alone is too much."""
    fsdp = plan.mesh["fsdp"]
    enough = fsdp * 2 ** math.ceil(math.log2(max(need.state / (0.6 * need.usable), 1)))
    if need.state <= 0.6 * need.usable:
        return ""
    if enough <= plan.chips // plan.slices // plan.mesh["tensor"] // plan.mesh["sequence"] and enough > fsdp:
        return _try(f"--config.mesh.fsdp={enough} --config.mesh.data=-1", "parameters and their averages fill a chip")
    tensor = 2 * plan.mesh["tensor"]
    if _divides(need, "tensor", tensor) and tensor <= 8 and enough > fsdp * tensor:
        return _try(f"--config.mesh.tensor={tensor}", "parameters and their averages fill a chip")
    alone = need.state > need.usable
    return "Take more chips: parameters, optimizer and averages alone fill those there are." if alone else ""


def _divides(need: Need, axis: str, parts: int) -> bool:
    """Return True if the program can be split into so many parts over a mesh axis."""
    sizes = need.load.splits.get(axis, ())
    return bool(sizes) and not any(size % parts for size in sizes)


def _remat(config: RunConfig, plan, need: Need) -> str:
    remat = getattr(config.model, "remat", "full")
    if plan.what != "train" or remat in ("full", True):
        return ""
    more = "True" if remat is False else "full"
    return _try(f"--config.model.remat={more}", f"what the backward pass keeps (remat {remat!r}) is most of it")


def _batch(config: RunConfig, plan, need: Need) -> str:
    """Take fewer rows at once, where a chip holds several."""
    split = plan.mesh["slice"] * plan.mesh["data"] * plan.mesh["fsdp"]
    rows = config.batch // config.loop.accumulate // split
    if plan.what != "train" or rows < 2:
        return ""
    fewer = next((n for n in range(2, rows + 1) if rows % n == 0 and n >= need.factor), rows)
    return _try(
        f"--config.loop.accumulate={config.loop.accumulate * fewer}", f"a chip holds {rows} rows of a batch at once"
    )


def _sequence(config: RunConfig, plan, need: Need) -> str:
    """Split a row that is too long for one chip, where chips are left to do so."""
    parts = plan.mesh["sequence"] * 2 ** math.ceil(math.log2(need.factor))
    inside = plan.chips // plan.slices // plan.mesh["tensor"]
    if parts > 16 or inside % parts or not _divides(need, "sequence", parts):
        return ""
    fsdp = f" --config.mesh.fsdp={inside // parts}" if plan.mesh["fsdp"] > inside // parts else ""
    rows = f" --config.batch={config.batch // parts * plan.mesh['sequence']}" if plan.what == "train" else ""
    split = _try(f"--config.mesh.sequence={parts}{fsdp}{rows}", "a pack is too long for one chip")
    return f"{split[:-1]}; or {need.load.shorten(need.factor)[0]}."


def _shorten(config: RunConfig, plan, need: Need) -> str:
    return _try(*need.load.shorten(need.factor))


def _try(options: str, why: str) -> str:
    return f"Try {options}: {why}."


RULES = (_parameters, _remat, _batch, _sequence, _shorten)
