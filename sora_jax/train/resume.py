"""Go on from a checkpoint, also with other settings of the optimizer than it was saved with."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from sora_jax.config import differences
from sora_jax.train.checkpoint import Checkpoints
from sora_jax.train.history import describe_changes
from sora_jax.train.optim import SpikeState
from sora_jax.train.state import Group, Optimizer, TrainState, abstract_state, make_optimizers

# Reads the config that a checkpoint holds, as this version writes it, and the groups that it trained.
ReadSaved = Callable[[dict], tuple[dict, Mapping[str, Group]]]
# Fields that do not change which batch comes at which place: the position in the data stays a true hint.
SAME_STREAM = ("optim", "loop", "feed", "mesh", "batch", "preview", "sampling", "held_out")
Decays = Mapping[str, tuple[float, ...]]


class Resumed(NamedTuple):
    """Hold what a run goes on with. changes: what differs from the checkpoint's config, in words; old: that config."""

    state: TrainState
    notes: dict
    changes: str
    old: dict | None


def resume(
    checkpoints: Checkpoints,
    state: TrainState,
    optimizers: Mapping[str, Optimizer],
    run: dict,
    read_saved: ReadSaved | None,
) -> Resumed:
    """Restore the newest whole checkpoint, with its values where `state`, of the config `run`, has the same parts.

    Parts of the optimizer that the checkpoint has not, such as the statistics of spikes, begin anew.
    """
    if read_saved is None:
        found, notes = checkpoints.restore(state)
        return Resumed(found, notes, "", None)
    mesh = jax.tree.leaves(state.params)[0].sharding.mesh

    def saved_optimizers(notes: dict) -> tuple[Mapping[str, Group], dict[str, Optimizer]]:
        config, groups = read_saved(notes["config"])
        return groups, make_optimizers(groups, config["loop"]["steps"])

    def structure(notes: dict) -> TrainState:
        there = abstract_state(*saved_optimizers(notes), mesh)
        return state if _same_structure(there, state) else there

    found, notes = checkpoints.restore(state, structure)
    old, _ = read_saved(notes["config"])
    if old != run:
        decays = {name: optimizer.decays for name, optimizer in saved_optimizers(notes)[1].items()}
        found = carry_over(found, state, decays, {name: optimizer.decays for name, optimizer in optimizers.items()})
    changes = describe_changes(old, run)
    if any(path.partition(".")[0] not in SAME_STREAM for path in differences(old, run)):
        notes = notes | {"position": None}
    step = int(found.step)
    _, before = saved_optimizers(notes)
    said = {path.rpartition(".")[2] for path in differences(old, run)} & {"learning_rate"}
    for name in () if said else before.keys() & optimizers.keys():
        was, now = float(before[name].rate(step)), float(optimizers[name].rate(step))
        if abs(was - now) > 1e-3 * max(was, now):
            changes += f"; the learning rate is {now:.3g} from here on, not {was:.3g}"
    return Resumed(found, notes, changes, old)


def _same_structure(a: Any, b: Any) -> bool:
    shapes = lambda state: jax.tree.map(lambda x: x.shape, state)  # noqa: E731
    return bool(shapes(a) == shapes(b))


def carry_over(old: TrainState, new: TrainState, was: Decays, now: Decays) -> TrainState:
    """Return `new` with the values of `old` in the parts that both have; the weights of common groups are the old.

    was, now: the decays of the averages. A new average is the old one of that decay, else of that place, else a copy of
    the first.
    """
    params, ema, opt_state = dict(new.params), dict(new.ema), dict(new.opt_state)
    for name in old.params.keys() & new.params.keys():
        if not _same_structure(old.params[name], new.params[name]):
            continue  # a group of other numbers, such as the means of a loss that was switched on
        params[name] = old.params[name]
        ema[name] = tuple(_average(old.ema[name], was[name], place, decay) for place, decay in enumerate(now[name]))
        opt_state[name] = _carried(new.opt_state[name], _parts(old.opt_state[name]))
    return TrainState(old.step, params, ema, opt_state)


def _average(averages: tuple, decays: tuple[float, ...], place: int, decay: float) -> Any:
    chosen = decays.index(decay) if decay in decays else min(place, len(averages) - 1)
    return jax.tree.map(lambda x: x.copy(), averages[chosen])  # a step donates its state: no array may be in it twice


def _parts(opt_state: Any) -> dict[type, Any]:
    """Collect the states of an optimizer's parts by their type."""
    if isinstance(opt_state, SpikeState):
        return _parts(opt_state.inner) | {SpikeState: opt_state}
    if type(opt_state) is tuple:
        found: dict[type, Any] = {}
        for part in opt_state:
            found |= _parts(part)
        return found
    return {type(opt_state): opt_state}


def _carried(new: Any, parts: dict[type, Any]) -> Any:
    """Replace the parts of an optimizer's state that are known by their type."""
    if type(new) is tuple:
        return tuple(_carried(part, parts) for part in new)
    if isinstance(new, SpikeState):
        known = parts.get(SpikeState, new)
        return known._replace(inner=_carried(new.inner, parts))
    return parts.get(type(new), new)
