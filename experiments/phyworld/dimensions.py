"""Measure what a linear head of D channels loses of the tokens of a world, whatever it has learnt.

    python experiments/phyworld/dimensions.py --scenario=collision

A linear map from D channels, normalised to mean 0, and a bias reach an affine space of at most D - 1 dimensions. Prints
the mean square error of the best such space for tokens of held-out clips, fitted by principal components to tokens of
training clips: no network of that width with a linear head has less. Pixels run from -1 to 1, as in training.
"""

import argparse

import numpy as np

from sora_jax.data.packing.packs import patchify
from sora_jax.worlds.phyworld import HELD_OUT, SCENARIOS, PhyworldConfig, count_of, draw

WIDTHS = (64, 96, 128, 192, 256, 384, 512)


def tokens_of(world: PhyworldConfig, indices: np.ndarray, patch: tuple[int, int, int]) -> np.ndarray:
    """Return the tokens after the first row of each clip, (N, P)."""
    clips = (draw(world, int(index)).astype(np.float32) / 127.5 - 1 for index in indices)
    first = world.size // patch[1] * (world.size // patch[2])
    return np.concatenate([patchify(clip, patch)[first:] for clip in clips])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", choices=SCENARIOS, default="collision")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--patch", type=int, nargs=3, default=(3, 8, 8), help="frames, rows and columns of a token")
    parser.add_argument("--clips", type=int, default=600, help="of training that the space is fitted to")
    parser.add_argument("--held-out", type=int, default=150, help="clips that are measured")
    options = parser.parse_args()
    world = PhyworldConfig(scenario=options.scenario, size=options.size, frames=33)
    patch = tuple(options.patch)
    training = np.random.default_rng(0).choice(count_of(world), options.clips, replace=False)
    fitted, held_out = (tokens_of(world, of, patch) for of in (training, HELD_OUT + np.arange(options.held_out)))
    middle = fitted.mean(0)
    _, directions = np.linalg.eigh(np.cov(fitted.T))
    held_out = held_out - middle
    print(f"mean square of the tokens around their mean: {np.square(held_out).mean():.4f}")
    for width in WIDTHS:
        if width - 1 < min(len(middle), len(fitted)):  # a space of fewer dimensions than there are tokens to fit it to
            kept = directions[:, -(width - 1) :]
            rest = held_out - held_out @ kept @ kept.T
            print(f"width {width:4}: {np.square(rest).mean():.5f}")


if __name__ == "__main__":
    main()
