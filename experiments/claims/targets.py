"""Train one network on the embedded world for each target: velocity, v, x0 and eps, some with the velocity's weight.

    python experiments/claims/latents.py --out=runs/claims
    python experiments/claims/targets.py --out=runs/claims --steps=500
    python experiments/claims/targets.py --out=runs/claims --steps=1000 --targets="velocity/x0, velocity loss"
    python experiments/claims/targets.py --draw

All runs have the same process (linear_flow), initial parameters, clips, times, noise and steps; only what the network
predicts differs, and how its error is weighted. They are measured by one ruler: the prediction converted to velocity on
held-out clips, at fixed times with fixed noise; and after 1,000 steps, where the learning rate ends, by the agreement
of held-out prompts. Results are added to targets.jsonl beside this file, from which --draw makes the tables and
targets.png. A run that was stopped goes on where it was, and so does one with more --steps.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
from pathlib import Path
from statistics import NormalDist

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
DECAY = 1000  # step at which the learning rate ends, however long a run is
EVERY = 500  # steps between measurements
ALPHA = math.sqrt(18 / 4)  # the shift of times of a clip of 18 tokens, the mean, with base_tokens = 4
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
        optim=dataclasses.replace(run.optim, learning_rate=2e-3, schedule="cosine", decay_steps=DECAY),
        loop=dataclasses.replace(run.loop, steps=ladder.steps, preview_every=EVERY),
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
    """Train one target, and write what was measured on the way to targets.jsonl."""
    config = target_config(ladder, name, gates)
    folder = ladder.out / "targets" / f"{name.replace(', ', '_').replace(' ', '_')}{'_gates' if gates else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    mesh = make_mesh(config.mesh)
    tokenizer = prepare_tokenizer(config, ladder.cache, folder)
    flops = step_counts(config, ladder, tokenizer)["flops"]
    measure = Ruler(ladder, config, tokenizer, mesh, folder, set(range(EVERY, DECAY, EVERY)), {DECAY}, flops)
    job = denoiser_job(config, ladder.cache, tokenizer, measure, folder / "captions")
    fit(job, config.loop, config.seed, mesh, folder, to_dict(config))
    points = {point["step"]: point for point in map(json.loads, (folder / "points.jsonl").read_text().splitlines())}
    rows = [row for row in read() if (row["target"], row["gates"]) != (name, gates)]
    rows += [{"target": name, "gates": gates} | point for point in points.values()]
    (HERE / "targets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read() -> list[dict]:
    kept = HERE / "targets.jsonl"
    return [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []


def shares() -> np.ndarray:
    """Return how often training draws a time next to each of TIMES, for the mean clip."""
    normal = NormalDist(math.log(ALPHA))
    edges = [normal.cdf(math.log(t / (1 - t))) if 0 < t < 1 else t for t in np.linspace(0, 1, len(TIMES) + 1)]
    return np.diff(edges)


def mean_error(row: dict, since: float = 0.0) -> float:
    """Return the velocity's error, its mean over the times of training from `since` on."""
    weights = shares() * (np.array(TIMES) > since)
    return float(np.dot(weights, row["by_time"]) / weights.sum())


def label(row: dict) -> str:
    return row["target"] + (", gates" if row["gates"] else "")


def order(row: dict) -> tuple:
    return row["step"], row["gates"], list(TARGETS).index(row["target"])


def table(rows: list[dict]) -> str:
    shown = (0, 2, 4, 6, 9)
    times = " | ".join(f"t = {TIMES[i]:.2f}" for i in shown)
    lines = [
        f"| steps | target | velocity error | from t = 0.5 on | {times} | prompts right | colour | kind | motion |",
        "|" + "---|" * (8 + len(shown)),
    ]
    for r in sorted(rows, key=order):
        errors = " | ".join(f"{r['by_time'][i]:.2f}" for i in shown)
        rates = [""] * 4
        if "agreement" in r:
            count = r["prompts"]
            rate = (r["agreement"] * count + 1) / (count + 2)  # Laplace's rule: that of 0 % has an error, too
            error = math.sqrt(rate * (1 - rate) / count)
            rates = [f"{r['agreement']:.1%} ± {error:.1%} of {count}"]
            rates += [f"{r[name]:.0%}" for name in ("colour", "kind", "motion")]
        means = f"{mean_error(r):.3f} | {mean_error(r, 0.5):.3f}"
        lines.append(f"| {r['step']} | {label(r)} | {means} | {errors} | {' | '.join(rates)} |")
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = dict(
        zip(TARGETS, ("tab:blue", "tab:cyan", "tab:red", "tab:green", "tab:orange", "tab:olive"), strict=True)
    )
    figure, (times, means) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    rows = sorted(rows, key=order)
    for r in rows:
        look = {"color": colours[r["target"]], "alpha": 1.0 if r["step"] == DECAY else 0.6}
        line = "-" if r["step"] == DECAY else "--"
        times.plot(TIMES, r["by_time"], line, marker="o", markersize=4, label=f"{label(r)}, {r['step']} steps", **look)
        means.barh([f"{label(r)}, {r['step']} steps"], [mean_error(r)], **look)
    times.set(xlabel="time (0 is data, 1 is noise)", ylabel="squared error of the velocity", yscale="log")
    times.set_title("one ruler: every prediction as a velocity, held-out clips")
    times.legend(frameon=False, fontsize=8)
    means.invert_yaxis()
    means.set(xlabel="squared error of the velocity, mean over the times of training")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/claims"))
    parser.add_argument("--steps", type=int, default=500)
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
