"""Measure what each `model.remat` costs: time and memory of a training step, and how often its products are computed.

    python experiments/bench/remat.py             about six minutes on two cores
    python experiments/bench/remat.py --quick     a tiny model; says nothing about speed

The whole step of `configs/sora.py:s` without text (loss, gradient, AdamW, one average) on two packs of 2048 tokens, a
clip each, float32. Memory is what XLA reserves beside state and batch. Prints Markdown.
"""

import argparse
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from timing import in_turns, machine, middle_half, milliseconds, report

from sora_jax.data.packing.packs import PackingConfig
from sora_jax.models.transformer import TransformerConfig
from sora_jax.nn.pack import Pack
from sora_jax.nn.remat import REMAT
from sora_jax.parallel.mesh import make_mesh, place_batch
from sora_jax.plan import hlo
from sora_jax.plan.denoiser import full_pack, train_denoiser
from sora_jax.train.denoiser import DenoiserRun, denoiser_groups
from sora_jax.train.state import TrainState, init_state, make_optimizers

HEADER = ("remat", "compiled / model FLOPs", "memory MiB", "step ms", "against full")


def config_of(remat: str, quick: bool) -> DenoiserRun:
    depth, width, heads, length = (2, 48, 2, 128) if quick else (12, 384, 6, 2048)
    model = TransformerConfig(
        depth, width, heads, latent_channels=16, text=None, dtype="float32", remat=remat, attention="blockwise"
    )
    return DenoiserRun(model=model, batch=2, packing=PackingConfig(length=length, slots=1))


def prepare(config: DenoiserRun, state: TrainState, mesh):
    """Return a call that does one step and returns its loss, compiled FLOPs over the model's, MiB of temporaries."""
    made = train_denoiser(config, mesh)
    compiled = made.function.lower(*made.arguments).compile()
    rows = {name: np.broadcast_to(x, (1, config.batch, *x.shape[1:])) for name, x in full_pack(config).items()}
    state, batch = jax.tree.map(jnp.copy, state), place_batch(Pack(**rows), mesh, leading=1)

    def step() -> float:
        nonlocal state
        state, metrics = compiled(state, made.arguments[1], batch)  # frozen weights: there are none
        return float(jax.block_until_ready((state, metrics))[1]["loss"])

    flops = hlo.count(compiled.as_text(), 1).flops / made.load.model_flops
    return step, flops, compiled.memory_analysis().temp_size_in_bytes / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    measured_on, mesh = machine(), make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        config = config_of("full", options.quick)
        groups = denoiser_groups(config)
        state = init_state(groups, make_optimizers(groups, config.loop.steps), 0, mesh)
        prepared = {name: prepare(config_of(name, options.quick), state, mesh) for name in REMAT}
        for name, (step, *_) in prepared.items():
            print(f"{name}: loss of the first step {step():.6f}")
        times = in_turns([step for step, *_ in prepared.values()], 1 if options.quick else options.rounds)
    full = np.array(times[list(prepared).index("full")])
    rows = []
    for (name, (_, flops, memory)), taken in zip(prepared.items(), times, strict=True):
        share = f"**{median(taken) / median(full):.2f}** ({middle_half(np.array(taken) / full)})"
        rows.append([f'"{name}"', f"{flops:.3f}", f"{memory:.0f}", milliseconds(taken), share])
    print(report(HEADER, rows, f"{config.packing.length} tokens a pack.", measured_on))


if __name__ == "__main__":
    main()
