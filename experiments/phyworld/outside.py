"""What helps outside the ranges of training? The same world learnt in several ways, at equal training FLOPs.

    python experiments/phyworld/outside.py --pflops=0.05 --workdir=runs/phyworld/outside

Every way is `sora-jax bench phyworld` with a few fields changed, and as many steps as --pflops pay for. A second call
goes on where the first stopped. Prints a table and writes WORKDIR/outside.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from sora_jax.benchmarks.phyworld import PhyworldBench, default_config, flops_of_step, prepared
from sora_jax.benchmarks.phyworld import main as bench
from sora_jax.config import from_dict, load
from sora_jax.files import read_text, write_json

# Way -> fields of the benchmark's config.
WAYS: dict[str, list[str]] = {
    "as configured": [],
    "relative positions alone": ["run.model.sincos_positions=False"],
    "absolute positions alone": ["run.model.rotary=False"],
    "predicts the velocity of the flow": ["run.diffusion.prediction=velocity", "run.model.input_skip=True"],
    "all noise levels alike": ["run.diffusion.times.pure=0.0", "run.diffusion.times.distribution=uniform"],
    "given frames a little noisy": ["run.diffusion.given.noise=1.0"],
    "balls that move both ways": ["world.both_ways=True"],  # not in a collision
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pflops", type=float, default=0.05, help="training of each way, in units of 10^15 FLOPs")
    parser.add_argument("--scenario", default="uniform", help="uniform, parabola or collision")
    parser.add_argument("--config", default=default_config(), help="config of the benchmark")
    parser.add_argument("--ways", default="", help="some of the ways, as their numbers from 0, between commas")
    parser.add_argument("--workdir", type=Path, required=True, help="folder for the runs")
    options = parser.parse_args()
    chosen = [int(word) for word in options.ways.split(",")] if options.ways else range(len(WAYS))
    lines = ["| way | in | velocity | radius | both | out, unbiased |", "|---|---|---|---|---|---|"]
    results: dict[str, Any] = {}
    for number in chosen:
        name, changes = list(WAYS.items())[number]
        if options.scenario == "collision" and "world.both_ways=True" in changes:
            continue
        folder = options.workdir / str(number)
        steps = round(options.pflops * 1e15 / flops_of(options.config, options.scenario, changes))
        schedule = [f"run.loop.steps={steps}", f"run.loop.save_every={steps}", "curve=0"]
        if not (folder / "result.json").exists():
            bench(options.config, [*changes, *schedule], {"scenario": options.scenario}, folder)
        results[name] = found = json.loads(read_text(folder / "result.json"))
        kinds = [found["kinds"][kind]["published"] for kind in ("velocity", "radius", "both")]
        errors = [found["in"]["published"], *kinds, found["out"]["unbiased"]]
        lines.append(f"| {name} | {' | '.join(f'{error:.3f}' for error in errors)} |")
        print("\n".join(lines), flush=True)
        write_json(options.workdir / "outside.json", results)


def flops_of(file: str, scenario: str, changes: list[str]) -> float:
    """Return the FLOPs of a training step of a way."""
    config = from_dict(PhyworldBench, load(file, [*changes, f"world.scenario={scenario}"]), "--config")
    size = config.world.frames, config.world.size, config.world.size
    return flops_of_step(prepared(config, Path("unused")), size)


if __name__ == "__main__":
    main()
