"""An exported model: a folder that is read like a run folder, with weights as safetensors in place of checkpoints.

    export.json          the step of the weights, their dtype, the version and the date; written last
    config.json, tokenizer.json, seen.json, data.json    as in a run folder, where it has them
    model.safetensors    averaged weights of the denoiser, by path, adapters merged
    frozen/              autoencoder.json and weights.safetensors
    README.md            the model card

One file NAME.safetensors holds the same: tensors as FILE:NAME, the text files in its metadata. Models in
`sora_jax/assets` come with the package and go by their names.
"""

import atexit
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax.config import check, choose, did_you_mean, read_json
from sora_jax.errors import UserError
from sora_jax.files import as_path, cache_folder, local_copy, make_folder, replacing

ASSETS = Path(__file__).resolve().parents[1] / "assets"  # a folder for each model that comes with the package
USUAL = "world"  # the model that is taken where none is named
MODEL_FILE, EXPORT_FILE, CARD_FILE = "model.safetensors", "export.json", "README.md"
SUFFIX = ".safetensors"
DTYPES = ("bfloat16", "float32")


def shipped_models() -> list[str]:
    """Return the names of the models that come with the package."""
    return sorted(entry.parent.name for entry in ASSETS.glob(f"*/{EXPORT_FILE}"))


def run_folder(given: str | Path | None, option: str = "--workdir") -> Path:
    """Return the folder of a run or an exported model: a folder, a file NAME.safetensors, or the name of a shipped one.

    A folder that exists goes before a shipped model of its name. None: the usual shipped model.

    Raises:
        UserError: a file is missing or holds no exported model, or no model came with the package.
    """
    if given is None:
        there = (ASSETS / USUAL / EXPORT_FILE).is_file()
        check(there, f"{option} is not given; it must be the folder of a run: no model came with this package")
        return ASSETS / USUAL
    path = as_path(given)
    if path.suffix == SUFFIX and not path.is_dir():
        check(path.is_file(), f"{option} is {str(given)!r}; there is no such file")
        return _unpacked(path, option)
    return ASSETS / str(given) if is_shipped(given) else path


def is_shipped(given: str | Path) -> bool:
    """Return True if this is the name of a shipped model, and of no folder here."""
    return str(given) in shipped_models() and not as_path(given).exists()


def output_folder(given: str | Path | None) -> Path:
    """Return the folder for files that are made with a run: its own, or the working folder for one that is no folder.

    Nothing is written into the package, or into a cache.
    """
    return as_path(given) if given is not None and as_path(given).is_dir() else as_path(".")


def no_run(option: str, given: str | Path) -> str:
    """Say that a folder is no run folder, where models may be meant that come with the package."""
    names = shipped_models()
    known = f"; models that come with the package: {', '.join(names)}{did_you_mean(str(given), names)}" if names else ""
    return f"{option} is {str(given)!r}; there is no config.json, so it is not a run folder{known}{run_inside(given)}"


def run_inside(folder: str | Path) -> str:
    """Return "; did you mean FOLDER/transformer?" for the folder of a quickstart, "" for others."""
    inside = as_path(folder) / "transformer"
    return f"; did you mean {inside}?" if (inside / "config.json").exists() else ""


def is_exported(folder: Path) -> bool:
    """Return True if a folder holds an exported denoiser."""
    return (as_path(folder) / MODEL_FILE).exists()


def exported_step(folder: Path) -> int:
    """Return the step of the weights of an exported model."""
    return read_json(as_path(folder) / EXPORT_FILE)["step"]


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a safetensors file by name; bfloat16 becomes float32.

    Raises:
        UserError: the file is damaged.
    """
    return {name: x.astype(np.float32) if _is_half(x) else x for name, x in _arrays(file).items()}


def write_arrays(file: Path, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays by name as safetensors; the file appears when it is whole."""
    from safetensors.numpy import save

    with replacing(as_path(file)) as temporary:  # not `save_file`, whose files no other user may read
        temporary.write_bytes(save({name: np.ascontiguousarray(x) for name, x in arrays.items()}, dict(metadata or {})))


def as_dtype(arrays: Mapping[str, Any], dtype: str) -> dict[str, np.ndarray]:
    """Return arrays in a dtype of DTYPES."""
    import ml_dtypes

    kinds = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
    return {name: np.asarray(x).astype(choose("--dtype", dtype, kinds)) for name, x in arrays.items()}


def pack_file(folder: Path, out: Path) -> None:
    """Write the files of an exported model into one safetensors file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    texts: dict[str, str] = {}
    arrays: dict[str, np.ndarray] = {}
    for path in files:
        name = path.relative_to(folder).as_posix()
        if path.suffix == SUFFIX:
            arrays |= {f"{name}:{key}": x for key, x in _arrays(path).items()}
        else:
            texts[name] = path.read_text(encoding="utf-8")
    write_arrays(out, arrays, texts)


def packed_texts(file: Path) -> dict[str, str]:
    """Return the text files that a packed model holds, by name; {} for other files."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(local_copy(file), framework="numpy") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _arrays(file: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(local_copy(file))
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(f"{str(file)!r} cannot be read: {error}") from error


def _is_half(x: np.ndarray) -> bool:
    return x.dtype.itemsize == 2


def _unpacked(file: Path, option: str) -> Path:
    """Return a folder with the files of a packed model: in the cache, by the digest of the file, made once."""
    file = local_copy(file)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:32]
    folder = cache_folder() / "models" / digest
    if (folder / EXPORT_FILE).exists():
        return folder
    try:
        make_folder(folder.parent)
        filled = Path(tempfile.mkdtemp(prefix=f".{digest}-", dir=folder.parent))
    except OSError:  # the cache cannot be written
        folder = _temporary_folder() / digest
        if (folder / EXPORT_FILE).exists():
            return folder
        filled = Path(tempfile.mkdtemp(prefix=f".{digest}-", dir=folder.parent))
    try:
        _unpack(file, filled, option)
        os.rename(filled, folder)
    except OSError as error:
        if not (folder / EXPORT_FILE).exists():  # else another process was faster
            raise UserError(f"{option} is {str(file)!r}; it cannot be unpacked: {error}") from error
    finally:
        shutil.rmtree(filled, ignore_errors=True)
    return folder


@functools.cache
def _temporary_folder() -> Path:
    """Make a folder for this process, which is removed when it ends."""
    folder = Path(tempfile.mkdtemp(prefix="sora_jax-models-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _unpack(file: Path, folder: Path, option: str) -> None:
    """Write the files of a packed model into a folder."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            texts, names = opened.metadata() or {}, list(opened.keys())
            whole = EXPORT_FILE in texts and "config.json" in texts and all(":" in name for name in names)
            check(whole, f"{option} is {str(file)!r}; it holds no model that `sora-jax export` has written")
            groups: dict[str, dict[str, np.ndarray]] = {}
            for name in names:
                inner, _, key = name.partition(":")
                groups.setdefault(inner, {})[key] = opened.get_tensor(name)
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{option} is {str(file)!r}; it cannot be read: {error}") from error
    for inner in (*texts, *groups):
        inside = (folder / inner).resolve().is_relative_to(folder.resolve())
        check(inside, f"{option} is {str(file)!r}; it names a file outside of its folder, {inner!r}")
        make_folder((folder / inner).parent)
    for inner, arrays in groups.items():
        write_arrays(folder / inner, arrays)
    for inner, text in texts.items():
        (folder / inner).write_text(text, encoding="utf-8")
