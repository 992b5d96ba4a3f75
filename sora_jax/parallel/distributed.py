"""Coordinate the processes of a run.

All processes must make every call here, in the same order: most are collectives and wait for the others. With a single
process nothing here communicates.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sora_jax.config import check
from sora_jax.data.shard_spec import ShardSpec
from sora_jax.errors import LostPeer, Unreachable, UserError
from sora_jax.parallel.rules import partition, parts
from sora_jax.shapes import PyTree

CONNECTION_ERRORS = ("Gloo", "NCCL", "UNAVAILABLE", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED")  # words of messages
START_TIMEOUT = 300  # seconds in which all processes must have started
HEARTBEAT_TIMEOUT = 60  # seconds without a heartbeat of one process after which JAX aborts all of them


def start(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Connect to the other processes of the run; must come before any other use of JAX.

    On TPU, SLURM and GKE JAX finds the others, and no argument is needed. Elsewhere all three are: `coordinator` is
    HOST:PORT of the first process, `processes` their number, and `process` the index of this one, from 0.

    If they have not all started within START_TIMEOUT, the process prints a message and ends with code 75. If one dies
    later, JAX aborts the others after HEARTBEAT_TIMEOUT with a message.

    Raises:
        UserError: arguments are missing or wrong, or no cluster was found.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in given.items() if value is None]
    check(len(missing) in (0, 3), f"{', '.join(missing)} is not given; give all of {', '.join(given)}, or none")
    where = "the other processes of the run"
    if coordinator is not None and processes is not None and process is not None:
        check(processes > 0, f"--processes is {processes}; it must be positive")
        check(0 <= process < processes, f"--process is {process}; it must be from 0 to {processes - 1}")
        host, _, port = coordinator.rpartition(":")
        valid = host and port.isdigit() and 0 < int(port) < 2**16
        check(valid, f"--coordinator is {coordinator!r}; it must be HOST:PORT, the port from 1 to 65535")
        where = f"all of {processes} processes at {coordinator}"
    deadline = time.monotonic() + START_TIMEOUT
    try:
        # JAX's own timeout aborts with a C++ stack trace: it is twice as long, so that ours comes first.
        with _exit_at(deadline + 1, where):
            if process and coordinator:
                _wait_for(coordinator, deadline)
            jax.distributed.initialize(
                coordinator,
                processes,
                process,
                initialization_timeout=2 * START_TIMEOUT,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
                shutdown_timeout_seconds=HEARTBEAT_TIMEOUT,
            )
    except (ValueError, RuntimeError) as error:
        message = f"no cluster was found ({error}); give --coordinator=HOST:PORT, --processes=N and --process=I"
        raise UserError(message) from error


@contextlib.contextmanager
def _exit_at(deadline: float, where: str) -> Iterator[None]:
    """Print a message if the context lasts longer than two seconds; end the process at the deadline."""

    def notify() -> None:
        print(f"sora-jax: waiting for {where}, {START_TIMEOUT} s at most", file=sys.stderr, flush=True)

    def end() -> NoReturn:
        print(f"sora-jax: {where} were not there within {START_TIMEOUT} s", file=sys.stderr, flush=True)
        os._exit(LostPeer.code)  # not an exception: the main thread waits inside JAX, where none reaches it

    timers = [threading.Timer(2, notify), threading.Timer(deadline - time.monotonic(), end)]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


def _wait_for(coordinator: str, deadline: float) -> None:
    """Wait until the first process accepts connections; JAX itself would abort with a C++ stack trace.

    Raises:
        LostPeer: there was no answer before the deadline.
        UserError: the host name has no address.
    """
    host, _, port = coordinator.rpartition(":")
    while True:
        try:
            return socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            if time.monotonic() > deadline:
                mistaken = isinstance(error, socket.gaierror)  # a wrong name; other errors: the first process is late
                message = f"--coordinator is {coordinator!r}; nobody answers there ({error})"
                raise (UserError if mistaken else LostPeer)(message) from error
            time.sleep(0.2)


def first() -> bool:
    """Return True in the process that writes files and prints."""
    return jax.process_index() == 0


def several() -> bool:
    """Return True if there is more than one process."""
    return jax.process_count() > 1


def share_of_batch(mesh: Mesh) -> ShardSpec:
    """Return the share of this process in the rows of a batch.

    Processes between which only parameters or the sequence are split read the same rows.

    Raises:
        UserError: the rows of a process are not contiguous, so that it could not read them as one block.
    """
    count = parts("batch", mesh)
    placed = NamedSharding(mesh, partition("batch")).addressable_devices_indices_map((count,))  # one row a part
    rows = sorted({index[0].start or 0 for index in placed.values() if index})
    even = rows == list(range(rows[0], rows[0] + len(rows))) and count % len(rows) == rows[0] % len(rows) == 0
    check(even, f"the mesh gives process {jax.process_index()} parts {rows} of a batch; they must follow each other")
    return ShardSpec(rows[0] // len(rows), count // len(rows))


def barrier(name: str) -> None:
    """Wait until all processes have called this with the same name."""
    if several():
        multihost_utils.sync_global_devices(name)


def all_true(here: bool) -> bool:
    """Return True if `here` is True in every process."""
    return bool(multihost_utils.process_allgather(np.int32(here)).all()) if several() else here


def total(values: dict[str, float]) -> dict[str, float]:
    """Return the sums of named values over the processes, rounded to float32 if there is more than one process."""
    if not several() or not values:
        return values
    sums = multihost_utils.process_allgather(np.array(list(values.values()), np.float32)).astype(np.float64).sum(0)
    return dict(zip(values, sums.tolist(), strict=True))


def on_host(tree: PyTree) -> PyTree:
    """Return the arrays of a tree as NumPy arrays, gathered from all processes into the memory of each."""
    if several():  # shards of other processes cannot be read from here: replicate first
        mesh = jax.tree.leaves(tree)[0].sharding.mesh
        tree = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(tree)
    return jax.tree.map(np.asarray, tree)


def stop_agreed(step: int) -> bool:
    """Return True in all processes alike if they must stop after this step because one of them received SIGTERM."""
    return multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def peers() -> Iterator[None]:
    """Convert a lost connection to another process into a one-sentence `LostPeer`.

    If the peer hangs without closing, JAX itself aborts after `HEARTBEAT_TIMEOUT` seconds.
    """
    try:
        yield
    except Unreachable:  # a lost connection to the object store, whose message has the same words
        raise
    # ValueError: raised when the step is dispatched. UserError: a checkpoint could not be saved for this reason.
    except (jax.errors.JaxRuntimeError, ValueError, UserError) as error:
        reason = (str(error).splitlines() or [""])[0]
        if not several() or not any(word in reason for word in CONNECTION_ERRORS):
            raise
        message = "another process of this run has died or cannot be reached; start all of them again, and the run goes"
        raise LostPeer(f"{message} on from the last save ({reason[:200]})") from error
