"""Read files of prompts: a prompt a line, or a table with more columns.

A `.jsonl` file has an object a line, a `.csv` file a header. Both need `prompt`; what else they may say of a clip is in
`COLUMNS`, and what they leave out is as on the command line.
"""

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sora_jax.config import check
from sora_jax.errors import UserError
from sora_jax.files import read_text

Span = tuple[int, str]  # first frame, prompt
Row = dict[str, Any]
COLUMNS: dict[str, Callable[[Any], Any]] = {
    "prompt": str,
    "negative": str,  # what guidance leads away from
    "guidance": float,
    "frames": int,
    "height": int,
    "width": int,
    "clip_id": int,  # keys the noise: equal numbers give equal noise
}


def read_prompts(path: Path) -> list[Row]:
    """Return a row of known columns for each prompt of a file.

    Raises:
        UserError: the file is missing or no text, or a row has no prompt, an unknown column or a value of another kind.
    """
    check(path.is_file(), f"--prompts-file is {str(path)!r}; there is no such file")
    try:
        text = read_text(path)
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts-file is {str(path)!r}; it must be UTF-8 text: {error}") from error
    if path.suffix.lower() == ".csv":
        rows = list(csv.DictReader(io.StringIO(text.lstrip("\ufeff"), newline="")))
    elif path.suffix.lower() == ".jsonl":
        rows = [_parsed(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        return [{"prompt": line.strip()} for line in text.splitlines() if line.strip()]
    return [_checked(path, number, row) for number, row in enumerate(rows, 1)]


def _parsed(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"--prompts-file is {str(path)!r}; line {number} is no JSON: {error}") from error
    check(isinstance(row, dict), f"--prompts-file is {str(path)!r}; line {number} must be a JSON object")
    return row


def _checked(path: Path, number: int, row: Row) -> Row:
    where = f"--prompts-file is {str(path)!r}; row {number}"
    unknown = [str(name) for name in row if name not in COLUMNS]
    check(not unknown, f"{where} has a column {''.join(unknown[:1])!r}; allowed: {', '.join(COLUMNS)}")
    check(row.get("prompt"), f"{where} has no prompt")
    try:
        return {name: COLUMNS[name](value) for name, value in row.items() if value not in (None, "")}
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} has a value of the wrong kind: {error}") from error


def spans_of(prompt: str) -> list[Span]:
    """Read a prompt that changes in time, "0: a fox runs 24: a fox sleeps"; any other prompt is for all frames.

    Raises:
        UserError: the frames do not rise.
    """
    if not re.match(r"\s*\d+:\s", prompt):
        return [(0, prompt)]
    check(re.match(r"\s*0:\s", prompt), f"--prompt is {prompt!r}; the first part must begin at frame 0: 0: ... 24: ...")
    parts = re.split(r"(?:^|\s)(\d+):\s+", prompt)
    spans = [(int(frame), text.strip()) for frame, text in zip(parts[1::2], parts[2::2], strict=True)]
    frames = [frame for frame, _ in spans]
    check(frames == sorted(set(frames)), f"--prompt is {prompt!r}; its frames must rise, such as 0: ... 24: ...")
    return spans
