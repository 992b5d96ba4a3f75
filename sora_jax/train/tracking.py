"""Report a run to Weights & Biases, too. The only file that imports wandb; no failure of it ends a run."""

import importlib
import importlib.util
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax.config import check, read_json
from sora_jax.files import as_path, is_remote, write_json

FILE = "wandb.json"  # the id, by which a run that is resumed is the same one there


def check_wandb(project: str) -> None:
    """Raise a UserError where a project is named and wandb is not installed."""
    there = not project or importlib.util.find_spec("wandb") is not None
    check(there, f"config.loop.wandb is {project!r}; wandb is not installed: pip install wandb, or leave it out")


class Wandb:
    """Write scalars and pictures of a run to a project; the first failure is reported, then nothing more is sent.

    WANDB_MODE=offline writes to RUN/wandb alone; `wandb sync` sends that later.
    """

    def __init__(self, project: str, workdir: Path, config: dict):
        self._run: Any = None
        self._trying(lambda: self._start(project, as_path(workdir), config))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Send scalars of a step."""
        self._send(lambda run: run.log({"step": step, **scalars}))

    def picture(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """Send a uint8 picture."""
        self._send(lambda run: run.log({"step": step, name: importlib.import_module("wandb").Image(image_HWC)}))

    def close(self) -> None:
        """End the run there."""
        self._send(lambda run: run.finish())

    def _start(self, project: str, workdir: Path, config: dict) -> None:
        import wandb

        path = workdir / FILE
        if not path.exists():
            write_json(path, {"project": project, "id": uuid.uuid4().hex[:12]})
        folder = None if is_remote(workdir) else str(workdir)
        named = {"project": project, "name": workdir.name, "id": read_json(path)["id"], "resume": "allow"}
        self._run = wandb.init(**named, dir=folder, config=config, settings=wandb.Settings(silent=True))
        self._run.define_metric("*", step_metric="step")

    def _send(self, function: Callable[[Any], object]) -> None:
        if self._run is not None:
            self._trying(lambda: function(self._run))

    def _trying(self, function: Callable[[], object]) -> None:
        try:
            function()
        except Exception as error:
            self._run = None
            said = (str(error).splitlines() or [type(error).__name__])[0][:200]
            print(f"sora-jax: nothing more is sent to Weights & Biases: {said}", file=sys.stderr)
