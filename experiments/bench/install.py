"""Size of an installation, and the time of `import sora_jax` and of `sora-jax --help`.

    python experiments/bench/install.py                        makes a fresh environment, minutes; needs a package index
    python experiments/bench/install.py --python=.venv/bin/python   measures an environment that is there
    python experiments/bench/install.py --quick                this environment, one start each

Prints Markdown.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import venv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from timing import machine, report

ROOT = Path(__file__).parents[2]
HEADER = ("what", "measured")
WHERE = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
MODULES = "import sys, sora_jax; print(sum(name in sys.modules for name in ('jax', 'flax', 'av', 'matplotlib')))"


def make_environment(folder: Path) -> tuple[Path, int, float]:
    """A fresh environment with the package: its Python, bytes before, seconds of the installation."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    before = sum(size for _, size in files(site_packages(python)))
    start = time.perf_counter()
    subprocess.run([python, "-m", "pip", "install", "--quiet", str(ROOT)], check=True)
    return python, before, time.perf_counter() - start


def site_packages(python: Path) -> Path:
    return Path(output(python, "-c", WHERE).strip())


def output(python: Path, *arguments: str) -> str:
    return subprocess.run([python, *arguments], check=True, capture_output=True, text=True, cwd=ROOT).stdout


def files(folder: Path) -> Iterator[tuple[str, int]]:
    """(top-level name, bytes) of every file below the folder."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            yield path.relative_to(folder).parts[0], path.stat().st_size


def seconds(python: Path, *arguments: str, rounds: int) -> str:
    """Median and least wall time of a fresh process; a first one, which makes the bytecode, is not counted."""
    taken = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        output(python, *arguments)
        taken.append(time.perf_counter() - start)
    return f"{median(taken[1:]):.3f} s (least {min(taken[1:]):.3f} s)"


def megabytes(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def size_rows(folder: Path, before: int) -> list[list[str]]:
    """Rows on the size of site-packages: all of it, and its largest parts."""
    parts = Counter()
    for name, size in files(folder):
        parts[name] += size
    largest = ", ".join(f"{name} {megabytes(size)}" for name, size in parts.most_common(6))
    without = f", of which {megabytes(before)} were there before" if before else ""
    return [["site-packages", megabytes(parts.total()) + without], ["its largest parts", largest]]


def time_rows(python: Path, rounds: int) -> list[list[str]]:
    heavy = output(python, "-c", MODULES).strip()
    return [
        ["an empty Python", seconds(python, "-c", "pass", rounds=rounds)],
        ["`import sora_jax`, whole process", seconds(python, "-c", "import sora_jax", rounds=rounds)],
        ["jax, flax, av, matplotlib imported by it", f"{heavy} of 4"],
        ["`sora-jax --help`, whole process", seconds(python, "-m", "sora_jax.cli", "--help", rounds=rounds)],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, help="the Python of an environment that has the package")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="this environment, one start each")
    options = parser.parse_args()
    measured_on = machine()
    with tempfile.TemporaryDirectory() as folder:
        python = Path(sys.executable) if options.quick else options.python
        rows, before = [], 0
        if python is None:
            python, before, taken = make_environment(Path(folder))
            rows.append(["`pip install .`", f"{taken:.0f} s"])
        rows += size_rows(site_packages(python), before)
        rows += time_rows(python, 1 if options.quick else options.rounds)
    notes = f"Times are medians of {options.rounds} starts, after one that is not counted."
    print(report(HEADER, rows, notes if not options.quick else "One start each.", measured_on))


if __name__ == "__main__":
    main()
