"""Train transformers and U-Nets on one latent cache with equal FLOPs, on four rungs, and measure them.

    sora-jax quickstart
    python experiments/unet/train.py --latents=runs/quickstart/latents --data=runs/quickstart/world \\
        --config=configs/quickstart.py --out=runs/unet_world
    python experiments/unet/train.py --latents=data/sprites_latents --data=data/sprites \\
        --config=configs/sprites.py:transformer --out=runs/unet_sprites
    python experiments/unet/draw.py --world=runs/unet_world --sprites=runs/unet_sprites

Both networks of a rung see the same clips with the same recipe (the config's, but for given frames and the shift of
times, which follows the number of tokens). The transformer is trained for --steps steps, the U-Net for as many as cost
the same FLOPs. Measured are the held-out loss and, on the world, by the oracle: agreement with held-out prompts, and
identity and shapes frame by frame, for sizes and durations of the training and for others; on sprites agreement by the
classifier of experiments/sprites. A call that was stopped goes on where it was.
"""

import argparse
import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from match import denoiser_run

from sora_jax.config import check, read_json, to_dict
from sora_jax.data.feeding.pipeline import PackedBatches
from sora_jax.data.storing.latents import LatentCache
from sora_jax.data.storing.manifest import Dataset, caption_of
from sora_jax.evaluate.consistency import average, in_worlds_words, measure
from sora_jax.evaluate.world import held_out_prompts
from sora_jax.files import write_json
from sora_jax.generate.run import Run
from sora_jax.models.denoiser import DenoiserConfig, denoiser_specs
from sora_jax.models.unet_layers import UNetConfig
from sora_jax.nn.params import count
from sora_jax.parallel.mesh import make_mesh
from sora_jax.parallel.settings import prepare_jax
from sora_jax.train.denoiser import DenoiserRun, batch_counts, denoiser_job, prepare_tokenizer
from sora_jax.train.frozen import load_autoencoder
from sora_jax.train.given import GivenConfig
from sora_jax.train.held_out import HeldOut, HeldOutClips
from sora_jax.train.loop import fit
from sora_jax.train.state import MODEL

TRANSFORMERS = {"XS": (2, 64, 2), "S": (2, 96, 3), "M": (3, 128, 4), "L": (4, 192, 6)}  # depth, width, heads
# Width, multipliers, levels with attention, blocks: FLOPs of a clip within 10 % of the transformer's (match.py).
UNETS = {
    "world": {
        "XS": (8, (1, 2), (1,), 1),
        "S": (8, (1, 2), (0, 1), 2),
        "M": (16, (1, 2), (1,), 2),
        "L": (32, (1, 2), (0, 1), 1),
    },
    "sprites": {
        "XS": (8, (1, 2, 2), (2,), 1),
        "S": (8, (1, 2, 4), (1, 2), 1),
        "M": (16, (1, 2, 2), (1, 2), 1),
        "L": (24, (1, 2, 3), (1, 2), 1),
    },
}
NETWORKS = ("transformer", "unet")
SAMPLING: dict[str, Any] = {"steps": 15, "guidance": 2.0, "seed": 1}
FRAMES = (5, 9, 13, 17)  # the world's clips have 5 or 9 frames
SIZES = ((24, 36), (36, 24), (36, 36), (24, 48))  # and the first two of these sizes, or 24 x 24


def rung_run(base: DenoiserRun, world: str, rung: str, network: str) -> DenoiserRun:
    """Return the run of a network: the same recipe and as much room in packs, whatever a token is."""
    old, text = base.model, base.model.text
    if network == "transformer":
        depth, width, heads = TRANSFORMERS[rung]
        model: DenoiserConfig = dataclasses.replace(old, depth=depth, width=width, heads=heads, unroll=depth)
        finer, margin = 1, 1.0
    else:
        width, multipliers, attended, blocks = UNETS[world][rung]
        model = UNetConfig(
            width, multipliers, blocks, attended, 8 if width % 16 else 16, latent_channels=old.latent_channels,
            text=text, position_theta=old.position_theta, input_skip=old.input_skip, remat="none",
        )  # fmt: skip
        finer, margin = old.patch_values // model.patch_values, 1.25
    times = dataclasses.replace(base.diffusion.times, base_tokens=base.diffusion.times.base_tokens * finer)
    packing = dataclasses.replace(base.packing, length=round(base.packing.length * finer * margin), rows_per_clip=1)
    return dataclasses.replace(
        base,
        model=model,
        packing=packing,
        diffusion=dataclasses.replace(base.diffusion, times=times, given=GivenConfig()),
        preview=dataclasses.replace(base.preview, prompts=(), sizes=()),
        held_out=dataclasses.replace(base.held_out, every=0),
    )


def mean_counts(run: DenoiserRun, cache: LatentCache, tokenizer: Any) -> dict[str, float]:
    """Return the mean clips, tokens and FLOPs of a training step."""
    batches = PackedBatches(cache, tokenizer, run.packs, run.batch, run.seed, run.split)
    counts = [batch_counts(run.model, batches[step]) for step in range(30)]
    return {name: float(np.mean([c[name] for c in counts])) for name in ("clips", "tokens", "flops")}


def train(options: argparse.Namespace, rung: str, network: str, budget: float | None) -> float:
    """Train and measure one network; returns the FLOPs of its training. budget: those that it has, None: --steps."""
    cache, dataset = LatentCache(options.latents), Dataset(options.data)
    run = rung_run(denoiser_run(options.config), options.world, rung, network)
    if network == "unet":
        rate = run.optim.learning_rate * options.unet_rate
        run = dataclasses.replace(run, optim=dataclasses.replace(run.optim, learning_rate=rate))
    folder = options.out / f"{rung}_{network}"
    folder.mkdir(parents=True, exist_ok=True)
    mesh, tokenizer = make_mesh(run.mesh), prepare_tokenizer(run, cache, folder)
    counts = mean_counts(run, cache, tokenizer)
    steps = options.steps if budget is None else max(round(budget / counts["flops"]), 1)
    if (folder / "found.json").exists() and read_json(folder / "found.json")["steps"] == steps:
        return steps * counts["flops"]
    every = max(steps // 10, 1)
    loop = dataclasses.replace(run.loop, steps=steps, log_every=every, save_every=every, preview_every=steps)
    run = dataclasses.replace(run, loop=loop)
    described = {"rung": rung, "network": network, "steps": steps, "parameters": count(denoiser_specs(run.model))}
    described |= {"forward_flops_per_clip": counts["flops"] / counts["clips"] / 3, **counts}
    print(json.dumps(described), flush=True)
    state = fit(
        denoiser_job(run, cache, tokenizer, None, folder / "tokens"), loop, run.seed, mesh, folder, to_dict(run)
    )
    with jax.set_mesh(mesh):
        averages = {name: each[0] for name, each in state.ema.items()}
        metrics = HeldOut(run, HeldOutClips(run, cache, tokenizer))(averages)
        trained = Run(run, averages[MODEL], tokenizer, mesh, autoencoder=load_autoencoder(cache.path))
        ask = world_agreement if options.world == "world" else SpritesOracle(dataset)
        found = ask(trained, dataset, options.prompts)
    write_json(folder / "found.json", described | {"held_out_loss": float(metrics["held_out/loss"]), "found": found})
    return steps * counts["flops"]


def world_agreement(run: Run, dataset: Dataset, prompts: int) -> dict[str, dict]:
    """Return what the oracle finds in clips of held-out prompts: as asked for, of other durations, of other sizes."""
    chosen = held_out_prompts(dataset, prompts)
    texts = [prompt for prompt, _ in chosen]
    if not texts:
        return {}
    check(all(map(in_worlds_words, texts)), "--data has captions that are not in the world's words")
    wanted = {"held-out": [size for _, size in chosen]}
    wanted |= {f"{frames} frames": [(frames, *size[1:]) for _, size in chosen] for frames in FRAMES}
    wanted |= {f"{height} x {width}": [(9, height, width)] * len(texts) for height, width in SIZES}
    sizes = [size for group in wanted.values() for size in group]
    clips = iter(run.generate(texts * len(wanted), sizes, **SAMPLING))  # at once: one program
    return {name: agreement(texts, list(islice(clips, len(texts)))) for name in wanted}


def agreement(prompts: Sequence[str], clips: Sequence[np.ndarray]) -> dict:
    """Return the oracle's rates: all facts, each of them, and identity and shapes frame by frame."""
    found = average([measure(*pair) for pair in zip(prompts, clips, strict=True)])
    return {"clips": found.clips, **found.agreement, **found.constancy, "curves": found.curves}


class SpritesOracle:
    """Ask the classifier of experiments/sprites, which is trained on real clips, about generated ones."""

    def __init__(self, dataset: Dataset):
        path = Path(__file__).parents[1] / "sprites" / "classify.py"
        spec = importlib.util.spec_from_file_location("classify", path)
        assert spec and spec.loader
        self.room = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.room)
        rows = [row for row in dataset.rows() if row["split"] == "train"]
        facts = [self.room.facts_of(caption_of(row)) for row in rows]
        self.words = {fact: sorted({each[fact] for each in facts}) for fact in self.room.FACTS}
        clips = self.room.stacked([dataset[row["index"]].frames for row in rows])
        classes = {fact: len(known) for fact, known in self.words.items()}
        self.classify = self.room.train(clips, self._labels(rows), classes, epochs=20, seed=0)

    def _labels(self, rows: Sequence[dict]) -> dict[str, np.ndarray]:
        facts = [self.room.facts_of(caption_of(row)) for row in rows]
        return {fact: np.array([known.index(each[fact]) for each in facts]) for fact, known in self.words.items()}

    def __call__(self, run: Run, dataset: Dataset, prompts: int) -> dict[str, dict]:
        """Return the rates of generated clips of held-out captions, and of their real clips."""
        rows = list(dataset.held_out())[:prompts]
        if not rows:
            return {}
        real = [dataset[row["index"]].frames for row in rows]
        made = run.generate([caption_of(row) for row in rows], [clip.shape[:3] for clip in real], **SAMPLING)
        said = self._labels(rows)
        columns = {"held-out": made, "real": real}
        return {name: self.room.rates(self.classify(self.room.stacked(clips)), said) for name, clips in columns.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--world", choices=sorted(UNETS), default=None, help="default: sprites for its config")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1200, help="of the transformer")
    parser.add_argument("--unet-rate", type=float, default=1.0, help="learning rate of U-Nets over the config's")
    parser.add_argument("--prompts", type=int, default=32, help="held-out prompts at most")
    parser.add_argument("--rungs", default=",".join(TRANSFORMERS))
    options = parser.parse_args()
    check(options.steps >= 1, f"--steps is {options.steps}; it must be at least 1")
    options.world = options.world or ("sprites" if "sprites" in options.config else "world")
    for rung in options.rungs.split(","):
        check(rung in TRANSFORMERS, f"--rungs has {rung!r}; the rungs are {', '.join(TRANSFORMERS)}")
    prepare_jax()
    for rung in options.rungs.split(","):
        budget = None
        for network in NETWORKS:
            budget = train(options, rung, network, budget)


if __name__ == "__main__":
    main()
