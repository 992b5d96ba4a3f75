"""Render the embedded world of configs/world.py and encode it by the autoencoder that comes with the package.

    python experiments/claims/latents.py --out=runs/claims
    python experiments/claims/latents.py --out=runs/claims_wide --wide

Writes OUT/world and OUT/latents, which targets.py and packing.py read. Nothing is trained. With --wide the clips have
the token counts of the "wider mix" of experiments/bench/packed_versus_padded.py: its frames, and twice its sizes, since
a token of the package's autoencoder is 24 pixels wide, not 12.
"""

import argparse
import dataclasses
from pathlib import Path

from sora_jax.config import from_dict, load
from sora_jax.config_files import package_config
from sora_jax.parallel.settings import prepare_jax
from sora_jax.quickstart import QuickstartConfig, render_world
from sora_jax.train.encode import encode_dataset

CLIPS = 3000
HOLDOUT = 0.25
WIDE = {
    "sizes": ((48, 48), (48, 72), (72, 48), (72, 72), (96, 96), (96, 168), (168, 96)),
    "frames": (5, 9, 17),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/claims"))
    parser.add_argument("--clips", type=int, default=CLIPS)
    parser.add_argument("--wide", action="store_true", help="clips of 12 to 252 tokens, in place of 4 to 30")
    options = parser.parse_args()
    prepare_jax()
    config = from_dict(QuickstartConfig, load(str(package_config("world.py"))))
    world = dataclasses.replace(config.world, **(WIDE if options.wide else {}))
    config = dataclasses.replace(config, world=world, clips=options.clips, holdout=HOLDOUT, workers=1)
    render_world(config, options.out)
    encode_dataset(Path("world"), options.out / "world", options.out / "latents")


if __name__ == "__main__":
    main()
