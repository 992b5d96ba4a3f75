"""Files and folders that appear whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sora_jax.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write under: on success it becomes `path`, else it goes. A full disk is a UserError."""
    temporary = path.with_name(f".{path.stem}.tmp-{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error
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


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder to fill; it gets the name `out` when the block ends well, and is removed when it does not.

    What a killed process left under the temporary name is removed first. UserError where `out` is in use or the
    disk is full.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out} already exists: give another folder or remove this one.")
    temporary = unfinished(out)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        os.rename(temporary, out)
    except OSError as error:
        raise UserError(f"out={out} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
