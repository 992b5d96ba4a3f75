"""Map a function over items in processes of its own, so that a file that kills or stops a decoder costs only itself."""

import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import connection, get_context
from typing import TypeVar

QUEUED = 2  # items that a process has, so that it need not wait for the next
AHEAD = 4  # results for each process that may wait for one that takes longer

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Failure:
    """Why an item has no result: "crash: ..." or "hang: ..."."""

    reason: str


def guarded_map(
    task: Callable[[Item], Result], items: Iterable[Item], workers: int, seconds: float
) -> Iterator[Result | Failure]:
    """`task` of each item, in order, in so many spawned processes; 0: in this one, without protection.

    A process that dies costs the item it was at, one that takes longer than `seconds` over an item is killed; both
    are replaced. task, items (small ones) and results must pickle; few items are under way at once, however many there
    are. What the task raises is raised here. Raises RuntimeError where a process dies before it has begun.
    """
    if workers == 0:
        yield from map(task, items)
        return
    crew = _Crew(task, items, workers, seconds)
    try:
        yield from crew.results()
    finally:
        crew.dismiss()


class _Worker:
    """A process and the items it was given, oldest first; `since`: when it began the oldest one."""

    def __init__(self, task: Callable):
        context = get_context("spawn")  # not forked: the caller may hold threads of an accelerator runtime
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, task), daemon=True)
        self.process.start()
        theirs.close()
        self.queue, self.begun, self.since = deque(), False, time.monotonic()

    def give(self, number: int, item) -> None:
        if not self.queue:
            self.since = time.monotonic()
        self.queue.append((number, item))
        try:
            self.pipe.send(item)
        except OSError:  # it is dead, which is found out when its answer is read
            return

    def left(self, seconds: float) -> float:
        """Seconds until it has taken too long; the time that a process needs to begin does not count."""
        return self.since + seconds - time.monotonic() if self.queue and self.begun else float("inf")

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class _Crew:
    def __init__(self, task: Callable, items: Iterable, workers: int, seconds: float):
        self.task, self.items, self.seconds = task, enumerate(items), seconds
        self.again, self.done, self.next = deque(), {}, 0  # to be given out, results, number of the result awaited
        self.given = 0
        self.workers = [_Worker(task) for _ in range(workers)]

    def results(self) -> Iterator:
        while True:
            self._feed()
            if self.next in self.done:
                yield self.done.pop(self.next)
                self.next += 1
            elif any(worker.queue for worker in self.workers):
                self._collect()
            else:
                return

    def dismiss(self) -> None:
        for worker in self.workers:
            worker.end()

    def _feed(self) -> None:
        while True:
            worker = min(self.workers, key=lambda worker: len(worker.queue))
            if len(worker.queue) == QUEUED or (entry := self._entry()) is None:
                return
            worker.give(*entry)

    def _entry(self) -> tuple | None:
        if self.again:
            return self.again.popleft()
        if self.given >= self.next + AHEAD * len(self.workers):
            return None
        entry = next(self.items, None)
        self.given += entry is not None
        return entry

    def _collect(self) -> None:
        """Wait for an answer or for the end of somebody's time."""
        left = min(worker.left(self.seconds) for worker in self.workers)
        timeout = None if left == float("inf") else max(0.0, left)
        ready = connection.wait([worker.pipe for worker in self.workers], timeout)
        for worker in [worker for worker in self.workers if worker.pipe in ready]:
            self._receive(worker)
        for worker in [worker for worker in self.workers if worker.left(self.seconds) <= 0 and not worker.pipe.poll()]:
            self._give_up(worker, f"hang: not read within {self.seconds:g} s")

    def _receive(self, worker: _Worker) -> None:
        try:
            result, error = worker.pipe.recv()
        except (EOFError, OSError) as end:
            worker.process.join()
            if not worker.begun:
                text = "a worker process died before it began: the main script needs if __name__ == '__main__'"
                raise RuntimeError(text) from end
            self._give_up(worker, f"crash: its process ended with {_ending(worker.process.exitcode)}")
            return
        if worker.begun:
            number, _ = worker.queue.popleft()
            self.done[number] = result
        worker.begun, worker.since = True, time.monotonic()
        if error is not None:
            raise error

    def _give_up(self, worker: _Worker, reason: str) -> None:
        """Replace a process; the item it was at, if any, has failed, and the rest of its queue is given out again."""
        worker.end()
        if worker.queue:
            number, _ = worker.queue.popleft()
            self.done[number] = Failure(reason)
        self.again.extendleft(reversed(worker.queue))
        self.workers[self.workers.index(worker)] = _Worker(self.task)


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _serve(pipe: connection.Connection, task: Callable) -> None:
    """What a process does: a sign that it has begun, then an answer to each item."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its processes
    pipe.send((None, None))
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            os._exit(0)  # the parent is gone
        try:
            answer = task(item), None
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = None, error
        pipe.send(answer)
