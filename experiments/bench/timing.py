"""What the benchmarks share: timing in turns, the machine, a Markdown table."""

import datetime
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def in_turns(
    runs: Sequence[Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """Seconds of each run in each round, A B A B ..., so that a machine that slows down slows all alike.

    Each is called once before, to compile; a call must return when its work is done. clock: `time.process_time` counts
    processor time, for a machine that others use, too.
    """
    for run in runs:
        run()
    seconds = [[] for _ in runs]
    for _ in range(rounds):
        for run, taken in zip(runs, seconds, strict=True):
            start = clock()
            run()
            taken.append(clock() - start)
    return seconds


def middle_half(values: Sequence[float]) -> str:
    """The range from the first to the third quartile."""
    low, high = np.quantile(values, (0.25, 0.75))
    return f"{low:.2f} to {high:.2f}"


def milliseconds(seconds: Sequence[float]) -> str:
    return f"{1000 * median(seconds):.1f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> str:
    """One line: processor, cores that this process may use, load, date, versions."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    load = f", load before {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    date = datetime.date.today().isoformat()
    return f"{processor()}, {cores()} cores{load}; {date}; Python {platform.python_version()}, {versions}"


def processor() -> str:
    """The processor's name, and the accelerator's where JAX uses one."""
    jax = sys.modules.get("jax")  # not imported here: install.py must not pay for it
    device = jax.devices()[0] if jax else None
    if device is not None and device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def command() -> str:
    """The command that was given, to be repeated from the repository's root."""
    return f"python experiments/bench/{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}"


def report(header: Sequence[str], rows: Sequence[Sequence[str]], notes: str, measured_on: str) -> str:
    """Markdown to paste into a README: command, machine, table, notes."""
    return f"`{command()}`  \n{measured_on}\n\n{table(header, rows)}\n\n{notes}"
