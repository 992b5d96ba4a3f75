"""A thread beside the loop: writes the time log, and warns while a step hangs."""

import contextlib
import statistics
import sys
import threading
import time
from collections import deque
from pathlib import Path

from tqdm import tqdm

from sora_jax.config import read_json
from sora_jax.errors import UserError
from sora_jax.files import as_path, is_remote, write_json
from sora_jax.train.metrics import Stopwatch
from sora_jax.train.mirror import FLUSH_INTERVAL

FILE = "time.json"
WAITING = {"data": "its batch", "step": "the device or another process"}
SLOW = 10  # times the median
RECENT, FEWEST = 100, 10  # steps that the median is of


class Watchdog:
    """Watch the steps of a run; a context manager whose `stepped` is called after each finished step.

    Every `interval` seconds (in an object store every ten) the seconds by cause are written to WORKDIR/time.json, for
    `spent_before`; workdir None writes nothing. A step that has taken ten times the median of the recent ones, and at
    least `interval`, is reported on stderr at that moment, and again when it ends. Saves and previews are no part of a
    step.
    """

    def __init__(self, watch: Stopwatch, workdir: Path | None, step: int, interval: float = 1.0):
        self._watch, self._workdir, self._step, self._interval = watch, workdir, step, interval
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._done, self._reported = 0.0, False
        self._pause = max(FLUSH_INTERVAL, interval) if workdir and is_remote(workdir) else interval
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watchdog")

    def __enter__(self):
        self._done = self._busy()
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()
        self._keep()

    def stepped(self, step: int) -> None:
        """Note that step `step` is finished."""
        now = self._busy()
        seconds, self._done, self._step = now - self._done, now, step
        if self._reported:
            tqdm.write(f"sora-jax: step {step} took {seconds:.1f} s", file=sys.stderr)
        self._reported = False
        self._recent.append(seconds)

    def _run(self) -> None:
        kept = time.monotonic()
        while not self._end.wait(self._interval):
            self._look()
            if time.monotonic() >= kept + self._pause - self._interval / 2:
                self._keep()
                kept = time.monotonic()

    def _busy(self) -> float:
        seconds = self._watch.now()
        return sum(seconds.get(cause, 0.0) for cause in WAITING)

    def _look(self) -> None:
        step, seconds, cause = self._step + 1, self._busy() - self._done, self._watch.cause
        if self._reported or len(self._recent) < FEWEST or cause not in WAITING:
            return
        usual = statistics.median(list(self._recent))
        if seconds > max(SLOW * usual, self._interval):
            self._reported = True
            text = f"step {step} has taken {seconds:.1f} s so far, the median is {usual:.2g} s; it waits for"
            tqdm.write(f"sora-jax: {text} {WAITING[cause]}", file=sys.stderr)

    def _keep(self) -> None:
        if self._workdir:
            # If the disk is full, the next save ends the run with a clear message; this thread must not.
            with contextlib.suppress(Exception):
                write_json(as_path(self._workdir) / FILE, {"step": self._step, "seconds": self._watch.now()})


def spent_before(workdir: Path, start: int, saved: dict[str, float]) -> dict[str, float]:
    """Return the seconds by cause of a run that goes on from step `start`; `saved` is what that checkpoint knows.

    Time that a killed process spent after that checkpoint is counted as "lost".
    """
    kept = _kept(as_path(workdir) / FILE) or {"step": start, "seconds": saved}
    if kept["step"] <= start:
        return kept["seconds"]
    lost = max(0.0, sum(kept["seconds"].values()) - sum(saved.values()))
    return saved | {"lost": saved.get("lost", 0.0) + lost}


def _kept(path: Path) -> dict | None:
    """Read the time log. If it is truncated (power loss), warn and return None: bookkeeping must never stop a run."""
    try:
        if not path.exists():
            return None
        kept = read_json(path)
        return {"step": int(kept["step"]), "seconds": {k: float(v) for k, v in kept["seconds"].items()}}
    except (UserError, AttributeError, KeyError, TypeError, ValueError):
        tqdm.write(f"sora-jax: {path} cannot be read; the time since the last save is not counted", file=sys.stderr)
        return None
