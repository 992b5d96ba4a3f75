"""Measure how long the training step of DiT-XL/2 takes to compile, against that of DiT-S/2.

    python experiments/bench/compile_time.py             about a minute on two cores
    python experiments/bench/compile_time.py --quick     two tiny models

The blocks are a scan, so depth should cost nothing: XL/2 has 28, S/2 12. Arrays are abstract, nothing is run. In turns,
with JAX's caches emptied before each; processor time, which other programs on the machine do not change, beside
seconds. Prints Markdown.
"""

import argparse
import dataclasses
import time
from statistics import median

import jax
import numpy as np
from jax_dit import make_loss
from model import first_state
from timing import machine, report

from sora_jax.data.packing.packs import PackingConfig, PackItem, pack_batch
from sora_jax.models.transformer import SIZES, TransformerConfig, denoiser_specs
from sora_jax.nn.pack import Pack
from sora_jax.nn.params import abstract
from sora_jax.train.optim import OptimConfig, make_optimizer
from sora_jax.train.state import MODEL, Optimizer
from sora_jax.train.step import make_step

DIT = TransformerConfig(
    latent_channels=4, text=None, classes=1000, rotary=False, qk_norm=False, sincos_positions=True, sincos_axes="xy",
    learned_variance=True, step_times=True, remat="dots", dtype="float32",
)  # fmt: skip
BATCH, SIDE = 8, 32
HEADER = ("model", "blocks", "trace s", "compile s", "processor time s", "against the first")


def model_of(depth: int, width: int, heads: int) -> TransformerConfig:
    return dataclasses.replace(DIT, depth=depth, width=width, heads=heads)


def batch_of(config: TransformerConfig) -> dict:
    """Return the shapes of a batch of 8 latents, one micro-batch."""
    packing = PackingConfig(length=(SIDE // config.patch[1]) ** 2, slots=1, text_length=1, patch=config.patch)
    items = [[PackItem(np.zeros((1, SIDE, SIDE, 4), np.float32), 1, np.array([0]), label=0)]] * BATCH
    packed = pack_batch(items, packing)
    host = {"eps_BLP": packed["tokens_BLP"], "times_BR": np.zeros((BATCH, 1), np.float32), "pack": Pack(**packed)}
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), host)


def compile_once(config: TransformerConfig) -> tuple[float, float, float]:
    """Return seconds to trace and lower, seconds to compile, processor time of both."""
    jax.clear_caches()
    optimizer = Optimizer(make_optimizer(OptimConfig(warmup_steps=0)), (0.9999,))
    params = abstract(denoiser_specs(config))
    state = jax.eval_shape(lambda params: first_state(params, optimizer), params)
    step = make_step(make_loss(config), {MODEL: optimizer})
    start, used = time.perf_counter(), time.process_time()
    lowered = step.lower(state, (), batch_of(config))
    traced = time.perf_counter()
    lowered.compile()
    return traced - start, time.perf_counter() - traced, time.process_time() - used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two tiny models, one round")
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    measured_on = machine()
    models = {f"DiT-{name}/2": model_of(*SIZES[name]) for name in ("S", "XL")}
    if options.quick:
        models = {f"{depth} blocks": model_of(depth, 48, 2) for depth in (2, 4)}
    taken = {name: [] for name in models}
    for _ in range(1 if options.quick else options.rounds):
        for name, config in models.items():
            taken[name].append(compile_once(config))
    middles = {name: [median(column) for column in zip(*times, strict=True)] for name, times in taken.items()}
    first = next(iter(middles.values()))
    rows = []
    for name, (trace, compiled, used) in middles.items():
        whole = f"{(trace + compiled) / (first[0] + first[1]):.2f}, processor time **{used / first[2]:.2f}**"
        rows.append([name, str(models[name].depth), f"{trace:.2f}", f"{compiled:.2f}", f"{used:.2f}", whole])
    print(report(HEADER, rows, "Trace: to HLO. With AdamW and one average; remat 'dots'.", measured_on))


if __name__ == "__main__":
    main()
