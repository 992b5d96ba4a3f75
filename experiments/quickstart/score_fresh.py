"""Score a quickstart run on prompts that no choice of its settings has seen.

    python experiments/quickstart/score_fresh.py --workdir=runs/quickstart --count=256

The 64 prompts that the quickstart scores also served to choose its settings. These are captions of other clips of the
same world, only such as no clip of the run's dataset has, trained on or held out. Prints what the oracle finds in the
real clips, in the same clips through the autoencoder, and in clips generated from their captions.
"""

import argparse
from pathlib import Path

import jax
import numpy as np

from sora_jax.config import check, from_dict, load
from sora_jax.data.manifest import Dataset, caption_of
from sora_jax.data.world import HELD_OUT, WorldConfig, clip, scene
from sora_jax.evaluate.world import Score, score
from sora_jax.generate.run import load_run
from sora_jax.quickstart import QuickstartConfig, default_config

FIRST = HELD_OUT + 1_000_000  # far behind the held-out clips of any dataset


def fresh_clips(world: WorldConfig, seen: set[str], count: int) -> list[tuple[str, np.ndarray]]:
    """Return the first `count` moving clips, from FIRST on, whose caption is not among the seen."""
    found = []
    for index in range(FIRST, FIRST + 1000 * count):
        caption = scene(world, index).caption
        if "moves" in caption and caption not in seen:
            found.append((caption, clip(world, index)[0]))
            if len(found) == count:
                return found
    check(False, f"--count is {count}; this world has only {len(found)} such clips among {1000 * count}")


def line(name: str, found: Score) -> str:
    rates = ", ".join(f"{fact} {getattr(found, fact):.1%}" for fact in ("colour", "kind", "motion", "count"))
    return f"{name:28} all of colour, kind and motion {found.triple:6.1%}   ({rates})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--config", default=None, help="of the quickstart run (default: its full form)")
    parser.add_argument("--count", type=int, default=256)
    options = parser.parse_args()
    config = from_dict(QuickstartConfig, load(options.config or default_config()))
    seen = {caption_of(row) for row in Dataset(options.workdir / "world").rows()}
    captions, clips = zip(*fresh_clips(config.world, seen, options.count), strict=True)
    print(f"{len(captions)} clips, {len(set(captions))} different captions")
    print(line("real clips", score(captions, clips)), flush=True)
    run = load_run(options.workdir / "transformer")
    with jax.set_mesh(run.mesh):
        order = sorted(range(len(clips)), key=lambda i: clips[i].shape)
        decoded = list(run.autoencoder.decode(run.autoencoder.encode(clips[i] for i in order)))
    print(line("through the autoencoder", score([captions[i] for i in order], decoded)), flush=True)
    generated = run.generate(captions, [c.shape[:3] for c in clips], config.show.steps or None, seed=1)
    print(line("generated from the captions", score(captions, generated)))


if __name__ == "__main__":
    main()
