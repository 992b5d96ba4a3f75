"""What to change when a program does not fit: the first change that is estimated to be enough."""

import dataclasses
import math

ROUND = 128  # tokens; a pack length is suggested in such steps
KEPT = 0.95  # of a chip's memory that a suggestion may fill: estimates are rough


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes of a chip: state, which grows with the parameters; work, which grows with what is in a call."""

    state: int
    work: int
    usable: int


def suggest(config, plan) -> str:
    """One sentence for a plan that does not fit, "" for one that does. Cheapest first: recompute, split, shorten."""
    if plan.fits:
        return ""
    state = sum(plan.memory.get(name, 0) for name in ("parameters", "optimizer", "averages"))
    need = Need(state, plan.needed - state, int(KEPT * plan.usable))
    return next(said for rule in RULES if (said := rule(config, plan, need)))


def _parameters(config, plan, need: Need) -> str:
    """The state alone is too much: split it further."""
    fsdp = plan.mesh["fsdp"]
    enough = fsdp * 2 ** math.ceil(math.log2(max(need.state / (0.6 * need.usable), 1)))
    if need.state <= 0.6 * need.usable:
        return ""
    if enough <= plan.chips // plan.slices // plan.mesh["tensor"] // plan.mesh["sequence"] and enough > fsdp:
        return _try(f"--config.mesh.fsdp={enough} --config.mesh.data=-1", "parameters and their averages fill a chip")
    tensor = 2 * plan.mesh["tensor"]
    if config.kind == "transformer" and config.model.heads % tensor == 0 and tensor <= 8 and enough > fsdp * tensor:
        return _try(f"--config.mesh.tensor={tensor}", "parameters and their averages fill a chip")
    alone = need.state > need.usable
    return "Take more chips: parameters, optimizer and averages alone fill those there are." if alone else ""


def _remat(config, plan, need: Need) -> str:
    if plan.what != "train" or getattr(config.model, "remat", "full") == "full":
        return ""
    return _try(
        "--config.model.remat=full", f"what the backward pass keeps (remat {config.model.remat!r}) is most of it"
    )


def _batch(config, plan, need: Need) -> str:
    """Several rows on a chip: fewer at once."""
    split = plan.mesh["slice"] * plan.mesh["data"] * plan.mesh["fsdp"]
    rows = config.batch // config.loop.accumulate // split
    factor = _factor(need)
    if plan.what != "train" or rows < 2:
        return ""
    fewer = next((n for n in range(2, rows + 1) if rows % n == 0 and n >= factor), rows)
    return _try(
        f"--config.loop.accumulate={config.loop.accumulate * fewer}", f"a chip holds {rows} rows of a batch at once"
    )


def _sequence(config, plan, need: Need) -> str:
    """A row of its own for each chip is too long: split it, where chips are left to do so."""
    if config.kind != "transformer":
        return ""
    parts = plan.mesh["sequence"] * 2 ** math.ceil(math.log2(_factor(need)))
    inside = plan.chips // plan.slices // plan.mesh["tensor"]
    if parts > 16 or inside % parts or config.packing.length % parts or config.packing.text_length % parts:
        return ""
    fsdp = f" --config.mesh.fsdp={inside // parts}" if plan.mesh["fsdp"] > inside // parts else ""
    rows = f" --config.batch={config.batch // parts * plan.mesh['sequence']}" if plan.what == "train" else ""
    split = _try(f"--config.mesh.sequence={parts}{fsdp}{rows}", "a pack is too long for one chip")
    return f"{split[:-1]}; or --pack-length={shorter_length(config, need)}."


def _shorten(config, plan, need: Need) -> str:
    if config.kind != "transformer":
        frames, height, width = config.crop
        side = 2 * max(int(min(height, width) / math.sqrt(_factor(need)) / 2 // 8 * 8), 8)
        return _try(f"--config.crop={frames},{side},{side}", "the activations of a crop fill a chip")
    return _try(f"--pack-length={shorter_length(config, need)}", "the activations of a pack fill a chip")


def shorter_length(config, need: Need) -> int:
    """The pack length whose activations are estimated to fit: they grow with the tokens."""
    return max(int(config.packing.length / _factor(need)) // ROUND, 1) * ROUND


def _factor(need: Need) -> float:
    """By how much too large the work of a call is for what the state leaves."""
    return max(need.work / max(need.usable - need.state, 1), 1.01)


def _try(options: str, why: str) -> str:
    return f"Try {options}: {why}."


RULES = (_parameters, _remat, _batch, _sequence, _shorten)
