"""Write folders part by part: by one process or by many, at once or after an interruption.

A folder of n parts is filled under a hidden name beside its own (`files.unfinished`):

=========================================  ===============================================================
`started.json`                             what is being made; something else cannot resume it
`PREFIX-0000k-of-0000n.array_record`       the records of part k
`part-0000k.jsonl`                         what was refused in part k: {"file", "reason"}
`part-0000k.parquet`                       a row for each record; written last: its presence says that part k
                                           is whole
=========================================  ===============================================================

What is in part k depends on k alone, so it does not matter which process makes it, and when. Once all parts are made
the rows are joined to `manifest.parquet`, the info file is written, and the folder gets its name. A half-written part
is made again. In an object store the folder has its name from the beginning, and the info file marks it as complete.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sora_jax.config import check, first_difference
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
    write_text,
)

KEY = ("id", "variant")  # columns that identify a row
RECORD_COLUMNS = {"shard": "int32", "record": "int32"}
STARTED = "started.json"
CLAIM_TRIES = 50
WIDE = {"string": "large_string"}


@dataclass(frozen=True)
class Kind:
    """Describe what a folder holds."""

    files: Mapping[str, str]  # prefix of a record file -> ArrayRecord options
    columns: dict[str, str]  # name of a column -> type
    info: str  # name of the file that makes the folder valid


@dataclass(frozen=True)
class ShardedWriter:
    """A folder that is being made; `start` opens it."""

    out: Path
    kind: Kind
    count: int

    @property
    def folder(self) -> Path:
        """Return the folder that the parts are written to."""
        return unfinished(self.out)

    def missing(self, share: ShardSpec = ShardSpec()) -> list[int]:
        """Return the parts of this process that are not made yet."""
        return [k for k in range(share.index, self.count, share.count) if not self.is_made(k)]

    def is_made(self, part: int) -> bool:
        """Return True if a part is whole."""
        return self.file(part, "parquet").exists()

    @contextmanager
    def write(self, part: int) -> Iterator["PartWriter"]:
        """Yield a writer for one part, which counts as made when the block ends without an exception."""
        import pyarrow.parquet as pq

        with self._as_user_error(), ExitStack() as files:
            paths = {self.folder / shard_name(name, part, self.count): how for name, how in self.kind.files.items()}
            writer = PartWriter(part, [files.enter_context(RecordWriter(path, how)) for path, how in paths.items()])
            yield writer
            for file in writer.files:
                file.finish()
            write_text(self.file(part, "jsonl"), _lines(writer.refusals))
            with replacing(self.file(part, "parquet")) as temporary:
                pq.write_table(_to_table(writer.rows, self.kind.columns | RECORD_COLUMNS), temporary)

    def rows(self, part: int) -> list[dict]:
        """Read the rows of a part that is made."""
        import pyarrow.parquet as pq

        return pq.read_table(local_copy(self.file(part, "parquet"))).to_pylist()

    def finish(
        self,
        info: dict,
        empty: Callable[[list[dict]], str] = str,
        amend: Callable[[Iterator[dict]], Callable[[dict], dict]] = lambda rows: lambda row: row,
    ) -> bool:
        """Join the parts if all are made, and give the folder its name; return False if some are missing.

        A row with the `KEY` of an earlier one is refused as a duplicate.

        Args:
            info: content of the info file beside "clips", "refused", "parts" (numbers) and "digest" (of the rows).
            empty: makes the message of the UserError for a folder without rows, from what was refused.
            amend: sees all rows and returns what becomes of each.
        """
        if (self.out / self.kind.info).exists():
            return True
        if self.missing():
            return False
        try:
            with self._as_user_error():
                every = (row for part in range(self.count) for row in self.rows(part))
                counts = _join(self, amend(every))
                if not counts["clips"]:
                    message = empty(read_lines(self.folder / "refused.jsonl"))
                    remove_folder(self.folder)
                    raise UserError(message)
                with _inside(self.folder / self.kind.info) as temporary:
                    text = json.dumps(info | counts, ensure_ascii=False, indent=1) + "\n"
                    temporary.write_text(text, encoding="utf-8")
                finish_folder(self.out)
        except (UserError, FileNotFoundError):
            if not (self.out / self.kind.info).exists():  # else another process was faster
                raise
        # Hidden files are of attempts that were stopped, or of another process that has joined the same parts.
        for leftover in (*self.out.glob("part-*"), *self.out.glob(".*"), self.out / STARTED):
            leftover.unlink(missing_ok=True)
        return True

    def _as_user_error(self) -> AbstractContextManager[None]:
        return as_user_error(f"--out is {str(self.out)!r}; it")

    def file(self, part: int, ending: str) -> Path:
        """Return the path of a table of a part: "parquet", its rows, or "jsonl", what was refused."""
        return self.folder / f"part-{part:05d}.{ending}"


def start(out: str | Path, kind: Kind, header: dict, count: int) -> ShardedWriter:
    """Open the unfinished folder of `out`, new or as an earlier call with the same `header` left it.

    header: JSON of all that decides what is in the parts. Raises UserError if `out` is in use, or was started with
    another header.
    """
    check(as_path(out).name, f"--out is {str(out)!r}; it must be a new folder")
    parts = ShardedWriter(as_path(out), kind, count)
    in_place = parts.folder == parts.out and (parts.out / STARTED).exists()
    if not in_place and parts.out.exists() and (not parts.out.is_dir() or any(parts.out.iterdir())):
        raise UserError(f"--out is {str(out)!r}; it already exists: give another folder or remove it")
    header = json.loads(json.dumps(header | {"parts": count}))
    with parts._as_user_error():
        make_folder(parts.folder)
        started = _claim(parts.folder / STARTED, header)
    if started != header:
        what = first_difference(started or {}, header) or "options"
        raise UserError(f"--out is '{out}'; it was started with another {what}: remove {parts.folder} to start anew")
    return parts


def _claim(path: Path, header: dict) -> dict | None:
    """Return the header that is started here: this one, unless another process was first."""
    if create(path, json.dumps(header)):
        return header
    for _ in range(CLAIM_TRIES):  # until the other process has written it
        with suppress(OSError, ValueError):
            return json.loads(read_text(path))
        time.sleep(0.1)
    return None


@dataclass
class PartWriter:
    """Take the rows of one part with their records, and what is refused; made by `ShardedWriter.write`."""

    part: int
    files: Sequence[RecordWriter]
    rows: list[dict] = field(default_factory=list)
    refusals: list[dict] = field(default_factory=list)

    def add(self, row: dict, *records: bytes) -> None:
        """Append a row, with one record for each kind of file in their order."""
        for file, record in zip(self.files, records, strict=True):
            file.write(record)
        self.rows.append(row | {"shard": self.part, "record": len(self.rows)})

    def refuse(self, file: str, reason: str) -> None:
        """List a file that is not used."""
        self.refusals.append({"file": file, "reason": reason})


def _join(parts: ShardedWriter, amended: Callable[[dict], dict]) -> dict:
    """Write all rows to one table and all refusals to one file; a part at a time, so memory holds only the keys."""
    import pyarrow.parquet as pq

    digest, index = hashlib.sha256(), 0
    seen: dict[tuple, str] = {}
    refused = []
    columns = {"index": "int64"} | parts.kind.columns | RECORD_COLUMNS
    with _inside(parts.folder / "manifest.parquet") as temporary:
        with pq.ParquetWriter(temporary, schema_of(columns)) as writer:
            for part in range(parts.count):
                refused += read_lines(parts.file(part, "jsonl"))
                rows = []
                for row in map(amended, parts.rows(part)):
                    key = tuple(row[name] for name in KEY)
                    file = row.get("file", "")
                    if key in seen:
                        refused.append({"file": file, "reason": f"duplicate: the same content as {seen[key]}"})
                        continue
                    seen[key] = file
                    rows.append({"index": index} | row)
                    digest.update(_canonical(row))
                    index += 1
                if rows:
                    writer.write_table(_to_table(rows, columns))
    refused = list({json.dumps(entry): entry for entry in refused}.values())  # one for all spans of a file
    with _inside(parts.folder / "refused.jsonl") as temporary:
        temporary.write_text(_lines(refused), encoding="utf-8")
    return {"clips": index, "refused": len(refused), "parts": parts.count, "digest": digest.hexdigest()}


def _canonical(row: dict) -> bytes:
    """Serialise what a clip is, wherever it came from."""
    return json.dumps({k: v for k, v in row.items() if k not in ("source", "file")}, sort_keys=True).encode()


def schema_of(columns: Mapping[str, str]) -> Any:
    """Return the Arrow schema of columns, name -> type."""
    import pyarrow as pa

    def kind(name: str) -> Any:
        # Of 64 bits: a column of a data set may hold more than 2 GiB.
        return pa.large_list(kind(name[:-2])) if name.endswith("[]") else pa.type_for_alias(WIDE.get(name, name))

    return pa.schema([(name, kind(type_)) for name, type_ in columns.items()])


def _to_table(rows: list[dict], columns: Mapping[str, str]) -> Any:
    import pyarrow as pa

    return pa.Table.from_pylist(rows, schema_of(columns))


def _lines(entries: Sequence[dict]) -> str:
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def read_lines(path: Path) -> list[dict]:
    """Read a file of JSON lines."""
    # Not `splitlines`: it also splits at U+2028, U+0085 and others, which JSON leaves as they are in file names.
    return [json.loads(line) for line in read_text(path).split("\n") if line]


@contextmanager
def _inside(path: Path) -> Iterator[Path]:
    """Yield a temporary path as `replacing` does, but do not create the folder: another process may have renamed it."""
    temporary = temporary_path(path)
    try:
        yield temporary
        put(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
