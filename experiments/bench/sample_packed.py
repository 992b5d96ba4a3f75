"""Sample 16 clips of 8 sizes in packs, and one by one, each in a program for its own size.

    python experiments/bench/sample_packed.py --workdir=runs/quickstart/transformer

Prints real tokens per second of both ways, in alternating runs, without and with the time to compile.
"""

import argparse
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from sora_jax.data.packing.packs import grid_of
from sora_jax.generate.requests import Request
from sora_jax.generate.run import Run, load_run
from sora_jax.generate.sampler import sample_latents

SIZES = [(9, 24, 36), (9, 36, 24), (9, 24, 24), (5, 24, 36), (5, 36, 24), (5, 24, 24), (1, 24, 36), (1, 24, 24)]


def tokens(run: Run, request: Request) -> int:
    """Return the tokens of a clip."""
    return math.prod(grid_of(request.size, run.config.model.patch))


def alone(run: Run, request: Request) -> Run:
    """Return the run with packs that hold one clip of this size and nothing else."""
    packing = dataclasses.replace(
        run.config.packing, length=tokens(run, request), slots=1, text_length=run.config.tokenizer.max_tokens
    )
    return dataclasses.replace(run, config=dataclasses.replace(run.config, packing=packing))


def timed(run: Run, requests: Sequence[Request], packed: bool) -> float:
    """Return the seconds that it takes to sample all requests."""
    sampling = run.config.sampling
    begin = time.perf_counter()
    with jax.set_mesh(run.mesh):
        if packed:
            sample_latents(run, requests, sampling, 0)
        else:
            for request in requests:
                sample_latents(alone(run, request), [request], sampling, 0)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/quickstart/transformer"))
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    run = load_run(options.workdir)
    requests = [
        Request("a red circle moves left", run.latent_size(*SIZES[i % len(SIZES)]), i + 1, guidance=2.0)
        for i in range(16)
    ]
    count = sum(tokens(run, request) for request in requests)
    jax.config.update("jax_enable_compilation_cache", False)
    cold = {packed: timed(run, requests, packed) for packed in (True, False)}
    warm: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * options.runs):
        warm[number % 2 == 0].append(timed(run, requests, number % 2 == 0))
    for name, seconds in {
        "with compile time": cold,
        "without": {k: float(np.median(v)) for k, v in warm.items()},
    }.items():
        rates = {packed: count / second for packed, second in seconds.items()}
        print(f"{name}: packed {rates[True]:.1f} tokens a second, one by one {rates[False]:.1f}: "
              f"{rates[True] / rates[False]:.2f} times as fast")  # fmt: skip


if __name__ == "__main__":
    main()
