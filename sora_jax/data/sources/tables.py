"""What tables, text files and records say of clips: captions by kind, label, split.

Columns of a table, keys of a JSON record:

====================  =====================================================================================
file, file_name       the clip, relative to the table
caption, text         its caption, of kind original
caption_KIND          a caption of that kind
captions              a mapping kind -> text, or a list: kinds original, 2, 3, ... (not in CSV)
label                 class number, or class name; below 0 is unknown
split                 such as train or test
====================  =====================================================================================
"""

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from sora_jax.data.sources.entries import escapes
from sora_jax.errors import UserError
from sora_jax.files import local_copy, open_text

ORIGINAL = "original"
FILE_COLUMNS = ("file", "file_name")
CAPTION_COLUMNS = ("caption", "text", "captions")
MAX_LABEL = 2**31 - 1

Label = int | str | None


@dataclass(frozen=True)
class Annotations:
    """What is said of a clip; a label is a class number or, as text, a name."""

    captions: dict[str, str] = field(default_factory=dict)
    label: Label = None
    split: str | None = None


@dataclass(frozen=True)
class Fields:
    """Names of the columns to use, "" for the usual ones."""

    caption: str = ""
    label: str = ""


def annotations(row: Mapping, fields: Fields = Fields()) -> Annotations:
    """What a row says. Raises ValueError, with the reason as text, where it cannot be understood."""
    captions: dict[str, str] = {}
    for kind, value in _texts(row, fields):
        if text := _text(f"caption of kind {kind}", value):
            captions.setdefault(kind, text)
    label = _label(row.get(fields.label or "label"))
    return Annotations(original_first(captions), label, _text("split", row.get("split")) or None)


def _texts(row: Mapping, fields: Fields) -> Iterator[tuple[str, object]]:
    for name in (fields.caption,) if fields.caption else ("caption", "text"):
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
        raise ValueError(f"its {what} is {value!r}, not a text")
    return clean(value)


def clean(text: str) -> str:
    """One line; ValueError where the text cannot be written as UTF-8."""
    text.encode()
    return " ".join(text.replace("\0", " ").split())


def original_first(captions: dict[str, str]) -> dict[str, str]:
    """The same captions, that of kind original first."""
    return {kind: captions[kind] for kind in sorted(captions, key=lambda kind: kind != ORIGINAL)}


def _label(value) -> Label:
    if isinstance(value, str):
        text = clean(value)
        value = int(text) if re.fullmatch(r"[+-]?\d{1,18}", text) else text or None
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, bool) or value != int(value) or value > MAX_LABEL:
        raise ValueError(f"its label is {value!r}, not a class name or a whole number below 2^31")
    return int(value) if value >= 0 else None


def number_labels(labels: Iterable[Label]) -> list[tuple[int | None, str | None]]:
    """(number, name) for each label of a source.

    Numbers stay, without names. Where one label is a name all are, and are numbered in sorted order.
    """
    labels = list(labels)
    if not any(isinstance(label, str) for label in labels):
        return [(label, None) for label in labels]
    names = [None if label is None else str(label) for label in labels]
    numbers = {name: number for number, name in enumerate(sorted(set(names) - {None}))}
    return [(numbers.get(name), name) for name in names]


def table_rows(path: Path, fields: Fields = Fields()) -> list[Annotations]:
    """The rows of a table that names no files, in order. Raises UserError with file and row."""
    return [_understood(path, number, row, fields) for number, row in _rows(path, fields)]


def file_rows(path: Path, fields: Fields = Fields()) -> dict[str, Annotations]:
    """What a table says, by file name relative to it. Raises UserError with file and row."""
    said = {}
    for number, row in _rows(path, fields):
        name = next((row[column] for column in FILE_COLUMNS if row.get(column)), None)
        if not isinstance(name, str):
            raise UserError(f"{path}, row {number}, has no file: a column file or file_name is required.")
        if escapes(name):
            raise UserError(f"{path}, row {number}, names {name}, which is outside the folder.")
        name = str(PurePosixPath(name))
        if name in said:
            raise UserError(f"{path}, row {number}, names {name} again: one row a file is allowed, with caption_KIND.")
        said[name] = _understood(path, number, row, fields)
    return said


def _understood(path: Path, number: int, row: dict, fields: Fields) -> Annotations:
    try:
        return annotations(row, fields)
    except ValueError as error:
        raise UserError(f"{path}, row {number}, cannot be used: {error}.") from error


def is_file_table(path: Path) -> bool:
    """Whether a file beside clips describes them: by its name captions.*, or by its columns."""
    if path.suffix not in READERS:
        return False
    if path.stem == "captions":
        return True
    if path.suffix == ".csv":
        return False
    try:
        columns = _columns(path)
    except Exception:  # a JSONL or Parquet file of something else, or of nothing
        return False
    return bool(columns & set(FILE_COLUMNS)) and any(_speaks(column) for column in columns)


def _columns(path: Path) -> set[str]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return set(pq.read_schema(local_copy(path)).names)
    return set(next(_read_jsonl(path, Fields()))[1])


def _speaks(column: str, fields: Fields = Fields()) -> bool:
    usual = column in (*CAPTION_COLUMNS, "label", "split") or column.startswith("caption_")
    return usual or column in (fields.caption, fields.label)


def _check_columns(path: Path, columns: Sequence[str], fields: Fields) -> None:
    for option in ("caption", "label"):
        wanted = getattr(fields, option)
        if wanted and wanted not in columns:
            raise UserError(f"{option}_field={wanted!r} is not a column of {path}: {', '.join(columns)} are.")
    if columns and not any(_speaks(column, fields) and column != "split" for column in columns):
        raise UserError(
            f"{path}, row 1, has no caption: a column caption, caption_KIND, captions or label is required."
        )


def _rows(path: Path, fields: Fields) -> Iterator[tuple[int, dict]]:
    try:
        yield from READERS[path.suffix](path, fields)
    except (UnicodeError, csv.Error, json.JSONDecodeError, RecursionError, OSError) as error:
        raise UserError(f"{path} cannot be read as {path.suffix[1:]} in UTF-8: {error}.") from error


def _read_csv(path: Path, fields: Fields) -> Iterator[tuple[int, dict]]:
    with open_text(path, "utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines)
        columns = rows.fieldnames or []
        _check_columns(path, columns, fields)
        for number, row in enumerate(rows, 2):
            if None in row or None in row.values():
                raise UserError(f"{path}, row {number}, has not the {len(columns)} cells of the first row.")
            yield number, row


def _read_jsonl(path: Path, fields: Fields) -> Iterator[tuple[int, dict]]:
    with open_text(path, "utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, row {number}, is not JSON: {error}.") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}, row {number}, is not a JSON object: one with file and caption is allowed.")
            yield number, row


def _read_parquet(path: Path, fields: Fields) -> Iterator[tuple[int, dict]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(local_copy(path)) as file:
            columns = [name for name in file.schema_arrow.names if name in FILE_COLUMNS or _speaks(name, fields)]
            _check_columns(path, columns, fields)
            batches = file.iter_batches(columns=columns)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}.") from error


READERS: dict[str, Callable[[Path, Fields], Iterator[tuple[int, dict]]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
