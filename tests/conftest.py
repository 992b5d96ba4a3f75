"""Eight virtual CPU devices and a compilation cache for every test, and small packs of random clips."""

import gc
import getpass
import hashlib
import importlib.util
import mmap
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


def quick_compile() -> str:
    """Return flags with which XLA compiles small programs in a fifth of the time: few passes of LLVM, none of MLIR.

    XLA ends the process at a flag that it does not know: flags of other versions of jaxlib are left out.
    """
    flags = {
        "xla_backend_optimization_level": "0",
        "xla_llvm_disable_expensive_passes": "true",
        "xla_cpu_use_fusion_emitters": "false",
    }
    library = Path(importlib.util.find_spec("jaxlib").origin).with_name("libjax_common.so")
    if not library.exists():
        return ""
    with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return " ".join(f"--{name}={value}" for name, value in flags.items() if content.find(name.encode()) >= 0)


# Most of the suite's time is compilation, of programs that run for milliseconds. `XLA_FLAGS= pytest` compiles as a
# user's process does. The processes that tests start inherit the flags.
if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = quick_compile()
SETTINGS = {
    "jax_platforms": "cpu",
    "jax_compilation_cache_dir": compilation_cache(),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    "jax_numpy_rank_promotion": "raise",
}
# In the environment for the processes that tests start; before the first import of JAX.
os.environ.update({name.upper(): str(value) for name, value in SETTINGS.items()})

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from sora_jax.data.packing.packs import PackingConfig, PackItem, pack, stack  # noqa: E402
from sora_jax.nn.pack import Pack  # noqa: E402
from sora_jax.nn.params import abstract  # noqa: E402

for name, value in SETTINGS.items():
    jax.config.update(name, value)
jax.config.update("jax_num_cpu_devices", 8)  # here alone: processes that tests start choose for themselves


def pytest_collection_finish():
    """Leave what is imported by now out of garbage collections: tracing makes many, and each would walk through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def few_mappings():
    """Drop compiled programs when there are many: each maps memory, and Linux ends a process with 65,530 mappings."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPPINGS:
        jax.clear_caches()
        gc.collect()


MAPPINGS = 25_000
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
