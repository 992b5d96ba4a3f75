"""Records on disk: ArrayRecord files with random access."""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sora_jax.files import as_path, local_copy, put, temporary_path

# One record a group, so that reading one clip does not unpack its neighbours; level 1 is as fast as the disk.
PIXELS = "group_size:1,zstd:1"
FLOATS = "group_size:1,uncompressed"  # float16 noise does not compress
MAX_OPEN = 128  # files of a folder
# Readers serve shuffled look-ups: reading ahead would only fetch clips that nobody asked for.
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


class RecordWriter:
    """Writes one ArrayRecord file; without records there is no file. Raises OSError."""

    def __init__(self, path: Path, options: str):
        self._path, self._options = path, options
        # Not of the same ending: a folder of such files may be read while this one grows.
        self._temporary = temporary_path(path.with_name(f"{path.name}.part"))
        self._writer, self._count = None, 0

    def write(self, record: bytes) -> None:
        with _as_os_error():
            if self._writer is None:
                from array_record.python.array_record_module import ArrayRecordWriter

                self._writer = ArrayRecordWriter(str(self._temporary), self._options)
            self._writer.write(record)
        self._count += 1

    def finish(self) -> None:
        """Check that all records can be read back, as a full disk can go unnoticed until then, and name the file."""
        self._end()
        if self._count:
            _check(self._temporary, self._count)
            put(self._temporary, self._path)

    def close(self) -> None:
        """Close the file; what was not finished goes."""
        self._end()
        self._temporary.unlink(missing_ok=True)

    def _end(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with _as_os_error():
                writer.close()


@contextmanager
def _as_os_error() -> Iterator[None]:
    """ArrayRecord reports a full disk as RuntimeError, with the cause before the first semicolon."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error).split(";")[0]) from error


def shard_name(prefix: str, shard: int, count: int) -> str:
    return f"{prefix}-{shard:05d}-of-{count:05d}.array_record"


def _check(path: Path, count: int) -> None:
    try:
        reader = open_reader(path)
        found = reader.num_records()
        reader.close()
    except Exception as error:
        raise OSError(f"a shard of it cannot be read back ({error})") from error
    if found != count:
        raise OSError(f"a shard of it holds {found} records of {count}")


def open_reader(path: Path):
    """An ArrayRecord reader for random access; a remote file is copied, as shuffled look-ups are many and small."""
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(str(local_copy(path)), READER_OPTIONS)


class ShardReader:
    """Random access to the record files of a folder. Files open when first read, anew in every process."""

    def __init__(self, folder: str | Path, prefix: str, count: int):
        self._folder, self._prefix, self._count = as_path(folder), prefix, count
        self._begin()

    def _begin(self) -> None:
        self._readers, self._process, self._lock = OrderedDict(), os.getpid(), threading.Lock()
        self._opening = [threading.Lock() for _ in range(self._count)]

    def read(self, shard: int, record: int) -> bytes:
        """One record, as it was written."""
        if self._process != os.getpid():  # a forked child must not share its parent's files and threads
            self._begin()
        return self._reader(shard).read([record])[0]

    def _reader(self, shard: int):
        """An open file; the one that was not used for longest is let go, as processes may open only so many."""
        with self._opening[shard]:  # one lock for each: a remote file may take minutes to come
            with self._lock:
                reader = self._readers.pop(shard, None)
            reader = reader or open_reader(self._folder / shard_name(self._prefix, shard, self._count))
            return self._hold(shard, reader)

    def _hold(self, shard: int, reader):
        with self._lock:
            self._readers[shard] = reader
            if len(self._readers) > MAX_OPEN:
                self._readers.popitem(last=False)
            return reader

    def __getstate__(self):
        return self._folder, self._prefix, self._count

    def __setstate__(self, state):
        self.__init__(*state)
