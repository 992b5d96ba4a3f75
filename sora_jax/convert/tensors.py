"""Files of named tensors: safetensors, and PyTorch's own where torch is installed."""

from pathlib import Path

import jax
import numpy as np

from sora_jax.config import check
from sora_jax.convert.record import Record, read_record
from sora_jax.errors import UserError
from sora_jax.files import as_path, local_copy, replacing

WEIGHTS = "diffusion_pytorch_model"
PICKLED = (".pt", ".pth", ".ckpt", ".bin")


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file, or of the weight files of a folder, widened to float32.

    UserError where there is none, where one is damaged, and where torch is needed and missing.
    """
    path = as_path(path)
    check(path.exists(), f"--weights is {str(path)!r}; there is no such file or folder")
    files = _weight_files(path) if path.is_dir() else [path]
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        check(
            file.suffix in (".safetensors", *PICKLED),
            f"--weights is {str(file)!r}; it must end in .safetensors, or in one of {', '.join(PICKLED)}",
        )
        check(file.exists(), f"--weights is {str(path)!r}; {file.name}, which its index names, is not there")
        tensors |= _read_pickled(file) if file.suffix in PICKLED else _read_safetensors(file)
    return {name: np.asarray(x, np.float32) for name, x in tensors.items()}


def _weight_files(folder: Path) -> list[Path]:
    """The files of a folder of diffusers: one, or those that an index names; safetensors first."""
    for ending in ("safetensors", "bin"):
        index, whole = folder / f"{WEIGHTS}.{ending}.index.json", folder / f"{WEIGHTS}.{ending}"
        if index.exists():
            return [folder / name for name in _named_files(read_record(index))]
        if whole.exists():
            return [whole]
    raise UserError(f"--weights is {str(folder)!r}; there is no {WEIGHTS}.safetensors in that folder")


def _named_files(index: Record) -> list[str]:
    files = index.values.get("weight_map")
    fits = isinstance(files, dict) and bool(files) and all(isinstance(name, str) for name in files.values())
    index.require(fits, "weight_map", "an object that names the file of each tensor")
    return sorted(set(files.values()))


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    try:
        # As JAX's arrays: NumPy alone has no bfloat16.
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
    except Exception as error:  # of the library, of many types
        reason = "it holds more than tensors, or is damaged: save its tensors (the average, 'ema') as .safetensors"
        raise UserError(f"--weights is {str(path)!r}; {reason}") from error
    # A training checkpoint of the official code holds the average beside the weights; its samples use the average.
    found = found.get("ema", found) if isinstance(found, dict) else found
    whole = isinstance(found, dict) and all(isinstance(x, torch.Tensor) for x in found.values())
    check(whole, f"--weights is {str(path)!r}; it must hold named tensors, alone or under 'ema'")
    return {name: x.float().numpy() for name, x in found.items()}


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file, whole or not at all."""
    from safetensors.numpy import save_file

    with replacing(as_path(path)) as temporary:
        save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, temporary, {"format": "pt"})
