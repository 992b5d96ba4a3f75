"""A finding: what is in order, what is doubtful, what is wrong, each in one sentence with what to do."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from sora_jax.errors import UserError

OK, WARNING, ERROR = "ok", "warning", "error"


class Finding(NamedTuple):
    """Report on one topic."""

    level: str  # ok, warning or error
    topic: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:8} {self.topic:12} {self.text}"


def guarded(topic: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield what a check finds; a check that fails is an error by itself, and ends no other."""
    try:
        yield from check()
    except UserError as error:
        yield Finding(ERROR, topic, str(error))
    except Exception as error:
        said = (str(error).splitlines() or [""])[0][:300]
        yield Finding(ERROR, topic, f"cannot be examined: {type(error).__name__}: {said}")
