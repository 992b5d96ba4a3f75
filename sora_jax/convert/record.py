"""JSON files of others: every value that is read is checked, and refused by the names of file and field."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from sora_jax.config import check
from sora_jax.errors import UserError
from sora_jax.files import read_text

REQUIRED = object()
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Record:
    """The fields of a file. A field that is not there has the default, and without one is refused as a wrong one is.

    All methods raise UserError with one sentence that names folder, file, field, value and what is allowed.
    """

    path: Path
    values: dict

    def require(self, condition: bool, name: str, allowed: str) -> None:
        """UserError unless the condition, which the field must meet, holds."""
        found = f"is {json.dumps(self.values[name])}" if name in self.values else "is missing"
        where = f"--weights is {str(self.path.parent)!r}; in its {self.path.name} {name} {found}"
        check(condition, f"{where}; it must be {allowed}")

    def known(self, name: str, allowed: tuple, default=REQUIRED):
        """A field that has one of these values."""
        value = self.values.get(name, default)
        self.require(value in allowed, name, " or ".join(map(json.dumps, allowed)))
        return value

    def whole(self, name: str, default=REQUIRED) -> int:
        """A positive whole number."""
        value = self.values.get(name, default)
        self.require(_is_whole(value), name, "a positive whole number")
        return value

    def wholes(self, name: str) -> tuple[int, ...]:
        """A list of at least one positive whole number."""
        value = self.values.get(name)
        fits = isinstance(value, list) and bool(value) and all(map(_is_whole, value))
        self.require(fits, name, "a list of positive whole numbers")
        return tuple(value)

    def number(self, name: str, default: float, positive: bool = False) -> float:
        """A number that float32 can hold."""
        value = self.values.get(name, default)
        self.require(_is_number(value, positive), name, f"a {'positive ' if positive else ''}finite number")
        return float(value)

    def numbers(self, name: str, count: int, positive: bool = False) -> list[float]:
        """A list of so many of them."""
        value = self.values.get(name)
        fits = isinstance(value, list) and len(value) == count and all(_is_number(x, positive) for x in value)
        self.require(fits, name, f"a list of {count} {'positive ' if positive else ''}finite numbers")
        return value

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None


def read_record(path: Path) -> Record:
    """The contents of a JSON file; UserError where it is missing, damaged, or holds no fields."""
    check(path.exists(), f"--weights is {str(path.parent)!r}; there is no {path.name} in that folder")
    try:
        values = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{str(path)!r} is damaged: {error}") from error
    check(isinstance(values, dict), f"{str(path)!r} holds no fields; it must be a JSON object")
    return Record(path, values)


def _is_whole(value) -> bool:
    return type(value) is int and value > 0


def _is_number(value, positive: bool) -> bool:
    # Comparisons alone: Python's whole numbers may be too large for any float.
    if type(value) not in (int, float):
        return False
    return (SMALLEST if positive else -LARGEST) <= value <= LARGEST
