"""The fastest backend on this device: measured, where it cannot be told beforehand."""

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from sora_jax.config import check
from sora_jax.errors import UserError
from sora_jax.nn.attention import BACKENDS, Place, Places
from sora_jax.parallel.mesh import MeshConfig, make_mesh

CANDIDATES = {"gpu": ("cudnn", "blockwise", "dense")}  # by platform; elsewhere "auto" knows
DENSE_UP_TO = 2**30  # bytes of scores
ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Load:
    """The attention of one device in a layer: packs of so many tokens, and heads."""

    packs: int
    length: int
    heads: int
    head_width: int
    dtype: str


def candidates() -> tuple[str, ...]:
    """Return the backends between which only a measurement can decide here; none where "auto" knows."""
    return CANDIDATES.get(jax.default_backend(), ())


def fastest(load: Load) -> tuple[str, str]:
    """Return the fastest of the `candidates`, forward and backward, and in words how long each took or why it failed.

    Of several processes the first decides. UserError where none works.
    """
    names = candidates()
    with jax.set_mesh(make_mesh(MeshConfig(), jax.local_devices()[:1])):
        found = {name: _tried(name, load) for name in names}
    words = ", ".join(f"{n} {x if isinstance(x, str) else f'{1e3 * x:.2f} ms'}" for n, x in found.items())
    times = [float("inf") if isinstance(x, str) else x for x in found.values()]
    check(min(times) < float("inf"), f"model.attention is 'auto'; no backend works on this device: {words}")
    choice = int(np.argmin(times))
    if jax.process_count() > 1:
        choice = int(multihost_utils.broadcast_one_to_all(np.int32(choice)))
    return names[choice], words


def _tried(name: str, load: Load) -> float | str:
    """Return seconds, or the reason why there are none."""
    if name == "dense" and 4 * load.packs * load.heads * load.length**2 > DENSE_UP_TO:
        return "not tried: its scores fill the memory"
    rng = np.random.default_rng(0)
    shape = load.packs, load.length, load.heads, load.head_width
    q, k, v = (jnp.asarray(rng.standard_normal(shape), load.dtype) for _ in range(3))
    place = Place(jnp.asarray(np.tile(mixed_segments(load.length), (load.packs, 1))))

    def loss(q, k, v):
        return BACKENDS[name](q, k, v, Places(place, place)).astype(jnp.float32).sum()

    try:
        return _median(jax.jit(jax.grad(loss, (0, 1, 2))), q, k, v)
    except (UserError, RuntimeError, ValueError, NotImplementedError) as error:
        return f"cannot: {(str(error).splitlines() or [type(error).__name__])[0][:120]}"


def mixed_segments(length: int) -> np.ndarray:
    """Return the segments of a pack of clips of half, a quarter, an eighth... of its length: (length,), from 1."""
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
