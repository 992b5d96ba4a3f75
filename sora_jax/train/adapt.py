"""Train a part of a network that has weights already: frozen parameters, and low-rank adapters (LoRA).

The parameters of a network are split in two trees of the same nesting: what is trained, which checkpoints hold, and
what is fixed, which the run folder keeps once in `base/`. `merge` puts them together again. A parameter is named by
its path, such as "blocks/qkv/weight"; a pattern names a path, all below it, or what `fnmatch` finds ("blocks/*_q").
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from sora_jax.config import check, read_json
from sora_jax.errors import NotFinite
from sora_jax.files import as_path
from sora_jax.nn import params as param
from sora_jax.nn.finite import named, not_finite
from sora_jax.nn.lora import SCALE, adapter_specs, scale_spec
from sora_jax.nn.params import ParamSpec
from sora_jax.train.checkpoint import BEST, NEWEST, Checkpoints, restore_tree
from sora_jax.train.exported import MODEL_FILE, exported_step, is_exported, read_arrays, run_folder
from sora_jax.train.state import MODEL, Group, abstract_ema

LISTED = 6  # parameters at most that a message names
BASE = "base"  # folder of what is fixed, in a run folder


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Configure the weights that a new run begins with."""

    # Run or exported model whose averaged weights are taken, RUN, RUN@STEP or RUN@best; "": random weights.
    weights: str = ""
    renew: tuple[str, ...] = ()  # paths of parameters that begin at random all the same, such as "classes"

    def __post_init__(self):
        check(
            self.weights or not self.renew,
            f"init.renew is {self.renew}; it must be left out without init.weights (--init-from)",
        )

    @property
    def source(self) -> tuple[Path, str]:
        """Return the run folder and which of its checkpoints: "newest", "best" or a step."""
        folder, mark, which = self.weights.rpartition("@")
        whole = not mark or "/" in which or as_path(self.weights).exists()
        name, which = (self.weights, NEWEST) if whole else (folder, which)
        return run_folder(name, "--init-from"), which


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Configure low-rank adapters (2106.09685): with a rank, they are all that is trained."""

    rank: int = 0  # columns of A and rows of B; 0: no adapters
    alpha: float = 8.0  # the adapter's term is multiplied by alpha / rank
    paths: tuple[str, ...] = ("blocks/qkv", "blocks/merge", "blocks/cross_*", "blocks/mlp")  # layers that have one

    def __post_init__(self):
        check(self.rank >= 0, f"lora.rank is {self.rank}; it must be 0 (none) or more")
        check(self.alpha > 0, f"lora.alpha is {self.alpha}; it must be positive")
        check(self.paths or not self.rank, "lora.paths is (); it must name layers")


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Return True if one of the patterns names the path, or what it lies below."""
    return any(path == p or fnmatchcase(path, p) or fnmatchcase(path, f"{p.rstrip('/')}/*") for p in patterns)


def split_specs(
    specs: dict, freeze: Sequence[str] = (), init: InitConfig = InitConfig(), lora: LoraConfig = LoraConfig()
) -> tuple[dict, dict]:
    """Split the specs of a network into what is trained and what is fixed.

    With adapters these are trained, and parameters that begin anew. A parameter of `freeze` is fixed.

    Raises:
        UserError: a pattern names nothing, there are no weights to fix, or nothing would be trained.
    """
    if not (freeze or lora.rank or init.renew):
        return specs, {}
    flat = flatten_dict(specs, sep="/")
    known = ", ".join(dict.fromkeys(path.removesuffix("/weight").removesuffix("/bias") for path in flat))
    own_paths = lora.paths if lora.rank and lora.paths != LoraConfig.paths else ()  # not all networks have the defaults
    for option, patterns in (("freeze", freeze), ("init.renew", init.renew), ("lora.paths", own_paths)):
        for pattern in patterns:
            there = any(matches(path, [pattern]) for path in flat)
            check(there, f"{option} is {patterns}; there is no {pattern!r}; allowed: {known}")
    for option, value in (("freeze", freeze), ("lora.rank", lora.rank)):
        check(init.weights or not value, f"{option} is {value}; it needs the weights of a run: give --init-from=RUN")
    check(not (freeze and lora.rank), f"freeze is {freeze}; with lora.rank = {lora.rank} all is frozen: leave it out")
    fixed = {path for path in flat if (lora.rank or matches(path, freeze)) and not matches(path, init.renew)}
    trained = {path: spec for path, spec in flat.items() if path not in fixed}
    kept = {path: spec for path, spec in flat.items() if path in fixed}
    for path in [p for p in fixed if lora.rank and p.endswith("/weight") and matches(p, lora.paths)]:
        layer = path.removesuffix("weight")
        trained |= {layer + name: spec for name, spec in adapter_specs(flat[path], lora.rank).items()}
        kept[layer + SCALE] = scale_spec(flat[path], lora.alpha / lora.rank)
    check(trained, f"freeze is {freeze}; that is all of the network, and some of it must be trained")
    return unflatten_dict(trained, sep="/"), unflatten_dict(kept, sep="/")


def merge(fixed: Mapping[str, Any], trained: Mapping[str, Any]) -> dict:
    """Put two nested dicts together, which share no leaf."""
    both = dict(fixed)
    for name, value in trained.items():
        both[name] = merge(both[name], value) if name in both else value
    return both


def restore_weights(
    folder: Path,
    groups: Callable[[dict], Mapping[str, Group]],
    fixed: dict,
    mesh: Mesh,
    which: str = NEWEST,
    option: str = "--workdir",
) -> tuple[dict, int]:
    """Restore the first average of a run's network, and the step that it is of; adapters stay beside their weights.

    groups(config): what a checkpoint trained, by the config that it holds: averages may have been added since. fixed:
    the specs of what the run does not train. option: names the folder where it has no checkpoint.

    Raises:
        UserError: there is no such checkpoint.
        NotFinite: some of the weights are not finite.
    """
    choice = "--checkpoint" if option == "--workdir" else option
    if is_exported(folder):
        return _exported_weights(folder, groups, mesh, which, choice)
    with Checkpoints(folder / "checkpoints", option=choice) as checkpoints:
        check(checkpoints.latest() is not None, f"{option} is {str(folder)!r}; it has no checkpoint yet")
        averages = checkpoints.restore_ema(lambda run: abstract_ema(groups(run["config"]), mesh), which)[MODEL][0]
        step = checkpoints.candidates(which)[0]  # those found damaged are no longer among them
        others = [str(other) for other in checkpoints.candidates() if other != step]
    if fixed:
        averages = merge(restore_tree(folder / BASE, param.abstract_on(fixed, mesh)), averages)
    if bad := not_finite(averages):
        what = f"{option} is {str(folder)!r}; the averaged weights of its checkpoint {step} have values that are"
        mend = f"; {choice} can name another: {', '.join(others)}" if others else ""
        raise NotFinite(f"{what} not finite, in {named(bad)}{mend}")
    return averages, step


def _exported_weights(
    folder: Path, groups: Callable[[dict], Mapping[str, Group]], mesh: Mesh, which: str, option: str
) -> tuple[dict, int]:
    """Read the weights of an exported model, and the step that they are of: the only one that it has."""
    step, file = exported_step(folder), folder / MODEL_FILE
    check(
        which in (NEWEST, BEST, str(step)), f"{option} is {which!r}; the exported model {str(folder)!r} has step {step}"
    )
    wanted = flatten_dict(abstract_ema(groups(read_json(folder / "config.json")), mesh)[MODEL][0], sep="/")
    found = read_arrays(file)
    whole = found.keys() == wanted.keys() and all(found[path].shape == x.shape for path, x in wanted.items())
    check(whole, f"{str(file)!r} is damaged: its arrays are not those of the config beside it")
    if bad := [path for path, x in found.items() if not np.isfinite(x).all()]:
        raise NotFinite(f"{str(file)!r} has values that are not finite, in {named(bad)}")
    placed = {path: jax.device_put(found[path].astype(x.dtype), x.sharding) for path, x in wanted.items()}
    return unflatten_dict(placed, sep="/"), step


def fitting(found: dict, wanted: Mapping[str, ParamSpec], init: InitConfig) -> dict:
    """Return those of the found parameters that `wanted` declares, without those of `init.renew`.

    Raises:
        UserError: some are missing, or of another shape; the sentence lists them.
    """
    found = flatten_dict(found, sep="/")
    wrong = []
    for path, spec in wanted.items():
        there = tuple(found[path].shape) if path in found else "absent"
        if there != spec.shape and not matches(path, init.renew):
            wrong.append(f"{path} ({there} there, {spec.shape} here)")
    if len(wrong) > LISTED:
        mend = f"and {len(wrong) - LISTED} more: this is another network; take the config of that run"
    else:
        mend = f"to begin these at random: --renew={','.join(entry.partition(' ')[0] for entry in wrong)}"
    check(not wrong, f"--init-from is {init.weights!r}; parameters differ: {'; '.join(wrong[:LISTED])}; {mend}")
    return {path: found[path] for path in wanted if not matches(path, init.renew)}
