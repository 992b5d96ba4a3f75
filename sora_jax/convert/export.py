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
from sora_jax.train.checkpoint import NEWEST
from sora_jax.train.denoiser import DenoiserRun
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
from sora_jax.train.frozen import FOLDER, autoencoder_config, export_autoencoder, saved_record
from sora_jax.train.seen import read_seen

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
        source, step, lines = run, saved_record(run).get("steps", 0), _about_autoencoder(run, out)
    else:
        plain, params, step = merged_weights(run, options.checkpoint)
        arrays = flatten_dict(jax.tree.map(np.asarray, params), sep="/")
        write_arrays(folder / MODEL_FILE, as_dtype(arrays, options.dtype))
        source, config = autoencoder_folder(run, options.autoencoder), to_dict(plain)
        lines = _about_denoiser(plain, sum(x.size for x in arrays.values()), run, out)
    export_autoencoder(source, folder / FOLDER, options.dtype)
    write_json(folder / "config.json", _public(config))
    for name in COPIED:
        if (run / name).exists():
            write_text(folder / name, read_text(run / name))
    about = {"step": step, "dtype": options.dtype, "version": __version__, "date": datetime.date.today().isoformat()}
    lines.append(
        f"Weights of step {step:,}, kept as {options.dtype}; exported by sora_jax {__version__} on {about['date']}."
    )
    front = [read_text(as_path(options.card)).strip(), ""] if options.card else []
    write_text(folder / CARD_FILE, "\n".join([*front, f"# {out.stem}", "", *lines, ""]))
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


def _about_denoiser(config: DenoiserRun, parameters: int, run: Path, out: Path) -> list[str]:
    """Return the lines of the model card that say what a denoiser is, what it has seen and how it is sampled."""
    preview, seen = config.preview, read_seen(run)
    takes = "text" if config.model.text else f"{config.model.classes} classes" if config.model.classes else "nothing"
    lines = [
        f"A denoiser of {parameters:,} parameters, a {config.model.name}, with its autoencoder: from {takes} to clips.",
        "",
    ]
    if seen:
        what = f"{seen.of:,} clips of {seen.frames[0]} to {seen.frames[1]} frames"
        lines.append(f"Trained on {what}, heights {_range(seen.height)} and widths {_range(seen.width)} pixels.")
        lines += [f"It knows the {len(seen.words):,} words of their captions, which are in `seen.json`.", ""]
    prompt = f' --prompt="{preview.prompts[0]}"' if preview.prompts else ""
    prompt = f" --class={preview.classes[0]}" if preview.classes else prompt
    ending = "png" if preview.sizes and preview.sizes[0][0] == 1 else "mp4"
    command = f"sora-jax sample --workdir={out.name}{prompt} --out=clip.{ending}"
    return [*lines, "```", command, "```", ""]


def _about_autoencoder(run: Path, out: Path) -> list[str]:
    """Return the lines of the model card that say what an autoencoder is and how it is used."""
    config, quality = autoencoder_config(run), saved_record(run).get("held_out_psnr")
    factors = f"{config.time_factor} x {config.space_factor} x {config.space_factor}"
    lines = [
        f"A video autoencoder that compresses {factors} (time, height, width) to {config.latent_channels} channels."
    ]
    lines += [f"PSNR of held-out clips when it was frozen: {quality:.1f} dB."] if quality else []
    command = f"sora-jax data encode --autoencoder={out.name} --data=data/clips --out=data/latents"
    return [*lines, "", "```", command, "```", ""]


def _range(values: tuple[int, int]) -> str:
    return f"{values[0]}" if values[0] == values[1] else f"{values[0]} to {values[1]}"
