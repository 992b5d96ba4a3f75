"""How batches are fetched ahead of the training step, and which rows of them a host reads.

Nothing is stored and advanced: batch n is a pure function of n, so to go on after step n, ask for step n + 1. Hosts
share a global batch by rows: how many hosts, workers and threads there are changes who reads a row, not which rows
there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from sora_jax.errors import UserError

_END = 1 << 62  # of the endless range of steps
Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class FeedConfig:
    """Reading ahead: `ahead` batches by `threads` threads, in each of `workers` processes (0: in this one)."""

    workers: int = 0
    threads: int = 2
    ahead: int = 4

    def __post_init__(self):
        for name, least in (("workers", 0), ("threads", 0), ("ahead", 1)):
            if getattr(self, name) < least:
                raise UserError(f"feed.{name} is {getattr(self, name)}; it must be at least {least}")


def read_ahead(batch_at: Callable[[int], Batch], start: int, feed: FeedConfig) -> Iterator[Batch]:
    """Batches `start`, `start + 1`, ... in order, made early as `feed` says; they do not depend on it.

    Worker processes are spawned: `batch_at` is pickled, and a script that uses them needs the
    `if __name__ == "__main__":` guard.
    """
    import grain

    read = grain.ReadOptions(num_threads=feed.threads, prefetch_buffer_size=feed.ahead if feed.threads else 0)
    steps = grain.MapDataset.range(start, _END).map(batch_at).to_iter_dataset(read)
    if feed.workers:
        _parse_flags()
        steps = steps.mp_prefetch(grain.MultiprocessingOptions(feed.workers, per_worker_buffer_size=feed.ahead))
    return _closing(iter(steps))


def _closing(iterator) -> Iterator[Batch]:
    """What a Grain iterator gives; its processes and their shared memory go with the generator."""
    try:
        yield from iterator
    finally:
        iterator.close()


def _parse_flags() -> None:
    """Grain's workers read absl flags; a program that does not use absl has never parsed them."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
