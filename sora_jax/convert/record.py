"""Read JSON files of other packages: every value is checked, and a refused one is named by file and field."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax.config import check
from sora_jax.errors import UserError
from sora_jax.files import read_text

REQUIRED: Any = object()  # default of a field that must be there
SMALLEST = float(np.finfo(np.float32).tiny)
LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Record:
    """Hold the fields of a file. A missing field takes the default, or is refused if there is none.

    All methods raise UserError with one sentence that names folder, file, field, value and what is allowed.
    """

    path: Path
    values: dict

    def require(self, condition: bool, name: str, allowed: str) -> None:
        """Raise UserError unless the condition, which the field must meet, holds."""
        found = f"is {json.dumps(self.values[name])}" if name in self.values else "is missing"
        where = f"--weights is {str(self.path.parent)!r}; in its {self.path.name} {name} {found}"
        check(condition, f"{where}; it must be {allowed}")

    def known(self, name: str, allowed: tuple, default: Any = REQUIRED) -> Any:
        """Return a field that must have one of these values."""
        value = self.values.get(name, default)
        self.require(value in allowed, name, " or ".join(map(json.dumps, allowed)))
        return value

    def whole(self, name: str, default: Any = REQUIRED) -> int:
        """Return a field that must be a positive integer."""
        value = self.values.get(name, default)
        self.require(_is_whole(value), name, "a positive whole number")
        return value

    def wholes(self, name: str) -> tuple[int, ...]:
        """Return a field that must be a list of at least one positive integer."""
        value: Any = self.values.get(name)
        fits = isinstance(value, list) and bool(value) and all(map(_is_whole, value))
        self.require(fits, name, "a list of positive whole numbers")
        return tuple(value)

    def number(self, name: str, default: float, positive: bool = False) -> float:
        """Return a field that must be a number that float32 can represent."""
        value = self.values.get(name, default)
        self.require(_is_number(value, positive), name, f"a {'positive ' if positive else ''}finite number")
        return float(value)

    def numbers(self, name: str, count: int, positive: bool = False) -> list[float]:
        """Return a field that must be a list of `count` numbers that float32 can represent."""
        value: Any = self.values.get(name)
        fits = isinstance(value, list) and len(value) == count and all(_is_number(x, positive) for x in value)
        self.require(fits, name, f"a list of {count} {'positive ' if positive else ''}finite numbers")
        return value

    def has(self, name: str) -> bool:
        """Return True if the field is there and not null."""
        return self.values.get(name) is not None


def read_record(path: Path) -> Record:
    """Read a JSON file; UserError if it is missing, damaged, or no object."""
    check(path.exists(), f"--weights is {str(path.parent)!r}; it must hold {path.name}")
    try:
        values = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{str(path)!r} is damaged: {error}") from error
    check(isinstance(values, dict), f"{str(path)!r} holds no fields; it must be a JSON object")
    return Record(path, values)


def _is_whole(value: object) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any, positive: bool) -> bool:
    # Compare without converting: a JSON integer may be too large for any float.
    if type(value) not in (int, float):
        return False
    return (SMALLEST if positive else -LARGEST) <= value <= LARGEST
