"""Read and write files of named tensors: safetensors, and PyTorch's own if torch is installed."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from sora_jax.config import check
from sora_jax.convert.record import Record, read_record
from sora_jax.errors import UserError
from sora_jax.files import as_path, local_copy, replacing

WEIGHTS = "diffusion_pytorch_model"
PICKLED = (".pt", ".pth", ".ckpt", ".bin")


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read all tensors of a file, or of the weight files of a folder, as float32.

    Raises:
        UserError: there is no file, one is damaged, or torch is needed and missing.
    """
    path = as_path(path)
    check(path.exists(), f"--weights is {str(path)!r}; it must be a file or folder that exists")
    files = _weight_files(path) if path.is_dir() else [path]
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        check(
            file.suffix in (".safetensors", *PICKLED),
            f"--weights is {str(file)!r}; it must end in .safetensors, or in one of {', '.join(PICKLED)}",
        )
        check(file.exists(), f"--weights is {str(path)!r}; it must hold {file.name}, which its index names")
        tensors |= _read_pickled(file) if file.suffix in PICKLED else _read_safetensors(file)
    return {name: np.asarray(x, np.float32) for name, x in tensors.items()}


def _weight_files(folder: Path) -> list[Path]:
    """List the weight files of a diffusers folder: one, or those that an index names; safetensors are preferred."""
    for ending in ("safetensors", "bin"):
        index = folder / f"{WEIGHTS}.{ending}.index.json"
        whole = folder / f"{WEIGHTS}.{ending}"
        if index.exists():
            return [folder / name for name in _named_files(read_record(index))]
        if whole.exists():
            return [whole]
    raise UserError(f"--weights is {str(folder)!r}; it must hold {WEIGHTS}.safetensors")


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


def _read_pickled(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        reason = "to read it torch must be installed; or save its tensors as .safetensors"
        raise UserError(f"--weights is {str(path)!r}; {reason}") from error
    try:
        found = torch.load(local_copy(path), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged files
        reason = "it holds more than tensors, or is damaged: save its tensors (those of the EMA) as .safetensors"
        raise UserError(f"--weights is {str(path)!r}; {reason}") from error
    # A training checkpoint of the official code holds the EMA beside the weights, and samples with the EMA.
    found = found.get("ema", found) if isinstance(found, dict) else found
    whole = isinstance(found, dict) and all(isinstance(x, torch.Tensor) for x in found.values())
    check(whole, f"--weights is {str(path)!r}; it must hold named tensors, alone or under 'ema'")
    return {name: x.float().numpy() for name, x in found.items()}


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file atomically."""
    from safetensors.numpy import save_file

    with replacing(as_path(path)) as temporary:
        save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, temporary, {"format": "pt"})
