"""Render the embedded world of configs/world.py and encode it by the autoencoder that comes with the package.

    python experiments/claims/latents.py --out=runs/claims

Writes OUT/world and OUT/latents, which targets.py and experiments/scaling/train_ladder.py read. Nothing is trained.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/claims"))
    parser.add_argument("--clips", type=int, default=CLIPS)
    options = parser.parse_args()
    prepare_jax()
    config = from_dict(QuickstartConfig, load(str(package_config("world.py"))))
    render_world(dataclasses.replace(config, clips=options.clips, holdout=HOLDOUT, workers=1), options.out)
    encode_dataset(Path("world"), options.out / "world", options.out / "latents")


if __name__ == "__main__":
    main()
