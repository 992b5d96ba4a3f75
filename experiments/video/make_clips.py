"""Draw a folder of captioned videos and pictures, to try the commands for own clips without any.

    python experiments/video/make_clips.py --out=clips
    sora-jax data build --config=configs/video.py:small_data --path=clips --out=data/small

They are clips of the embedded world (`sora_jax/worlds`), larger than the quickstart's: one shape on a background, 96
pixels on the shorter side, up to 25 frames at 8 a second, with their captions in captions.csv.
"""

import argparse
import csv
from dataclasses import replace
from pathlib import Path

from sora_jax.data.viewing.write import write_video
from sora_jax.worlds import WorldConfig, scene
from sora_jax.worlds.render import render

WORLD = WorldConfig(
    sizes=((96, 96), (96, 144), (144, 96)),
    frames=(9, 17, 25),
    image_share=0.3,
)


def make_clips(out: Path, count: int, seed: int = 0, labels: bool = False) -> None:
    """Write `count` clips as 0000.mp4 or 0000.png, and captions.csv with the columns file and caption."""
    world = replace(WORLD, seed=seed)
    header = ("file", "caption", "label") if labels else ("file", "caption")
    rows = [header]
    for index in range(count):
        planned = scene(world, index)
        frames = render(planned)
        path = write_video(out / f"{index:04d}.{'mp4' if len(frames) > 1 else 'png'}", frames, world.fps)
        row = (path.name, planned.caption, planned.shapes[0].kind)
        rows.append(row[: len(header)])
    with open(out / "captions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--count", type=int, default=300, help="number of clips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--labels", action="store_true", help="also a column label: the kind of the shape")
    options = parser.parse_args()
    make_clips(options.out, options.count, options.seed, options.labels)
    print(f"{options.count} clips in {options.out}")


if __name__ == "__main__":
    main()
