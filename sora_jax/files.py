"""Files and folders that appear whole or not at all."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sora_jax.errors import UserError


@contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Turns an OSError (a full disk, a folder without permission) into "WHAT cannot be written: ...", a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be written: {error.strerror or error}.") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write under: on success it becomes `path`, else it goes. A full disk is a UserError."""
    # Not by process number: processes of several machines may write into one folder.
    temporary = path.with_name(f".{path.stem}.tmp-{uuid.uuid4().hex[:12]}{path.suffix}")
    try:
        with as_user_error(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: str | Path, text: str) -> None:
    """A UTF-8 text file, whole or not at all. UserError where it cannot be written."""
    with replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content) -> None:
    """A readable JSON file, whole or not at all. UserError where it cannot be written."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def unfinished(out: Path) -> Path:
    """The hidden name under which a folder is filled; nobody else has a reason to use it."""
    return out.with_name(f".{out.name}.sora_jax-unfinished")
