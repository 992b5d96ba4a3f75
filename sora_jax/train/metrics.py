"""Write what a run reports: `metrics.jsonl`, TensorBoard, and how its time was spent.

The only file that imports a TensorBoard writer.
"""

import contextlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sora_jax.files import as_path, read_text, write_text
from sora_jax.train.mirror import Mirror
from sora_jax.train.tracking import Wandb

ROWS = "metrics.jsonl"


class MetricsWriter:
    """Append one JSON line per report to RUN/metrics.jsonl and the same scalars to RUN/tensorboard.

    In an object store, where files cannot grow, both are written anew by `flush`, and from time to time
    (`mirror.Mirror`); if that fails it is reported and the run goes on.

    `start` is the step that the run goes on from: reports of later steps, which a killed run left, are dropped,
    so that no step is reported twice. tracker: what gets the same scalars and pictures.
    """

    def __init__(self, workdir: Path, start: int = 0, tracker: Wandb | None = None):
        from tensorboardX import SummaryWriter

        kept = [row for row in read_metrics(workdir) if row["step"] <= start]
        with contextlib.ExitStack() as stack:
            self._mirror = stack.enter_context(Mirror(as_path(workdir)))
            folder = self._mirror.folder
            write_text(folder / ROWS, "".join(json.dumps(row) + "\n" for row in kept))
            self._file = stack.enter_context(open(folder / ROWS, "a", encoding="utf-8"))
            # Also at the first step: the folder may hold events of a run that was killed before its first save.
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
            stack.callback(self._board.close)
            self._tracker = tracker
            if tracker:
                stack.callback(tracker.close)
            self._stack = stack.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._stack.__exit__(*error)

    def write(self, step: int, metrics: dict) -> None:
        """Write numbers or short vectors; a vector's entries become name/0, name/1..."""
        flat = flatten(metrics)
        self._file.write(json.dumps({"step": step} | {k: v if math.isfinite(v) else None for k, v in flat.items()}))
        self._file.write("\n")
        self._file.flush()
        finite = {name: value for name, value in flat.items() if math.isfinite(value)}
        for name, value in finite.items():
            self._board.add_scalar(name, value, step)
        if self._tracker:
            self._tracker.write(step, finite)
        self._mirror.flush_if_due()

    def flush_rows(self) -> None:
        """Put the rows on permanent storage; called before the checkpoint that they belong to is saved."""
        self._mirror.flush(ROWS)

    def flush(self) -> None:
        """Put rows and TensorBoard events on permanent storage. Slower than `flush_rows`: event files are large."""
        self._board.flush()
        self._mirror.flush()

    def picture(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """Write a uint8 picture for TensorBoard."""
        self._board.add_image(name, image_HWC, step, dataformats="HWC")
        if self._tracker:
            self._tracker.picture(step, name, image_HWC)


def flatten(metrics: Mapping) -> dict[str, float]:
    """Flatten metrics: scalars under their names, vectors as name/index."""
    flat = {}
    for name, value in metrics.items():
        value = np.asarray(value)
        if value.ndim == 0:
            flat[name] = float(value)
        else:
            flat |= {f"{name}/{i}": float(v) for i, v in enumerate(value)}
    return flat


def read_metrics(workdir: Path) -> list[dict]:
    """Read the reports of a run, in order."""
    path = as_path(workdir) / ROWS
    rows = []
    for line in read_text(path).splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed run may be incomplete
            rows.append(json.loads(line))
    return rows


class Stopwatch:
    """Measure seconds by cause, `with watch("save"): ...`; the causes of a run add up to the wall time of `fit`.

    Another thread may call `now` and `cause` at any time.
    """

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: tuple[str, float] | None = None

    @contextlib.contextmanager
    def __call__(self, cause: str):
        start = time.perf_counter()
        self._running = cause, start
        try:
            yield
        finally:
            self._running = None
            self.seconds[cause] += time.perf_counter() - start

    def add(self, seconds: dict[str, float]) -> None:
        """Add the time spent by earlier processes of the same run."""
        for cause, value in seconds.items():
            self.seconds[cause] += value

    @property
    def cause(self) -> str | None:
        """The cause that is being measured, None between causes."""
        return self._running and self._running[0]

    def now(self) -> dict[str, float]:
        """Return `seconds`, including the cause that is being measured."""
        running, seconds = self._running, dict(self.seconds)
        if running:
            seconds[running[0]] = seconds.get(running[0], 0.0) + time.perf_counter() - running[1]
        return seconds

    def __str__(self) -> str:
        """Describe the share of time spent on steps, and the rest by cause."""
        seconds = self.now()
        whole = sum(seconds.values())
        rest = ", ".join(f"{cause} {value:.1f} s" for cause, value in seconds.items() if cause != "step")
        return f"{seconds.get('step', 0.0) / max(whole, 1e-9):.0%} of {whole:.1f} s spent on steps; {rest}"
