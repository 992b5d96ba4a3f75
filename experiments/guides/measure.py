"""Measure what sketches and key frames do: are shape and place of a clip those that they show?

    python experiments/guides/measure.py --workdir=runs/guides --quickstart=runs/quickstart

Sketches and key frames are of fresh clips of the world. Prints a table, and writes guides.png to the folder --out: of
each clip the sketch or the key frames, the clip that they guide, and the clip that they were drawn from.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
from score_fresh import fresh_clips

from sora_jax.config import from_dict, load
from sora_jax.data.storing.manifest import Dataset
from sora_jax.data.viewing.sheets import strip
from sora_jax.data.viewing.write import save_png
from sora_jax.generate.run import load_run
from sora_jax.generate.tasks import Tasks
from sora_jax.quickstart import QuickstartConfig, default_config
from sora_jax.train.drawings import draw_edges
from sora_jax.worlds.oracle import read

SHOWN = 5
LAST = 8


def compare(name: str, frame: int, clips: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> None:
    """Print how often the kind of shape in a frame is that of another clip, and how far the two shapes are apart."""
    kinds, colours, errors = [], [], []
    for clip, other in zip(clips, wanted, strict=True):
        (found,), (target,) = (read(each[frame : frame + 1]).shapes[:1] or (None,) for each in (clip, other))
        kinds.append(found is not None and found.kind == target.kind)
        colours.append(found is not None and found.colour == target.colour)
        if found is not None:
            errors.append(min(clip.shape[1:3]) * np.linalg.norm(found.path_T2[0] - target.path_T2[0]))
    place = np.array([error for error in errors if not np.isnan(error)])
    print(f"{name:44} kind {np.mean(kinds):6.1%}, colour {np.mean(colours):6.1%}, place within 3 pixels "
          f"{np.mean(place <= 3):6.1%}, median distance {np.median(place):.1f} pixels", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/guides"))
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"), help="for its world")
    parser.add_argument("--config", default=None, help="of the quickstart run (default: its full form)")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("experiments/guides"))
    options = parser.parse_args()
    config = from_dict(QuickstartConfig, load(options.config or default_config()))
    seen = {caption for row in Dataset(options.quickstart / "world").rows() for caption in row["captions"]}
    pairs = [pair for pair in fresh_clips(config.world, seen, 4 * options.count) if len(pair[1]) == LAST + 1]
    captions, clips = zip(*pairs[: options.count], strict=True)
    sizes = [clip.shape[:3] for clip in clips]
    run = load_run(options.workdir)
    make = Tasks(run)
    edges = [draw_edges(clip) for clip in clips]
    silent = [""] * len(clips)

    def sampled(tasks: Sequence, prompts: Sequence[str] = captions, **how) -> list[np.ndarray]:
        return run.generate(prompts, tasks=tasks, seed=1, **how)

    first = [make.guide(size, sketches={0: drawn[:1]}) for size, drawn in zip(sizes, edges)]
    last = [make.guide(size, sketches={LAST: drawn[LAST:]}) for size, drawn in zip(sizes, edges)]
    still = [make.guide((1, *size[1:]), sketches={0: drawn[:1]}) for size, drawn in zip(sizes, edges)]
    ends = [make.guide(clip.shape[:3], {0: clip[:1], LAST: clip[LAST:]}) for clip in clips]
    middle = [make.guide(clip.shape[:3], {4: clip[4:5]}) for clip in clips]
    plain = run.generate(captions, sizes, seed=1)
    compare("prompt alone, first frame", 0, plain, clips)
    compare("prompt alone, last frame", LAST, plain, clips)
    drawn = sampled(first)
    compare("prompt and sketch of the first frame", 0, drawn, clips)
    compare("no prompt, sketch of the first frame", 0, sampled(first, silent, guidance=1), clips)
    compare("image: prompt and sketch", 0, sampled(still), clips)
    compare("prompt and sketch of the last frame", LAST, sampled(last), clips)
    between = sampled(ends)
    compare("first frame and key frame 8, last frame", LAST, between, clips)
    at_4 = sampled(middle)
    compare("key frame 4 alone, frame 4", 4, at_4, clips)
    rows = []
    for number in range(SHOWN):
        blank = np.full_like(clips[number][:1], 255)
        shown = [edges[number][:1], blank, drawn[number], blank, between[number], blank, at_4[number], blank,
                 clips[number]]  # fmt: skip
        rows.append(np.concatenate([strip(clip, min(len(clip), 5), 2) for clip in shown], axis=1))
    width = max(row.shape[1] for row in rows)
    rows = [np.pad(row, ((0, 6), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    save_png(options.out / "guides.png", np.concatenate(rows))


if __name__ == "__main__":
    main()
