"""The ablations of W.A.L.T (2312.06662, tables 2 to 7) in miniature, on pixel-art characters: ours beside theirs.

    python experiments/walt/ablations.py --latents=data/sprites_latents --data=data/sprites --out=runs/walt_ablations
    python experiments/walt/ablations.py ... --rows=base,no-qk-norm --seeds 0 1
    python experiments/walt/ablations.py ... --quick        a few steps of every row; says nothing

experiments/sprites says how the data is made. Each row is configs/walt.py:small in the paper's recipe (rank 2, no skip
of the input) with the change of one row of the paper, trained for --steps with every seed of --seeds to OUT/ROW_SEED.
It is measured by the Frechet distance, in features of a classifier that learns the captions of the dataset, between
real held-out clips and clips that are sampled from their captions without guidance. A call that was stopped goes on
where it was. Prints a table after every run, writes it to OUT/table.md, and the figures to OUT/ablations.json.
"""

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sora_jax.config import check, load, override
from sora_jax.data.packing.packs import PackItem, pack_batch
from sora_jax.evaluate.denoiser import DenoiserOptions, evaluate_denoiser
from sora_jax.evaluate.features import FeaturesConfig
from sora_jax.files import write_json
from sora_jax.kinds import run_config
from sora_jax.kinds.run import train
from sora_jax.models.denoiser import denoiser_specs, forward_flops
from sora_jax.nn.params import count
from sora_jax.parallel.settings import prepare_jax
from sora_jax.train.denoiser import DenoiserRun
from sora_jax.train.metrics import read_metrics

CONFIG = f"{Path(__file__).parents[2] / 'configs' / 'walt.py'}:small"
LATENT, WORDS = (5, 16, 16, 8), 40  # of a clip and its caption
RECIPE = ("model.adaln_rank=2", "model.input_skip=False", "preview.prompts=()", "preview.sizes=()")


class Row(NamedTuple):
    """Hold a row: what it is, the paper's FVD after 35,000 steps on UCF-101, and how our recipe is changed."""

    what: str
    theirs: float
    changes: tuple[str, ...] = ()


def patch_row(side: int, theirs: float) -> Row:
    """Make the row of a patch of so many latents; the pack has room for as many clips."""
    grid = 16 // side
    changes = f"model.patch=(1,{side},{side})", f"model.positions=(5,{grid},{grid})", f"packing.length={10 * grid**2}"
    return Row(f"patch {side // 4} times the base's", theirs, changes)


ROWS = {
    "base": Row("full recipe", 60.7),
    "window-1": Row("spatiotemporal windows of 1/4 of a side", 56.9, ("model.spatiotemporal_window=(1,1)",)),
    "window-4": Row("spatiotemporal windows of whole frames", 55.3, ("model.spatiotemporal_window=(4,4)",)),
    "no-windows": Row("attention to whole clips", 59.9, ("model.windows=False",)),
    "patch-8": patch_row(8, 134.4),
    "patch-16": patch_row(16, 461.8),
    "estimate-0": Row("no self-conditioning", 109.9, ("model.self_conditioning=False",)),
    "estimate-0.3": Row("self-conditioning of 0.3", 76.0, ("diffusion.self_conditioning=0.3",)),
    "estimate-0.6": Row("self-conditioning of 0.6", 60.0, ("diffusion.self_conditioning=0.6",)),
    "rank-4": Row("modulation of rank 4", 56.6, ("model.adaln_rank=4",)),
    "rank-16": Row("modulation of rank 16", 55.5, ("model.adaln_rank=16",)),
    "rank-64": Row("modulation of rank 64", 54.4, ("model.adaln_rank=64",)),
    "no-qk-norm": Row("no QK norm", 59.0, ("model.qk_norm=False",)),
    "no-zero-snr": Row("no zero terminal SNR", 91.0, ("diffusion.process=vp_linear",)),
    # As many parameters, in a longer training of the paper.
    "separate": Row("a modulation for each block", 34.6, ("model.adaln_rank=0",)),
    "deeper": Row("rank 2 in a deeper network", 36.7, ("model.depth=8", "model.unroll=4")),
}
BESIDE = {"deeper": "separate"} | {name: "base" for name in ROWS if name not in ("base", "separate", "deeper")}


def config_of(name: str, seed: int, options: argparse.Namespace) -> DenoiserRun:
    """Return the run of a row."""
    every = max(options.steps // 6, 1)
    own = (
        f"latents={options.latents}",
        f"seed={seed}",
        f"loop.steps={options.steps}",
        f"loop.save_every={every}",
        f"loop.log_every={max(options.steps // 60, 1)}",
        "loop.preview_every=0",
        f"held_out.every={every}",
        f"optim.warmup_steps={min(100, options.steps // 2)}",
    )
    batch = (f"batch={options.batch}",) if options.batch else ()
    return override(run_config(load(CONFIG)), (*RECIPE, *own, *batch, *ROWS[name].changes), "config")


def one_clip(config: DenoiserRun) -> dict:
    """Return a batch of one clip and its caption."""
    return pack_batch([[PackItem(np.zeros(LATENT, np.float32), 1, np.full(WORDS, 2, np.int32))]], config.packs)


def measure(name: str, seed: int, options: argparse.Namespace) -> dict:
    """Train a run, or go on with it, and measure it, unless that is done."""
    config, folder = config_of(name, seed, options), options.out / f"{name}_{seed}"
    asked = {"row": name, "seed": seed, "steps": options.steps, "clips": options.clips}
    kept = folder / "found.json"
    if kept.exists() and (found := json.loads(kept.read_text())).items() >= asked.items():
        return found
    began = time.process_time()
    train(config, folder)
    spent, seconds = time.process_time() - began, folder / "processor_seconds.json"  # of all calls for this run
    spent += json.loads(seconds.read_text()) if seconds.exists() else 0
    write_json(seconds, spent)
    features = FeaturesConfig(steps=20) if options.quick else FeaturesConfig()
    asks = DenoiserOptions(
        metrics=("own",),
        count=options.clips,
        steps=str(options.sampling_steps),
        sampling=("guidance.scale=1",),
        own={"own": features},
    )
    columns = evaluate_denoiser(folder, options.data, asks).columns
    losses = [row["held_out/loss"] for row in read_metrics(folder) if row.get("held_out/loss") is not None]
    found = asked | {
        "parameters": count(denoiser_specs(config.model)),
        "flops_of_a_clip": forward_flops(config.model, one_clip(config)),
        "processor_seconds": spent,
        "held_out_loss": losses[-1] if losses else None,
        "distance": columns["generated"]["own"],
        "autoencoder": columns["autoencoder"]["own"],
    }
    write_json(kept, found)
    return found


def table(found: list[dict]) -> str:
    """Return a Markdown table: means over seeds, and each distance over that of the row that it is compared with."""
    head = "| | theirs: FVD | over | ours: distance | over | held-out loss | parameters | MFLOPs of a clip | minutes |"
    runs = {name: [each for each in found if each["row"] == name] for name in ROWS}
    ours = {name: float(np.mean([each["distance"]["value"] for each in some])) for name, some in runs.items() if some}
    lines = [head, "|" + "---|" * 9]
    for name, mean in ours.items():
        some, row, beside = runs[name], ROWS[name], BESIDE.get(name)
        values = [f"{row.theirs}", f"{row.theirs / ROWS[beside].theirs:.2f}" if beside else "", f"{mean:.4g}"]
        values.append(f"{mean / ours[beside]:.2f}" if beside in ours else "")
        losses = [each["held_out_loss"] for each in some if each["held_out_loss"] is not None]
        values.append(f"{np.mean(losses):.4f}" if losses else "")
        values += [f"{some[0]['parameters']:,}", f"{some[0]['flops_of_a_clip'] / 1e6:.0f}"]
        values.append(f"{np.mean([each['processor_seconds'] for each in some]) / 60:.0f}")
        lines.append(f"| {row.what} | {' | '.join(values)} |")
    limit = np.mean([each["autoencoder"]["value"] for each in found])
    return "\n".join([*lines, "", f"Distance of the real clips through the autoencoder: {limit:.4g}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=Path, required=True, help="latent cache of the sprites")
    parser.add_argument("--data", type=Path, required=True, help="dataset folder with the real clips")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs and the table")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=0, help="packs of a step; default: that of the config")
    parser.add_argument("--clips", type=int, default=360, help="held-out clips that are compared")
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--quick", action="store_true", help="4 steps of 2 packs, 8 clips, 2 sampling steps")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.batch, options.clips, options.sampling_steps = 4, 2, 8, 2
    rows = options.rows.split(",")
    for name in rows:
        check(name in ROWS, f"--rows has {name!r}; the rows are {', '.join(ROWS)}")
    prepare_jax()
    found = []
    for seed in options.seeds:
        for name in rows:
            found.append(measure(name, seed, options))
            write_json(options.out / "ablations.json", found)
            (options.out / "table.md").write_text(table(found) + "\n")
            print(table(found), flush=True)


if __name__ == "__main__":
    main()
