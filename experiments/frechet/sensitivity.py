"""Measure what the own features of a dataset notice: held-out clips as they are, and disturbed, against training clips.

python experiments/frechet/sensitivity.py --data=data/sprites
"""

import argparse
from pathlib import Path

import numpy as np

from sora_jax.data.storing.manifest import Dataset, evenly_spread
from sora_jax.evaluate.frechet_report import FrechetOptions, frechet_reports
from sora_jax.parallel.settings import prepare_jax


def noisy(clip: np.ndarray) -> np.ndarray:
    """Add noise of a deviation of 20 grey levels."""
    noise = np.random.default_rng(0).normal(0, 20, clip.shape)
    return np.clip(clip + noise, 0, 255).astype(np.uint8)


DISTURBED = {
    "as they are": lambda clip: clip,
    "noise": noisy,
    "every second pixel, twice": lambda clip: clip[:, ::2, ::2].repeat(2, 1).repeat(2, 2),
    "backwards": lambda clip: clip[::-1],
    "the first frame, held": lambda clip: clip[:1].repeat(len(clip), 0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="dataset folder")
    parser.add_argument("--clips", type=int, default=360, help="of each set, at most")
    options = parser.parse_args()
    prepare_jax()
    dataset = Dataset(options.data)
    real, held_out = (
        [dataset[row["index"]].frames for row in evenly_spread(rows, options.clips)]
        for rows in (dataset.rows("train"), dataset.held_out())
    )
    sets = {name: map(change, held_out) for name, change in DISTURBED.items()}
    for name, report in frechet_reports("own", real, sets, FrechetOptions(data=options.data, batch=64)).items():
        print(f"{name:26} {report.text}", flush=True)


if __name__ == "__main__":
    main()
