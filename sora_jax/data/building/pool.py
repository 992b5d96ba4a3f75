"""Map a function over items in worker processes: a file that crashes or stalls a decoder costs only itself.

A thread drives each process over a pipe of its own. The workers of `pebble.ProcessPool` share a pipe and its locks, and
all stop for good when one is killed while it sends a result; `concurrent.futures` gives up everything under way.
"""

import os
import pickle
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import connection, get_context
from queue import SimpleQueue
from typing import Any, TypeVar

AHEAD = 4  # items for each process that are under way or wait for one that takes longer

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Refusal:
    """Say why an item has no result; the kind stands before the first colon: "crash: ...", "hang: ..."."""

    reason: str


def map_with_timeout(
    task: Callable[[Item], Result], items: Iterable[Item], workers: int, seconds: float
) -> Generator[Result | Refusal, None, None]:
    """Yield `task(item)` of each item, in order, from spawned processes; with 0 workers from this one, unprotected.

    A process that dies, or takes longer than `seconds` for an item, is replaced and its item refused. Few items are
    under way at once. Task, items and results are pickled. What the task raises is raised here.

    Raises:
        RuntimeError: a process died before it began.
    """
    if workers == 0:
        yield from map(task, items)
        return
    crew: list[_Worker] = []
    pickled = pickle.dumps(task)  # here, so that a process can answer with what raises while it unpickles
    idle = SimpleQueue[_Worker]()

    def run(item: Item) -> Result | Refusal:
        worker = idle.get()
        try:
            return worker.run(item, seconds)
        finally:
            idle.put(worker)

    left, futures, threads = iter(items), deque[Future](), ThreadPoolExecutor(workers)
    try:
        for _ in range(workers):
            crew.append(_Worker(pickled))
            idle.put(crew[-1])
        while True:
            futures.extend(threads.submit(run, item) for item in islice(left, AHEAD * workers - len(futures)))
            if not futures:
                return
            yield futures.popleft().result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in crew:
            worker.process.kill()
        threads.shutdown()
        for worker in crew:  # the processes that were started meanwhile
            worker.end()


class _Worker:
    """Hold a process and the pipe to it."""

    def __init__(self, task: bytes):
        self.task = task
        self.start()

    def start(self) -> None:
        """Start the process, or another in its place."""
        context = get_context("spawn")  # not forked: the caller may hold threads of an accelerator runtime
        self.pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self.task), daemon=True)
        process.start()
        theirs.close()
        self.process, self.begun = process, False

    def run(self, item: Any, seconds: float) -> Any:
        """Return the result of an item, or a Refusal; the time that the process needs to begin does not count."""
        try:
            self.begun = self.begun or self.pipe.recv()
            self.pipe.send(item)
            if not self.pipe.poll(seconds):
                return self._replace(f"hang: not read within {seconds:g} s")
            result, error = self.pipe.recv()
        except (EOFError, OSError) as end:
            if self.begun:
                return self._replace("crash: its process ended with {}")
            raise RuntimeError("a worker process died: the main script needs if __name__ == '__main__'") from end
        if error is not None:
            raise error
        return result

    def end(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def _replace(self, reason: str) -> Refusal:
        self.end()
        code = self.process.exitcode or 0
        self.start()
        return Refusal(reason.format(signal.Signals(-code).name if code < 0 else f"exit code {code}"))


def _serve(pipe: connection.Connection, pickled: bytes) -> None:
    """Answer items in a worker process, until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its processes
    task, error = _answer(pickle.loads, pickled)
    pipe.send(True)
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            os._exit(0)
        pipe.send((None, error) if error else _answer(task, item))


def _answer(task: Callable, item: Any) -> tuple[Any, Exception | None]:
    try:
        return task(item), None
    except Exception as error:
        error.add_note(traceback.format_exc())
        return None, error
