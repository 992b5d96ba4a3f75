"""From prompts and clips to clips. The room itself can be called: `sora_jax.generate(prompt)`."""

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    """A module that can be called, since its name is that of the function which users look for."""

    def __call__(
        self,
        prompts: str | Sequence[str],
        sizes: Sequence[Any] = (),
        steps: int | str | None = None,
        guidance: float | Sequence[float] | None = None,
        seed: int = 0,
        negative: str | Sequence[str] = "",
        progress: Any = None,
        bar: bool | None = None,
        **unknown: Any,
    ) -> Any:
        """Generate clips with the model that comes with the package, which is loaded once; see `Run.generate`.

        One prompt, a str, gives one clip, uint8 (frames, height, width, 3); a sequence gives a list.
        """
        if unknown:
            known = "the size is sizes=(frames, height, width), and load_run().generate has further arguments"
            raise TypeError(f"generate() has no argument {next(iter(unknown))!r}; {known}")
        from sora_jax.generate.shipped import shipped_run

        options = dict(steps=steps, guidance=guidance, seed=seed, negative=negative, progress=progress, bar=bar)
        return shipped_run().generate(prompts, sizes, **options)


sys.modules[__name__].__class__ = _Room
