"""Draw the tasks as moving clips, side by side, each with its name below: frames that are given have an orange border.

    python experiments/tasks/make_moving.py --out=experiments/tasks/moving.webp

All are made by the model `world` of the package from one clip, at the first seed: nothing is chosen by its looks.
"""

import argparse
from pathlib import Path

import numpy as np

from sora_jax.data.fit import pad_frames
from sora_jax.data.viewing.sheets import contact_sheet
from sora_jax.data.viewing.write import write_video
from sora_jax.generate.run import load_run
from sora_jax.generate.tasks import Tasks

SIZE = (9, 48, 72)
TIMES = 2  # each clip is enlarged so many times
MOVES = "a red circle moves right on a plain white background"
STAYS = "a red circle stays still on a plain white background"
OTHER = "a blue square moves right on a plain white background"


def framed(clip: np.ndarray, given: slice | None) -> np.ndarray:
    """Enlarge a clip; draw a frame around the frames that were given."""
    clip = np.pad(clip.repeat(TIMES, 1).repeat(TIMES, 2), ((0, 0), (4, 4), (4, 4), (0, 0)), constant_values=255)
    if given is not None:
        inner, clip[given] = clip[given, 4:-4, 4:-4].copy(), (230, 120, 0)
        clip[given, 4:-4, 4:-4] = inner
    return clip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a .gif or .webp")
    options = parser.parse_args()
    run = load_run("world")
    make = Tasks(run, context=5)
    clip = run.generate(MOVES, SIZE)
    mask = np.zeros((1, *SIZE[1:]), bool)
    mask[:, :, SIZE[2] // 2 :] = True
    made = {
        "text to video": (MOVES, None, None),
        "animate its first frame": (MOVES, make.animate(clip[:1], SIZE[0]), slice(0, 1)),
        "extend by 8 frames": (MOVES, make.extend(clip[:5], 8), slice(0, 5)),
        "what came before": (MOVES, make.extend(clip[4:], -8), slice(8, None)),
        "connect two clips": (MOVES, make.connect(clip[:3], clip[-4:], 6), np.r_[0:3, 9:13]),
        "a loop": (STAYS, make.loop((8, *SIZE[1:])), None),
        "in-paint the right half": (MOVES, make.fill(clip, mask), None),
        "edit, strength 0.8": (OTHER, make.edit(clip, 0.8), None),
    }
    tasks = {name: task for name, (_, task, _) in made.items() if task is not None}
    found = run.generate([made[name][0] for name in tasks], tasks=list(tasks.values()))
    clips = {"text to video": clip} | dict(zip(tasks, found, strict=True))
    length = max(map(len, clips.values()))
    shown = [pad_frames(framed(clips[name], given), length) for name, (_, _, given) in made.items()]
    sheets = [contact_sheet([clip[t : t + 1] for clip in shown], list(made), columns=4, shown=1) for t in range(length)]
    print(write_video(options.out, np.stack(sheets), 8.0))


if __name__ == "__main__":
    main()
