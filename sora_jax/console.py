"""Write to the terminal: progress bars, notes and results, in one place for the whole package.

Results go to stdout, progress and messages to stderr. With `--quiet` there are no bars and no notes; with `--json`
a result is one JSON value, and nothing else is on stdout.
"""

import json
import math
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

LINE = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
BETWEEN = 30.0  # seconds between the lines of a bar in a file


@dataclass
class Habits:
    """Hold what the options of the command line say of the output."""

    quiet: bool = False
    json: bool = False


HABITS = Habits()


def log(text: str) -> None:
    """Print what a command is doing: to stdout, beside a result of JSON to stderr, and nowhere if it is quiet."""
    if not HABITS.quiet:
        print(text, file=sys.stderr if HABITS.json else sys.stdout, flush=True)


def note(text: str) -> None:
    """Print a note to stderr, unless the command is quiet. Warnings are no notes: they are always printed."""
    if not HABITS.quiet:
        print(f"sora-jax: {text}", file=sys.stderr, flush=True)


def result(values: Any, text: str) -> None:
    """Print the result of a command: its text or, with `--json`, its values."""
    print(as_json(values) if HABITS.json else text)


def as_json(values: Any) -> str:
    """Return values as JSON; what is not finite becomes null, a path its text, a number of NumPy a number."""
    return json.dumps(_plain(values), indent=1, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return [_plain(entry) for entry in value]
    if hasattr(value, "tolist"):  # an array or a number of NumPy
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, int) else str(value)


class Lines:
    """Write the states of a bar to a file as lines: the first, then one every 30 seconds, and the last."""

    def __init__(self, stream: TextIO):
        self._stream, self._state, self._due = stream, "", 0.0

    def write(self, text: str) -> None:
        """Take what `tqdm` writes: a carriage return and a state; a line feed at the end."""
        self._state = text.strip() or self._state
        if self._state and (text == "\n" or time.monotonic() >= self._due):
            print(self._state, file=self._stream, flush=True)
            self._state, self._due = "", time.monotonic() + BETWEEN

    def flush(self) -> None:
        """Flush the file."""
        self._stream.flush()


def watched() -> bool:
    """Return True if somebody sees a bar move: in a terminal, or in a cell of a notebook, on Colab too."""
    return sys.stderr.isatty() or type(sys.stderr).__module__.partition(".")[0] == "ipykernel"


def progress(
    iterable: Iterable[Any] | None = None,
    desc: str = "",
    total: float | None = None,
    disable: bool = False,
    **look: Any,
) -> Any:
    """Return a bar of `tqdm`: live in a terminal or a notebook, a line now and then in a file, none if quiet.

    look: further arguments of `tqdm`; `postfix` is text behind the numbers, such as what the first step waits for.
    """
    with warnings.catch_warnings():  # a notebook without ipywidgets shows the bar as text
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm
    if not watched():
        look |= dict(file=Lines(sys.stderr), bar_format=LINE, position=0, leave=True)
    return tqdm(iterable, desc=desc, total=total, disable=disable or HABITS.quiet, dynamic_ncols=True, **look)
