"""Keep in every generated file how it was made, so that `sora-jax sample --like=FILE` makes it again.

A recipe is JSON: the command, which of its clips the file is, and what a reader wants to know of it. It stands in the
metadata of the file (mp4: comment; GIF: comment; PNG: text "recipe"; WebP: EXIF image description) and beside it, in
FILE.json, for programs that lose metadata.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sora_jax import __version__
from sora_jax.config import check, read_json, to_dict
from sora_jax.data.media import read_comment
from sora_jax.files import as_path, write_json
from sora_jax.generate.prompts import Row
from sora_jax.train.denoiser import DenoiserRun

FLAGS = {"classes": "class"}  # options whose flag has another name
LEFT_OUT = (
    "function", "parser", "arguments", "out", "like", "prompts_file", "prompt", "expand", "checkpoint", "sampling",
    "clip",
)  # fmt: skip
FILES = ("workdir", "autoencoder", "image", "video", "mask")


def command_of(options: argparse.Namespace, rows: Sequence[Row]) -> list[str]:
    """Return the options of a `sora-jax sample` command as a list, with absolute paths and the prompts of files.

    Prompts are those that were sampled: nothing is expanded again. A file of prompts that says more of its clips is
    named; the others are not needed again.
    """
    words = [f"--prompt={row['prompt']}" for row in rows]
    if any(len(row) > 1 for row in rows):
        words = [f"--prompt={prompt}" for prompt in options.prompt]
        words += [f"--prompts-file={as_path(options.prompts_file).absolute()}"]
        words += [f"--expand={options.expand}"] if options.expand else []
    for name, value in sorted(vars(options).items()):
        if name in LEFT_OUT or value == options.parser.get_default(name):
            continue
        flag = f"--{FLAGS.get(name, name).replace('_', '-')}"
        if name in FILES:
            value = as_path(value).absolute()
        if name == "connect":
            value = ",".join(str(as_path(file).absolute()) for file in value.split(","))
        if value is True:
            words.append(flag)
        else:
            words += [f"{flag}={one}" for one in (value if isinstance(value, list) else [value])]
    return words + [f"--sampling.{change}" for change in options.sampling]


def digest_of(config: DenoiserRun) -> str:
    """Return a digest of a run's config."""
    text = json.dumps(to_dict(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_recipe(command: Sequence[str], config: DenoiserRun, step: int, clip: int, facts: dict[str, Any]) -> dict:
    """Return the recipe of clip number `clip` of a command, sampled from the checkpoint of a step."""
    made_by = {"program": f"sora_jax {__version__}", "config": digest_of(config), "step": step}
    return {**made_by, **facts, "clip": clip, "command": [*command, f"--checkpoint={step}"]}


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
    except ValueError:
        recipe = None
    if recipe is None and beside.exists():
        recipe = read_json(beside)
    whole = isinstance(recipe, dict) and isinstance(recipe.get("command"), list)
    check(whole, f"--like is {str(path)!r}; it holds no recipe, and there is none in {beside.name}")
    return recipe
