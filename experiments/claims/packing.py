"""Train one network on packed clips and on padded ones for equal processor time, on clips of many sizes.

    python experiments/claims/latents.py --out=runs/claims_wide --wide
    python experiments/claims/packing.py --data=runs/claims_wide
    python experiments/claims/packing.py --draw

Padded means one clip a row, each row as long as the longest clip. Both have the same initial parameters, optimizer and
learning rate, and as many rows that a step has as many real tokens, on average: a step means the same for both, and its
price differs. They are trained in turns in one process, --chunk seconds of its processor time each, with the reading of
clips; compiling and measuring are not counted. The held-out loss is that of `sora_jax.train.held_out`, by the same
program for both. Results go to packing.json beside this file, from which --draw makes the table and packing.png.
"""

import argparse
import dataclasses
import functools
import json
import time
from pathlib import Path

import jax
import numpy as np

from sora_jax.config import check, from_dict, load
from sora_jax.config_files import package_config
from sora_jax.data.feeding.pipeline import PackedBatches
from sora_jax.data.feeding.tokenizer import Tokenizer
from sora_jax.data.packing.packs import token_counts
from sora_jax.data.storing.latents import LatentCache
from sora_jax.nn.pack import Pack
from sora_jax.parallel.mesh import make_mesh, place_batch
from sora_jax.parallel.settings import prepare_jax
from sora_jax.quickstart import QuickstartConfig
from sora_jax.train.denoiser import DenoiserRun, denoiser_groups, denoiser_loss, prepare_tokenizer
from sora_jax.train.given import GivenConfig
from sora_jax.train.held_out import HeldOut
from sora_jax.train.loop import split_batch
from sora_jax.train.state import MODEL, init_state, make_optimizers
from sora_jax.train.step import make_step

HERE = Path(__file__).parent
KEPT = HERE / "packing.json"
MODEL_SIZE = {"depth": 3, "width": 128, "heads": 4}  # M of the ladder
LENGTH, SLOTS, PACKS = 384, 16, 2  # those of the bench's wider mix
STEPS = 10**6  # of a schedule that is constant after its warm-up


def layouts(base: DenoiserRun, cache: LatentCache, tokenizer: Tokenizer) -> dict[str, DenoiserRun]:
    """Return the runs by name: they differ in the sizes of a row and in the number of rows alone."""
    model = dataclasses.replace(base.model, **MODEL_SIZE, unroll=MODEL_SIZE["depth"])
    optim = dataclasses.replace(base.optim, learning_rate=1.5e-3, schedule="constant", warmup_steps=100, ema=(0.99,))
    run = dataclasses.replace(
        base,
        captions="first",
        model=model,
        optim=optim,
        diffusion=dataclasses.replace(base.diffusion, given=GivenConfig()),
        held_out=dataclasses.replace(base.held_out, clips=96),
    )
    tokens = (cache.grids // np.array(model.patch)).prod(1)
    words = np.array([len(tokenizer.encode(captions[0])) for captions in cache.column("captions").to_pylist()])
    text = max(int(words.max()), int(np.ceil(SLOTS * words.mean() / 16)) * 16)
    fixed = dataclasses.replace(base.packing, patch=None, rows_per_clip=1)
    packed = dataclasses.replace(fixed, length=LENGTH, slots=SLOTS, text_length=text)
    padded = dataclasses.replace(fixed, length=int(tokens.max()), slots=1, text_length=int(words.max()))
    packed_run = dataclasses.replace(run, packing=packed, batch=PACKS)
    report = PackedBatches(cache, tokenizer, packed_run.packs, PACKS, run.seed).report()
    rows = round(PACKS * report.tokens / report.packs / tokens[cache.indices("train")].mean())
    return {"packed": packed_run, "padded": dataclasses.replace(run, packing=padded, batch=rows)}


class Learner:
    """Train one layout in turns; `seconds` of processor time, `steps` and real `tokens` so far."""

    def __init__(self, run: DenoiserRun, cache: LatentCache, tokenizer: Tokenizer, mesh):
        self.mesh, self.seconds, self.steps, self.tokens, self.places = mesh, 0.0, 0, 0, 0
        self.batches = PackedBatches(cache, tokenizer, run.packs, run.batch, run.seed)
        groups = denoiser_groups(run)
        optimizers = make_optimizers(groups, STEPS)
        self.step = make_step(functools.partial(denoiser_loss, run), optimizers)
        self.step(init_state(groups, optimizers, run.seed, mesh), (), self.placed(self.batches[0]))  # to compile
        self.state = init_state(groups, optimizers, run.seed, mesh)

    def placed(self, batch: dict) -> Pack:
        return Pack(**place_batch(split_batch(batch, 1), self.mesh, leading=1))

    def train(self, seconds: float) -> None:
        """Train for as much processor time of this process, all its threads together."""
        start, spent = time.process_time(), 0.0
        while spent < seconds:
            batch = self.batches[self.steps]
            self.state = jax.block_until_ready(self.step(self.state, (), self.placed(batch))[0])
            self.steps += 1
            self.tokens += int(token_counts(batch).sum())
            self.places += batch["segments_BL"].size
            spent = time.process_time() - start
        self.seconds += spent

    @property
    def averages(self) -> dict:
        return {MODEL: self.state.ema[MODEL][0]}


def measure(options: argparse.Namespace) -> None:
    """Train both in turns and write packing.json."""
    prepare_jax()
    base = from_dict(QuickstartConfig, load(str(package_config("world.py")))).transformer
    cache, mesh = LatentCache(options.data / "latents"), make_mesh()
    tokenizer = prepare_tokenizer(base, cache, options.data)
    runs = layouts(base, cache, tokenizer)
    found = {}
    with jax.set_mesh(mesh):
        held_out = HeldOut(runs["packed"], cache, tokenizer)
        learners = {name: Learner(run, cache, tokenizer, mesh) for name, run in runs.items()}
        curves = {name: [] for name in runs}
        for turn in range(1, round(options.seconds / options.chunk) + 1):
            for name, learner in learners.items():
                learner.train(options.chunk)
                if turn % options.every == 0:
                    loss = float(held_out(learner.averages)["held_out/loss"])
                    curves[name].append((learner.seconds, learner.steps, loss))
                    print(f"{name}: {learner.seconds:.0f} s, {learner.steps} steps, loss {loss:.4f}", flush=True)
        for name, learner in learners.items():
            packing = runs[name].packs
            found[name] = {"rows": runs[name].batch, "length": packing.length, "clips": packing.slots}
            found[name] |= {"steps": learner.steps, "seconds": learner.seconds, "tokens": learner.tokens}
            found[name] |= {"fill": learner.tokens / learner.places, "curve": curves[name]}
    KEPT.write_text(json.dumps(found, indent=1) + "\n")


def time_to(curve: list, loss: float) -> float:
    """Return the processor time of the first measurement at or below a loss, interpolated; inf without one."""
    seconds, losses = [s for s, _, _ in curve], np.minimum.accumulate([loss for _, _, loss in curve])
    if losses[-1] > loss:
        return float("inf")
    return float(np.interp(-loss, -losses, seconds))


def report(found: dict) -> str:
    lines = [
        "| layout | rows x length | fill | real tokens a step | steps | processor s | held-out loss |",
        "|" + "---|" * 7,
    ]
    for name, r in found.items():
        sizes = f"{r['rows']} x {r['length']} | {r['fill']:.0%} | {r['tokens'] / r['steps']:.0f}"
        lines.append(f"| {name} | {sizes} | {r['steps']} | {r['seconds']:.0f} | {r['curve'][-1][2]:.3f} |")
    packed, padded = found["packed"]["curve"], found["padded"]["curve"]
    reached = time_to(packed, padded[-1][2])
    lines += ["", f"packed has padded's last loss after {reached:.0f} of its {padded[-1][0]:.0f} s:"]
    return "\n".join(lines) + f" 1/{padded[-1][0] / reached:.1f} of the processor time"


def draw(found: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for name, colour in (("packed", "tab:blue"), ("padded", "tab:orange")):
        seconds, steps, losses = zip(*found[name]["curve"], strict=True)
        for panel, x in zip(panels, (seconds, steps), strict=True):
            panel.plot(x, losses, "o-", color=colour, markersize=4, label=name)
    panels[0].set(xlabel="processor time of training, s", ylabel="held-out loss", title="at equal processor time")
    panels[1].set(xlabel="steps", title="at equal steps")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/claims_wide"))
    parser.add_argument("--seconds", type=float, default=90.0, help="processor time of each")
    parser.add_argument("--chunk", type=float, default=5.0, help="processor seconds of a turn")
    parser.add_argument("--every", type=int, default=3, help="turns between measurements")
    parser.add_argument("--draw", action="store_true", help="train nothing: table and plot of what was measured")
    options = parser.parse_args()
    check(
        options.seconds >= options.chunk * options.every, f"--seconds is {options.seconds}; nothing would be measured"
    )
    if not options.draw:
        measure(options)
    found = json.loads(KEPT.read_text())
    print(report(found))
    draw(found, HERE / "packing.png")


if __name__ == "__main__":
    main()
