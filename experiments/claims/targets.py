"""Train one network on the embedded world for each target: velocity, v, x0 and eps, some with the velocity's weight.

    python experiments/claims/latents.py --out=runs/claims
    python experiments/claims/targets.py --out=runs/claims
    python experiments/claims/targets.py --draw

All runs have the same process (linear_flow), initial parameters, clips, times, noise and steps; only what the network
predicts differs, and how its error is weighted. They are measured by one ruler: the prediction converted to velocity on
held-out clips, at fixed times with fixed noise, and the agreement of held-out prompts. Results are added to targets.jsonl
beside this file, from which --draw makes the tables and targets.png. A run that was stopped goes on where it was.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "scaling"))
from train_ladder import HELD_OUT_SEED, Ladder, Measure, rung_config, step_counts

from sora_jax.config import choose, from_dict, load, to_dict
from sora_jax.config_files import package_config
from sora_jax.data.storing.latents import LatentCache
from sora_jax.data.storing.manifest import Dataset
from sora_jax.diffusion.keys import Purpose, step_key, token_noise
from sora_jax.diffusion.prediction import convert, from_x0_and_eps
from sora_jax.diffusion.process import corrupt, process_named
from sora_jax.diffusion.weights import WeightConfig
from sora_jax.nn.pack import Pack, per_slot, slot_of
from sora_jax.parallel.mesh import make_mesh, place_batch
from sora_jax.parallel.settings import prepare_jax
from sora_jax.quickstart import QuickstartConfig
from sora_jax.train.denoiser import DenoiserRun, denoiser_job, network, prepare_tokenizer
from sora_jax.train.loop import fit

HERE = Path(__file__).parent
# Name: prediction, weight of its error.
TARGETS = {
    "velocity": ("velocity", "uniform"),
    "v": ("v", "uniform"),
    "x0": ("x0", "uniform"),
    "eps": ("eps", "uniform"),
    "x0, velocity loss": ("x0", "velocity"),
    "eps, velocity loss": ("eps", "velocity"),
}
TIMES = tuple((i + 0.5) / 10 for i in range(10))
BATCHES = 12  # of held-out packs, about 250 clips
BATCH = 8  # packs in a step
MODEL = {"depth": 4, "width": 144, "heads": 6}  # that of configs/world.py


def target_config(ladder: Ladder, name: str, gates: bool) -> DenoiserRun:
    """Return the run of a target: the recipe of the ladder's L/9 but for its width, the schedule and the target."""
    run = rung_config(ladder, "L/9")
    prediction, weight = TARGETS[name]
    return dataclasses.replace(
        run,
        batch=BATCH,
        model=dataclasses.replace(run.model, **MODEL, input_skip=gates),
        diffusion=dataclasses.replace(run.diffusion, prediction=prediction, weight=WeightConfig(weight)),
        optim=dataclasses.replace(run.optim, learning_rate=2e-3, schedule="cosine"),
        loop=dataclasses.replace(run.loop, steps=ladder.steps, preview_every=max(ladder.steps // 2, 1)),
    )


class Ruler(Measure):
    """Measure the squared error of the velocity at each of TIMES, of held-out clips with fixed noise."""

    def losses_of(self, params: dict) -> dict:
        sums = np.zeros((len(TIMES), 2))
        for index in range(min(self.held_out.report().packs // self.config.batch, BATCHES)):
            pack = Pack(**place_batch(self.held_out[index], self.mesh))
            sums += [jax.device_get(velocity_error(self.config, params, pack, np.float32(t))) for t in TIMES]
        by_time = sums[:, 0] / sums[:, 1]
        return {"loss": float(by_time.mean()), "by_time": by_time.tolist()}


@functools.partial(jax.jit, static_argnums=0)
def velocity_error(config: DenoiserRun, params: dict, pack: Pack, time: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the sum over real tokens of the velocity's mean squared error at one time, and the number of tokens."""
    process, prediction = process_named(config.diffusion.process), config.diffusion.prediction
    ids_BL = per_slot(pack.clip_ids_BS, slot_of(pack.segments_BL))
    x0_BLP = pack.tokens_BLP.astype(jnp.float32)
    key = step_key(HELD_OUT_SEED, 0, Purpose.HELD_OUT_NOISE)
    eps_BLP = token_noise(key, ids_BL, pack.index_BL, x0_BLP.shape[-1])
    t_BL1 = jnp.full((*pack.segments_BL.shape, 1), time)
    x_BLP = corrupt(process, x0_BLP, eps_BLP, t_BL1)
    y_BLP = network(params, config, pack)(x_BLP, jnp.full(pack.row_slots_BR.shape, time)).astype(jnp.float32)
    found_BLP = convert(process, prediction, "velocity", y_BLP, x_BLP, t_BL1)
    error_BL = jnp.mean(jnp.square(found_BLP - from_x0_and_eps(process, "velocity", x0_BLP, eps_BLP, t_BL1)), axis=-1)
    real_BL = pack.segments_BL > 0
    return jnp.sum(jnp.where(real_BL, error_BL, 0.0)), jnp.sum(real_BL)


def train_target(ladder: Ladder, name: str, gates: bool) -> None:
    """Train one target, measure it half way and at the end, and add the last measurement to targets.jsonl."""
    config = target_config(ladder, name, gates)
    folder = ladder.out / "targets" / f"{name.replace(', ', '_').replace(' ', '_')}{'_gates' if gates else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    mesh = make_mesh(config.mesh)
    tokenizer = prepare_tokenizer(config, ladder.cache, folder)
    flops = step_counts(config, ladder, tokenizer)["flops"]
    every, last = config.loop.preview_every, config.loop.steps
    measure = Ruler(ladder, config, tokenizer, mesh, folder, set(range(every, last, every)), {last}, flops)
    job = denoiser_job(config, ladder.cache, tokenizer, measure, folder / "captions")
    fit(job, config.loop, config.seed, mesh, folder, to_dict(config))
    points = [json.loads(line) for line in (folder / "points.jsonl").read_text().splitlines()]
    found = {"target": name, "gates": gates, "curve": [[p["step"], p["loss"]] for p in points], **points[-1]}
    rows = [row for row in read() if (row["target"], row["gates"]) != (name, gates)]
    (HERE / "targets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, found]))


def read() -> list[dict]:
    kept = HERE / "targets.jsonl"
    return [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []


def standard_error(rate: float, count: int) -> float:
    return math.sqrt(rate * (1 - rate) / count)


def table(rows: list[dict]) -> str:
    shown = (0, 2, 5, 7, 9)
    times = " | ".join(f"t = {TIMES[i]:.2f}" for i in shown)
    lines = [
        f"| target | gates | velocity error | {times} | agreement | colour | kind | motion |",
        "|" + "---|" * (7 + len(shown)),
    ]
    for r in sorted(rows, key=lambda r: (r["gates"], list(TARGETS).index(r["target"]))):
        errors = " | ".join(f"{r['by_time'][i]:.3f}" for i in shown)
        agreement = f"{r['agreement']:.0%} ± {standard_error(r['agreement'], r['prompts']):.0%}"
        rates = " | ".join(f"{r[name]:.0%}" for name in ("colour", "kind", "motion"))
        gates = "yes" if r["gates"] else "no"
        lines.append(f"| {r['target']} | {gates} | {r['loss']:.3f} | {errors} | {agreement} | {rates} |")
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = dict(zip(TARGETS, ("tab:blue", "tab:cyan", "tab:red", "tab:green", "tab:orange", "tab:olive"), strict=True))
    figure, (times, rates) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    rows = sorted(rows, key=lambda r: (r["gates"], list(TARGETS).index(r["target"])))
    for r in rows:
        name = r["target"] + (", gates" if r["gates"] else "")
        line = "--" if r["gates"] else "-"
        times.plot(TIMES, r["by_time"], line, marker="o", markersize=4, color=colours[r["target"]], label=name)
    times.set(xlabel="time (0 is data, 1 is noise)", ylabel="squared error of the velocity", yscale="log")
    times.set_title("one ruler: every prediction as a velocity, held-out clips")
    times.legend(frameon=False, fontsize=8)
    names = [r["target"] + (", gates" if r["gates"] else "") for r in rows]
    values = [100 * r["agreement"] for r in rows]
    errors = [100 * standard_error(r["agreement"], r["prompts"]) for r in rows]
    rates.barh(names, values, xerr=errors, color=[colours[r["target"]] for r in rows], capsize=3)
    rates.invert_yaxis()
    rates.set(xlabel="held-out prompts right, %, with the standard error", xlim=(0, 100))
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/claims"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=128, help="held-out prompts at most")
    parser.add_argument("--targets", default="", help="such as velocity/x0; all where it is not given")
    parser.add_argument("--gates", action="store_true", help="add the noisy tokens to the prediction: model.input_skip")
    parser.add_argument("--draw", action="store_true", help="train nothing: tables and plot of what was measured")
    options = parser.parse_args()
    if not options.draw:
        prepare_jax()
        base = from_dict(QuickstartConfig, load(str(package_config("world.py")))).transformer
        cache, dataset = LatentCache(options.out / "latents"), Dataset(options.out / "world")
        ladder = Ladder(base, cache, dataset, options.out, options.steps, options.prompts)
        for name in options.targets.split("/") if options.targets else TARGETS:
            choose("--targets", name, TARGETS)
            train_target(ladder, name, options.gates)
    rows = read()
    print(table(rows))
    draw(rows, HERE / "targets.png")


if __name__ == "__main__":
    main()
