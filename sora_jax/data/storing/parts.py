"""Folders that are made part by part: by one process or by many, at once or after an interruption.

A folder of n parts is filled under a hidden name beside its own (`files.unfinished`):

=========================================  ===============================================================
`started.json`                             what is being made; another content does not go on with it
`PREFIX-0000k-of-0000n.array_record`       the records of part k
`part-0000k.jsonl`                         what was refused in part k: {"file", "reason"}
`part-0000k.parquet`                       a row for each record; written last: its presence says that part k
                                           is whole
=========================================  ===============================================================

What is in part k depends on k alone, so it does not matter who makes it, and when. Once all parts are there the
rows are joined to `manifest.parquet`, the info file is written, and the folder gets its name. A half-written part is
made again. In an object store the folder has its name from the beginning, and the info file says that it is whole.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sora_jax.config import first_difference
from sora_jax.data.shard_spec import ShardSpec
from sora_jax.data.storing.shards import RecordWriter, shard_name
from sora_jax.errors import UserError
from sora_jax.files import (
    as_path,
    as_user_error,
    create,
    finish_folder,
    local_copy,
    make_folder,
    put,
    read_text,
    remove_folder,
    replacing,
    temporary_path,
    unfinished,
)

PLACES = {"shard": "int32", "record": "int32"}
STARTED = "started.json"
CLAIM_TRIES = 50
WIDE = {"string": "large_string"}


@dataclass(frozen=True)
class Kind:
    """What a folder holds. files: prefix of a record file -> ArrayRecord options. columns: of a row, name -> type.

    info: name of the file that makes the folder valid.
    """

    files: Mapping[str, str]
    columns: Mapping[str, str]
    info: str


@dataclass(frozen=True)
class ShardedWriter:
    """A folder in the making; `start` opens it."""

    out: Path
    kind: Kind
    count: int

    @property
    def folder(self) -> Path:
        return unfinished(self.out)

    def missing(self, share: ShardSpec = ShardSpec()) -> list[int]:
        """The parts of this process that are not there yet."""
        return [k for k in range(share.index, self.count, share.count) if not self.is_made(k)]

    def is_made(self, part: int) -> bool:
        """Whether a part is there, whole."""
        return self._rows(part).exists()

    @contextmanager
    def write(self, part: int) -> Iterator["PartWriter"]:
        """A writer for one part, which counts as made when the block ends well."""
        with as_user_error(f"out={self.out}"):
            writer = PartWriter(self, part)
            try:
                yield writer
                writer.finish()
            finally:
                writer.close()

    def finish(self, info: dict, unique: Sequence[str] = ("id",), empty: Callable[[list[dict]], str] = str) -> bool:
        """Join the parts if all are there, give the folder its name; False if others still work on theirs.

        info: what the info file holds beside "clips", "refused", "parts" (their numbers) and "digest" (of the rows).
        unique: columns that tell rows apart; a row that repeats an earlier one is refused as a duplicate.
        empty(refused): the message of the UserError that is raised where there is no row at all.
        """
        if (self.out / self.kind.info).exists():
            return True
        if self.missing():
            return False
        try:
            with as_user_error(f"out={self.out}"):
                counts = _join(self, unique)
                if not counts["clips"]:
                    message = empty(_read_lines(self.folder / "refused.jsonl"))
                    remove_folder(self.folder)
                    raise UserError(message)
                with _inside(self.folder / self.kind.info) as temporary:
                    temporary.write_text(json.dumps(info | counts, ensure_ascii=False, indent=1) + "\n")
                finish_folder(self.out)
        except (UserError, FileNotFoundError):
            if not (self.out / self.kind.info).exists():  # else another process was faster
                raise
        # Hidden files are of attempts that were stopped, or of another process that has joined the same parts.
        for leftover in (*self.out.glob("part-*"), *self.out.glob(".*"), self.out / STARTED):
            leftover.unlink(missing_ok=True)
        return True

    def _rows(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.parquet"

    def _refused(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.jsonl"


def start(out: str | Path, kind: Kind, header: dict, count: int) -> ShardedWriter:
    """The unfinished folder of `out`, new or as an earlier call with the same `header` left it.

    header: JSON of all that decides what is in the parts. Raises UserError where `out` is in use, or something else
    was started there: other options, or the same from other files.
    """
    parts = ShardedWriter(as_path(out), kind, count)
    in_place = parts.folder == parts.out and (parts.out / STARTED).exists()
    if not in_place and parts.out.exists() and (not parts.out.is_dir() or any(parts.out.iterdir())):
        raise UserError(f"out={out} already exists: give another folder or remove this one.")
    header = json.loads(json.dumps(header | {"parts": count}))
    with as_user_error(f"out={out}"):
        make_folder(parts.folder)
        started = _claim(parts.folder / STARTED, header)
    if started != header:
        what = first_difference(started or {}, header) or "options"
        raise UserError(f"out={out} was started with another {what}: remove {parts.folder} to start anew.")
    return parts


def _claim(path: Path, header: dict) -> dict | None:
    """What is started here: `header`, unless another process was first."""
    if create(path, json.dumps(header)):
        return header
    for _ in range(CLAIM_TRIES):  # until the other process has written it
        if (found := _read_json(path)) is not None:
            return found
        time.sleep(0.1)
    return None


class PartWriter:
    """Takes the rows of one part with their records, and what is refused; made by `ShardedWriter.write`."""

    def __init__(self, parts: ShardedWriter, part: int):
        self._parts, self._part = parts, part
        self._writers = {
            prefix: RecordWriter(parts.folder / shard_name(prefix, part, parts.count), options)
            for prefix, options in parts.kind.files.items()
        }
        self._table: list[dict] = []
        self._refusals: list[dict] = []

    def add(self, row: dict, *records: bytes) -> None:
        """Append a row, with one record for each kind of file in their order."""
        for writer, record in zip(self._writers.values(), records, strict=True):
            writer.write(record)
        self._table.append(row | {"shard": self._part, "record": len(self._table)})

    def refuse(self, file: str, reason: str) -> None:
        """List a file that is not used."""
        self._refusals.append({"file": file, "reason": reason})

    def finish(self) -> None:
        """Check what is on the disk, then say that the part is whole."""
        for writer in self._writers.values():
            writer.finish()
        _write_lines(self._parts._refused(self._part), self._refusals)
        with replacing(self._parts._rows(self._part)) as temporary:
            _write_table(temporary, self._table, self._parts.kind.columns | PLACES)

    def close(self) -> None:
        for writer in self._writers.values():
            with suppress(OSError):
                writer.close()


def _join(parts: ShardedWriter, unique: Sequence[str]) -> dict:
    """All rows in one table, all refusals in one file; a part at a time, so memory holds only the keys."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    digest, seen, index = hashlib.sha256(), {}, 0
    refused = []
    columns = {"index": "int64"} | dict(parts.kind.columns) | PLACES
    with _inside(parts.folder / "manifest.parquet") as temporary:
        with pq.ParquetWriter(temporary, _schema(columns)) as writer:
            for part in range(parts.count):
                refused += _read_lines(parts._refused(part))
                rows = []
                for row in pq.read_table(local_copy(parts._rows(part))).to_pylist():
                    key = tuple(row[name] for name in unique)
                    file = row.get("file", "")
                    if key in seen:
                        refused.append({"file": file, "reason": f"duplicate: the same content as {seen[key]}"})
                        continue
                    seen[key] = file
                    rows.append({"index": index} | row)
                    digest.update(_canonical(row))
                    index += 1
                if rows:
                    writer.write_table(pa.Table.from_pylist(rows, _schema(columns)))
    refused = list({json.dumps(entry): entry for entry in refused}.values())  # one for all spans of a file
    with _inside(parts.folder / "refused.jsonl") as temporary:
        temporary.write_text(_lines(refused), encoding="utf-8")
    return {"clips": index, "refused": len(refused), "parts": parts.count, "digest": digest.hexdigest()}


def _canonical(row: dict) -> bytes:
    """What a clip is, wherever it came from."""
    return json.dumps({k: v for k, v in row.items() if k not in ("source", "file")}, sort_keys=True).encode()


def _schema(columns: Mapping[str, str]):
    import pyarrow as pa

    def kind(name: str):
        # Of 64 bits: a column of a data set may hold more than 2 GiB.
        return pa.large_list(kind(name[:-2])) if name.endswith("[]") else pa.type_for_alias(WIDE.get(name, name))

    return pa.schema([(name, kind(type_)) for name, type_ in columns.items()])


def _write_table(path: Path, rows: list[dict], columns: Mapping[str, str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows, _schema(columns)), path)


def _write_lines(path: Path, entries: Sequence[dict]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(_lines(entries), encoding="utf-8")


def _lines(entries: Sequence[dict]) -> str:
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


@contextmanager
def _inside(path: Path) -> Iterator[Path]:
    """As `replacing`, in a folder that another process may have renamed: it is not made again."""
    temporary = temporary_path(path)
    try:
        yield temporary
        put(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in read_text(path).splitlines()]


def _read_json(path: Path):
    try:
        return json.loads(read_text(path))
    except (OSError, ValueError):
        return None
