"""Attention on packs: blocks that skip what is masked, against the whole score matrix with a mask.

    python experiments/bench/attention.py             about three minutes on two cores
    python experiments/bench/attention.py --quick     short packs; says nothing about speed

Forward and backward together, float32, 6 heads of 64. Mixed: a pack of 4096 tokens with clips of 64 to 1024 tokens,
and a short one; one: the same pack as a single clip. Outputs and gradients must agree. Memory is what XLA reserves for
the gradient at 8, 16 and 32 thousand tokens. Prints Markdown.
"""

import argparse
import functools
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from timing import in_turns, machine, middle_half, milliseconds, report, table

from sora_jax.nn.attention import Place, Places, blockwise_attention, dense_attention

HEADS, WIDTH = 6, 64
HEADER = ("packs", "clips", "pairs that are not masked", "dense ms", "blockwise ms", "dense / blockwise")


def mixed(length: int, shortest: int, longest: int) -> np.ndarray:
    """Segments (1, L) of clips whose lengths are uniform, the last cut."""
    draws = np.random.default_rng(0)
    lengths = draws.integers(shortest, longest + 1, length // shortest)
    return np.repeat(np.arange(1, len(lengths) + 1), lengths)[None, :length].astype(np.int32)


def arrays(length: int) -> list:
    return [jnp.asarray(x) for x in np.random.default_rng(1).standard_normal((4, 1, length, HEADS, WIDTH), np.float32)]


def gradient(attend, segments):
    """A jitted function of (q, k, v, probe): the output, and its gradients along the probe."""

    place = Place(segments)

    def found(q, k, v, probe):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, Places(place, place)), q, k, v)
        return out, pull(probe)

    return jax.jit(found)


def compare(segments: np.ndarray, rounds: int) -> list[str]:
    """A row of the table; AssertionError where the two do not agree."""
    given = arrays(segments.shape[1])
    sides = [gradient(attend, jnp.asarray(segments)) for attend in (dense_attention, blockwise_attention)]
    first = [side(*given) for side in sides]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), *first)
    dense, blocks = in_turns([lambda side=side: jax.block_until_ready(side(*given)) for side in sides], rounds)
    _, counts = np.unique(segments, return_counts=True)
    return [
        f"1 x {segments.shape[1]}",
        f"{len(counts)}: {counts.min()} to {counts.max()} tokens" if len(counts) > 1 else "one",
        f"{(counts**2).sum() / segments.size**2:.0%}",
        milliseconds(dense),
        milliseconds(blocks),
        f"**{median(dense) / median(blocks):.2f}** ({middle_half(np.array(dense) / np.array(blocks))})",
    ]


def memory(attend, length: int) -> str:
    """MiB that the gradient of one clip of that length needs beside its arguments and results, as XLA reserves them."""
    shapes = [jax.ShapeDtypeStruct((1, length, HEADS, WIDTH), jnp.float32)] * 4
    compiled = gradient(attend, jnp.ones((1, length), jnp.int32)).lower(*shapes).compile()
    return f"{compiled.memory_analysis().temp_size_in_bytes / 2**20:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    length, rounds = (512, 2) if options.quick else (4096, options.rounds)
    measured_on = machine()
    short, one = mixed(length // 8, length // 64, length // 16), np.ones((1, length), np.int32)
    rows = [compare(segments, rounds) for segments in (mixed(length, 64, length // 4), short, one)]
    lengths = (length // 2, length) if options.quick else (8192, 16384, 32768)
    sizes = [[str(n), memory(dense_attention, n), memory(blockwise_attention, n)] for n in lengths]
    print(report(HEADER, rows, table(("tokens of one clip", "dense MiB", "blockwise MiB"), sizes), measured_on))


if __name__ == "__main__":
    main()
