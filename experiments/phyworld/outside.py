"""What helps outside the ranges of training? The same world learnt in several ways, at equal training FLOPs.

    python experiments/phyworld/outside.py --pflops=0.05 --workdir=runs/phyworld/outside
    python experiments/phyworld/outside.py --size=16 --ways=0,1,2,3,4,5,7,8 --pflops=0.006 --workdir=runs/phyworld/small

Every way is `sora-jax bench phyworld` with a few fields changed, and as many steps as --pflops pay for. A second call
goes on where the first stopped. Prints a table and writes WORKDIR/outside.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from sora_jax.benchmarks.phyworld import PhyworldBench, default_config, prepared
from sora_jax.benchmarks.phyworld import main as bench
from sora_jax.benchmarks.prediction import cost_of
from sora_jax.config import from_dict, load
from sora_jax.files import read_text, write_json

FEW = ["run.sampling.steps=10"]  # of the solver, where noise between data and pure noise is learnt, too
# Way -> variant of the config that stands for "", and fields that change. The first is the config as it is.
WAYS: dict[str, tuple[str, list[str]]] = {
    "as configured": ("", []),
    "relative positions alone": ("", ["run.model.sincos_positions=False"]),
    "absolute positions alone": ("", ["run.model.rotary=False"]),
    "predicts the velocity of the flow": ("", ["run.diffusion.prediction=velocity", "run.model.input_skip=True"]),
    "all noise levels": ("", ["run.diffusion.times.pure=0.0", "run.diffusion.times.distribution=uniform", *FEW]),
    "given frames a little noisy": ("", ["run.diffusion.given.noise=1.0"]),
    "latents of an autoencoder": (
        ":latent",
        ["run.model.patch=(3,{latents},{latents})", "autoencoder.crop=(4,{size},{size})"],
    ),  # fmt: skip
    "frames of two sizes in a pack": ("", ["world.zooms=({larger},)"]),  # half as large again
    "balls that move both ways": ("", ["world.both_ways=True"]),  # not in a collision
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pflops", type=float, default=0.05, help="training of each way, in units of 10^15 FLOPs")
    parser.add_argument("--scenario", default="uniform", help="uniform, parabola or collision")
    parser.add_argument("--config", default=default_config(), help="config file of the benchmark")
    parser.add_argument("--size", type=int, default=32, help="height and width of the frames, 16 or a multiple")
    parser.add_argument("--ways", default="", help="some of the ways, as their numbers from 0, between commas")
    parser.add_argument("--workdir", type=Path, required=True, help="folder for the runs")
    options = parser.parse_args()
    chosen = [int(word) for word in options.ways.split(",")] if options.ways else range(len(WAYS))
    lines = ["| way | in | out | in, unbiased | out, unbiased | ball lost, in | out |", "|---|---|---|---|---|---|---|"]
    results: dict[str, Any] = {}
    for number in chosen:
        name, (variant, changes) = list(WAYS.items())[number]
        if options.scenario == "collision" and "world.both_ways=True" in changes:
            continue
        folder = options.workdir / str(number)
        if not (folder / "result.json").exists():
            sizes = {"size": options.size, "larger": options.size * 3 // 2, "latents": options.size // 8}
            changes = [change.format(**sizes) for change in changes]
            changes += [f"world.size={options.size}", f"world.scenario={options.scenario}"]
            learn(options.config + variant, changes, options.pflops * 1e15, folder)
        results[name] = found = json.loads(read_text(folder / "result.json"))
        sides = found["in"], found["out"]
        errors = [side[reader] for reader in ("published", "unbiased") for side in sides]
        cells = ["none" if error is None else f"{error:.3f}" for error in errors]
        lines.append(f"| {' | '.join([name, *cells, *(format(side['lost'], '.0%') for side in sides)])} |")
        print("\n".join(lines), flush=True)
        write_json(options.workdir / "outside.json", results)


def learn(file: str, changes: list[str], flops: float, folder: Path) -> None:
    """Run the benchmark in as many steps as the FLOPs pay for."""
    config = from_dict(PhyworldBench, load(file, changes), "--config")
    steps = round(flops / cost_of(prepared(config, folder)).step_flops)
    schedule = [f"run.loop.steps={steps}", f"run.loop.save_every={steps}", "curve=0"]
    bench(file, [*changes, *schedule], {}, folder)


if __name__ == "__main__":
    main()
