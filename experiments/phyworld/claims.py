"""Repeat in miniature what Phyworld says of generalisation by cases (Kang et al. 2411.02385, section 5).

    python experiments/phyworld/claims.py --claim=gap --workdir=runs/phyworld/gap
    python experiments/phyworld/claims.py --claim=flip --workdir=runs/phyworld/flip
    python experiments/phyworld/claims.py --claim=conflict --workdir=runs/phyworld/conflict

gap: velocities of a middle range are not trained on; are they bridged? flip: fast balls are trained on that move
right, or right and left; do slow ones turn round? conflict: two attributes always go together in training (red balls
are small, blue ones large); which of them does a ball keep that has them the other way round?

Every world is learnt by the network and in the steps of configs/phyworld.py, or in --steps, on its frames, or on those
of --size. A second call goes on where the first stopped. Writes WORKDIR/CLAIM.json, and CLAIM.png beside this file
unless --out names a folder.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from sora_jax.benchmarks.phyworld import BATCH, PhyworldBench, default_config, predict_clips, prepared
from sora_jax.config import from_dict, load
from sora_jax.files import read_text, write_json
from sora_jax.generate.run import load_run
from sora_jax.kinds.run import train
from sora_jax.parallel.settings import prepare_jax
from sora_jax.worlds import HELD_OUT
from sora_jax.worlds.phyworld import CONFLICTS, RADII, SPEEDS, PhyworldConfig, truth
from sora_jax.worlds.phyworld_error import see_ball

matplotlib.use("agg")
import matplotlib.pyplot as plt

GAPS = {"none": None, "2 to 3": (2.0, 3.0), "1.5 to 3.5": (1.5, 3.5), "1.25 to 3.75": (1.25, 3.75)}
FAST = (2.5, 4.0)  # what flips are trained on
CLEAR = 0.15  # of a range: attributes nearer to its middle are not counted
MIDDLES = {"size": np.mean(RADII["uniform"]), "velocity": np.mean(SPEEDS)}
WIDTHS = {"size": np.ptp(RADII["uniform"]), "velocity": np.ptp(SPEEDS)}
Rows = dict[str, list[dict[str, Any]]]  # by the name of a world: the true and the seen ball of each clip


def worlds(claim: str, world: PhyworldConfig) -> dict[str, PhyworldConfig]:
    """Return the worlds of a claim by name."""
    if claim == "gap":
        low, high = SPEEDS
        ranges = {name: ((low, gap[0]), (gap[1], high)) if gap else (SPEEDS,) for name, gap in GAPS.items()}
        return {name: dataclasses.replace(world, velocities=each) for name, each in ranges.items()}
    if claim == "flip":
        fast = dataclasses.replace(world, velocities=(FAST,))
        return {"right": fast, "both ways": dataclasses.replace(fast, both_ways=True)}
    return {name: dataclasses.replace(world, conflict=name) for name in CONFLICTS}


def learn_and_look(config: PhyworldBench, count: int, folder: Path) -> list[dict[str, Any]]:
    """Train on a world, predict held-out clips, and return the true and the seen ball of each."""
    out = folder / "seen.json"
    if out.exists():
        return json.loads(read_text(out))
    train(prepared(config, folder), folder / "denoiser")
    run, rows = load_run(folder / "denoiser"), []
    for start in range(HELD_OUT, HELD_OUT + count, BATCH):
        indices = range(start, min(start + BATCH, HELD_OUT + count))
        for index, clip in zip(indices, predict_clips(run, config.world, indices), strict=True):
            true = truth(config.world, index)
            seen = see_ball(config.world, clip)
            rows.append({"true": vars(true.balls[0]), "seen": seen and vars(seen)})
    write_json(out, rows)
    return rows


def speeds(rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Return true and seen speeds of the clips in which a ball is seen, along the true way."""
    true, seen = np.array([(r["true"]["speed"], r["seen"]["speed"]) for r in rows if r["seen"]]).reshape(-1, 2).T
    return np.abs(true), seen * np.sign(true)


def mean(values: np.ndarray | list[bool]) -> float:
    """Return the mean; NaN of no values."""
    return float(np.mean(values)) if len(values) else float("nan")


def unseen(rows: list[dict[str, Any]]) -> str:
    """Return the share of the clips in which no ball is seen, or not for long enough: they are left out."""
    return f"{mean([not row['seen'] for row in rows]):.0%}"


def gap(found: Rows, panels) -> list[str]:
    """Compare errors in the gap with those beside it."""
    lines = ["| gap | error beside it | error in it | no ball |", "|---|---|---|---|"]
    for panel, (name, rows) in zip(panels, found.items(), strict=True):
        true, seen = speeds(rows)
        low, high = GAPS[name] or (2.0, 3.0)
        within, error = (low < true) & (true < high), np.abs(seen - true)
        lines.append(f"| {name} | {mean(error[~within]):.3f} | {mean(error[within]):.3f} | {unseen(rows)} |")
        scatter(panel, true, seen, f"gap: {name}")
        panel.axvspan(low, high, color="C1" if GAPS[name] else "none", alpha=0.15)
    return lines


def flip(found: Rows, panels) -> list[str]:
    """Count slow balls that turn round, and compare errors of slow and fast ones."""
    head = "slow balls that turn round | speed of slow balls, true | seen | error of fast balls | no ball"
    lines = [f"| trained on | {head} |", "|---|---|---|---|---|---|"]
    for panel, (name, rows) in zip(panels, found.items(), strict=True):
        true, seen = speeds(rows)
        slow = true < FAST[0]
        turned, error = f"{mean(seen[slow] < 0):.0%}", mean(np.abs(seen - true)[~slow])
        speeds_of_slow = f"{mean(true[slow]):.2f} | {mean(seen[slow]):.2f}"
        lines.append(f"| {name} | {turned} | {speeds_of_slow} | {error:.3f} | {unseen(rows)} |")
        scatter(panel, true, seen, f"trained on balls that move\n{name}")
        panel.axvspan(*FAST, color="C2", alpha=0.15)
    return lines


def scatter(panel, true: np.ndarray, seen: np.ndarray, title: str) -> None:
    """Plot seen against true speeds."""
    panel.plot(true, seen, ".", ms=3)
    panel.plot(SPEEDS, SPEEDS, "-", color="grey", linewidth=0.8)
    panel.set(xlabel="true velocity", ylabel="velocity of the prediction", title=title)


def is_high(name: str, ball: dict[str, Any]) -> bool | None:
    """Return which of its two values an attribute has; None where a number is near the middle."""
    if name in ("colour", "shape"):
        return ball["colour"] == "blue" if name == "colour" else ball["figure"] == "square"
    off = (ball["radius"] if name == "size" else ball["speed"]) - MIDDLES[name]
    return None if abs(off) < CLEAR * WIDTHS[name] else bool(off > 0)


def conflict(found: Rows, panels) -> list[str]:
    """Count how often each of two attributes in conflict is kept."""
    lines = ["| pair | clips | first is kept | second is kept | no ball |", "|---|---|---|---|---|"]
    kept = []
    for name, rows in found.items():
        pair, counts = name.split("-"), []
        for row in rows:
            before = [is_high(each, row["true"]) for each in pair]
            if row["seen"] and None not in before:
                # A seen number is high or low, however near to the middle.
                after = [high_or_low(each, row["seen"]) for each in pair]
                counts.append([a == b for a, b in zip(before, after, strict=True)])
        kept.append([mean(column) for column in np.array(counts).reshape(-1, 2).T])
        lines.append(f"| {name} | {len(counts)} | {kept[-1][0]:.0%} | {kept[-1][1]:.0%} | {unseen(rows)} |")
    places = np.arange(len(found))
    for side, offset in ((0, -0.2), (1, 0.2)):
        panels[0].bar(places + offset, [each[side] for each in kept], 0.38, label=("first", "second")[side])
    panels[0].set(xticks=places, xticklabels=list(found), ylabel="share that keeps the attribute", ylim=(0, 1))
    panels[0].legend(frameon=False)
    return lines


def high_or_low(name: str, ball: dict[str, Any]) -> bool:
    """Return which of its two values an attribute has."""
    if name in MIDDLES:
        return bool((ball["radius"] if name == "size" else ball["speed"]) > MIDDLES[name])
    return bool(is_high(name, ball))


CLAIMS: dict[str, tuple[Callable[[Rows, Any], list[str]], int]] = {
    "gap": (gap, 4),
    "flip": (flip, 2),
    "conflict": (conflict, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--claim", required=True, choices=CLAIMS)
    parser.add_argument("--config", default=default_config(), help="config of the benchmark")
    parser.add_argument("--size", type=int, help="height and width of the frames (default: those of the config)")
    parser.add_argument("--steps", type=int, help="steps of each training (default: those of the config)")
    parser.add_argument("--count", type=int, default=128, help="held-out clips that are predicted of each world")
    parser.add_argument("--workdir", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for the picture")
    options = parser.parse_args()
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps is {options.steps}; it must be at least 1")
    prepare_jax()
    changes = [f"run.loop.steps={options.steps}"] if options.steps else []
    changes += [f"world.size={options.size}"] if options.size else []
    config = from_dict(PhyworldBench, load(options.config, changes), "--config")
    found = {}
    for name, world in worlds(options.claim, config.world).items():
        folder = options.workdir / name.replace(" ", "_")
        found[name] = learn_and_look(dataclasses.replace(config, world=world), options.count, folder)
    write_json(options.workdir / f"{options.claim}.json", found)
    draw, columns = CLAIMS[options.claim]
    figure, panels = plt.subplots(1, columns, figsize=(max(3.2 * columns, 7), 3.2), squeeze=False, layout="constrained")
    print("\n".join(draw(found, panels[0])))
    figure.savefig(options.out / f"{options.claim}.png", dpi=110)


if __name__ == "__main__":
    main()
