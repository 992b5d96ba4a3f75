"""Count the clips whose shape is wholly in the frame: a model of native aspect ratios against one of square crops.

    python experiments/framing/measure.py --native=runs/framing_native --square=runs/framing_square

The prompts are captions of clips of the world that neither model saw. Each model is asked for the sizes that it was
trained on, and the model of squares also for the native sizes. Writes bars.png and framing.png, the same prompts by
each, to the folder --out.
"""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent))
from config import world

from sora_jax.data.fit import crop_box
from sora_jax.data.viewing.sheets import strip
from sora_jax.data.viewing.write import save_png
from sora_jax.generate.run import load_run
from sora_jax.worlds import HELD_OUT, clip, scene
from sora_jax.worlds.oracle import agreement
from sora_jax.worlds.oracle.backdrop import fit_plane
from sora_jax.worlds.oracle.reading import find_colours, grey_levels

FIRST = HELD_OUT + 1_000_000
SHOWN = 6


def in_frame(frames: np.ndarray) -> bool:
    """Return True if there is a shape, and no pixel of one on the border of any frame."""
    grey = grey_levels(frames)
    inside_THW = find_colours(grey, fit_plane(grey))[1]
    border_THW = np.pad(np.zeros_like(inside_THW[:, 1:-1, 1:-1]), ((0, 0), (1, 1), (1, 1)), constant_values=True)
    return bool(inside_THW.any()) and not (inside_THW & border_THW).any()


def squares(frames: np.ndarray) -> np.ndarray:
    """Return the square in the middle of each frame."""
    side = min(frames.shape[1:3])
    left, top, right, bottom = map(int, crop_box(*frames.shape[1:3], side, side))
    return frames[:, top:bottom, left:right]


def draw(shares: dict[str, float], path: Path) -> None:
    """Draw bars of the share of clips whose shapes are wholly in the frame."""
    figure: Figure
    figure, axes = plt.subplots(figsize=(7, 2.2), layout="constrained")
    bars = axes.barh(list(shares), [100 * share for share in shares.values()])
    axes.bar_label(bars, fmt="%.0f")
    axes.invert_yaxis()
    axes.set_xlabel("% of clips whose shapes are wholly in the frame")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--native", type=Path, required=True)
    parser.add_argument("--square", type=Path, required=True)
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("experiments/framing"))
    options = parser.parse_args()
    moving = (index for index in range(FIRST, FIRST + 100 * options.count) if "moves" in scene(world(), index).caption)
    real, prompts = zip(*(clip(world(), index) for index, _ in zip(moving, range(options.count))), strict=True)
    native = [frames.shape[:3] for frames in real]
    square = [(frames, min(sides), min(sides)) for frames, *sides in native]
    one, other = load_run(options.native), load_run(options.square)
    cases = {
        "real clips": list(real),
        "real clips, square crops": [squares(frames) for frames in real],
        "trained on native sizes, native": one.generate(prompts, native, seed=1),
        "trained on squares, squares": other.generate(prompts, square, seed=1),
        "trained on squares, native": other.generate(prompts, native, seed=1),
    }
    shares = {}
    for name, clips in cases.items():
        found = [agreement(prompt, frames) for prompt, frames in zip(prompts, clips, strict=True)]
        rates = {fact: np.mean([getattr(a, fact) is not False for a in found]) for fact in ("kind", "motion")}
        shares[name] = whole = float(np.mean([in_frame(frames) for frames in clips]))
        print(
            f"{name:34} wholly in frame {whole:.1%}, kind {rates['kind']:.1%}, motion {rates['motion']:.1%}", flush=True
        )
    draw(shares, options.out / "bars.png")
    rows = []
    for i in range(SHOWN):
        strips = [strip(clips[i], 5, 2) for clips in list(cases.values())[2:]]
        height = max(one.shape[0] for one in strips)
        rows.append(
            np.concatenate(
                [np.pad(s, ((0, height - len(s)), (0, 6), (0, 0)), constant_values=255) for s in strips], axis=1
            )
        )
    width = max(row.shape[1] for row in rows)
    rows = [np.pad(row, ((0, 6), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    save_png(options.out / "framing.png", np.concatenate(rows))


if __name__ == "__main__":
    main()
