"""Sample the model that comes with the package: `sora_jax.generate("a red circle moves left")`."""

import functools
from collections.abc import Sequence
from typing import Any, overload

import numpy as np

from sora_jax.generate.run import Run, load_run


@functools.cache
def shipped_run() -> Run:
    """Return the shipped model `world`, which is loaded once."""
    return load_run()


@overload
def generate(prompts: str, *arguments: Any, **options: Any) -> np.ndarray: ...


@overload
def generate(prompts: Sequence[str], *arguments: Any, **options: Any) -> list[np.ndarray]: ...


def generate(prompts: Any, *arguments: Any, **options: Any) -> Any:
    """Generate clips with the shipped model `world`: a str gives one clip, a sequence a list; see `Run.generate`."""
    return shipped_run().generate(prompts, *arguments, **options)
