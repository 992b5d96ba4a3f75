"""Text to video in functional JAX: packed spacetime patches of any size, from a laptop to a pod."""

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["generate", "load_run", "save", "show"]

_ROOMS = {"load_run": "sora_jax.generate.run", "save": "sora_jax.generate.show", "show": "sora_jax.generate.show"}


def __getattr__(name: str):
    """Import what a notebook needs when it is first used: `import sora_jax` alone loads no JAX."""
    if name == "generate":  # a room that can be called
        return import_module("sora_jax.generate")
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ROOMS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
