"""Measure a training step: `sora_jax.models.transformer` against the same model written by hand (by_hand.py).

    python experiments/bench/step_versus_by_hand.py             about three minutes on two cores
    python experiments/bench/step_versus_by_hand.py --quick     seconds; says nothing about speed

Clips of one size, one a row: no padding, nothing to mask, so the hand-written model has neither packs nor segments.
Same parameters, data and optimiser, a step of each in turn in one process. The losses of the first and of the last
step must agree, which they only do if gradients and updates agree too. Prints Markdown.
"""

import argparse
import dataclasses
import functools
from pathlib import Path
from statistics import median

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import optax
from model import first_state, place, random_params
from timing import in_turns, machine, middle_half, milliseconds, report

from sora_jax.config import from_dict, load
from sora_jax.data.packing.packs import PackingConfig, PackItem, pack, stack
from sora_jax.models.transformer import TransformerConfig, denoise
from sora_jax.nn.layers import compute_dtype
from sora_jax.nn.pack import Pack
from sora_jax.parallel.mesh import make_mesh, place_batch
from sora_jax.quickstart import QuickstartConfig
from sora_jax.train.optim import OptimConfig, make_optimizer
from sora_jax.train.state import MODEL, Optimizer
from sora_jax.train.step import make_step

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.py"
WORDS = 16
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # relative, of a loss
HEADER = ("model", "remat", "clips x tokens", "sora_jax ms", "by hand ms", "sora_jax / by hand", "loss, both")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, the token grid of its clips, and how many of them are in a step."""

    name: str
    model: TransformerConfig
    grid: tuple[int, int, int]
    clips: int


def cases(model: TransformerConfig, quick: bool) -> list[Case]:
    """The quickstart's model, keeping all activations or only block inputs, and blocks of DiT-S on longer clips."""
    text = dataclasses.replace(model.text, depth=1)
    if quick:
        tiny = dataclasses.replace(model, depth=2, width=48, heads=2, text=text)
        return [Case("tiny", tiny, (2, 2, 3), 2)]
    change = functools.partial(dataclasses.replace, model)
    small = dict(depth=4, width=384, heads=6)
    return [
        Case("quickstart's", change(remat="none"), (3, 4, 4), 40),
        Case("quickstart's", change(remat="full"), (3, 4, 4), 40),
        Case("4 blocks of DiT-S", change(remat="none", **small), (4, 8, 8), 4),
    ]


def make_data(case: Case) -> dict[str, np.ndarray]:
    """Noisy tokens x (B, L, P), their target, times (B,), word ids (B, M)."""
    draws = np.random.default_rng(0)
    shape = (case.clips, int(np.prod(case.grid)), case.model.patch_values)
    return {
        "x_BLP": draws.standard_normal(shape, np.float32),
        "target_BLP": draws.standard_normal(shape, np.float32),
        "times_B": draws.random(case.clips, np.float32),
        "ids_BM": draws.integers(3, case.model.text.vocabulary, (case.clips, WORDS)).astype(np.int32),
    }


def make_pack(case: Case, ids_BM: np.ndarray) -> dict[str, np.ndarray]:
    """The clips as packs of one clip each."""
    patch = case.model.patch
    packing = PackingConfig(length=int(np.prod(case.grid)), slots=1, text_length=WORDS, patch=patch)
    latent = np.zeros((*np.multiply(case.grid, patch), case.model.latent_channels), np.float32)
    return stack([pack([PackItem(latent, clip_id, ids)], packing) for clip_id, ids in enumerate(ids_BM, 1)])


def ours(case: Case, optim: OptimConfig, data: dict, mesh):
    """Return a function that does one training step of the package's model and returns its loss."""

    def loss(params, _frozen, batch, _step, _part):
        predicted_BLP = denoise(params[MODEL], case.model, batch["pack"], batch["x_BLP"], batch["times_B"][:, None])
        error_BL = jnp.square(predicted_BLP - batch["target_BLP"]).mean(-1)
        return {MODEL: error_BL.sum()}, ({MODEL: jnp.float32(error_BL.size)}, {})

    with jax.set_mesh(mesh):
        optimizer = Optimizer(make_optimizer(optim), optim.ema)
        state = first_state(place(random_params(case.model)), optimizer)
        step = make_step(loss, {MODEL: optimizer})
        batch = {**data, "pack": Pack(**make_pack(case, data["ids_BM"]))}
        batch = place_batch(jax.tree.map(lambda x: x[None], batch), mesh, leading=1)

    def one_step() -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = step(state, (), batch)
        return float(jax.block_until_ready((state, metrics))[1]["loss"])

    return one_step


def theirs(case: Case, optim: OptimConfig, data: dict):
    """Return the same for the model written by hand, with a step written by hand."""
    optimizer = make_optimizer(optim)
    constants = by_hand.tables(case.model, case.grid, WORDS)
    dtype = compute_dtype(case.model.dtype)

    def loss(params, batch):
        x, times, ids = batch["x_BLP"], batch["times_B"], batch["ids_BM"]
        predicted = by_hand.denoise(params, case.model, constants, x, times, ids, dtype)
        return jnp.square(predicted - batch["target_BLP"]).mean()

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        params, averages, opt_state = state
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        averages = [optax.incremental_update(params, ema, 1 - d) for ema, d in zip(averages, optim.ema, strict=True)]
        return (params, averages, opt_state), value

    params = jax.device_put(random_params(case.model))
    averages = [jax.device_put(random_params(case.model)) for _ in optim.ema]
    state, batch = (params, averages, jax.jit(optimizer.init)(params)), jax.device_put(data)

    def one_step() -> float:
        nonlocal state
        state, value = step(state, batch)
        return float(jax.block_until_ready((state, value))[1])

    return one_step


def measure(case: Case, optim: OptimConfig, rounds: int, mesh) -> list[str]:
    """One row of the table; AssertionError where the two models' losses part."""
    data = make_data(case)
    runs = [ours(case, optim, data, mesh), theirs(case, optim, data)]
    losses = [[], []]
    kept = [lambda run=run, into=into: into.append(run()) for run, into in zip(runs, losses, strict=True)]
    seconds = in_turns(kept, rounds)
    tolerance = TOLERANCE[str(compute_dtype(case.model.dtype))]
    for at in (0, -1):
        first, second = (values[at] for values in losses)
        print(f"{case.name}: loss of step {at % len(losses[0]) + 1}: {first:.6f} and {second:.6f}", flush=True)
        assert abs(first - second) <= tolerance * second, f"{case.name}: loss {first}, by hand {second}"
    ratios = np.array(seconds[0]) / np.array(seconds[1])
    return [
        f"{case.name}: depth {case.model.depth}, width {case.model.width}",
        case.model.remat,
        f"{case.clips} x {int(np.prod(case.grid))}",
        milliseconds(seconds[0]),
        milliseconds(seconds[1]),
        f"**{median(seconds[0]) / median(seconds[1]):.3f}** ({middle_half(ratios)})",
        f"{losses[1][0]:.4f} to {losses[1][-1]:.4f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds")
    options = parser.parse_args()
    measured_on = machine()
    config = from_dict(QuickstartConfig, load(str(CONFIG))).transformer
    mesh = make_mesh(devices=jax.devices()[:1])
    rounds = 2 if options.quick else options.rounds
    optim = dataclasses.replace(config.optim, warmup_steps=0)
    rows = [measure(case, optim, rounds, mesh) for case in cases(config.model, options.quick)]
    notes = (
        f"Medians of {rounds} rounds, a step of each in turn; in brackets the middle half of the ratios of single"
        " rounds. The loss of the first and the last step agreed between the two in every row."
    )
    print(report(HEADER, rows, notes, measured_on))


if __name__ == "__main__":
    main()
