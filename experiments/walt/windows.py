"""The cost of W.A.L.T's windows against attention to whole clips, at 4,096 tokens in one clip and in several.

    python experiments/walt/windows.py             some six minutes of one core
    python experiments/walt/windows.py --quick     short clips; says nothing about speed

W.A.L.T with windows of 1 x 16 x 16 and t x 8 x 8, and the same network without windows: two blocks of width 384 without
text, float32. Measured is the processor time of a forward pass, and of one with the gradient of every parameter, all in
turns. FLOPs are those of `forward_flops`, also of 24 blocks of width 1024. Prints Markdown; ratios are the cost without
windows over the cost with them.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from timing import in_turns, machine, middle_half, milliseconds, table

from sora_jax.data.packing.packs import PackingConfig, PackItem, pack, stack
from sora_jax.models.denoiser import denoise, denoiser_specs, forward_flops
from sora_jax.models.walt_blocks import WaltConfig
from sora_jax.nn.pack import Pack
from sora_jax.nn.params import init

SMALL = WaltConfig(depth=2, width=384, heads=6, text=None, dtype="float32", remat="none")
LARGE = dataclasses.replace(SMALL, depth=24, width=1024, heads=16)
CLIPS = {  # token grids (t, h, w) of 4,096 tokens
    "one of 16 x 16 x 16": [(16, 16, 16)],
    "one of 4 x 32 x 32": [(4, 32, 32)],
    "an image of 1 x 64 x 64": [(1, 64, 64)],
    "two clips, four images": [(5, 16, 16), (7, 16, 16), *[(1, 16, 16)] * 4],
}
HEADER = (
    *("clips", "FLOPs, width 1024", "FLOPs, width 384", "forward", "with gradient"),
    *("whole clips, ms", "windows, ms", "whole clips, with gradient", "windows, with gradient"),
)


def batch_of(grids: list[tuple[int, int, int]]) -> dict:
    """A host batch of one pack without padding."""
    rng = np.random.default_rng(0)
    items = [PackItem(rng.standard_normal((*g, 8), np.float32), i + 1, np.array([0])) for i, g in enumerate(grids)]
    length = int(sum(map(np.prod, grids)))
    return stack([pack(items, PackingConfig(length, len(grids), len(grids), SMALL.patch))])


def programs(config: WaltConfig, batch: dict):
    """Functions of nothing: a forward pass, and the gradient of every parameter, for a pack, compiled."""
    arrays = Pack(**{name: jnp.asarray(x) for name, x in batch.items()})
    params = jax.jit(lambda key: init(denoiser_specs(config), key))(jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.02, params)  # no gate is closed
    times_BR = jnp.full(arrays.row_slots_BR.shape, 0.5)
    # The pack is an argument: of a constant the compiler would find the windows itself.
    loss = lambda p, arrays, t_BR: jnp.square(denoise(p, config, arrays, arrays.tokens_BLP, t_BR)).sum()  # noqa: E731
    return [lambda f=jax.jit(f): jax.block_until_ready(f(params, arrays, times_BR)) for f in (loss, jax.grad(loss))]


def ways(config: WaltConfig) -> tuple[WaltConfig, WaltConfig]:
    """Without windows and with."""
    return dataclasses.replace(config, windows=False), config


def flops_ratio(batch: dict, config: WaltConfig) -> str:
    whole, windows = (forward_flops(way, batch) for way in ways(config))
    return f"{whole / windows:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows = []
    for name, grids in CLIPS.items():
        batch = batch_of([(t, h // 8, w // 8) for t, h, w in grids] if options.quick else grids)
        timed = [run for config in ways(SMALL) for run in programs(config, batch)]
        seconds = in_turns(timed, 1 if options.quick else options.rounds, time.process_time)
        ratios = [middle_half(np.divide(seconds[i], seconds[i + 2])) for i in range(2)]
        own = [milliseconds(seconds[i]) for i in (0, 2, 1, 3)]
        rows.append([name, flops_ratio(batch, LARGE), flops_ratio(batch, SMALL), *ratios, *own])
        print(table(HEADER, rows), flush=True)
    asked = " --quick" if options.quick else f" --rounds={options.rounds}"
    print(f"\n`python experiments/walt/windows.py{asked}`  \n{machine()}")


if __name__ == "__main__":
    main()
