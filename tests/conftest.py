"""Eight virtual CPU devices and a compilation cache for every test, and small packs of random clips."""

import getpass
import hashlib
import os
import platform
import tempfile
from pathlib import Path

import numpy as np
import pytest


def processor_digest() -> str:
    """Identify the kind of processor: on another one a compiled program may round otherwise, or not run."""
    processor = Path("/proc/cpuinfo")
    text = processor.read_text() if processor.exists() else platform.processor()
    features = sorted({line for line in text.splitlines() if line.startswith(("flags", "Features", "model name"))})
    return hashlib.sha256("\n".join(features).encode()).hexdigest()[:12]


def compilation_cache() -> str:
    """Return a folder of this user and this machine alone: a compiled program fits one processor only."""
    machine = f"{platform.node()}-{platform.machine()}-{processor_digest()}"
    return str(Path(tempfile.gettempdir()) / f"sora_jax-tests-{getpass.getuser()}-{machine}")


SETTINGS = {
    "jax_platforms": "cpu",
    "jax_compilation_cache_dir": compilation_cache(),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
# In the environment for the processes that tests start; before the first import of JAX.
os.environ.update({name.upper(): str(value) for name, value in SETTINGS.items()})

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from sora_jax.data.packing import PackingConfig, PackItem, pack, stack  # noqa: E402
from sora_jax.nn.pack import Pack  # noqa: E402
from sora_jax.nn.params import abstract  # noqa: E402

for name, value in SETTINGS.items():
    jax.config.update(name, value)
jax.config.update("jax_num_cpu_devices", 8)  # here alone: processes that tests start choose for themselves

CHANNELS = 2
SIZES = ((3, 4, 4), (1, 4, 6), (2, 4, 4), (1, 2, 4))  # latents (t, h, w): 12, 6, 8 and 2 tokens
CAPTIONS = ((3, 4, 5), (6,), (7, 8, 9, 10), (11, 12))  # no id is in two captions


@pytest.fixture(scope="session")
def clips():
    """Four clips of different sizes with random latents, as `PackItem`s."""
    rng = np.random.default_rng(0)
    latents = [rng.standard_normal((*size, CHANNELS), np.float32) for size in SIZES]
    clip_ids = [11, 22, 33, 2**32 - 1]
    return [PackItem(z, clip_id, np.array(text)) for z, clip_id, text in zip(latents, clip_ids, CAPTIONS, strict=True)]


@pytest.fixture(scope="session")
def packed():
    """packed(rows, **sizes): a `Pack` whose row b holds the clips `rows[b]` in slot order."""

    def build(rows, length=40, slots=4, text_length=12, patch=(1, 2, 2), **sizes) -> Pack:
        config = PackingConfig(length, slots, text_length, patch, **sizes)
        return Pack(**stack([pack(row, config) for row in rows]))

    return build


@pytest.fixture(scope="session")
def alone(packed):
    """alone(clip, **sizes): a `Pack` of one clip in one slot, without padding."""

    def build(clip, patch=(1, 2, 2), **sizes) -> Pack:
        length = int(np.prod(clip.values.shape[:3]) // np.prod(patch))
        return packed([[clip]], length, 1, len(clip.text), patch, **sizes)

    return build


@pytest.fixture(scope="session")
def randomised():
    """randomised(specs): random values for all parameters, gains around 1, so that no gate and branch is closed."""

    def build(specs, seed=0, scale=0.3):
        rng = np.random.default_rng(seed)

        def value(path, spec):
            middle = 0.0 if path and path[-1].key in ("weight", "bias", "table", "classes") else 1.0
            return jnp.asarray(middle + scale * rng.standard_normal(spec.shape), spec.dtype)

        return jax.tree_util.tree_map_with_path(value, abstract(specs))

    return build
