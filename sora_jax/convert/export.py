"""Export a run: averaged weights, config, tokenizer and autoencoder in one folder or file that is read like a run."""

import copy
import dataclasses
import datetime
import functools
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from sora_jax import __version__
from sora_jax.config import check, check_word, read_json, to_dict
from sora_jax.convert.adapted import merged_weights
from sora_jax.files import (
    as_path,
    as_user_error,
    finish_folder,
    is_empty,
    read_text,
    remove_folder,
    unfinished,
    write_json,
    write_text,
)
from sora_jax.generate.run import autoencoder_folder
from sora_jax.train.autoencoder import AutoencoderRun
from sora_jax.train.card import card
from sora_jax.train.checkpoint import NEWEST
from sora_jax.train.exported import (
    CARD_FILE,
    DTYPES,
    EXPORT_FILE,
    MODEL_FILE,
    SUFFIX,
    as_dtype,
    no_run,
    pack_file,
    packed_texts,
    run_folder,
    write_arrays,
)
from sora_jax.train.frozen import FOLDER, export_autoencoder, saved_record

COPIED = ("tokenizer.json", "data.json", "seen.json")  # those that a run folder has; run.json holds typed commands
BLANKED = ("latents", "data", "loop.wandb")  # fields that name files of this machine, or a project
SHORTENED = ("start", "loss.lpips_file", "model.text.pretrained")  # to the last name: a config without is refused


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Choose what is exported of a run, and how."""

    checkpoint: str = NEWEST  # or "best", or a step
    dtype: str = DTYPES[0]  # of the weights, one of DTYPES; they are read as float32
    autoencoder: Path | None = None  # run of one, for a run that holds none
    card: Path | None = None  # text that is put in front of the model card

    def __post_init__(self):
        check_word("--dtype", self.dtype, DTYPES)
        there = self.card is None or as_path(self.card).is_file()
        check(there, f"--card is {str(self.card)!r}; there is no such file")


def export(run: str | Path, out: str | Path, options: ExportOptions = ExportOptions()) -> list[str]:
    """Export a run into a folder, or into one file NAME.safetensors; return lines that say what was written.

    What is there under the name is replaced if it is an exported model.

    Raises:
        UserError: there is no such run or checkpoint, it has no autoencoder, or something else is at `out`.
    """
    folder, out = run_folder(run, "RUN"), as_path(out)
    check((folder / "config.json").exists(), no_run("RUN", run))
    _check_free(out, folder, run)
    packs = out.suffix == SUFFIX
    filled = Path(tempfile.mkdtemp(prefix="sora_jax-export-")) if packs else unfinished(out)
    try:
        with as_user_error(str(out)):
            _fill(folder, filled, out, options)
            if packs:
                pack_file(filled, out)
            else:
                if out.exists() and out != filled:
                    remove_folder(out)
                finish_folder(out)
    finally:
        if packs or filled != out:
            shutil.rmtree(filled, ignore_errors=True)
    size = sum(file.stat().st_size for file in ([out] if packs else out.rglob("*")))
    return [f"{out}: {size / 2**20:.1f} MiB, {options.dtype}"]


def _check_free(out: Path, folder: Path, run: str | Path) -> None:
    """Raise a UserError where something is at `out` that is no exported model, or the model itself."""
    if out.suffix == SUFFIX:
        free = not out.exists() or out.is_file() and EXPORT_FILE in packed_texts(out)
    else:
        free = is_empty(out) and not out.is_file() or (out / EXPORT_FILE).exists()
    check(free, f"--out is {str(out)!r}; there is something else than an exported model: give another name")
    itself = out.exists() and out.resolve() in (folder.resolve(), as_path(run).resolve())
    check(not itself, f"--out is {str(out)!r}; that is the model that is exported: give another name")


def _fill(run: Path, folder: Path, out: Path, options: ExportOptions) -> None:
    """Write all files of a model into a folder; `out` is its name."""
    if not is_empty(folder):
        remove_folder(folder)
    config = read_json(run / "config.json")
    if config.get("kind") == AutoencoderRun.kind:
        source, step, count = run, saved_record(run).get("steps", 0), 0
    else:
        plain, params, step = merged_weights(run, options.checkpoint)
        arrays = flatten_dict(jax.tree.map(np.asarray, params), sep="/")
        write_arrays(folder / MODEL_FILE, as_dtype(arrays, options.dtype))
        source, config = autoencoder_folder(run, options.autoencoder), to_dict(plain)
        count = sum(x.size for x in arrays.values())
    export_autoencoder(source, folder / FOLDER, options.dtype)
    write_json(folder / "config.json", _public(config))
    for name in COPIED:
        if (run / name).exists():
            write_text(folder / name, read_text(run / name))
    about = {"step": step, "dtype": options.dtype, "version": __version__, "date": datetime.date.today().isoformat()}
    about |= {"parameters": {"trained": count}} if count else {}
    front = f"{read_text(as_path(options.card)).strip()}\n\n" if options.card else ""
    write_text(folder / CARD_FILE, front + card(folder, out.name, about))
    write_json(folder / EXPORT_FILE, about)  # makes the folder valid


def _public(config: dict) -> dict:
    """Return a config without what it says of this machine and of its user."""
    config = copy.deepcopy(config)
    for path in (*BLANKED, *SHORTENED):
        *parents, name = path.split(".")
        group = functools.reduce(lambda values, parent: values.get(parent) or {}, parents, config)
        if value := group.get(name):
            known = path == "model.text.pretrained" and not as_path(value).exists() and not as_path(value).is_absolute()
            group[name] = "" if path in BLANKED else value if known else as_path(value).name  # known: of a hub
    return config
