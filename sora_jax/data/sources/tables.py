"""Captions, labels and splits from tables and records.

Columns of a table, keys of a JSON record; capitals do not count, but in the KIND of `caption_KIND`:

=====================================  ====================================================================
file, file_name, path, video, ...      the clip, relative to the table; see `FILE_COLUMNS`
caption, text, prompt                  its caption, of kind original
caption_KIND                           a caption of that kind
captions                               a mapping kind -> text, or a list: kinds original, 2, 3, ...
label                                  class number, or class name; below 0 is unknown
split                                  such as train or test
=====================================  ====================================================================

A table is CSV with any separator, JSON lines, Parquet, or JSON: a list of records, or files mapped to records or texts.
"""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import chain, islice
from typing import BinaryIO, NamedTuple

ORIGINAL = "original"
FILE_COLUMNS = (
    *("file", "file_name", "filename", "path", "file_path", "media_path"),
    *("video", "video_path", "image", "image_path"),
)
CAPTION_COLUMNS = ("caption", "text", "prompt", "captions")
KNOWN = (*FILE_COLUMNS, *CAPTION_COLUMNS, "label", "split")
MAX_LABEL = 2**31 - 1
EMPTY = re.compile(r"\A((?i:nan)|<NA>|None|NA)\Z")  # what pandas writes into empty cells
# A column with names of files in Parquet; categories of pandas are a dictionary. Others hold embedded media.
NAMES = re.compile(r"(dictionary<values=)?(large_)?string(_view)?(, .*)?")

Label = int | str | None


@dataclass(frozen=True)
class Annotations:
    """Captions by kind, class label (a number or a name) and split of a clip."""

    captions: dict[str, str] = field(default_factory=dict)
    label: Label = None
    split: str | None = None
    problem: str = ""  # why some cannot be used


def merge(parts: Iterable[Annotations]) -> Annotations:
    """Combine annotations, of which later ones go first. Captions of kind original stand first."""
    captions: dict[str, str] = {}
    label, split, problem = None, None, ""
    for part in parts:
        captions |= part.captions
        label, split = label if part.label is None else part.label, part.split or split
        problem = problem or part.problem
    kinds = sorted((kind for kind, text in captions.items() if text), key=lambda kind: kind != ORIGINAL)
    return Annotations({kind: captions[kind] for kind in kinds}, label, split, problem)


@dataclass(frozen=True)
class Fields:
    """Names of the columns to use; "" takes the usual ones."""

    caption: str = ""
    label: str = ""


def annotations(row: Mapping, fields: Fields = Fields()) -> Annotations:
    """Return the annotations in a row."""
    captions: dict[str, str] = {}
    try:
        for kind, value in _texts(row, fields):
            if text := _text(f"caption of kind {kind}", value):
                captions.setdefault(str(kind), text)
        label, split = _label(row.get(fields.label or "label")), _text("split", row.get("split"))
        clean(Row(0, row).file())
        return Annotations(captions, label, split or None)
    except ValueError as error:
        return Annotations(problem=str(error))


def _texts(row: Mapping, fields: Fields) -> Iterator[tuple[str, object]]:
    for name in (fields.caption,) if fields.caption else CAPTION_COLUMNS[:-1]:
        yield from _by_kind(row.get(name))
    for name, value in row.items():
        if isinstance(name, str) and name.startswith("caption_"):
            yield name.removeprefix("caption_"), value
    yield from _by_kind(row.get("captions"))


def _by_kind(value) -> Iterable[tuple[str, object]]:
    if isinstance(value, Mapping):
        return value.items()
    if not isinstance(value, list | tuple):
        return [(ORIGINAL, value)]
    if all(isinstance(item, tuple) and len(item) == 2 for item in value):  # a map of Parquet
        return value
    return [(str(number) if number > 1 else ORIGINAL, item) for number, item in enumerate(value, 1)]


def _text(what: str, value) -> str:
    if value is None or value != value:  # an empty cell of Parquet may be NaN
        return ""
    if not isinstance(value, str):
        raise ValueError(f"its {what} is {_short(value)}; it must be a text")
    return EMPTY.sub("", clean(value))


def _short(value) -> str:
    return text if len(text := repr(value)) <= 60 else f"{text[:60]}..."


def clean(text: str) -> str:
    """Return a text as one line; ValueError if it cannot be written as UTF-8."""
    if re.search(r"[\ud800-\udfff]", text):
        raise ValueError(f"{_short(text)} is not UTF-8; it must be saved as UTF-8")
    return " ".join(text.replace("\0", " ").split())


def _label(value) -> Label:
    if isinstance(value, str):
        text = _text("label", value)
        if not re.fullmatch(r"[+-]?\d{1,18}(\.0*)?", text):
            return text or None
        value = int(text.partition(".")[0])  # and whole numbers beside empty cells as 2.0
    if value is None or value != value:
        return None
    number = isinstance(value, int | float | Decimal) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value != int(value) or value > MAX_LABEL:
        raise ValueError(f"its label is {_short(value)}; it must be a class name or a whole number below 2^31")
    return int(value) if value >= 0 else None


def number_labels(labels: Iterable[Label]) -> list[tuple[int | None, str | None]]:
    """Return (number, name) for each label of a source.

    Numbers stay, without names. If any label is a name, all become names, and are numbered in sorted order.
    """
    labels = list(labels)
    if not any(isinstance(label, str) for label in labels):
        return [(label if isinstance(label, int) else None, None) for label in labels]
    names = [None if label is None else str(label) for label in labels]
    numbers = {name: number for number, name in enumerate(sorted({name for name in names if name is not None}))}
    return [(None, None) if name is None else (numbers[name], name) for name in names]


class Row(NamedTuple):
    """A row of a table; `problem` says why it cannot be used. The header of CSV is row 1."""

    number: int
    cells: Mapping
    problem: str = ""

    def file(self) -> str:
        """Return the name of the clip, or ""."""
        named = (self.cells.get(column) for column in FILE_COLUMNS)
        return next((name.strip() for name in named if isinstance(name, str) and name.strip()), "")

    def annotations(self, fields: Fields) -> Annotations:
        return Annotations(problem=self.problem) if self.problem else annotations(self.cells, fields)


class Table(NamedTuple):
    """The columns of a table (of JSON, the keys of its first records), and its rows, read on demand."""

    columns: Sequence[str]
    rows: Iterable[Row]

    def problem(self, fields: Fields) -> str:
        """Return "" for a table of clips, or the columns that it has and those that it must have."""
        named = [column for column in (fields.caption, fields.label) if column]
        usual = ", ".join((*CAPTION_COLUMNS, "caption_KIND, label"))
        used = any(is_used(column, fields) and column not in (*FILE_COLUMNS, "split") for column in self.columns)
        if used and any(column in FILE_COLUMNS for column in self.columns) and not set(named) - set(self.columns):
            return ""
        needed = f"one of {', '.join(FILE_COLUMNS)}, and {', '.join(named) or f'one of {usual}'}"
        return f"its columns are {', '.join(self.columns) or '(none)'}; it must have {needed}"


def is_used(column: str, fields: Fields) -> bool:
    """Return True if annotations may be read from a column."""
    return column in KNOWN or column.startswith("caption_") or column in (fields.caption, fields.label)


def usual(column) -> str:
    """Return the name of a column without capitals; only a kind keeps them, as in the names of text files."""
    text = str(column).strip()
    return text if text.startswith("caption_") else text.lower()


def _lines(stream: BinaryIO, newline: str | None = None) -> io.TextIOWrapper:
    mark = stream.read(2)
    stream.seek(0)
    utf16 = mark in (b"\xff\xfe", b"\xfe\xff")  # "Unicode text" of Excel
    encoding = ("utf-16", "strict") if utf16 else ("utf-8-sig", "surrogateescape")  # so a wrong byte costs its row only
    return io.TextIOWrapper(stream, *encoding, newline)


def _read_csv(stream: BinaryIO, fields: Fields) -> Table:
    lines = _lines(stream, newline="")
    header = lines.readline()
    named = re.fullmatch(r"sep=(.)\s*", header)  # by Excel, before the header
    if not named:
        lines.seek(0)
    separator = named[1] if named else max(",;\t|", key=header.count)
    csv.field_size_limit(2**24)
    cells = csv.reader(lines, delimiter=separator, strict=True, skipinitialspace=True)
    columns = [usual(column) for column in next(cells, [])]
    return Table(columns, _csv_rows(cells, columns))


def _csv_rows(cells, columns: list[str]) -> Iterator[Row]:
    number, count = 1, len(columns)
    while True:
        number, line = number + 1, cells.line_num
        try:
            row = next(cells)
        except StopIteration:
            return
        except csv.Error as error:
            if cells.line_num > line + 1:  # the rows in between are lost
                raise ValueError(f"row {number} opens a quote and does not close it ({error})") from error
            yield Row(number, {}, f"its quotes do not match ({error})")
            continue
        if any(map(str.strip, row)):  # sheets end in rows of separators
            wrong = len(row) < count or any(map(str.strip, row[count:]))
            problem = f"it has {len(row)} cells, the header {count}; a text with separators needs quotes"
            yield Row(number, dict(zip(columns, row)), problem if wrong else "")


def _read_jsonl(stream: BinaryIO, fields: Fields) -> Table:
    return _records((number, line) for number, line in enumerate(_lines(stream), 1) if line.strip())


def _records(values: Iterable[tuple[int, object]]) -> Table:
    """Make a table of JSON records, each an object or its text, and their numbers."""
    rows = iter(json_row(number, value) for number, value in values)
    head = list(islice(rows, 20))
    if head and all(row.problem for row in head):
        raise ValueError(f"row {head[0].number}: {head[0].problem}")
    return Table(list(dict.fromkeys(key for row in head for key in row.cells)), chain(head, rows))


def json_row(number: int, value: object) -> Row:
    """Make a row of a JSON object or its text."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        return Row(number, {}, f"it is not JSON ({error})")
    if not isinstance(value, Mapping):
        return Row(number, {}, f"it is {_short(value)}; it must be a JSON object")
    return Row(number, {usual(key): cell for key, cell in value.items()})


def _read_json(stream: BinaryIO, fields: Fields) -> Table:
    content = json.load(_lines(stream))
    if isinstance(content, Mapping):
        rows = {name: row if isinstance(row, Mapping) else {"captions": row} for name, row in content.items()}
        if any(rows[name] is not content[name] and "." not in name for name in rows):  # a record of something else
            return Table(list(content), [])
        content = [{"file": name, **row} for name, row in rows.items()]
    return _records(enumerate(content if isinstance(content, list) else [content], 1))


def _read_parquet(stream: BinaryIO, fields: Fields) -> Table:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(stream)
    names = {column.name: usual(column.name) for column in file.schema_arrow}
    for column in file.schema_arrow:
        if names[column.name] in FILE_COLUMNS and not NAMES.fullmatch(str(column.type)):
            names[column.name] = f"{column.name} ({column.type})"[:60]
    wanted = [name for name, column in names.items() if is_used(column, fields)]
    rows = (row for batch in file.iter_batches(columns=wanted) for row in batch.to_pylist())
    return Table(list(names.values()), (json_row(number, row) for number, row in enumerate(rows, 1)))


READERS: dict[str, Callable[[BinaryIO, Fields], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
