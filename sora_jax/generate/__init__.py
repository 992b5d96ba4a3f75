"""From prompts and clips to clips: requests, packs, the compiled sampler, tasks, files.

The room itself can be called, as `sora_jax.generate(prompt)`: see `generate.shipped`.
"""

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    """A module that samples the shipped model when it is called: its name is that of a function for users."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from sora_jax.generate.shipped import generate

        return generate(*arguments, **options)


sys.modules[__name__].__class__ = _Room
