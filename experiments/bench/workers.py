"""Benchmarks against another framework: each side has a process of its own, and they are asked in turns.

Two thread pools in one process fight for the cores: the threads of one spin while the other computes. Here the side
that is not asked waits for a line of text, and uses no processor.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable

THREADS = 2


class Worker:
    """A process of this script with `--side=NAME` that answers the name of a run with its seconds and its value."""

    def __init__(self, side: str, *arguments: str):
        command = [sys.executable, sys.argv[0], f"--side={side}", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "JAX_PLATFORMS": "cpu"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
        )
        self.runs = self._answer()

    def ask(self, run: str) -> tuple[float, float]:
        """Seconds and value of one call."""
        self._process.stdin.write(run + "\n")
        seconds, value = self._answer()
        return float(seconds), float(value)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> list[str]:
        for line in self._process.stdout:
            if line.startswith("answer "):
                return line.split()[1:]
        raise RuntimeError(f"{self._process.args} ended without an answer")


def prepare(processor_time: bool) -> int:
    """The worker's first act, before any framework is imported: how many threads it may use.

    For processor time it keeps to one core: then other programs make a run longer, but hardly more expensive.
    """
    if not processor_time:
        return THREADS
    os.environ["OMP_NUM_THREADS"] = "1"
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    return 1


def serve(runs: dict[str, Callable[[], float]], processor_time: bool) -> None:
    """The worker's part: calls what it is asked for until nobody asks; each is called once before, to compile."""
    clock = time.process_time if processor_time else time.perf_counter
    for run in runs.values():
        run()
    print("answer", *runs, flush=True)
    for line in sys.stdin:
        start = clock()
        value = runs[line.strip()]()
        print("answer", clock() - start, value, flush=True)


def alternate(workers: dict[str, Worker], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run of every worker, "SIDE RUN", a call of each in every round."""
    seconds = {f"{side} {run}": [] for side, worker in workers.items() for run in worker.runs}
    for _ in range(rounds):
        for name, taken in seconds.items():
            side, _, run = name.partition(" ")
            taken.append(workers[side].ask(run)[0])
    return seconds


def conditions(processor_time: bool) -> str:
    """Threads and clock, and what of the environment bears on memory, which both sides inherit."""
    clock = "one thread a side, processor time" if processor_time else f"{THREADS} threads a side"
    tunables = os.environ.get("GLIBC_TUNABLES")
    return clock + (f", both with `GLIBC_TUNABLES={tunables}`" if tunables else "")
