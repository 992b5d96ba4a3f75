"""The model that comes with the package, as `sora_jax.generate(prompt)` samples it."""

import functools

from sora_jax.generate.run import Run, load_run


@functools.cache
def shipped_run() -> Run:
    """Return the shipped model `world`, which is loaded once."""
    return load_run()
