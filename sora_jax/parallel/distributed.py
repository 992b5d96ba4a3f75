"""Several processes that work as one: every call here is made by all of them, at the same place of the program.

With one process, which is how most runs go, nothing here costs anything.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sora_jax.config import check
from sora_jax.data.share import Share
from sora_jax.errors import LostPeer, Unreachable, UserError
from sora_jax.parallel.rules import partition, parts

LOST = ("Gloo", "NCCL", "UNAVAILABLE", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED")  # said of a lost connection
START = 300  # seconds that the processes may take to be there
SILENCE = 60  # seconds without a sign of life after which a process is given up, and with it all the others


def start(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins the other processes of the run; to be called before anything else of JAX.

    On TPU, SLURM and GKE nothing need be given: JAX finds the others. Elsewhere all three are: HOST:PORT of the first
    process, the number of processes, and which this is, from 0. Where they are not all there within five minutes, the
    process says so and ends with code 75. When a process dies later, JAX ends the others within about a minute, and
    says why. UserError if the others cannot be known.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in given.items() if value is None]
    check(len(missing) in (0, 3), f"{', '.join(missing)} is not given; give all of {', '.join(given)}, or none")
    where = "the other processes of the run"
    if not missing:
        check(processes > 0, f"--processes is {processes}; it must be positive")
        check(0 <= process < processes, f"--process is {process}; it must be from 0 to {processes - 1}")
        host, _, port = coordinator.rpartition(":")
        valid = host and port.isdigit() and 0 < int(port) < 2**16
        check(valid, f"--coordinator is {coordinator!r}; it must be HOST:PORT, the port from 1 to 65535")
        where = f"all of {processes} processes at {coordinator}"
    until = time.monotonic() + START
    try:
        with _given_up(until + 1, where):
            if process:
                _wait_for(coordinator, until)
            jax.distributed.initialize(
                coordinator,
                processes,
                process,
                initialization_timeout=2 * START,  # the end of it would be a stack of C++
                heartbeat_timeout_seconds=SILENCE,
                shutdown_timeout_seconds=SILENCE,
            )
    except (ValueError, RuntimeError) as error:
        message = f"no cluster was found ({error}); give --coordinator=HOST:PORT, --processes=N and --process=I"
        raise UserError(message) from error


@contextlib.contextmanager
def _given_up(until: float, where: str) -> Iterator[None]:
    """Says what is waited for when it takes more than a moment, and ends the process when it takes too long."""

    def tell():
        print(f"sora-jax: waiting for {where}, {START} s at most", file=sys.stderr, flush=True)

    def end():
        print(f"sora-jax: {where} were not there within {START} s", file=sys.stderr, flush=True)
        os._exit(LostPeer.code)  # the main thread waits inside JAX, where no exception reaches it

    timers = [threading.Timer(2, tell), threading.Timer(until - time.monotonic(), end)]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


def _wait_for(coordinator: str, until: float) -> None:
    """Returns when the first process answers; JAX itself would end this one by a stack of C++.

    LostPeer where nobody has answered by then; UserError where the host has no address.
    """
    host, _, port = coordinator.rpartition(":")
    while True:
        try:
            return socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            if time.monotonic() > until:
                mistaken = isinstance(error, socket.gaierror)  # not a first process that is late
                message = f"--coordinator is {coordinator!r}; nobody answers there ({error})"
                raise (UserError if mistaken else LostPeer)(message) from error
            time.sleep(0.2)


def first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return jax.process_index() == 0


def several() -> bool:
    """Whether there is more than one process."""
    return jax.process_count() > 1


def share_of_batch(mesh: Mesh) -> Share:
    """Return the share of this process in the rows of a batch.

    Processes between which only parameters or the sequence are split read the same rows. UserError where the rows of
    a process do not follow each other.
    """
    count = parts("batch", mesh)
    placed = NamedSharding(mesh, partition("batch")).addressable_devices_indices_map((count,))
    rows = sorted({rows.start or 0 for (rows,) in placed.values()})
    even = rows == list(range(rows[0], rows[0] + len(rows))) and count % len(rows) == rows[0] % len(rows) == 0
    check(even, f"the mesh gives process {jax.process_index()} parts {rows} of a batch; they must follow each other")
    return Share(rows[0] // len(rows), count // len(rows))


def barrier(name: str) -> None:
    """Returns when all processes have come here."""
    if several():
        multihost_utils.sync_global_devices(name)


def all_true(here: bool) -> bool:
    """Whether `here` holds in every process."""
    return bool(multihost_utils.process_allgather(np.int32(here)).all()) if several() else here


def total(values: dict[str, float]) -> dict[str, float]:
    """Sums over the processes, name by name, in float32 where there is more than one."""
    if not several() or not values:
        return values
    sums = multihost_utils.process_allgather(np.array(list(values.values()), np.float32)).astype(np.float64).sum(0)
    return dict(zip(values, sums.tolist(), strict=True))


def on_host(tree):
    """The whole arrays of a tree, wherever their parts are, in the memory of every process."""
    if several():
        mesh = jax.tree.leaves(tree)[0].sharding.mesh
        tree = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(tree)
    return jax.tree.map(np.asarray, tree)


def stop_agreed(step: int) -> bool:
    """Whether all processes stop after this step, because one of them was sent SIGTERM; the same answer in each."""
    return multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def peers() -> Iterator[None]:
    """Makes one sentence, a LostPeer, of a lost connection to another process.

    Where no connection breaks, JAX itself ends the process, with a message, `SILENCE` seconds after the last sign.
    """
    try:
        yield
    except Unreachable:  # in words like those of a lost connection, but to the store
        raise
    # A ValueError where the step is dispatched, a UserError where a checkpoint could not be saved for that reason.
    except (jax.errors.JaxRuntimeError, ValueError, UserError) as error:
        reason = (str(error).splitlines() or [""])[0]
        if not several() or not any(word in reason for word in LOST):
            raise
        message = "another process of this run has died or cannot be reached; start all of them again, and the run goes"
        raise LostPeer(f"{message} on from the last save ({reason[:200]})") from error
