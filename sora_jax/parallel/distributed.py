"""Several processes that work as one: every call here is made by all of them, at the same place of the program.

With one process, which is how most runs go, nothing here costs anything.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils


def first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def all_true(here: bool) -> bool:
    """Whether `here` holds in every process."""
    return here if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.int32(here)).all())


def total(values: dict[str, float]) -> dict[str, float]:
    """Sums over the processes, name by name, in float32 where there is more than one."""
    if jax.process_count() == 1 or not values:
        return values
    sums = multihost_utils.process_allgather(np.array(list(values.values()), np.float32)).astype(np.float64).sum(0)
    return dict(zip(values, sums.tolist(), strict=True))
