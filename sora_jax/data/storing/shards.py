"""Write and read ArrayRecord files.

`ArrayRecordDataSource` of the same package does not serve to read: it opens all files to count their records, keeps
every file open that was read once, and shares readers with forked children.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from sora_jax.files import as_path, local_copy, put, temporary_path

# One record a group, so that reading one clip does not unpack its neighbours; level 1 is as fast as the disk.
PIXELS = "group_size:1,zstd:1"
FLOATS = "group_size:1,uncompressed"  # float16 noise does not compress
MAX_OPEN = 128  # files of a folder
# Readers serve shuffled look-ups: reading ahead would only fetch clips that nobody asked for.
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


class RecordWriter:
    """Write one ArrayRecord file, or none if there are no records; what is not finished goes. Raises OSError."""

    def __init__(self, path: Path, options: str):
        self._path, self._options = path, options
        # Not of the same ending: a folder of such files may be read while this one grows.
        self._temporary = temporary_path(path.with_name(f"{path.name}.part"))
        self._writer: Any = None
        self._count = 0

    def __enter__(self) -> "RecordWriter":
        return self

    def write(self, record: bytes) -> None:
        """Append a record."""
        with _as_os_error():
            if self._writer is None:
                from array_record.python.array_record_module import ArrayRecordWriter

                self._writer = ArrayRecordWriter(str(self._temporary), self._options)
            self._writer.write(record)
        self._count += 1

    def finish(self) -> None:
        """Check that all records can be read back, as a full disk can go unnoticed until then, and name the file."""
        if self._writer is None:
            return
        with _as_os_error():
            self._writer.close()
        try:
            reader = open_reader(self._temporary)
            found = reader.num_records()
            reader.close()
        except Exception as error:
            raise OSError(f"a shard of it cannot be read back ({error})") from error
        if found != self._count:
            raise OSError(f"a shard of it holds {found} records of {self._count}")
        put(self._temporary, self._path)

    def __exit__(self, *exception: object) -> None:
        if self._writer is not None and self._writer.is_open():
            with suppress(RuntimeError):
                self._writer.close()
        self._temporary.unlink(missing_ok=True)


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Convert the RuntimeError that ArrayRecord raises for a full disk; its cause stands before the first semicolon."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error).split(";")[0]) from error


def shard_name(prefix: str, shard: int, count: int) -> str:
    """Return the name of a record file."""
    return f"{prefix}-{shard:05d}-of-{count:05d}.array_record"


def open_reader(path: Path):
    """Open a file for random access; a remote one is copied, as shuffled look-ups are many and small."""
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(str(local_copy(path)), READER_OPTIONS)


class ShardReader:
    """Random access to the record files of a folder. Files open when first read, anew in every process."""

    def __init__(self, folder: str | Path, prefix: str, count: int):
        self._state = as_path(folder), prefix, count
        self._begin()

    def _begin(self) -> None:
        folder, prefix, count = self._state
        self._process = os.getpid()
        # One lock for each file: a remote one may take minutes to come. A process may keep only so many files open.
        self._locks = [threading.Lock() for _ in range(count)]
        self._open = lru_cache(MAX_OPEN)(lambda shard: open_reader(folder / shard_name(prefix, shard, count)))

    def read(self, shard: int, record: int) -> bytes:
        """Return a record as it was written."""
        if self._process != os.getpid():  # a forked child must not share its parent's files and threads
            self._begin()
        with self._locks[shard]:
            reader = self._open(shard)
        return reader.read([record])[0]

    def __reduce__(self):
        return ShardReader, self._state
