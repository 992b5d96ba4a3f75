"""Print parameters and forward FLOPs of a transformer and of U-Nets, and find the width that matches in FLOPs.

    python experiments/unet/match.py --transformer=configs/transformer.py:B --unet=configs/unet.py:B --latent=5,32,32

FLOPs are those of one clip with a caption of --words tokens, counted as `sora-jax` counts them for its utilisation:
products with weights and attention inside clips, no padding (`forward_flops` of each network).
"""

import argparse
import dataclasses

import numpy as np

from sora_jax.config import from_dict, load
from sora_jax.data.packing.packs import EmptyItem, pack_batch
from sora_jax.models.denoiser import denoiser_specs, forward_flops
from sora_jax.models.unet_layers import UNetConfig
from sora_jax.nn.params import count
from sora_jax.train.denoiser import DenoiserRun


def clip_flops(run: DenoiserRun, size: tuple[int, int, int], words: int) -> float:
    """Return the FLOPs of one pass over a clip of `size` latents (t, h, w) with a caption of so many tokens."""
    rows = 2 if run.diffusion.given.any else 1
    packing = dataclasses.replace(run.packs, length=int(np.prod(size)), slots=1, text_length=words, rows_per_clip=rows)
    packing = dataclasses.replace(packing, multiple=(1, 1))
    return forward_flops(run.model, pack_batch([[EmptyItem(size, 1, np.zeros(words, np.int32))]], packing))


def matched_width(run: DenoiserRun, target: float, size: tuple[int, int, int], words: int, step: int = 8) -> int:
    """Return the width, a multiple of `step`, with which the FLOPs of a U-Net are nearest to a target."""
    assert isinstance(run.model, UNetConfig)

    def error(width: int) -> float:
        wide = dataclasses.replace(run.model, width=width, head_width=_divisor(run.model, width))
        return abs(np.log(clip_flops(dataclasses.replace(run, model=wide), size, words) / target))

    return min(range(step, 1024, step), key=error)


def _divisor(model: UNetConfig, width: int) -> int:
    """Return the head width, or the largest even one below it that divides the widths of all attended levels."""
    widths = [width * model.multipliers[level] for level in model.attended]
    fitting = [each for each in range(6, model.head_width + 1, 2) if not any(own % each for own in widths)]
    return max(fitting, default=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--transformer", default="configs/transformer.py:S")
    parser.add_argument("--unet", default="configs/unet.py:S")
    parser.add_argument("--latent", default="5,32,32", help="frames, rows, columns of latents")
    parser.add_argument("--words", type=int, default=32)
    options = parser.parse_args()
    size = tuple(map(int, options.latent.split(",")))
    runs = {path: denoiser_run(path) for path in (options.transformer, options.unet)}
    flops = {path: clip_flops(run, size, options.words) for path, run in runs.items()}
    target = flops[options.transformer]
    for path, run in runs.items():
        own = count(denoiser_specs(run.model))
        print(f"{path:32} {own:>13,} parameters {flops[path] / 1e9:10.3f} GFLOPs, {flops[path] / target:.3f} of it")
    print(f"width with the nearest FLOPs: {matched_width(runs[options.unet], target, size, options.words)}")


def denoiser_run(path: str) -> DenoiserRun:
    """Load the run of a denoiser from a config, which may be one of the quickstart."""
    config = load(path)
    return from_dict(DenoiserRun, config.transformer if "transformer" in config else config)


if __name__ == "__main__":
    main()
