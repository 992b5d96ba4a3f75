"""Train a ladder of small transformers on one latent cache: sizes XS to L, and patches of 9, 3 or 1 latent places.

    sora-jax quickstart
    python experiments/scaling/train_ladder.py --quickstart=runs/quickstart --out=runs/scaling
    python experiments/scaling/draw.py --out=runs/scaling

Every rung sees the same clips in the same order, at the same noise levels, with the same recipe: one step is one step.
A rung is trained for --steps steps, and where it is cheaper than the rung M/9, for as many FLOPs as M/9 spends in
--steps. On the way the held-out loss and the agreement with held-out prompts are written to OUT/RUNG/points.jsonl.
A call that was stopped goes on where it was; more --steps later make the same runs longer.
"""

import argparse
import dataclasses
import functools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from sora_jax.config import check, from_dict, load, to_dict
from sora_jax.data.feeding.pipeline import PackedBatches
from sora_jax.data.storing.latents import LatentCache
from sora_jax.data.storing.manifest import Dataset
from sora_jax.evaluate.world import held_out_prompts, score
from sora_jax.files import write_json
from sora_jax.generate.run import Run
from sora_jax.models.transformer import denoiser_specs
from sora_jax.nn import params as param
from sora_jax.nn.pack import Pack
from sora_jax.parallel.mesh import make_mesh, place_batch
from sora_jax.parallel.settings import prepare_jax
from sora_jax.quickstart import QuickstartConfig, default_config
from sora_jax.train.denoiser import DenoiserRun, batch_counts, denoiser_job, denoiser_loss, prepare_tokenizer
from sora_jax.train.frozen import load_autoencoder
from sora_jax.train.given import GivenConfig
from sora_jax.train.loop import fit
from sora_jax.train.state import MODEL

SIZES = {"XS": (2, 64, 2), "S": (2, 96, 3), "M": (3, 128, 4), "L": (4, 192, 6)}  # depth, width, heads
PATCHES = {9: (1, 3, 3), 3: (1, 1, 3), 1: (1, 1, 1)}
# By forward FLOPs, a factor of 2 to 3 from line to line; in a line, from parameters to tokens.
LEVELS = (("XS/9",), ("S/9", "XS/3"), ("M/9", "S/3", "XS/1"), ("L/9", "M/3", "S/1"), ("L/3",))
REFERENCE = "M/9"

EVERY = 5  # steps; what is measured is measured at a multiple of it
FIRST = 100  # step, of the first measurement at the earliest
HELD_OUT_SEED = 1
SAMPLING = {"steps": 15, "guidance": 2.0, "seed": 1}


@dataclasses.dataclass(frozen=True)
class Ladder:
    """What all rungs share. `batch` packs a step, `prompts` held-out ones for the agreement."""

    base: DenoiserRun
    cache: LatentCache
    dataset: Dataset
    out: Path
    steps: int
    prompts: int


def rung_config(ladder: Ladder, name: str) -> DenoiserRun:
    """Return the run of a rung: packs and the shift of times follow its tokens, so that nothing else differs.

    Gates for the input, captions of several forms and given tokens, which the quickstart has, are left out.
    """
    size, places = name.split("/")
    (depth, width, heads), finer = SIZES[size], 9 // int(places)
    base = ladder.base
    model = dataclasses.replace(
        base.model, depth=depth, width=width, heads=heads, patch=PATCHES[int(places)], unroll=depth, input_skip=False
    )
    times = dataclasses.replace(base.diffusion.times, base_tokens=4 * finer)
    return dataclasses.replace(
        base,
        captions="first",
        model=model,
        batch=8,
        packing=dataclasses.replace(
            base.packing, length=48 * finer, slots=6, text_length=48, patch=None, rows_per_clip=1
        ),
        diffusion=dataclasses.replace(base.diffusion, times=times, given=GivenConfig()),
        optim=dataclasses.replace(
            base.optim, learning_rate=1.5e-3, schedule="constant", warmup_steps=100, ema=(0.995,)
        ),
        loop=dataclasses.replace(base.loop, log_every=50, save_every=250, preview_every=EVERY),
        preview=dataclasses.replace(base.preview, prompts=(), sizes=()),
    )


def step_counts(config: DenoiserRun, ladder: Ladder, tokenizer) -> dict[str, float]:
    """Return the mean clips, tokens and FLOPs of a training step."""
    batches = PackedBatches(ladder.cache, tokenizer, config.packs, config.batch, config.seed, config.split)
    counts = [batch_counts(config.model, batches[step]) for step in range(50)]
    return {name: sum(c[name] for c in counts) / len(counts) for name in ("clips", "tokens", "flops")}


def wanted_steps(steps: int, flops: float, budget: float) -> tuple[list[int], list[int]]:
    """Return the steps at which only the loss is measured, and those at which prompts are sampled too.

    `budget` FLOPs are what the reference spends; a step of this rung costs `flops`.
    """
    enough = budget / flops
    last = _rounded(max(steps, enough))
    sampled = {_rounded(step) for step in (steps, enough, 2 * enough)}
    losses = {_rounded(last / 2**i) for i in range(12) if last >= 2**i * FIRST}
    return sorted(losses - sampled), sorted(step for step in sampled if step <= last)


def _rounded(steps: float) -> int:
    return max(round(steps / EVERY), 1) * EVERY


def train_rung(ladder: Ladder, name: str, budget: float) -> None:
    """Train one rung and measure it on the way."""
    config, folder = rung_config(ladder, name), ladder.out / name.replace("/", "_")
    folder.mkdir(parents=True, exist_ok=True)
    mesh = make_mesh(config.mesh)
    tokenizer = prepare_tokenizer(config, ladder.cache, folder)
    counts = step_counts(config, ladder, tokenizer)
    losses, sampled = wanted_steps(ladder.steps, counts["flops"], budget)
    last = max(sampled)
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, steps=last))
    described = {"rung": name, "parameters": param.count(denoiser_specs(config.model)), **counts, "last": last}
    write_json(folder / "rung.json", described)
    print(json.dumps(described), flush=True)
    measure = Measure(ladder, config, tokenizer, mesh, folder, set(losses), set(sampled), counts["flops"])
    job = denoiser_job(config, ladder.cache, tokenizer, measure, folder / "captions")
    state = fit(job, config.loop, config.seed, mesh, folder, to_dict(config))
    if ladder.prompts and not measure.known(last):
        with jax.set_mesh(mesh):
            measure(last, {name: averages[0] for name, averages in state.ema.items()})


class Measure:
    """Append held-out loss and agreement of the averaged weights to points.jsonl; the loop's preview."""

    def __init__(self, ladder, config, tokenizer, mesh, folder: Path, losses, sampled, flops: float):
        self.config, self.mesh, self.folder, self.flops = config, mesh, folder, flops
        self.losses, self.sampled = losses, sampled
        self.run = functools.partial(
            Run, config, tokenizer=tokenizer, autoencoder=load_autoencoder(ladder.cache.path), mesh=mesh
        )
        self.chosen = held_out_prompts(ladder.dataset, ladder.prompts)
        self.held_out = PackedBatches(ladder.cache, tokenizer, config.packs, config.batch, HELD_OUT_SEED, "held-out")

    def known(self, step: int) -> bool:
        """Return True if an earlier call has sampled at this step."""
        path = self.folder / "points.jsonl"
        points = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        return any(point["step"] == step and "agreement" in point for point in points)

    def __call__(self, step: int, averages: dict, writer=None) -> None:
        if step not in self.losses | self.sampled:
            return
        params, start = averages[MODEL], time.perf_counter()
        point = {"step": step, "flops": step * self.flops} | self.losses_of(params)
        if step in self.sampled and self.chosen:
            point |= self.agreement(params)
        point["seconds"] = time.perf_counter() - start
        with open(self.folder / "points.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(point) + "\n")
        print(json.dumps(point), flush=True)

    def losses_of(self, params: dict) -> dict:
        """Return the mean over the held-out clips, once each, with captions, at times and noise that never change."""
        config = dataclasses.replace(
            self.config, seed=HELD_OUT_SEED, diffusion=dataclasses.replace(self.config.diffusion, caption_dropout=0.0)
        )
        count = self.held_out.report().packs // config.batch
        sums = [_loss(config, params, Pack(**place_batch(self.held_out[i], self.mesh)), i) for i in range(count)]
        return {"loss": float(sum(loss for loss, _ in sums) / sum(weight for _, weight in sums))}

    def agreement(self, params: dict) -> dict[str, float]:
        """Return what the oracle finds right in clips of the held-out prompts."""
        prompts, sizes = [p for p, _ in self.chosen], [s for _, s in self.chosen]
        clips = self.run(params=params).generate(prompts, sizes, **SAMPLING)
        found = score(prompts, clips)
        return {"prompts": found.clips, "agreement": found.triple} | {
            name: getattr(found, name) for name in ("colour", "kind", "motion")
        }


@functools.partial(jax.jit, static_argnums=0)
def _loss(config: DenoiserRun, params: dict, pack: Pack, draw: jax.Array):
    loss, (weight, _) = denoiser_loss(config, {MODEL: params}, (), pack, jnp.asarray(draw, jnp.int32), jnp.int32(0))
    return loss[MODEL], weight[MODEL]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--prompts", type=int, default=100, help="at most, as many as are held out; 0: the loss alone")
    parser.add_argument("--rungs", default="", help="such as M/9,S/3; all where it is not given")
    options = parser.parse_args()
    check(options.steps >= EVERY, f"--steps is {options.steps}; it must be at least {EVERY}")
    names = [name for level in LEVELS for name in level]
    chosen = options.rungs.split(",") if options.rungs else names
    for name in chosen:
        check(name in names, f"--rungs has {name!r}; the rungs are {', '.join(names)}")
    prepare_jax()
    base = from_dict(QuickstartConfig, load(default_config())).transformer
    cache, dataset = LatentCache(options.quickstart / "latents"), Dataset(options.quickstart / "world")
    ladder = Ladder(base, cache, dataset, options.out, options.steps, options.prompts)
    reference = rung_config(ladder, REFERENCE)
    tokenizer = prepare_tokenizer(reference, cache, options.out)
    budget = options.steps * step_counts(reference, ladder, tokenizer)["flops"]
    for name in chosen:
        train_rung(ladder, name, budget)


if __name__ == "__main__":
    main()
