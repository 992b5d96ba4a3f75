"""End a command by Ctrl-C with its own exit code, also while JAX compiles a program."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

CODE = 130  # 128 + SIGINT, as shells report it
GRACE = 2.0  # seconds between the Ctrl-C that ends a command at once and its end
CLEANING = 10.0  # seconds, where Python has begun to clean up: the last files are being written
# Commands that go on from what they saved
RESUMED = (["train"], ["quickstart"], ["data", "build"], ["data", "encode"], ["evaluate"])


def sentence(arguments: list[str]) -> str:
    """Return what an interrupted command says."""
    resumed = any(arguments[: len(command)] == command for command in RESUMED)
    rest = (
        "the same command goes on where the last save was" if resumed else "the files that it has written are complete"
    )
    return f"sora-jax: interrupted; {rest}"


def end(code: int) -> NoReturn:
    """End the process without Python's exit, in which JAX dies if the compilation of a program was interrupted."""
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def watched(said: str) -> Iterator[None]:
    """End the process soon after a Ctrl-C that asks for it, even if Python does not get to run its handler.

    Python runs handlers between its own instructions: not before a compilation ends, which may take minutes. A thread
    is told of the signal at once. Where the first Ctrl-C asks for an orderly stop, the second one is meant.
    """
    cleaning = threading.Event()

    def handle(number: int, frame: object) -> None:
        cleaning.set()
        raise KeyboardInterrupt

    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, handle)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)  # as `set_wakeup_fd` demands
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def late() -> None:
        if cleaning.is_set() and count == 1:
            time.sleep(CLEANING - GRACE)
        print(f"\n{said}", file=sys.stderr, flush=True)
        end(CODE)

    count = 0

    def wait() -> None:
        nonlocal count
        for number in iter(lambda: os.read(reading, 1), b""):
            count += number[0] == signal.SIGINT
            orderly = count == 1 and signal.getsignal(signal.SIGINT) is not handle
            if number[0] == signal.SIGINT and not orderly:
                timer = threading.Timer(GRACE, late)
                timer.daemon = True
                timer.start()

    threading.Thread(target=wait, daemon=True, name="interrupt").start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)
