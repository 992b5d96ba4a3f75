"""Small dataset folders with chosen clips."""

from contextlib import contextmanager

from sora_jax.data.storing.manifest import FORMAT, KIND
from sora_jax.data.storing.parts import start


@contextmanager
def write_dataset(out, options: dict):
    """A writer (`add_clip`, `refuse`) for a dataset of one part; the folder appears when the block ends well."""
    parts = start(out, KIND, {"options": options}, 1)
    with parts.write(0) as writer:
        yield writer
    parts.finish({"format": FORMAT, "options": options})


def same_folder(one, other) -> None:
    """Compare two folders to the byte."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
