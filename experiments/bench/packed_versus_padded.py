"""Measure real tokens per second of a training step: packed rows against one clip per row, padded to the longest clip.

    python experiments/bench/packed_versus_padded.py             about three minutes on two cores
    python experiments/bench/packed_versus_padded.py --quick     seconds; says nothing about speed
    python experiments/bench/packed_versus_padded.py --only 256  one mix

Same model, same code (`denoiser_loss` in `make_step`), same clips, in turns in one process; prints Markdown.
"""

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from model import first_state, place, random_params
from timing import in_turns, machine, middle_half, milliseconds, report

from sora_jax.config import check, from_dict, load
from sora_jax.data.feeding import tokenizer as tokenizers
from sora_jax.data.packing.packs import PackingConfig, PackItem, grid_of, pack, stack
from sora_jax.data.packing.planning import plan
from sora_jax.data.storing.latents import clip_id_of
from sora_jax.models.autoencoder import latent_grid
from sora_jax.nn.pack import Pack
from sora_jax.parallel.mesh import make_mesh, place_batch
from sora_jax.quickstart import QuickstartConfig
from sora_jax.train.denoiser import DenoiserRun, denoiser_groups, denoiser_loss
from sora_jax.train.state import MODEL, TrainState, make_optimizers
from sora_jax.train.step import make_step
from sora_jax.worlds import WorldConfig, scene

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.py"
WIDE = ((24, 24), (24, 36), (36, 24), (36, 36), (48, 48), (48, 84), (84, 48))
TOLERANCE = 1e-4  # relative, float32; bfloat16 on accelerators is checked in float32 all the same
HEADER = ("clips", "clip tokens", "layout", "rows x length", "fill", "step ms", "real tokens/s", "packed / padded")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How clips are laid in rows: the pack's sizes and the rows of a step."""

    name: str
    packing: PackingConfig
    rows: int


@dataclasses.dataclass(frozen=True)
class Mix:
    """A set of clips, with the pack sizes that one would choose for it."""

    name: str
    world: WorldConfig
    length: int
    slots: int


def mixes(world: WorldConfig, packing: PackingConfig) -> list[Mix]:
    """Return the quickstart's mix with its own packs, a wider one, and clips that are all equal, short and long.

    For equal short clips a pack is the largest multiple of the clip that is no longer than the quickstart's pack: with
    any other length each pack would end in padding. Four long ones are a pack of 1024 tokens.
    """
    wide = dataclasses.replace(world, sizes=WIDE, frames=(5, 9, 17))
    equal = dataclasses.replace(world, sizes=((24, 24),), frames=(9,), image_share=0.0)
    long = dataclasses.replace(equal, sizes=((96, 96),), frames=(7,))
    return [
        Mix("quickstart's mix", world, packing.length, packing.slots),
        Mix("wider mix, up to 17 frames of 48x84", wide, 384, 16),
        Mix("equal, 9 frames of 24x24", equal, packing.length // 20 * 20, packing.length // 20),
        Mix("equal, 7 frames of 96x96: 256 tokens", long, 1024, 4),
    ]


def make_items(config: QuickstartConfig, world: WorldConfig, count: int) -> list[PackItem]:
    """Clips of the world's sizes and captions; their latents are noise, which costs the same."""
    scenes = [scene(world, index) for index in range(count)]
    texts = tokenizers.train([s.caption for s in scenes], config.transformer.tokenizer)
    draws = np.random.default_rng(0)
    channels = config.transformer.model.latent_channels
    items = []
    for index, s in enumerate(scenes):
        size = latent_grid(config.autoencoder.model, s.frames, s.height, s.width)
        latent = draws.standard_normal((*size, channels), np.float32)
        items.append(PackItem(latent, clip_id_of(f"clip {index}"), texts.encode(s.caption)))
    return items


def tokens(item: PackItem, patch: Sequence[int]) -> int:
    return int(np.prod(grid_of(item.values.shape[:3], patch)))


def layouts(mix: Mix, run: DenoiserRun, items: list[PackItem]) -> list[Layout]:
    """Packed and padded, with about the same number of places for tokens in a step."""
    longest = max(tokens(item, run.packs.patch) for item in items)
    wordiest = max(len(item.text) for item in items)
    words = mix.slots * float(np.mean([len(item.text) for item in items]))
    text = max(wordiest, int(np.ceil(words / 16)) * 16)  # enough for all slots, and a multiple of 16
    packed = dataclasses.replace(run.packs, length=mix.length, slots=mix.slots, text_length=text)
    padded = dataclasses.replace(run.packs, length=longest, slots=1, text_length=wordiest)
    places = max(run.batch * run.packs.length, mix.length)
    return [
        Layout("packed", packed, max(1, round(places / mix.length))),
        Layout("padded", padded, max(1, round(places / longest))),
    ]


def members_of(layout: Layout, items: list[PackItem]) -> list[list[PackItem]]:
    """Which clips share a row, for all clips."""
    p = layout.packing
    lengths = np.array([tokens(item, p.patch) for item in items])
    texts = np.array([len(item.text) for item in items])
    planned = plan(0, 0, lengths, texts, p)
    return [[items[i] for i in planned[row]] for row in range(len(planned))]


def batches_of(layout: Layout, members: list[list[PackItem]]) -> list[dict]:
    """Host batches of all rows, the last one filled up with empty rows."""
    rows = [pack(row, layout.packing) for row in members]
    nothing = {name: value if name == "row_slots_R" else np.zeros_like(value) for name, value in rows[0].items()}
    rows += [nothing] * (-len(rows) % layout.rows)
    return [stack(rows[i : i + layout.rows]) for i in range(0, len(rows), layout.rows)]


def on_device(batch: dict, mesh) -> Pack:
    """One micro-batch, as the training step takes it."""
    return Pack(**place_batch({name: value[None] for name, value in batch.items()}, mesh, leading=1))


def trainer(run: DenoiserRun, batches: list[dict], mesh):
    """Return a function that does one training step on the next of the batches, and waits for it."""
    optimizers = make_optimizers(denoiser_groups(run), run.loop.steps)
    state = first_state(place(random_params(run.model)), optimizers[MODEL])
    step = make_step(functools.partial(denoiser_loss, run), optimizers)
    placed = [on_device(batch, mesh) for batch in batches]
    calls = 0

    def one_step() -> TrainState:
        nonlocal state, calls
        state, metrics = step(state, (), placed[calls % len(placed)])
        calls += 1
        return jax.block_until_ready(state)

    return one_step


def check_losses_agree(run: DenoiserRun, pair: list[Layout], row: list[PackItem], mesh) -> list[float]:
    """Return the losses of the clips of one pack, packed and padded, at the same random parameters; both must agree."""
    model = dataclasses.replace(run.model, dtype="float32")
    run = dataclasses.replace(run, model=model)
    params = place(random_params(model))
    loss = jax.jit(lambda pack: denoiser_loss(run, {MODEL: params}, (), pack, jnp.int32(0), jnp.int32(0)))
    found = []
    for layout, members in zip(pair, ([row], [[item] for item in row]), strict=True):
        small = dataclasses.replace(layout, rows=len(members))
        (batch,) = batches_of(small, members)
        total, (weight, _) = loss(Pack(**place_batch(batch, mesh)))
        found.append(float(total[MODEL] / weight[MODEL]))
    assert abs(found[0] - found[1]) <= TOLERANCE * abs(found[1]), f"packed {found[0]}, padded {found[1]}"
    return found


def measure(mix: Mix, config: QuickstartConfig, count: int, rounds: int, mesh) -> list[list[str]]:
    """The two table rows of a mix."""
    run = config.transformer
    items = make_items(config, mix.world, count)
    pair = layouts(mix, run, items)
    members = [members_of(layout, items) for layout in pair]
    losses = check_losses_agree(run, pair, members[0][0], mesh)
    print(f"{mix.name}: loss of one pack {losses[0]:.6f} packed, {losses[1]:.6f} padded", flush=True)
    runs = [
        trainer(run, batches_of(layout, rows[: 4 * layout.rows]), mesh)
        for layout, rows in zip(pair, members, strict=True)
    ]
    seconds = in_turns(runs, rounds)
    real = [tokens(item, run.packs.patch) for item in items]
    per_row = [sum(real) / len(rows) for rows in members]  # over all clips: shapes are fixed, so is the time of a step
    rates = [mean * layout.rows / median(s) for mean, layout, s in zip(per_row, pair, seconds, strict=True)]
    spread = [a / b * rates[0] / rates[1] for a, b in _shares(seconds)]
    rows = []
    for layout, mean, s, rate in zip(pair, per_row, seconds, rates, strict=True):
        L = layout.packing.length
        ratio = f"**{rates[0] / rates[1]:.2f}** ({middle_half(spread)})" if layout is pair[0] else ""
        rows.append([
            mix.name, f"{min(real)} to {max(real)}", layout.name, f"{layout.rows} x {L}", f"{mean / L:.1%}",
            milliseconds(s), f"{rate:.0f}", ratio,
        ])  # fmt: skip
    return rows


def _shares(seconds: list[list[float]]):
    """For each round how much slower than its median the padded and the packed step were."""
    packed, padded = (np.array(s) / median(s) for s in seconds)
    return zip(padded, packed, strict=True)


def shrunk(config: QuickstartConfig) -> QuickstartConfig:
    """A tiny model and batch, for `--quick`."""
    run = config.transformer
    text = dataclasses.replace(run.model.text, width=32, depth=1)
    model = dataclasses.replace(run.model, depth=1, width=48, heads=2, text=text)
    return dataclasses.replace(config, transformer=dataclasses.replace(run, model=model, batch=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(CONFIG), help="a quickstart config, for world, model and packs")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clips", type=int, default=3000)
    parser.add_argument("--only", default="", help="the mixes whose names contain this")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one mix, one round")
    options = parser.parse_args()
    measured_on = machine()
    config = from_dict(QuickstartConfig, load(options.config))
    rounds, count = options.rounds, options.clips
    chosen = [mix for mix in mixes(config.world, config.transformer.packs) if options.only in mix.name]
    check(chosen, f"--only is {options.only!r}; it must be in the name of a mix")
    if options.quick:
        config, rounds, count, chosen = shrunk(config), 1, 200, chosen[:1]
    mesh = make_mesh()
    rows = []
    with jax.set_mesh(mesh):
        for mix in chosen:
            rows += measure(mix, config, count, rounds, mesh)
    model = config.transformer.model
    notes = (
        f"Model: depth {model.depth}, width {model.width}, heads {model.heads}, remat {model.remat!r}. Fill: share of"
        f" real tokens over all {count} clips. Step: median of {rounds} rounds, a step of each in turn; in brackets the"
        " middle half of the ratios of single rounds."
    )
    print(report(HEADER, rows, notes, measured_on))


if __name__ == "__main__":
    main()
