"""The cost of W.A.L.T's windows against attention to whole clips, at 4,096 tokens in one clip and in several.

    python experiments/walt/windows.py             some five minutes on two cores
    python experiments/walt/windows.py --quick     short clips; says nothing about speed

W.A.L.T with windows of 1 x 16 x 16 and t x 8 x 8, and the transformer, each of four blocks of width 384 without text,
forward and backward, float32. FLOPs are those of `train_flops`, also of 24 blocks of width 1024. Prints Markdown.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from timing import in_turns, machine, middle_half, milliseconds, table

from sora_jax.data.packing.packs import PackingConfig, PackItem, pack, stack
from sora_jax.models.denoiser import denoise, denoiser_specs, train_flops
from sora_jax.models.transformer import TransformerConfig
from sora_jax.models.walt_blocks import WaltConfig
from sora_jax.nn.pack import Pack
from sora_jax.nn.params import init

SMALL = dict(depth=4, width=384, heads=6, patch=(1, 1, 1), latent_channels=8, text=None, dtype="float32", remat="none")
LARGE = SMALL | dict(depth=24, width=1024, heads=16)
NETWORKS = (TransformerConfig, WaltConfig)
CLIPS = {  # token grids (t, h, w) of 4,096 tokens
    "one of 16 x 16 x 16": [(16, 16, 16)],
    "one of 4 x 32 x 32": [(4, 32, 32)],
    "an image of 1 x 64 x 64": [(1, 64, 64)],
    "two clips, four images": [(5, 16, 16), (7, 16, 16), *[(1, 16, 16)] * 4],
}
HEADER = ("clips", "FLOPs, width 1024", "FLOPs, width 384", "transformer ms", "W.A.L.T ms", "time, middle half")


def batch_of(grids: list[tuple[int, int, int]]) -> dict:
    """A host batch of one pack without padding."""
    rng = np.random.default_rng(0)
    items = [PackItem(rng.standard_normal((*g, 8), np.float32), i + 1, np.array([0])) for i, g in enumerate(grids)]
    length = int(sum(map(np.prod, grids)))
    return stack([pack(items, PackingConfig(length, len(grids), len(grids), SMALL["patch"]))])


def slope(config, batch: dict):
    """A function of nothing: the gradient of every parameter for a pack, compiled."""
    arrays = Pack(**{name: jnp.asarray(x) for name, x in batch.items()})
    params = jax.jit(lambda key: init(denoiser_specs(config), key))(jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.02, params)  # no gate is closed
    times_BR = jnp.full(arrays.row_slots_BR.shape, 0.5)
    loss = lambda p, x: jnp.square(denoise(p, config, arrays, x, times_BR)).sum()  # noqa: E731
    found = jax.jit(jax.grad(loss))
    return lambda: jax.block_until_ready(found(params, arrays.tokens_BLP))


def flops_ratio(batch: dict, size: dict) -> str:
    """Those of the transformer over those of W.A.L.T."""
    full, windows = (train_flops(network(**size), batch) for network in NETWORKS)
    return f"{full / windows:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    rows = []
    for name, grids in CLIPS.items():
        batch = batch_of([(t, h // 8, w // 8) for t, h, w in grids] if quick else grids)
        one, other = in_turns([slope(network(**SMALL), batch) for network in NETWORKS], 1 if quick else 5)
        ratios = flops_ratio(batch, LARGE), flops_ratio(batch, SMALL)
        rows.append([name, *ratios, milliseconds(one), milliseconds(other), middle_half(np.divide(one, other))])
    print(f"`python experiments/walt/windows.py{' --quick' * quick}`  \n{machine()}\n\n{table(HEADER, rows)}")


if __name__ == "__main__":
    main()
