"""Ask two models the same short prompts: one that was trained on full captions is asked with expanded ones.

    python experiments/recaption/measure.py --full=runs/recaption_full --short=runs/recaption_short \\
        --world=runs/quickstart/world

Sora trains on full descriptions and expands what users type. Here both models see the same clips; one reads captions
that tell the background, one captions that do not. Prompts name no background. The oracle counts what the short prompt
says, and, of the expanded ones, the background too.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from sora_jax.config import from_dict, load
from sora_jax.data.storing.manifest import Dataset
from sora_jax.evaluate.world import Score, score
from sora_jax.generate.expand import expand_prompts
from sora_jax.generate.run import load_run
from sora_jax.quickstart import QuickstartConfig, default_config
from sora_jax.worlds import HELD_OUT, clip, scene
from sora_jax.worlds.captions import parse, write
from sora_jax.worlds.oracle import read

FIRST = HELD_OUT + 1_000_000
FACTS = ("triple", "colour", "kind", "motion", "shape_constancy")


def fresh(dataset: Path, count: int) -> tuple[list[str], list[tuple[int, int, int]]]:
    """Return short prompts and sizes of clips whose captions the dataset does not have."""
    world = from_dict(QuickstartConfig, load(default_config())).world
    seen = {caption for row in Dataset(dataset).rows() for caption in row["captions"]}
    prompts, sizes, index = [], [], FIRST
    while len(prompts) < count:
        caption = scene(world, index).caption
        if "moves" in caption and caption not in seen:
            prompts.append(write(parse(caption), "short"))
            sizes.append(clip(world, index)[0].shape[:3])
        index += 1
    return prompts, sizes


def draw(scores: dict[str, Score], path: Path) -> None:
    """Draw bars of the facts of each model."""
    figure: Figure
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for number, (name, found) in enumerate(scores.items()):
        values = [100 * getattr(found, fact) for fact in FACTS]
        axes.bar(np.arange(len(FACTS)) + 0.27 * (number - 1), values, 0.25, label=name)
    axes.set_xticks(range(len(FACTS)), ["all three", *FACTS[1:-1], "shape constancy"])
    axes.set_ylabel("% of clips")
    figure.legend(loc="outside upper center", ncols=len(scores), fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", type=Path, required=True, help="run trained on full captions")
    parser.add_argument("--short", type=Path, required=True, help="run trained on captions without a background")
    parser.add_argument("--world", type=Path, required=True, help="dataset of both")
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("experiments/recaption"))
    options = parser.parse_args()
    prompts, sizes = fresh(options.world, options.count)
    expanded = expand_prompts(prompts, "world")
    cases = {
        "short captions, short prompts": (options.short, prompts),
        "full captions, short prompts": (options.full, prompts),
        "full captions, expanded prompts": (options.full, expanded),
    }
    scores = {}
    for name, (folder, asked) in cases.items():
        clips = load_run(folder).generate(asked, sizes, seed=1)
        scores[name] = found = score(prompts, clips)
        told = [parse(prompt) for prompt in asked]
        ground = [read(c).tone == wanted.tone for c, wanted in zip(clips, told, strict=True) if wanted.tone]
        rates = ", ".join(f"{fact} {getattr(found, fact):.1%}" for fact in FACTS)
        print(f"{name:34} {rates}; background {np.mean(ground) if ground else float('nan'):.1%}", flush=True)
    draw(scores, options.out / "recaption.png")


if __name__ == "__main__":
    main()
