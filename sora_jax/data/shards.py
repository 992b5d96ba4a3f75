"""Records on disk: shards of bytes with random access."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# One record a group, so that reading one clip does not unpack its neighbours; level 1 is as fast as the disk.
WRITER_OPTIONS = "group_size:1,zstd:1"
# Readers serve shuffled look-ups: reading ahead would only fetch clips that nobody asked for.
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


class ShardWriter:
    """Writes records into `PREFIX-00000-of-000NN.array_record` files of about `shard_bytes` each.

    Not a shard bears its final name before `close`, which also counts what can be read back.
    """

    def __init__(self, folder: Path, prefix: str, shard_bytes: int = 2**28):
        self._folder, self._prefix, self._shard_bytes = Path(folder), prefix, shard_bytes
        self._writer, self._bytes = None, 0
        self._counts: list[int] = []

    def write(self, record: bytes) -> tuple[int, int]:
        """Append a record; returns (shard, place in the shard)."""
        if self._writer is None or self._bytes + len(record) > self._shard_bytes:
            self._next_shard()
        with _as_os_error():
            self._writer.write(record)
        self._bytes += len(record)
        self._counts[-1] += 1
        return len(self._counts) - 1, self._counts[-1] - 1

    def close(self) -> int:
        """Finish the last shard, check and name all; returns their number. OSError if records are missing."""
        self._end_shard()
        for shard, count in enumerate(self._counts):
            _check_shard(self._partial(shard), count)
            self._partial(shard).rename(self._folder / shard_name(self._prefix, shard, len(self._counts)))
        return len(self._counts)

    def _partial(self, shard: int) -> Path:
        return self._folder / f"{self._prefix}-{shard:05d}.partial"

    def _next_shard(self) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        self._end_shard()
        self._writer = ArrayRecordWriter(str(self._partial(len(self._counts))), WRITER_OPTIONS)
        self._bytes = 0
        self._counts.append(0)

    def _end_shard(self) -> None:
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


def _check_shard(path: Path, count: int) -> None:
    # A disk that fills up can go unnoticed until the file is read.
    try:
        reader = _open_reader(path)
        found = reader.num_records()
        reader.close()
    except Exception as error:
        raise OSError(f"a shard of it cannot be read back ({error})") from error
    if found != count:
        raise OSError(f"a shard of it holds {found} records of {count}")


def _open_reader(path: Path):
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(str(path), READER_OPTIONS)


class ShardReader:
    """Random access to what a ShardWriter wrote. Files open when first read, anew in every process."""

    def __init__(self, folder: str | Path, prefix: str, count: int):
        self._folder, self._prefix, self._count = Path(folder), prefix, count
        self._readers, self._process = {}, os.getpid()

    def read(self, shard: int, record: int) -> bytes:
        if self._process != os.getpid():  # a forked child must not share its parent's files and threads
            self._readers, self._process = {}, os.getpid()
        if shard not in self._readers:
            self._readers[shard] = _open_reader(self._folder / shard_name(self._prefix, shard, self._count))
        return self._readers[shard].read([record])[0]

    def __getstate__(self):
        return self._folder, self._prefix, self._count

    def __setstate__(self, state):
        self.__init__(*state)
