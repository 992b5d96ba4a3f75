"""Make JAX's settings those that the package relies on, at the start of each command that computes."""

import contextlib
import os
import sys
from glob import glob
from pathlib import Path

import jax

from sora_jax.errors import UserError
from sora_jax.files import as_path, cache_folder, is_remote, make_folder
from sora_jax.parallel import distributed

MOST_BYTES = 4_000_000_000  # of compiled programs that are kept


def prepare_jax() -> None:
    """Check the platform, keep compiled programs on disk, and let Optax convert dtypes.

    Raises:
        UserError: JAX_PLATFORMS names a platform that is not there.
    """
    check_platforms()
    # Optax multiplies floats with its counter: with JAX_NUMPY_DTYPE_PROMOTION=strict no optimizer makes a step.
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    use_compilation_cache()


def use_compilation_cache() -> None:
    """Keep compiled programs on disk, so that the next run starts faster; SORA_JAX_CACHE names another folder.

    JAX's key of a program is its text, the version of jaxlib, XLA's flags and the device: code that was changed, or
    another version, finds nothing old. Without a folder that can be written they are not kept, which is reported.
    """
    if distributed.several() and jax.default_backend() == "cpu":
        return  # it serves the first process alone, and on CPUs that one waits for the others half a minute at most
    try:
        named = os.environ.get("SORA_JAX_CACHE")
        folder = as_path(named) if named else cache_folder() / "compiled"
        if not is_remote(folder):
            make_folder(folder)
            if not os.access(folder, os.W_OK):
                raise PermissionError(f"{folder} cannot be written")
            trim(folder, MOST_BYTES)
    except (UserError, OSError) as error:
        print(f"sora-jax: compiled programs are not kept for the next start: {error}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def trim(folder: Path, most: int) -> None:
    """Remove the programs that were not read for longest, until the others have at most so many bytes.

    JAX's own limit (jax_compilation_cache_max_size) takes a lock for every program that is read, and stores nothing
    more in a folder that was filled without it.
    """
    found = []
    for path in folder.glob("*-cache"):
        with contextlib.suppress(OSError):  # another process removes some, too
            found.append((max((state := path.stat()).st_atime, state.st_mtime), state.st_size, path))
    left = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if left <= most:
            return
        left -= size
        with contextlib.suppress(OSError):
            path.unlink()


def check_platforms() -> None:
    """Raise a UserError if JAX_PLATFORMS names a platform that is not there."""
    asked = jax.config.values["jax_platforms"]
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that CUDA's plug-in is installed
        if not asked:
            raise
        reason = f" ({str(error).partition(chr(10))[0][:200]})" if str(error) else ""
        here = " or ".join(filter(_is_there, ("tpu", "cuda", "cpu")))
        raise UserError(
            f"JAX_PLATFORMS is {asked!r}; JAX finds no such platform here: it must be {here}, or not be set{reason}"
        ) from error


def _is_there(platform: str) -> bool:
    if platform == "tpu" and not glob("/dev/accel*") + glob("/dev/vfio/[0-9]*"):
        return False  # JAX would look for it for minutes, where libtpu is installed
    jax.config.update("jax_platforms", platform)
    try:
        return bool(jax.devices())
    except (RuntimeError, AssertionError):
        return False
