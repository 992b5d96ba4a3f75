"""Hold a run folder while a process trains in it: a second one that is started there by mistake is refused.

On one machine a lock of the kernel on RUN/.lock decides. It ends with its process, however that ends. The file names
the process and is written anew every few seconds, as a sign of life: that decides between machines, and where there are
no locks of the kernel (object stores, some network file systems).
"""

import contextlib
import dataclasses
import errno
import functools
import io
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sora_jax.config import check
from sora_jax.errors import UserError
from sora_jax.files import (
    RUN_LOCK,
    as_path,
    as_user_error,
    create,
    is_remote,
    locked,
    make_folder,
    read_text,
    write_text,
)
from sora_jax.parallel import distributed

BEAT = 10.0  # seconds between two signs of life
WATCH = 25.0  # seconds in which a process that lives gives one
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclasses.dataclass(frozen=True)
class Holder:
    """Identify a process that trains, and since when."""

    process: int
    host: str
    since: str
    beat: int = 0  # signs of life so far

    def __str__(self) -> str:
        return f"process {self.process} on host {self.host}"


@contextlib.contextmanager
def run_lock(workdir: Path) -> Iterator[None]:
    """Hold a run folder, which is made if need be, and removed again if nothing was put into it.

    Raises:
        UserError: in all processes of this run, where another one trains in the folder.
    """
    refusal = ""
    with contextlib.ExitStack() as stack:
        if distributed.first():
            try:
                stack.enter_context(_held(as_path(workdir)))
            except UserError as error:
                refusal = str(error)
        free = distributed.all_true(not refusal)
        check(free, refusal or f"--workdir is {str(workdir)!r}; the first process says why it cannot be used")
        yield


def holder(folder: Path) -> tuple[Holder | None, bool]:
    """Return which process holds a run folder, None if none does, and if it lives; nothing is written.

    Where the kernel has no locks it counts as alive.
    """
    path = as_path(folder) / RUN_LOCK
    found = _read(path)
    if found is None or is_remote(folder):
        return found, found is not None
    try:
        locked(path, wait=False).close()
    except BlockingIOError:
        return found, True
    except (ImportError, OSError):
        return found, True
    return found, False


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    own = Holder(os.getpid(), socket.gethostname(), time.strftime("%Y-%m-%d %H:%M"))
    with contextlib.ExitStack() as stack:
        with as_user_error(str(folder / RUN_LOCK)):
            if not is_remote(folder):
                stack.callback(_remove_empty, [each for each in (folder, *folder.parents) if not each.exists()])
            make_folder(folder)
            write = _take(folder, own, None if is_remote(folder) else stack.enter_context(_kernel_lock(folder)))
        stack.callback(_remove, folder / RUN_LOCK)
        stack.enter_context(_signs_of_life(own, write))
        yield


def _take(folder: Path, own: Holder, file: io.TextIOBase | None) -> Callable[[str], None]:
    """Write who holds the folder, unless another process does; return how it is written anew."""
    path = folder / RUN_LOCK
    write = functools.partial(write_text, path) if file is None else functools.partial(_rewrite, file)
    if file is None and create(path, _text(own)):
        return write
    if left := _read(path):
        # What a process of this machine has left, whose lock is free, is left of one that has ended.
        ended = file is not None and left.host == own.host
        check(ended or not _lives(path, left), _refusal(folder, left))
        print(f"sora-jax: {path} was left by {left}, which has ended; it is taken over", file=sys.stderr)
    write(_text(own))
    return write


@contextlib.contextmanager
def _kernel_lock(folder: Path) -> Iterator[io.TextIOBase | None]:
    """Yield the lock file under the kernel's lock, or None where there are no such locks; UserError if it is taken."""
    path = folder / RUN_LOCK
    try:
        while True:
            file = locked(path, wait=False)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
            file.close()  # its holder has removed it meanwhile
    except BlockingIOError:
        raise UserError(_refusal(folder, _read(path))) from None
    except (ImportError, OSError) as error:  # there is no fcntl on Windows
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        yield None
        return
    with file:
        yield file


def _refusal(folder: Path, holder: Holder | None) -> str:
    who = f"{holder} has trained in it since {holder.since}" if holder else "another process trains in it"
    return f"--workdir is {str(folder)!r}; {who}; wait for it, stop it, or take another folder"


def _text(holder: Holder) -> str:
    return json.dumps(dataclasses.asdict(holder)) + "\n"


def _rewrite(file: io.TextIOBase, text: str) -> None:
    """Write a file anew in place: one that replaced it would be without its lock."""
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()


def _read(path: Path) -> Holder | None:
    """Read who holds a folder; None if the file is not there, or is just being written."""
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
        return Holder(**json.loads(read_text(path)))
    return None


def _lives(path: Path, left: Holder) -> bool:
    """Watch for a sign of life of a process that cannot be asked."""
    print(f"sora-jax: {path} is of {left}; waiting {WATCH:.0f} s for a sign of life", file=sys.stderr, flush=True)
    end = time.monotonic() + WATCH
    while time.monotonic() < end:
        time.sleep(WATCH / 50)
        now = _read(path)
        if now is not None and now != left:
            return True
    return False


@contextlib.contextmanager
def _signs_of_life(own: Holder, write: Callable[[str], None]) -> Iterator[None]:
    """Write the file anew now and then, in a thread; a sign that cannot be given is left out."""
    ended = threading.Event()

    def beat() -> None:
        number = 0
        while not ended.wait(BEAT):
            number += 1
            with contextlib.suppress(OSError, UserError):
                write(_text(dataclasses.replace(own, beat=number)))

    thread = threading.Thread(target=beat, name="run lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # it is not empty
            folder.rmdir()
