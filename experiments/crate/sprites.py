"""CRATE against a DiT of equal size on pixel-art characters: the same clips, packs, noise, steps and evaluation.

    python experiments/crate/sprites.py --latents=data/sprites_latents --out=runs/crate_study
    python experiments/sprites/classify.py --workdir=runs/crate_study/crate_0.002_0 --data=data/sprites --guidance=2

The last line, for the best run of each network, tells how many facts of held-out captions are drawn right.
experiments/sprites says how the data is made. Both networks have 3.2 million parameters: the transformer is that of
configs/sprites.py, CRATE that of configs/crate.py:small, which is the same recipe with another `model`. Each is trained
at every learning rate of --rates and with every seed of --seeds, to OUT/NETWORK_RATE_SEED; a call that was stopped goes
on where it was. Prints a table: parameters, model FLOPs of a full pack, processor time, training and held-out loss.
Draws OUT/sprites.png and writes OUT/sprites.json.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import matplotlib
import numpy as np

from sora_jax.config import load
from sora_jax.files import write_json
from sora_jax.kinds import run_config
from sora_jax.kinds.run import train
from sora_jax.models.denoiser import denoiser_specs, forward_flops
from sora_jax.nn.params import count
from sora_jax.parallel.settings import prepare_jax
from sora_jax.plan.denoiser import full_pack
from sora_jax.train.denoiser import DenoiserRun
from sora_jax.train.metrics import read_metrics

matplotlib.use("agg")
import matplotlib.pyplot as plt

CONFIGS = Path(__file__).parents[2] / "configs"
NETWORKS = {"transformer": "sprites.py:transformer", "crate": "crate.py:small"}
REPORT = "sprites.json"


def config_of(network: str, rate: float, seed: int, options: argparse.Namespace) -> DenoiserRun:
    """Return the recipe of configs/sprites.py, with the network's own model."""
    base = run_config(load(str(CONFIGS / NETWORKS["transformer"])))
    model = run_config(load(str(CONFIGS / NETWORKS[network]))).model
    optim = dataclasses.replace(base.optim, learning_rate=rate, warmup_steps=min(100, options.steps // 2))
    every = max(options.steps // 60, 1)
    loop = dataclasses.replace(
        base.loop, steps=options.steps, log_every=every, save_every=max(options.steps // 6, 1), preview_every=0
    )
    held_out = dataclasses.replace(base.held_out, every=max(options.steps // 6, 1))
    return dataclasses.replace(
        base,
        latents=str(options.latents),
        model=model,
        optim=optim,
        loop=loop,
        held_out=held_out,
        batch=options.batch or base.batch,
        preview=dataclasses.replace(base.preview, prompts=(), sizes=()),
        seed=seed,
    )


def measure(network: str, rate: float, seed: int, options: argparse.Namespace) -> dict:
    """Train a run, or go on with it, and read what it has measured."""
    config, folder = config_of(network, rate, seed, options), options.out / f"{network}_{rate:g}_{seed}"
    began = time.process_time()
    train(config, folder)
    spent = time.process_time() - began
    kept = folder / "processor_seconds.json"  # of all calls that have trained this run
    spent += json.loads(kept.read_text()) if kept.exists() else 0
    write_json(kept, spent)
    rows = read_metrics(folder)
    curve = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    held_out = [(row["step"], row["held_out/loss"]) for row in rows if row.get("held_out/loss") is not None]
    return {
        "network": network,
        "rate": rate,
        "seed": seed,
        "parameters": count(denoiser_specs(config.model)),
        "flops_of_a_pack": forward_flops(config.model, full_pack(config)),
        "processor_seconds": spent,
        "loss": float(np.mean([value for _, value in curve[-5:]])),
        "held_out": held_out[-1][1] if held_out else None,
        "curve": curve,
        "held_out_curve": held_out,
    }


def table(runs: list[dict]) -> str:
    head = "| network | rate | seed | parameters | MFLOPs of a pack | processor time | loss | held-out loss |"
    lines = [head, "|" + "---|" * 8]
    for run in runs:
        size = f"{run['parameters']:,} | {run['flops_of_a_pack'] / 1e6:.0f} | {run['processor_seconds'] / 60:.0f} min"
        held_out = f"{run['held_out']:.4f}" if run["held_out"] is not None else ""
        lines.append(
            f"| {run['network']} | {run['rate']:g} | {run['seed']} | {size} | {run['loss']:.4f} | {held_out} |"
        )
    return "\n".join(lines)


def plot(runs: list[dict], path: Path) -> None:
    """Draw the losses of all runs by step: training, smoothed over five reports, and held out."""
    figure, (training, held_out) = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    rates = sorted({run["rate"] for run in runs})
    for run in runs:
        colour = f"C{list(NETWORKS).index(run['network'])}"
        line = ("-", "--", "-.", ":")[rates.index(run["rate"]) % 4]
        label = f"{run['network']}, rate {run['rate']:g}" if run["seed"] == min(r["seed"] for r in runs) else None
        steps, values = np.array(run["curve"]).T
        smooth = np.convolve(np.pad(values, (2, 2), mode="edge"), np.full(5, 0.2), mode="valid")
        training.loglog(steps, smooth, line, color=colour, label=label)
        if run["held_out_curve"]:
            held_out.loglog(*np.array(run["held_out_curve"]).T, line, marker=".", color=colour, label=label)
    training.set(xlabel="step", ylabel="training loss")
    held_out.set(xlabel="step", ylabel="held-out loss")
    training.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=Path, required=True, help="latent cache of the sprites")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs, the table and the plot")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=0, help="packs of a step; default: that of the config")
    parser.add_argument("--rates", type=float, nargs="*", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    options = parser.parse_args()
    prepare_jax()
    runs = []
    for seed in options.seeds:
        for rate in options.rates:
            runs += [measure(network, rate, seed, options) for network in NETWORKS]
            write_json(options.out / REPORT, runs)
            plot(runs, options.out / "sprites.png")
    print(table(runs))


if __name__ == "__main__":
    main()
