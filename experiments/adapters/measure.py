"""Measure what runs know of Zorp, and what they still know of everybody else.

    python experiments/adapters/measure.py --data=data/sprites --out=experiments/adapters \\
        runs/sprites runs/zorp runs/zorp_full

Zorp: two clips of each of 20 moves (5 actions, 4 directions). "colour": clips whose figure has, in four of five pixels,
a colour near the line between Zorp's two. "move": clips whose silhouette is nearest to one of the right action and
direction, among the real clips of the split "train". Others: 40 held-out prompts; "move" is the same, PSNR is to the
real clip. Writes results.json and zorp.png: rows of moves, a strip for each run.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from make_character import BRIGHT, DARK, caption_of

from sora_jax.data.storing.manifest import Dataset, evenly_spread
from sora_jax.data.storing.manifest import caption_of as caption_of_row
from sora_jax.data.viewing.sheets import contact_sheet, strip
from sora_jax.data.viewing.write import save_png
from sora_jax.generate.run import Run, load_run

ACTIONS = ("slashing", "walking", "casting a spell", "shooting", "thrusting")
DIRECTIONS = ("to the left", "to the right", "towards the camera", "away from the camera")
SIZE = (9, 64, 64)
NEAR = 60.0  # distance of a colour to Zorp's line, in levels of 255
SHOWN = (0, 5, 8, 11, 14, 19)  # moves of the sheet


def silhouette(clip: np.ndarray) -> np.ndarray:
    """Share of the figure in each 4 x 4 pixels of each frame, as one vector."""
    figure = (clip.min(-1) < 200).astype(np.float32)
    return figure.reshape(len(clip), 16, 4, 16, 4).mean((2, 4)).ravel()


def move_of(caption: str) -> tuple[str, str]:
    return next((a, d) for a in ACTIONS for d in DIRECTIONS if a in caption and d in caption)


class Moves:
    """Tell the action and direction of a clip by the nearest silhouette of real ones."""

    def __init__(self, dataset: Dataset):
        rows = dataset.rows("train")
        self.moves = [move_of(caption_of_row(row)) for row in rows]
        self.gallery = np.stack([silhouette(dataset[row["index"]].frames) for row in rows])

    def __call__(self, clip: np.ndarray) -> tuple[str, str]:
        return self.moves[int(np.square(self.gallery - silhouette(clip)).sum(1).argmin())]


def is_zorp(clip: np.ndarray) -> bool:
    """Return True if four of five pixels of the figure are near the line between the two colours."""
    pixels = clip[clip.min(-1) < 200].astype(np.float64)
    along = np.clip((pixels - DARK) @ (BRIGHT - DARK) / np.square(BRIGHT - DARK).sum(), 0, 1)
    return bool((np.linalg.norm(pixels - DARK - along[:, None] * (BRIGHT - DARK), axis=1) < NEAR).mean() > 0.8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255.0**2 / np.square(a.astype(float) - b.astype(float)).mean()))


def of_zorp(run: Run, moves: Moves) -> tuple[dict, list[np.ndarray]]:
    wanted = [(a, d) for a in ACTIONS for d in DIRECTIONS] * 2
    clips = run.generate([caption_of(*move) for move in wanted], SIZE, guidance=2.0)
    right = np.mean([moves(clip) == move for clip, move in zip(clips, wanted, strict=True)])
    return {"zorp, colour": float(np.mean([is_zorp(clip) for clip in clips])), "zorp, move": float(right)}, clips


def of_others(run: Run, moves: Moves, dataset: Dataset) -> dict:
    rows = evenly_spread(dataset.held_out("train"), 40)
    captions = [caption_of_row(row) for row in rows]
    clips = run.generate(captions, SIZE, guidance=2.0)
    real = [dataset[row["index"]].frames for row in rows]
    return {
        "others, move": float(np.mean([moves(clip) == move_of(c) for clip, c in zip(clips, captions, strict=True)])),
        "others, PSNR": float(np.mean([psnr(a, b) for a, b in zip(clips, real, strict=True)])),
        "others, colour of zorp": float(np.mean([is_zorp(clip) for clip in clips])),
    }


def sheet(clips: Sequence[Sequence[np.ndarray]], names: Sequence[str]) -> np.ndarray:
    """Draw a row for each shown move: the strip of each run beside the others."""
    gap = np.full((SIZE[1], 12, 3), 255, np.uint8)
    wanted = [(a, d) for a in ACTIONS for d in DIRECTIONS]
    rows, titles = [], []
    for number in SHOWN:
        parts = [part for each in clips for part in (strip(each[number], 4, 1), gap)]
        rows.append(np.concatenate(parts[:-1], axis=1)[None])
        titles.append(f"{' | '.join(names)}: zorp, {', '.join(wanted[number])}")
    return contact_sheet(rows, titles, columns=1, shown=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, the first one before tuning")
    parser.add_argument("--data", type=Path, required=True, help="dataset folder of the sprites")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and zorp.png")
    options = parser.parse_args()
    dataset = Dataset(options.data)
    moves, found, clips = Moves(dataset), {}, []
    for folder in options.runs:
        run = load_run(folder)
        measured, made = of_zorp(run, moves)
        found[folder.name] = measured | of_others(run, moves, dataset)
        clips.append(made)
        print(folder.name, json.dumps(found[folder.name]))
    (options.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    save_png(options.out / "zorp.png", sheet(clips, [folder.name for folder in options.runs]))


if __name__ == "__main__":
    main()
