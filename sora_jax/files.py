"""Access local files and Google Cloud Storage through one interface, and write files atomically.

`as_path` returns what the package calls a Path: `pathlib.Path` for the disk, `etils.epath.Path`, which has the same
methods, for `gs://`. This file alone knows how an object store differs from a disk:

- An object appears when its upload ends and cannot be appended to: a file is written on the local disk, then uploaded.
- Files with random access (records, tar) and files for libraries that need a local path (NumPy, zip) are read from a
  `local_copy`, which is downloaded once.
- There are no folders to create, rename or lock. A folder of several files is complete when the file that is written
  last exists: `dataset.json`, `cache.json`, `autoencoder.json`, or Orbax's own marker.
"""

import errno
import functools
import hashlib
import io
import json
import os
import shutil
import tempfile
import traceback
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from glob import glob
from pathlib import Path
from typing import Any

from sora_jax.errors import UserError, install_command

REMOTE = "gs://"
RUN_LOCK = ".lock"  # in a run folder, while a process trains there
# Full disks and wrong paths: mistakes that the user can mend, not bugs.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR}
DISK_ERRORS |= {errno.ENOTDIR, errno.ENAMETOOLONG}
STORAGE_LIBRARIES = ("gcsfs.", "google.auth.", "google.api_core.", "google.cloud.")  # packages that serve gs://
NETWORK_LIBRARIES = ("aiohttp.", "requests.")  # packages below them, whose exceptions they pass on
# Lock files that stay open until the process ends: the operating system then releases their locks, also after a kill.
HELD_LOCKS: list[io.TextIOBase] = []


def as_path(name: str | os.PathLike) -> Path:
    """Return the Path of a local file or of `gs://BUCKET/...`; UserError for other schemes, or if gcsfs is missing."""
    text = os.fspath(name)
    if text.startswith("gs:/"):  # pathlib collapses the two slashes into one
        try:
            _prepare_storage()
        except ImportError as error:
            raise UserError(f"{text!r} needs gcsfs, which is not installed: {install_command('gcs')}") from error
        from etils import epath

        return epath.Path(REMOTE + text.removeprefix("gs:").lstrip("/"))
    if "://" in text:
        raise UserError(f"{text!r} cannot be used; a path must be local or {REMOTE}BUCKET/...")
    return Path(text)


@functools.cache
def _prepare_storage() -> None:
    # Always gcsfs: where TensorFlow is installed epath would import it, and TensorFlow takes all memory of a GPU.
    os.environ.setdefault("EPATH_USE_TF", "false")
    import fsspec

    # No cached listings: TensorStore (Orbax) and other processes write to the bucket without gcsfs knowing.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    fsspec.get_filesystem_class("gcs")


def is_remote(path: str | os.PathLike) -> bool:
    """Return True for a path in an object store."""
    return os.fspath(path).startswith(REMOTE)


def is_storage_error(error: Exception) -> bool:
    """Return True if the libraries behind gs:// raised the error: no permission, no network, no such bucket."""
    if f"{type(error).__module__}.".startswith(STORAGE_LIBRARIES + NETWORK_LIBRARIES):
        return True
    # They also raise plain OSErrors, such as FileNotFoundError: only the traceback tells those from the disk's.
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return isinstance(error, OSError) and any(f"{name}.".startswith(STORAGE_LIBRARIES) for name in modules)


def storage_message(error: Exception) -> str:
    """Describe a disk or bucket error in one sentence. Returns "" for other errors, whose traceback should be shown."""
    if is_storage_error(error):
        return f"{REMOTE} cannot be used: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"{error.filename or 'a file'} cannot be used: {error.strerror}"
    return ""


def _storage(path: Path) -> tuple[Any, str]:
    """Return fsspec's file system of a remote path, and the path's name in it."""
    from fsspec.core import url_to_fs

    return url_to_fs(os.fspath(path))


@contextmanager
def as_user_error(what: str, action: str = "written") -> Iterator[None]:
    """Convert storage errors inside the context to the UserError "WHAT cannot be written: ...", or another action.

    Covers every OSError (a full disk, no permission) and every exception of the libraries behind gs://.
    """
    try:
        yield
    except Exception as error:
        # A disk that is full while a remote file is read is about the copy, whose context is outside.
        of_copy = action == "read" and getattr(error, "errno", None) in DISK_ERRORS
        if of_copy or not isinstance(error, OSError) and not is_storage_error(error):
            raise
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{what} cannot be {action}: {why}.") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary local path; move it to `path` on success, delete it on failure. Raises UserError."""
    with as_user_error(str(path)):
        temporary = temporary_path(path)
        try:
            make_folder(path.parent)
            yield temporary
            put(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink()


def temporary_path(path: Path) -> Path:
    """Return an unused hidden local path with the suffix of `path`, beside it unless `path` is remote."""
    # Random, not the process id: processes of several machines may write into one shared folder.
    name = f".{path.stem}.tmp-{uuid.uuid4().hex[:12]}{path.suffix}"
    return _own_folder(cache_folder() / "unfinished") / name if is_remote(path) else path.with_name(name)


@functools.cache
def _own_folder(above: Path) -> Path:
    """Create a folder below `above` for unfinished files of this process; remove folders of processes that died."""
    make_folder(above)
    with locked(above / ".lock"):  # no process may see a folder between its creation and its lock
        for folder in (entry for entry in above.iterdir() if entry.is_dir()):
            # A live process holds the lock of its folder until it ends, so a free lock means that it is gone.
            with suppress(BlockingIOError), locked(folder / ".lock", wait=False):
                shutil.rmtree(folder, ignore_errors=True)
        own = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=above))
        HELD_LOCKS.append(locked(own / ".lock"))
    return own


def temporary_folder() -> Path:
    """Make a folder for files on their way to an object store; a later process removes what a dead one left."""
    return Path(tempfile.mkdtemp(dir=_own_folder(cache_folder() / "unfinished")))


def put(temporary: Path, path: Path) -> None:
    """Move a finished local file to `path` atomically, replacing a file that is there."""
    if is_remote(path):
        storage, name = _storage(path)
        storage.put_file(str(temporary), name)
        temporary.unlink()
    else:
        os.replace(temporary, path)


def create(path: Path, text: str) -> bool:
    """Write a file unless it exists, and return True if it did not: of several processes, exactly one gets True."""
    try:  # both ways of creating are atomic, unlike a check followed by a write
        if is_remote(path):
            storage, name = _storage(path)
            storage.pipe_file(name, text.encode(), mode="create")
        else:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
    except FileExistsError:
        return False
    return True


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically; UserError if it cannot be written."""
    with replacing(as_path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: object) -> None:
    """Write an indented JSON file atomically; UserError if it cannot be written."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def read_text(path: Path) -> str:
    """Read a UTF-8 text file."""
    with io.TextIOWrapper(path.open("rb"), encoding="utf-8") as file:  # `path.read_text` of epath ignores `encoding`
        return file.read()


def size_and_time(path: Path) -> tuple[int, str]:
    """Return the size of a file in bytes and its modification time as text, which identify its content."""
    if is_remote(path):
        storage, name = _storage(path)
        found = storage.info(name)
        return found["size"], str(found.get("mtime"))
    status = path.stat()
    return status.st_size, str(status.st_mtime_ns)


def matching(pattern: str) -> list[Path]:
    """List the paths that match a glob pattern with *, ? and **."""
    if is_remote(pattern):
        storage, name = _storage(as_path(pattern))
        return [as_path(REMOTE + found) for found in storage.glob(name)]
    return [Path(found) for found in glob(pattern, recursive=True)]


def remote_files(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every object below a folder, by name relative to it, in one request."""
    storage, root = _storage(folder)
    found = {name: entry for name, entry in storage.find(root, detail=True).items() if not name.endswith("/")}
    return {name.removeprefix(root).lstrip("/"): e["size"] for name, e in found.items() if e["type"] == "file"}


def is_empty(folder: Path) -> bool:
    """Return True if the folder is missing or empty.

    The placeholder object that cloud consoles create for a folder does not count, nor does the lock of a run.
    """
    if is_remote(folder):
        storage, root = _storage(folder)
        spare = root.rstrip("/"), f"{root.rstrip('/')}/{RUN_LOCK}"
        with suppress(FileNotFoundError):
            return all(name.rstrip("/") in spare for name in storage.ls(root, detail=False))
        return True
    return not folder.is_dir() or all(entry.name == RUN_LOCK for entry in folder.iterdir())


def read_together(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Read small remote files of a folder concurrently, by name; files that cannot be read are left out."""
    if not names:
        return {}
    storage, root = _storage(folder)
    found = storage.cat_ranges([f"{root}/{name}" for name in names], None, None, on_error="return")
    return {name: data for name, data in zip(names, found, strict=True) if isinstance(data, bytes)}


def make_folder(folder: Path) -> None:
    """Create a folder and its parents; do nothing in an object store, which has no folders."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder and everything in it."""
    from etils import epath

    epath.Path(folder).rmtree(missing_ok=is_remote(folder))


def unfinished(out: Path) -> Path:
    """Return the hidden folder in which `out` is filled before `finish_folder` renames it.

    For an object store this is `out` itself: renaming would copy every file, and readers could see half of them.
    """
    return out if is_remote(out) else out.with_name(f".{out.name}.sora_jax-unfinished")


def finish_folder(out: Path) -> None:
    """Rename `unfinished(out)` to `out`; OSError if something else has that name."""
    if not is_remote(out):
        with suppress(OSError):
            out.rmdir()  # an empty folder of that name may be replaced
        os.rename(unfinished(out), out)


def cache_folder() -> Path:
    """Return the local cache folder: SORA_JAX_CACHE if that is a local path, else ~/.cache/sora_jax. Raises UserError.

    It may be deleted while nothing runs. Below it, `files` holds copies of remote files, `captions` tokenized captions,
    `compiled` programs and `unfinished` files that wait for their upload.
    """
    named = os.environ.get("SORA_JAX_CACHE", "")
    if named and not is_remote(named):
        return Path(named)
    try:
        return Path.home() / ".cache" / "sora_jax"
    except RuntimeError as error:
        raise UserError("SORA_JAX_CACHE is not set; without a home folder it must name a folder for caches") from error


def local_copy(path: Path) -> Path:
    """Return a local file itself, or download a remote one, once per content, and return the copy.

    fsspec's caches do not serve: `simplecache` ignores new versions and hands out files that are half downloaded,
    `filecache` overwrites a copy under its readers and downloads once per process. Raises OSError if there is no such
    file, UserError if it cannot be read or the copy cannot be written.
    """
    if not is_remote(path):
        return path
    key = repr((os.fspath(path), *size_and_time(path)))
    copy = cache_folder() / "files" / hashlib.sha256(key.encode()).hexdigest()[:32] / path.name
    if not copy.exists():
        with as_user_error(str(copy)):
            make_folder(copy.parent)
            with locked(copy.with_name(f".{copy.name}.lock")):
                if not copy.exists():  # checked again: another process may have made it before the lock was free
                    storage, name = _storage(path)
                    with replacing(copy) as temporary, as_user_error(str(path), "read"):
                        storage.get_file(name, str(temporary))
    return copy


def locked(path: Path, wait: bool = True) -> io.TextIOBase:
    """Open a file under an exclusive lock between processes, which lasts until the file is closed.

    Raises BlockingIOError if another process has the lock and `wait` is False.
    """
    import fcntl  # not at the top: there is none on Windows

    file = path.open("a+")  # not "w": who is refused must not empty it
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file
