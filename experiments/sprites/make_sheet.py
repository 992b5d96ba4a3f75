"""Make a sheet of held-out prompts: the caption, what was generated, and the real clip beside it.

    python experiments/sprites/make_sheet.py --workdir=runs/sprites --data=data/sprites --out=sprites.png

Takes clips of the dataset that no part was trained on, evenly spread, and generates at the size of each real clip.
Nothing is chosen by its looks: the same arguments give the same sheet.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sora_jax.config import check
from sora_jax.data.storing.manifest import Dataset, caption_of
from sora_jax.data.viewing.sheets import contact_sheet, strip
from sora_jax.data.viewing.write import save_png
from sora_jax.generate.run import load_run

GAP = 12


def choose_rows(dataset: Dataset, split: str, count: int) -> list[dict]:
    """Choose `count` manifest rows of clips that are not of the trained split, evenly spread."""
    rows = dataset.held_out(split)
    check(bool(rows), f"--data is {str(dataset.path)!r}; it holds no clip outside the split {split!r}")
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, count).astype(int))]


def side_by_side(generated: np.ndarray, real: np.ndarray, shown: int, scale: int) -> np.ndarray:
    """Draw two clips of equal height as strips, generated left, real right; uint8 (H, W, 3)."""
    left, right = strip(generated, shown, scale), strip(real, shown, scale)
    return np.concatenate([left, np.full((len(left), GAP, 3), 255, np.uint8), right], axis=1)


def make_sheet(pairs: Sequence[tuple[np.ndarray, np.ndarray]], captions: Sequence[str], shown: int, scale: int):
    """Draw one row per pair with its caption below; uint8 (H, W, 3)."""
    rows = [side_by_side(generated, real, shown, scale)[None] for generated, real in pairs]
    return contact_sheet(rows, captions, columns=1, shown=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="run folder of a trained transformer")
    parser.add_argument("--data", type=Path, required=True, help="dataset folder with the real clips")
    parser.add_argument("--out", type=Path, required=True, help="a .png")
    parser.add_argument("--autoencoder", type=Path, help="one whose decoder was trained further (default: the run's)")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--shown", type=int, default=5, help="frames shown of each clip")
    parser.add_argument("--scale", type=int, default=1, help="pixels are enlarged by this factor")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    run, dataset = load_run(options.workdir, options.autoencoder), Dataset(options.data)
    rows = choose_rows(dataset, run.config.split, options.count)
    captions = [caption_of(row) for row in rows]
    sizes = [(row["frames"], row["height"], row["width"]) for row in rows]
    generated = run.generate(captions, sizes, options.steps, options.guidance, options.seed)
    pairs = [(clip, dataset[row["index"]].frames) for clip, row in zip(generated, rows, strict=True)]
    print(save_png(options.out, make_sheet(pairs, captions, options.shown, options.scale)))


if __name__ == "__main__":
    main()
