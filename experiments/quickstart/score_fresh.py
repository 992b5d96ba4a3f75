"""Score a quickstart run on prompts that its dataset does not have.

    python experiments/quickstart/score_fresh.py --workdir=runs/quickstart --count=256
    python experiments/quickstart/score_fresh.py --workdir=runs/quickstart --count=256 --short

The prompts are captions of other clips of the same world, only such as no clip of the run's dataset has, trained on or
held out. Prints what the oracle finds in the real clips, in the same clips through the autoencoder, and in clips
generated from their captions; then how diverse the clips of one prompt are that show what it says, against the world's
own clips of that caption (1 is as diverse, 0 always the same).

With --distinct no two prompts are the same, and their captions may be in the dataset: of other clips. --model=NAME
scores a model that comes with the package, or an exported one, in place of the run in --workdir.

With --short the prompts name no background ("a red circle moves left"), and the same facts are scored; training clips
may have these captions. With --larger=2 the generated clips have twice the height, width and steps in time: sizes that
the model was not trained on.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from sora_jax.config import check, from_dict, load
from sora_jax.data.storing.manifest import Dataset
from sora_jax.evaluate.diversity import Diversity, diversity, mean_diversity, world_clips
from sora_jax.evaluate.world import Score, score
from sora_jax.generate.run import Run, load_run
from sora_jax.quickstart import QuickstartConfig, default_config
from sora_jax.worlds import HELD_OUT, WorldConfig, clip, scene
from sora_jax.worlds.captions import parse, write

FIRST = HELD_OUT + 1_000_000  # far behind the held-out clips of any dataset
REAL = 64  # of the world's own clips that the diversity of a prompt is compared with


def fresh_clips(world: WorldConfig, seen: set[str], count: int, distinct: bool = False) -> list[tuple[str, np.ndarray]]:
    """Return the first `count` moving clips, from FIRST on, with a caption that is not seen; distinct: nor twice."""
    found, seen = [], set(seen)
    for index in range(FIRST, FIRST + 1000 * count):
        caption = scene(world, index).caption
        if "moves" in caption and caption not in seen:
            found.append((caption, clip(world, index)[0]))
            if distinct:
                seen.add(caption)
            if len(found) == count:
                return found
    check(False, f"--count is {count}; this world has only {len(found)} such clips among {1000 * count}")


def line(name: str, found: Score) -> str:
    rates = ", ".join(f"{fact} {getattr(found, fact):.1%}" for fact in ("colour", "kind", "motion", "count"))
    return (
        f"{name:28} all of colour, kind and motion {found.triple:6.1%}   ({rates})   "
        f"shape constancy {found.shape_constancy:6.1%}, edge error {found.edge_error:.4f}, speckle {found.speckle:.4f}"
    )


def prompts_of(captions: Sequence[str], short: bool) -> list[str]:
    """Return the captions, or, if they are to be short, what they say of shapes alone."""
    return [write(parse(caption), "short") for caption in captions] if short else list(captions)


def larger(size: tuple[int, int, int], factor: int) -> tuple[int, int, int]:
    """Return the size (T, H, W) of a clip whose sides and steps in time are multiplied."""
    frames, height, width = size
    return 1 + factor * (frames - 1), factor * height, factor * width


def measure_diversity(
    run: Run, config: QuickstartConfig, prompts: Sequence[tuple[str, tuple[int, int, int]]], seeds: int
) -> list[Diversity]:
    """Sample each prompt at its size (T, H, W) from as many seeds, and compare with the world's own clips."""
    asked = [pair for pair in prompts for _ in range(seeds)]
    texts, sizes = [text for text, _ in asked], [size for _, size in asked]
    clips = run.generate(texts, sizes, config.show.steps or None, seed=2)
    groups = [clips[i : i + seeds] for i in range(0, len(clips), seeds)]
    return [
        diversity(group, world_clips(config.world, text, size, REAL), text)
        for (text, size), group in zip(prompts, groups, strict=True)
    ]


def diversity_line(name: str, found: Diversity) -> str:
    values = ", ".join(f"{fact} {value:.2f}" for fact, value in dataclasses.asdict(found).items())
    return f"diversity: {values}   {name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--config", default=None, help="of the quickstart run (default: its full form)")
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--short", action="store_true", help="prompts that name no background")
    parser.add_argument("--distinct", action="store_true", help="different prompts, whose captions may be trained on")
    parser.add_argument("--model", default="", help="exported model, or its name (default: WORKDIR/transformer)")
    parser.add_argument("--larger", type=int, default=1, help="factor of height, width and steps in time")
    parser.add_argument("--prompts", type=int, default=4, help="prompts whose diversity is measured (0: none)")
    parser.add_argument("--seeds", type=int, default=16, help="clips of each of them")
    options = parser.parse_args()
    config = from_dict(QuickstartConfig, load(options.config or default_config()))
    rows = () if options.distinct else Dataset(options.workdir / "world").rows()
    seen = {caption for row in rows for caption in row["captions"]}
    captions, clips = zip(*fresh_clips(config.world, seen, options.count, options.distinct), strict=True)
    print(f"{len(captions)} clips, {len(set(captions))} different captions")
    print(line("real clips", score(captions, clips)), flush=True)
    run = load_run(options.model or options.workdir / "transformer")
    with jax.set_mesh(run.mesh):
        order = sorted(range(len(clips)), key=lambda i: clips[i].shape)
        decoded = list(run.autoencoder.decode(run.autoencoder.encode(clips[i] for i in order)))
    print(line("through the autoencoder", score([captions[i] for i in order], decoded)), flush=True)
    prompts, sizes = prompts_of(captions, options.short), [larger(c.shape[:3], options.larger) for c in clips]
    generated = run.generate(prompts, sizes, config.show.steps or None, seed=1)
    name = "generated from short prompts" if options.short else "generated from the captions"
    print(line(name, score(prompts, generated)), flush=True)
    chosen = list(dict(zip(prompts, sizes, strict=True)).items())[: options.prompts]
    if chosen:
        found = measure_diversity(run, config, chosen, options.seeds)
        for (text, _), each in zip(chosen, found, strict=True):
            print(diversity_line(text, each))
        print(diversity_line(f"mean of {len(found)} prompts x {options.seeds} seeds", mean_diversity(found)))


if __name__ == "__main__":
    main()
