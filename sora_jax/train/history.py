"""Keep which config a run had from which step on: RUN/history.jsonl, a line for each change."""

import datetime
import json
from pathlib import Path
from typing import Any

from sora_jax import __version__
from sora_jax.config import differences, value_at
from sora_jax.files import as_path, read_text, write_text

HISTORY = "history.jsonl"


def describe_changes(old: dict, new: dict) -> str:
    """Say which fields differ, with both values."""
    each = (f"config.{p} {value_at(new, p)!r} (was {value_at(old, p)!r})" for p in differences(old, new))
    return ", ".join(each)


def read_history(workdir: Path) -> list[dict]:
    """Read the history of a run: dicts with `step`, `date`, `version`, `changed` and `config`, in order of steps."""
    path = as_path(workdir) / HISTORY
    return [json.loads(line) for line in read_text(path).splitlines()] if path.exists() else []


def record_config(workdir: Path, step: int, config: dict, old: dict | None = None) -> None:
    """Add a line if the run goes on from `step` with another config than the last line's, or has no line yet.

    Lines of later steps, which were lost with their checkpoints, are dropped. old: the config of the checkpoint, as
    this version writes it; None for a run that begins.
    """
    before = read_history(workdir)
    lines = [line for line in before if line["step"] < step] or ([] if old is None else [_line(0, old, None)])
    old = old or (lines[-1]["config"] if lines else None)
    if not lines or old != config:
        lines.append(_line(step, config, old))
    if step == 0 or lines != before:
        write_text(as_path(workdir) / HISTORY, "".join(json.dumps(line) + "\n" for line in lines))


def _line(step: int, config: dict, old: dict | None) -> dict[str, Any]:
    changed = {} if old is None else {p: [value_at(old, p), value_at(config, p)] for p in differences(old, config)}
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"step": step, "date": date, "version": __version__, "changed": changed, "config": config}
