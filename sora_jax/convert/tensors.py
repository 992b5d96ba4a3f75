"""Read and write files of named tensors: safetensors, and PyTorch's own if torch is installed."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sora_jax.config import check
from sora_jax.convert.record import Record, read_record
from sora_jax.errors import NotFinite, UserError
from sora_jax.files import as_path, local_copy, replacing
from sora_jax.nn.finite import named

WEIGHTS = "diffusion_pytorch_model"
# Weight files of a folder and their indices; diffusers names a variant before the last ending.
WEIGHT_FILE = re.compile(rf"{WEIGHTS}(?:\.(\w+))?\.(safetensors|bin)(\.index(?:\.(\w+))?\.json)?")
HALVES = ("fp16", "bf16")  # variants that hold the same weights
PICKLED = (".pt", ".pth", ".ckpt", ".bin")
# Keys under which checkpoints hold weights, the preferred first: the official training codes sample with the EMA.
NESTINGS = ("ema", "state_dict", "model", "module")
# What DDP and training codes put before the names of a network's tensors.
PREFIXES = ("module.", "model.", "ema.", "state_dict.")
COMPILED = "_orig_mod."  # put by torch.compile, which may wrap a network or its blocks, before the names of its parts
TOLD = ("model", "path_type", "prediction")  # arguments of the training codes of DiT and SiT that must fit --from


def read_tensors(path: Path, notes: list[str] | None = None) -> dict[str, np.ndarray]:
    """Read all tensors of a file, or of the weight files of a folder, as float32.

    notes: gets a sentence for the user about each nesting, prefix or variant that was taken.

    Raises:
        UserError: there is no file, one is damaged, a tensor is not finite, or torch is needed and missing.
    """
    path, notes = as_path(path), [] if notes is None else notes
    check(path.exists(), f"--weights is {str(path)!r}; it must be a file or folder that exists")
    files = _weight_files(path, notes) if path.is_dir() else [path]
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        check(
            file.suffix in (".safetensors", *PICKLED),
            f"--weights is {str(file)!r}; it must end in .safetensors, or in one of {', '.join(PICKLED)}",
        )
        check(file.exists(), f"--weights is {str(path)!r}; it must hold {file.name}, which its index names")
        tensors |= _read_pickled(file, notes) if file.suffix in PICKLED else _read_safetensors(file)
    tensors = {name: np.asarray(x, np.float32) for name, x in _without_prefixes(tensors, notes).items()}
    _check_finite(tensors, path)
    return tensors


def _check_finite(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    broken = [name for name, x in tensors.items() if not np.isfinite(x).all()]
    if broken:
        wrong = f"there is a NaN or infinity in {named(broken)}"
        raise NotFinite(f"--weights is {str(path)!r}; its tensors must be finite, and {wrong}")


def _weight_files(folder: Path, notes: list[str]) -> list[Path]:
    """List the weight files of a diffusers folder: one, or those that an index names.

    Safetensors are preferred to PyTorch's files, then files that are no variant, such as fp16, to variants.
    """
    found = [match for path in folder.iterdir() if (match := WEIGHT_FILE.fullmatch(path.name))]
    check(found, f"--weights is {str(folder)!r}; it must hold {WEIGHTS}.safetensors")

    def rank(match: re.Match) -> tuple:
        variant = match[1] or match[4] or ""
        return match[2] == "bin", variant != "", variant not in HALVES, variant, match[3] is None

    first = min(found, key=rank)
    if variant := first[1] or first[4]:
        notes.append(f"{first[0]!r} was read, of the variant {variant!r}")
    return [folder / name for name in _named_files(read_record(folder / first[0]))] if first[3] else [folder / first[0]]


def _named_files(index: Record) -> list[str]:
    """List the files that an index names."""
    files: Any = index.values.get("weight_map")
    fits = isinstance(files, dict) and bool(files) and all(isinstance(name, str) for name in files.values())
    index.require(fits, "weight_map", "an object that names the file of each tensor")
    return sorted(set(files.values()))


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    try:
        # Read as JAX arrays, not by safetensors.numpy, which cannot read bfloat16.
        with jax.default_device(jax.devices("cpu")[0]), safe_open(local_copy(path), framework="flax") as file:
            return {name: np.asarray(file.get_tensor(name)) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"--weights is {str(path)!r}; it cannot be read: {error}") from error


def _read_pickled(path: Path, notes: list[str]) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        reason = "to read it torch must be installed; or save its tensors as .safetensors"
        raise UserError(f"--weights is {str(path)!r}; {reason}") from error
    try:
        # The official training codes keep their arguments, a Namespace, beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(local_copy(path), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged files
        reason = "it holds more than tensors, or is damaged: save its tensors (those of the EMA) as .safetensors"
        raise UserError(f"--weights is {str(path)!r}; {reason}") from error
    args = found.get("args") if isinstance(found, Mapping) else None
    args = vars(args) if isinstance(args, argparse.Namespace) else {}
    if told := " ".join(f"{name}={args[name]}" for name in TOLD if name in args):
        notes.append(f"the checkpoint was trained with {told}")
    found = _without_nestings(found, notes)
    whole = isinstance(found, Mapping) and all(isinstance(x, torch.Tensor) for x in found.values())
    check(whole, f"--weights is {str(path)!r}; it must hold named tensors, alone or under {' or '.join(NESTINGS)}")
    return {name: x.float().numpy() for name, x in found.items()}


def _without_nestings(found: Any, notes: list[str]) -> Any:
    """Return what a checkpoint holds under the first of NESTINGS that it has; the same again for what is there."""
    keys = [key for key in NESTINGS if isinstance(found, Mapping) and isinstance(found.get(key), Mapping)]
    if not keys:
        return found
    instead = f", and not of {' or '.join(map(repr, keys[1:]))}" if keys[1:] else ""
    notes.append(f"the tensors of {keys[0]!r} in the checkpoint were read{instead}")
    return _without_nestings(found[keys[0]], notes)


def _without_prefixes(tensors: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Return the tensors without the PREFIXES that all their names have, and without a COMPILED part of any name."""
    if any(COMPILED in name for name in tensors):
        notes.append(f"{COMPILED!r} was left out of the names of tensors")
        tensors = {name.replace(COMPILED, ""): x for name, x in tensors.items()}
    for prefix in PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            notes.append(f"the prefix {prefix!r} was left out of the names of all tensors")
            return _without_prefixes({name.removeprefix(prefix): x for name, x in tensors.items()}, notes)
    return dict(tensors)


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file atomically."""
    from safetensors.numpy import save_file

    with replacing(as_path(path)) as temporary:
        save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, temporary, {"format": "pt"})
