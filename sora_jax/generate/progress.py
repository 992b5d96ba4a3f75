"""Report how far a sampler is: a bar, a function that is called, or nothing."""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from sora_jax.console import progress, watched

Progress = Callable[[int, int], None]  # called with the units that are done, and all of them


class Watch(NamedTuple):
    """Say who looks on while clips are sampled.

    progress: is called after every few steps; an exception that it raises ends the sampling. bar: show one; None: in a
    notebook or a terminal, unless there is `progress`.
    """

    progress: Progress | None = None
    bar: bool | None = False

    @property
    def shows_bar(self) -> bool:
        """Return True if a bar is shown."""
        return (self.progress is None and watched()) if self.bar is None else self.bar

    @property
    def looks(self) -> bool:
        """Return True if anybody looks on."""
        return self.progress is not None or self.shows_bar

    @contextlib.contextmanager
    def counting(self, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Yield what adds to the units that are done; the first call of `progress` is made at once, with 0."""
        done = 0
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(progress(total=total, desc="sampling", unit=unit)) if self.shows_bar else None

            def add(count: int) -> None:
                nonlocal done
                done += count
                if bar is not None:
                    bar.update(count)
                if self.progress is not None:
                    self.progress(done, total)

            if self.progress is not None:
                self.progress(0, total)
            yield add
