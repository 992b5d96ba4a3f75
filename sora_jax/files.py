"""Paths on the disk and in Google Cloud Storage, and files that appear whole or not at all.

`as_path` makes what the package calls a Path: pathlib's for the disk, `etils.epath`'s, which has the same methods, for
`gs://`. What is different in an object store stands in this file alone:

- an object appears whole when its upload ends, and never grows: a file is made on the local disk, then put there;
- what is read here and there and again (records, tar), or by libraries that know the disk alone (NumPy, zip), is read
  from a `local_copy`, made once;
- there are no folders to make, to rename, or to lock. A folder that is filled file by file is complete once its last
  file is there, under a name that says so: `dataset.json`, `cache.json`, `autoencoder.json`, Orbax's own.
"""

import errno
import functools
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from glob import glob
from pathlib import Path

from sora_jax.errors import UserError

REMOTE = "gs://"
PAUSE = 10.0  # seconds between two writes of what would grow on a disk
SHARE = 20  # a mirror spends at most one part in so many of a run's time
NOT_A_BUG = {  # full disks and wrong paths
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG),
}
LIBRARIES = ("gcsfs.", "google.auth.", "google.api_core.", "google.cloud.")  # behind gs://
HELD: list[io.TextIOBase] = []  # open as long as this process lives
ERRORS = (*LIBRARIES, "aiohttp.", "requests.")  # whose own errors are of the store and the network


def as_path(name: str | os.PathLike) -> Path:
    """A path of the disk, or of `gs://BUCKET/...`; UserError for other places, or where gs:// needs a package."""
    text = os.fspath(name)
    if text.startswith("gs:/"):  # pathlib makes one slash of two
        try:
            _prepare_storage()
        except ImportError as error:
            raise UserError(f"{text!r} needs gcsfs, which is not here: pip install 'sora_jax[gcs]'") from error
        from etils import epath

        return epath.Path(REMOTE + text.removeprefix("gs:").lstrip("/"))
    if "://" in text:
        raise UserError(f"{text!r} cannot be used: paths of this machine and {REMOTE}BUCKET/... can.")
    return Path(text)


@functools.cache
def _prepare_storage() -> None:
    # One way to gs://, whatever else is installed: with TensorFlow there epath would take that, and a GPU's memory.
    os.environ.setdefault("EPATH_USE_TF", "false")
    import fsspec

    # Orbax's arrays come by TensorStore, and other processes write too: a remembered listing would be of yesterday.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    fsspec.get_filesystem_class("gcs")


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is not of the local disk."""
    return os.fspath(path).startswith(REMOTE)


def of_storage(error: Exception) -> bool:
    """Whether an error comes from the libraries behind gs://: no permission, no network, no such bucket."""
    if f"{type(error).__module__}.".startswith(ERRORS):
        return True
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return isinstance(error, OSError) and any(f"{name}.".startswith(LIBRARIES) for name in modules)


def no_bug(error: Exception) -> str:
    """In one sentence what the disk or the store refuses; "" of any other error, which is to be shown whole."""
    if of_storage(error):
        return f"{REMOTE} cannot be used: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if isinstance(error, OSError) and error.errno in NOT_A_BUG:
        return f"{error.filename or 'a file'} cannot be used: {error.strerror}"
    return ""


def _storage(path: Path):
    """(fsspec's file system, the name there) of a remote path."""
    from fsspec.core import url_to_fs

    return url_to_fs(os.fspath(path))


@contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Turns an OSError (a full disk, a folder without permission) into "WHAT cannot be written: ...", a UserError.

    Likewise what else the libraries behind gs:// raise where the store refuses or does not answer.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not of_storage(error):
            raise
        raise UserError(f"{what} cannot be written: {_reason(error)}.") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A local name to write under: on success it becomes `path`, else it goes. A full disk is a UserError."""
    with as_user_error(str(path)):
        temporary = temporary_of(path)
        try:
            make_folder(path.parent)
            yield temporary
            put(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink()


def temporary_of(path: Path) -> Path:
    """A hidden name on the local disk, of the same ending, for what is to become `path`: beside it, if that can be."""
    # Not by process number: processes of several machines may write into one folder.
    name = f".{path.stem}.tmp-{uuid.uuid4().hex[:12]}{path.suffix}"
    return _own_folder(cache_folder() / "unfinished") / name if is_remote(path) else path.with_name(name)


@functools.cache
def _own_folder(above: Path) -> Path:
    """A folder for what this process has not finished yet; those that killed processes have left are removed."""
    make_folder(above)
    with _locked(above / ".lock"):
        for folder in (entry for entry in above.iterdir() if entry.is_dir()):
            with suppress(BlockingIOError), _locked(folder / ".lock", wait=False):  # its process holds it to the end
                shutil.rmtree(folder, ignore_errors=True)
        own = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=above))
        HELD.append(_locked(own / ".lock"))
    return own


def put(temporary: Path, path: Path) -> None:
    """Gives a finished file of the local disk its name, over what is there, at one moment."""
    if is_remote(path):
        storage, name = _storage(path)
        storage.put_file(str(temporary), name)
        temporary.unlink()
    else:
        os.replace(temporary, path)


def create(path: Path, text: str) -> bool:
    """Writes a file unless it is there; whether it was not. Of several processes one is told so."""
    try:
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
    """A UTF-8 text file, whole or not at all. UserError where it cannot be written."""
    with replacing(as_path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content) -> None:
    """A readable JSON file, whole or not at all. UserError where it cannot be written."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """The text of a file. (epath's own takes every encoding for the system's.)"""
    with open_text(path, encoding) as file:
        return file.read()


def open_text(path: Path, encoding: str = "utf-8", newline: str | None = None) -> io.TextIOBase:
    """A text file to be read line by line."""
    return io.TextIOWrapper(path.open("rb"), encoding=encoding, newline=newline)


def size_and_time(path: Path) -> tuple[int, str]:
    """Bytes of a file, and a text that tells this content from what was there at other times."""
    if is_remote(path):
        storage, name = _storage(path)
        found = storage.info(name)
        return found["size"], str(found.get("mtime"))
    status = path.stat()
    return status.st_size, str(status.st_mtime_ns)


def names_below(folder: Path) -> list[str]:
    """Names of all files below a folder, relative to it, sorted."""
    if is_remote(folder):
        return sorted(remote_files(folder))
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def matching(pattern: str) -> list[Path]:
    """The paths that a pattern with *, ? and ** stands for."""
    if is_remote(pattern):
        storage, name = _storage(as_path(pattern))
        return [as_path(REMOTE + found) for found in storage.glob(name)]
    return [Path(found) for found in glob(pattern, recursive=True)]


def remote_files(folder: Path) -> dict[str, int]:
    """Name, relative to the folder -> bytes of every object below; one question, however many there are."""
    storage, root = _storage(folder)
    found = storage.find(root, detail=True)
    return {
        name.removeprefix(root).lstrip("/"): entry["size"]
        for name, entry in found.items()
        if entry["type"] == "file" and not name.endswith("/")
    }


def is_empty(folder: Path) -> bool:
    """Whether nothing is below a folder, or there is none; an object in its own name, as consoles make, is nothing."""
    if is_remote(folder):
        storage, root = _storage(folder)
        with suppress(FileNotFoundError):
            return all(name.rstrip("/") == root.rstrip("/") for name in storage.ls(root, detail=False))
        return True
    return not folder.is_dir() or not any(folder.iterdir())


def read_together(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Name -> bytes of small remote files of a folder, many at a time; those that cannot be read are left out."""
    if not names:
        return {}
    storage, root = _storage(folder)
    found = storage.cat_ranges([f"{root}/{name}" for name in names], None, None, on_error="return")
    return {name: data for name, data in zip(names, found, strict=True) if isinstance(data, bytes)}


def make_folder(folder: Path) -> None:
    """The folder and those above it, where there are folders."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def remove_folder(folder: Path) -> None:
    """With all that is in it."""
    if is_remote(folder):
        folder.rmtree(missing_ok=True)
    else:
        shutil.rmtree(folder)


def unfinished(out: Path) -> Path:
    """Where a folder is filled: under a hidden name that nobody else has a reason to use; in an object store in place.

    There each file would have to be copied to be renamed, and half of them could be seen on the way.
    """
    return out if is_remote(out) else out.with_name(f".{out.name}.sora_jax-unfinished")


def finish_folder(out: Path) -> None:
    """Gives the folder that was filled as `unfinished(out)` its name. OSError where something else has it."""
    if not is_remote(out):
        with suppress(OSError):
            out.rmdir()  # an empty folder of that name may be filled
        os.rename(unfinished(out), out)


def cache_folder() -> Path:
    """SORA_JAX_CACHE if that is on the disk, else below the user's; to be emptied at will while nothing runs.

    `files` holds copies of remote files, `captions` tokens of captions, `unfinished` what is to become remote.
    """
    named = os.environ.get("SORA_JAX_CACHE", "")
    return Path(named) if named and not is_remote(named) else Path.home() / ".cache" / "sora_jax"


def local_copy(path: Path) -> Path:
    """The file itself, or of a remote one a copy on the local disk, made once for each content, by one process or many.

    OSError where there is no such file, UserError where it cannot be read, or on a full disk.
    """
    if not is_remote(path):
        return path
    key = repr((os.fspath(path), *size_and_time(path)))
    copy = cache_folder() / "files" / hashlib.sha256(key.encode()).hexdigest()[:32] / path.name
    if not copy.exists():
        with as_user_error(str(copy)):
            make_folder(copy.parent)
            with _locked(copy.with_name(f".{copy.name}.lock")):
                if not copy.exists():  # else another has made it in the meantime
                    _fetch(path, copy)
    return copy


def _fetch(path: Path, copy: Path) -> None:
    storage, name = _storage(path)
    with replacing(copy) as temporary:
        try:
            storage.get_file(name, str(temporary))
        except Exception as error:
            of_disk = isinstance(error, OSError) and error.errno in NOT_A_BUG
            if of_disk or not (isinstance(error, OSError) or of_storage(error)):
                raise
            raise UserError(f"{path} cannot be read: {_reason(error)}.") from error


def _locked(path: Path, wait: bool = True) -> io.TextIOBase:
    """A file that one open file, of all processes, holds until it is closed; BlockingIOError instead of waiting."""
    import fcntl

    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


class Mirror:
    """A folder of files that grow: the folder itself, or of a remote one a local folder that is copied there.

    `keep_in_time` copies what has changed, at most every ten seconds and in a twentieth of the time; `keep`, and the
    end of the context, at once. A copy that fails is reported once and tried again the next time; only the last one
    raises UserError. A killed process loses what came after the last copy.
    """

    def __init__(self, folder: Path):
        self._target, self._kept, self._next, self._fails = folder, {}, 0.0, False
        self.folder = folder
        if is_remote(folder):
            with as_user_error(str(folder)):
                self.folder = Path(tempfile.mkdtemp(dir=_own_folder(cache_folder() / "unfinished")))

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self.folder == self._target:
            return
        try:
            if kind:  # which is to be told, and not this
                self.keep()
            else:
                self._copy("*")
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def keep_in_time(self) -> None:
        """Copies what has changed since the last time, if it is time."""
        start = time.monotonic()
        if start >= self._next:
            self.keep()
            now = time.monotonic()
            self._next = now + max(PAUSE, SHARE * (now - start))

    def keep(self, pattern: str = "*") -> None:
        """Copies at once what has changed since the last time, of the files whose names are like the pattern."""
        if self.folder == self._target:
            return
        try:
            self._copy(pattern)
            self._fails = False
        except UserError as error:
            if not self._fails:
                print(f"sora-jax: {error} It is tried again now and then.", file=sys.stderr)
            self._fails = True

    def _copy(self, pattern: str) -> None:
        for file in sorted(file for file in self.folder.rglob(pattern) if file.is_file()):
            if self._kept.get(file) != (version := size_and_time(file)):
                target = self._target / file.relative_to(self.folder).as_posix()
                with replacing(target) as temporary:  # a copy, as this file goes on growing
                    shutil.copyfile(file, temporary)
                self._kept[file] = version
