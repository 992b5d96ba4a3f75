"""Keep compiled programs on disk."""

import os
from pathlib import Path

import jax

from sora_jax.files import as_path
from sora_jax.parallel import distributed


def use_compilation_cache() -> None:
    """Keep compiled programs on disk, so that the next run starts faster; SORA_JAX_CACHE names another folder."""
    if distributed.several() and jax.default_backend() == "cpu":
        return  # it serves the first process alone, and on CPUs that one waits for the others half a minute at most
    folder = as_path(os.environ.get("SORA_JAX_CACHE") or Path.home() / ".cache" / "sora_jax" / "compiled")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
