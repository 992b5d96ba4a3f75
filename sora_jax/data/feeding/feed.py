"""Read batches ahead of the training step.

There is no state to save: batch n is a pure function of n, so to go on after step n, ask for step n + 1. Hosts
share a global batch by rows: the number of hosts, workers and threads changes who reads a row, not which rows
there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from sora_jax.config import check

_END = 1 << 62  # of the endless range of steps
Batch = dict[str, np.ndarray]
T = TypeVar("T")


@dataclass(frozen=True)
class FeedConfig:
    """Set how many batches are read ahead, and by whom; the batches do not depend on it."""

    workers: int = 0  # processes; 0: this one
    threads: int = 2  # in each process; 0: none, batches are made when they are asked for
    ahead: int = 4  # batches, in each process

    def __post_init__(self) -> None:
        for name, least in (("workers", 0), ("threads", 0), ("ahead", 1)):
            value = getattr(self, name)
            check(value >= least, f"feed.{name} is {value}; it must be at least {least}")


def read_ahead(batch_at: Callable[[int], T], start: int, feed: FeedConfig) -> Iterator[T]:
    """Yield the batches `start`, `start + 1`, ... in order, made early.

    Worker processes are spawned: `batch_at` is pickled, and a script that uses them needs the
    `if __name__ == "__main__":` guard.
    """
    import grain

    read = grain.ReadOptions(num_threads=feed.threads, prefetch_buffer_size=feed.ahead if feed.threads else 0)
    steps = grain.MapDataset.range(start, _END).map(batch_at).to_iter_dataset(read)
    if feed.workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # workers of Grain read flags of absl, which this program never parses
            flags.FLAGS.mark_as_parsed()
        steps = steps.mp_prefetch(grain.MultiprocessingOptions(feed.workers, per_worker_buffer_size=feed.ahead))
    return _closing(iter(steps))


def _closing(iterator: Any) -> Iterator[Any]:
    """Yield from a Grain iterator, and end its processes and their shared memory with the generator."""
    try:
        yield from iterator
    finally:
        iterator.close()
