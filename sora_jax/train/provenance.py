"""Keep in RUN/run.json what made a run: each start with its command, versions, commit, devices, times and steps.

Nothing here may stop a run: what cannot be found out is left out, and a file that cannot be written is not written.
"""

import contextlib
import datetime
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from sora_jax import __version__
from sora_jax.config import read_json
from sora_jax.errors import CHECKOUT
from sora_jax.files import as_path, write_json
from sora_jax.parallel import distributed

FILE = "run.json"
PACKAGES = ("jax", "jaxlib", "flax", "numpy")
ENTRIES = ("sora-jax", "cli.py", "__main__.py")  # file names of the command line's programs
GIT_TIMEOUT = 5.0  # seconds


class Start:
    """Record one start of a run; `reached` writes up to which step it came, and when."""

    def __init__(self, workdir: Path, step: int, notes: Mapping[str, Any]):
        self._path, self._notes = as_path(workdir) / FILE, dict(notes)
        self._starts = [*read_starts(workdir), environment() | {"start": _now(), "from": step}]
        self.reached(step)

    def reached(self, step: int) -> None:
        """Write that step `step` is reached now."""
        self._starts[-1] |= {"to": step, "end": _now()}
        with contextlib.suppress(Exception):
            write_json(self._path, self._notes | {"starts": self._starts})


def read_starts(workdir: Path) -> list[dict]:
    """Return the starts of a run, in order; [] where none is recorded."""
    return read_run(workdir).get("starts", [])


def read_run(workdir: Path) -> dict:
    """Return what run.json holds; {} where there is none, or it cannot be read."""
    path = as_path(workdir) / FILE
    with contextlib.suppress(Exception):
        return dict(read_json(path)) if path.exists() else {}
    return {}


def environment() -> dict[str, Any]:
    """Describe the command, the versions and the devices of this process."""
    found: dict[str, Any] = {
        "command": command(),
        "sora_jax": __version__,
        **commit(),
        "python": platform.python_version(),
    }
    found |= {name: version for name in PACKAGES if (version := installed_version(name))}
    devices = jax.devices()
    kind = f"{len(devices)} x {devices[0].device_kind}"
    return found | {"platform": devices[0].platform, "devices": kind, "processes": jax.process_count()}


def command() -> str:
    """Return the command line as it was typed, "" where the package is used from Python."""
    program = Path(sys.argv[0]).name if sys.argv else ""
    return shlex.join(["sora-jax", *sys.argv[1:]]) if program in ENTRIES else ""


def installed_version(name: str) -> str:
    """Return the version of an installed package, "" where there is none."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return ""


def commit() -> dict[str, Any]:
    """Return the git commit that the code runs from, and if files differ from it; {} for an installed package."""
    if not (CHECKOUT / ".git").exists():
        return {}

    def git(*arguments: str) -> str:
        words = ["git", "-C", str(CHECKOUT), *arguments]
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT).stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    return {}


def start(workdir: Path, step: int, notes: Mapping[str, Any]) -> Start | None:
    """Record a start, in the first process; None in others, or where that fails."""
    with contextlib.suppress(Exception):
        return Start(workdir, step, notes) if distributed.first() else None
    return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
