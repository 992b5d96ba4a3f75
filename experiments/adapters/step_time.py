"""Time a training step of runs in turn, and tell what each keeps: parameters, state and the memory of its program.

    python experiments/adapters/step_time.py runs/zorp_full runs/zorp

The runs are those of this experiment: all of the network, and adapters. Each round makes `--steps` steps of every run;
the ratio to the first run is the median over rounds. Memory is what the compiled program needs beside its arguments.
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np

from sora_jax.generate.run import read_run_config
from sora_jax.kinds import kind_of
from sora_jax.kinds.begin import begin
from sora_jax.nn.params import count
from sora_jax.parallel.mesh import make_mesh, place_batch
from sora_jax.train.loop import split_batch, with_fixed
from sora_jax.train.state import MODEL, init_state, make_optimizers
from sora_jax.train.step import make_step

MIB = 2.0**20


def stepper(folder: Path, mesh):
    """Return step() of a run, one batch again and again, and what it keeps, in words."""
    config = read_run_config(folder)
    kind = kind_of(config)
    job = begin(kind, config, kind.job(config, kind.open(config, folder, mesh), folder), folder, mesh)
    optimizers = make_optimizers(job.groups, config.loop.steps)
    state = init_state(job.groups, optimizers, config.seed, mesh)
    batch, _ = next(job.batches(0, None))
    batch = job.to_device(place_batch(split_batch(batch, 1), mesh, leading=1))
    frozen = (job.fixed, job.frozen)
    step = make_step(with_fixed(job.loss), optimizers).lower(state, frozen, batch).compile()
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree)) / MIB  # noqa: E731
    trained, fixed = (count(specs) for specs in kind.parts(config))
    program = step.memory_analysis().temp_size_in_bytes / MIB
    text = (
        f"{folder.name}: {trained:,} of {trained + fixed:,} parameters trained ({trained / (trained + fixed):.1%}); "
        f"optimizer and averages {size((state.opt_state, state.ema)):.1f} MiB, a checkpoint "
        f"{size(state):.1f} MiB, fixed {size(frozen):.1f} MiB, program {program:.0f} MiB"
    )

    def once() -> None:
        nonlocal state
        state, _ = step(state, frozen, batch)
        jax.block_until_ready(state.params[MODEL])

    return once, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        steps = [stepper(folder, mesh) for folder in options.runs]
        seconds = np.zeros((options.rounds + 1, len(steps)))
        for row in seconds:
            for column, (once, _) in enumerate(steps):
                start = time.process_time()
                for _ in range(options.steps):
                    once()
                row[column] = (time.process_time() - start) / options.steps
    for column, (_, text) in enumerate(steps):
        ratio = np.median(seconds[1:, column] / seconds[1:, 0])  # the first round warms up
        print(f"{text}; {np.median(seconds[1:, column]):.3f} s of processor a step, {ratio:.2f} of the first run's")


if __name__ == "__main__":
    main()
