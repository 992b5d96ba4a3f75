"""Which backend is the fastest on this device: measured, where it cannot be told beforehand."""

import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from sora_jax.errors import UserError
from sora_jax.nn.attention import BACKENDS
from sora_jax.parallel.mesh import MeshConfig, make_mesh

CANDIDATES = {"gpu": ("cudnn", "blockwise", "dense")}  # by platform; elsewhere "auto" knows
DENSE_UP_TO = 4096  # tokens: beyond, the scores alone are gigabytes
ROUNDS = 5


def measured(backend: str, length: int, heads: int, head_width: int, dtype) -> str:
    """`backend`, or in place of "auto" the one that is fastest here, forward and backward, on packs of this length.

    Of several processes the first decides. What a device or a library cannot do is no candidate.
    """
    candidates = CANDIDATES.get(jax.default_backend(), ())
    if backend != "auto" or not candidates:
        return backend
    times = _times(candidates, length, heads, head_width, jnp.dtype(dtype))
    choice = int(np.argmin(times))
    if jax.process_count() > 1:
        choice = int(multihost_utils.broadcast_one_to_all(np.int32(choice)))
    return candidates[choice]


@functools.cache
def _times(candidates: tuple[str, ...], *shape) -> tuple[float, ...]:
    """Seconds of each candidate; infinite of those that cannot."""
    with jax.set_mesh(make_mesh(MeshConfig(), jax.local_devices()[:1])):
        return tuple(_seconds(name, *shape) for name in candidates)


def _seconds(name: str, length: int, heads: int, head_width: int, dtype) -> float:
    if name == "dense" and length > DENSE_UP_TO:
        return float("inf")
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, length, heads, head_width)), dtype) for _ in range(3))
    segments = jnp.asarray(mixed_segments(length))[None]

    def loss(q, k, v):
        return BACKENDS[name](q, k, v, segments, segments).astype(jnp.float32).sum()

    try:
        return _median(jax.jit(jax.grad(loss, (0, 1, 2))), q, k, v)
    except (UserError, RuntimeError, ValueError, NotImplementedError):
        return float("inf")


def mixed_segments(length: int) -> np.ndarray:
    """A pack of clips of half, a quarter, an eighth... of its length: (length,) segment numbers from 1."""
    place = np.arange(length)
    return 1 + np.minimum(np.log2(length / (length - place)).astype(np.int32), 5)


def _median(function: Callable, *arguments) -> float:
    jax.block_until_ready(function(*arguments))  # compiles
    spent = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        spent.append(time.perf_counter() - begun)
    return statistics.median(spent)
