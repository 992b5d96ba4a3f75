"""Keep in every generated file how it was made, so that `sora-jax sample --like=FILE` makes it again.

A recipe is JSON: the command, which of its clips the file is, and what a reader wants to know of it. It stands in the
metadata of the file (mp4: comment; GIF: comment; PNG: text "recipe"; WebP: EXIF image description) and beside it, in
FILE.json, for programs that lose metadata.
"""

import argparse
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sora_jax import __version__
from sora_jax.config import check, read_json
from sora_jax.data.viewing.write import read_comment
from sora_jax.errors import UserError
from sora_jax.files import as_path, read_text, write_json
from sora_jax.generate.prompts import Row
from sora_jax.train.exported import is_shipped

FLAGS = {"classes": "class", "clip_ids": "clip"}  # options whose flag has another name
LEFT_OUT = (
    "function", "parser", "arguments", "out", "like", "prompts_file", "prompt", "expand", "checkpoint", "sampling",
    "clip", "rows", "workdir", "upscale", "vbench", "samples",
)  # fmt: skip
MANY = 100  # prompts of a command that a recipe holds
FILES = ("autoencoder", "image", "sketch", "video", "mask")


@dataclass(frozen=True)
class MadeBy:
    """Hold what a recipe says of its command: options, prompts as they were sampled, digest of the run's config.

    inputs: digests of the files that the command read, by their absolute names.
    """

    command: Sequence[str]
    rows: Sequence[Row]
    config: str
    inputs: Mapping[str, str]


def command_of(options: argparse.Namespace) -> list[str]:
    """Return the options of a `sora-jax sample` command without its prompts, with absolute paths."""
    words = [f"--workdir={_named(options.workdir)}"] if options.workdir else []
    words.append(f"--upscale={options.upscale}")  # always: files of version 0.1.0 without it are not enlarged
    for name, value in sorted(vars(options).items()):
        if name in LEFT_OUT or value == options.parser.get_default(name):
            continue
        flag = f"--{FLAGS.get(name, name).replace('_', '-')}"
        if name in FILES:
            several = value if isinstance(value, list) else [value]
            value = [_named(file) for file in several]
        if name in ("connect", "then"):
            value = ",".join(map(_named, value.split(",")))
        if value is True:
            words.append(flag)
        else:
            words += [f"{flag}={one}" for one in (value if isinstance(value, list) else [value])]
    return words + [f"--sampling.{change}" for change in options.sampling]


def _named(file: str | Path) -> str:
    """Return the name by which a file or folder is found from any folder: absolute, or that of a shipped model."""
    return str(file if is_shipped(file) else as_path(file).absolute())


def digest_of(folder: str | Path) -> str:
    """Return a digest of the config that a run folder keeps; "" where it keeps none."""
    file = as_path(folder) / "config.json"
    return hashlib.sha256(read_text(file).encode()).hexdigest()[:16] if file.exists() else ""


def digests_of(files: Iterable[Path]) -> dict[str, str]:
    """Return the digest of each file that is there, by its absolute name."""
    there = [as_path(file).absolute() for file in files if as_path(file).is_file()]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in there}


def make_recipe(made_by: MadeBy, step: int, clip: int, facts: dict[str, Any]) -> dict:
    """Return the recipe of clip number `clip` of a command, sampled from the checkpoint of a step.

    It holds all prompts of the command, since clips that travel in the same packs are equal to the bit; of more than
    MANY it holds its own alone, and the clip is made again to float error.
    """
    rows = list(made_by.rows)
    if len(rows) > MANY:
        rows, clip = [{"clip_id": clip + 1} | rows[clip]], 0
    about = {"program": f"sora_jax {__version__}", "config": made_by.config, "step": step}
    about |= {"inputs": dict(made_by.inputs)} if made_by.inputs else {}
    return {**about, **facts, "clip": clip, "rows": rows, "command": [*made_by.command, f"--checkpoint={step}"]}


def save_recipe(path: Path, recipe: dict) -> None:
    """Write a recipe beside a file."""
    write_json(path.with_name(f"{path.name}.json"), recipe)


def read_recipe(path: str | Path) -> dict:
    """Read the recipe of a file: from its metadata, or from the file beside it.

    Raises:
        UserError: there is none.
    """
    path = as_path(path)
    check(path.is_file(), f"--like is {str(path)!r}; there is no such file")
    beside = path.with_name(f"{path.name}.json")
    try:
        recipe = json.loads(read_comment(path) or "null")
    except Exception:  # another kind of file, a comment of somebody else, or what Pillow and libav refuse
        recipe = None
    if recipe is None and beside.exists():
        recipe = read_json(beside)
    whole = (
        isinstance(recipe, dict) and isinstance(recipe.get("command"), list) and isinstance(recipe.get("rows"), list)
    )
    check(whole, f"--like is {str(path)!r}; it holds no recipe, and there is none in {beside.name}")
    return recipe


def enlarged_by(path: Path, height: int, width: int) -> int:
    """Return the factor by which a generated file of this size is enlarged, as its recipe says; 1 for others.

    A file that was scaled or cropped since has another size than its recipe says: its factor is 1.
    """
    try:
        recipe = read_recipe(path)
    except UserError:
        return 1
    factor, size = recipe.get("upscale"), recipe.get("size")
    if not isinstance(factor, int) or factor < 1:
        return 1
    return factor if size == [height / factor, width / factor] else 1
