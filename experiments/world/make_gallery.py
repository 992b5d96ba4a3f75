"""Draw what the two models of the package make, side by side, with its prompts below.

    python experiments/world/make_gallery.py --out=experiments/world/gallery.gif

The prompts are those of the models' previews, at the first seed: nothing is chosen by its looks.
"""

import argparse
from pathlib import Path

import numpy as np

from sora_jax.data.fit import pad_frames
from sora_jax.data.viewing.sheets import contact_sheet
from sora_jax.data.viewing.write import write_video
from sora_jax.generate.run import load_run

SHOWN = 4  # clips of each model
SIDE = 192  # pixels of the larger side of a clip, about


def clips_of(name: str) -> tuple[list[str], list[np.ndarray]]:
    """Return the prompts of a model's previews and the clips that it makes of them, enlarged."""
    run = load_run(name)
    preview = run.config.preview
    prompts, sizes = list(preview.prompts[:SHOWN]), list(preview.sizes)
    clips = run.generate(prompts, sizes=sizes[:SHOWN] if len(sizes) > 1 else sizes[0])
    return prompts, [clip.repeat(s, 1).repeat(s, 2) for clip in clips for s in [SIDE // max(clip.shape[1:3])]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a .gif")
    options = parser.parse_args()
    models = [clips_of(name) for name in ("world", "sprites")]
    prompts, clips = [p for names, _ in models for p in names], [c for _, made in models for c in made]
    length = max(map(len, clips))
    clips = [pad_frames(clip, length) for clip in clips]
    stills = [[clip[t : t + 1] for clip in clips] for t in range(length)]
    sheets = [contact_sheet(still, prompts, columns=SHOWN, shown=1) for still in stills]
    print(write_video(options.out, np.stack(sheets), 8.0))


if __name__ == "__main__":
    main()
