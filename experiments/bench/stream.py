"""Time clips that are decoded batch by batch, and clips that are decoded when all are sampled.

    python experiments/bench/stream.py --workdir=runs/quickstart/transformer

Prints the time to the first clip and to the last of both ways, which run in turn, and whether the clips are equal.
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.generate.requests import Request
from sora_jax.generate.run import Run, load_run
from sora_jax.generate.sampler import sample_latents


def streamed(run: Run, requests: Sequence[Request], sampling: SamplingConfig) -> tuple[float, dict[int, np.ndarray]]:
    """Return when the first clip was there, and all clips."""
    begin, first, clips = time.perf_counter(), 0.0, {}
    for number, clip in run.stream(requests, sampling, 0):
        first = first or time.perf_counter() - begin
        clips[number] = clip
    return first, clips


def in_turn(run: Run, requests: Sequence[Request], sampling: SamplingConfig) -> tuple[float, dict[int, np.ndarray]]:
    """Return the same, with all clips sampled before the first is decoded."""
    begin = time.perf_counter()
    with jax.set_mesh(run.mesh):
        clips = dict(enumerate(run.decode(sample_latents(run, requests, sampling, 0))))
    return time.perf_counter() - begin, clips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/quickstart/transformer"))
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument("--steps", default="10")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    run = load_run(options.workdir)
    size = run.latent_size(*run.config.preview.sizes[0])
    requests = [Request(f"a red circle moves {'left' if i % 2 else 'up'}", size, i + 1) for i in range(options.clips)]
    sampling = dataclasses.replace(run.config.sampling, steps=options.steps)
    ways = {"decoded batch by batch": streamed, "decoded at the end": in_turn}
    found = {name: way(run, requests, sampling)[1] for name, way in ways.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(options.runs):
        for name, way in ways.items():
            begin = time.perf_counter()
            first, _ = way(run, requests, sampling)
            times[name].append((first, time.perf_counter() - begin))
    for name, pairs in times.items():
        first, last = np.median(np.array(pairs), axis=0)
        print(f"{name:24} first clip {first:.2f} s, all {options.clips} {last:.2f} s")
    one, other = found.values()
    ratios = [b / a for (_, a), (_, b) in zip(*times.values(), strict=True)]
    equal = all(np.array_equal(one[number], other[number]) for number in other)
    print(
        f"{np.median(ratios):.2f} times as fast in the median of rounds; the clips are {'' if equal else 'not '}equal"
    )


if __name__ == "__main__":
    main()
