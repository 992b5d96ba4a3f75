"""Small dataset folders with chosen clips."""

from contextlib import contextmanager

from sora_jax.data.storing.manifest import FORMAT, KEY, KIND
from sora_jax.data.storing.parts import start


@contextmanager
def write_dataset(out, options: dict):
    """A writer (`add_clip`, `refuse`) for a dataset of one part; the folder appears when the block ends well."""
    parts = start(out, KIND, {"options": options}, 1)
    with parts.write(0) as writer:
        yield writer
    parts.finish({"format": FORMAT, "options": options}, KEY)
