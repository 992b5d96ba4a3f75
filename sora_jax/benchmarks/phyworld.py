"""Run `sora-jax bench phyworld`: learn a world of Phyworld from nothing, and measure the physics of what is predicted.

Three frames of a clip are given and the other 29 predicted, by the sampler's mask. The error is that of the velocities,
on held-out clips within the ranges of training and outside (`worlds.phyworld_error`). Stages: train, predict and
measure, put the result among the published ones. Each leaves its result in the work folder and is not repeated.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax import console
from sora_jax.benchmarks.phyworld_table import Row, draw_plot, published_rows, table
from sora_jax.benchmarks.prediction import cost_of, given_frames, predict
from sora_jax.config import check, from_dict, load, to_dict
from sora_jax.config_files import package_config
from sora_jax.data.building.build import build
from sora_jax.data.building.prepare import BuildConfig
from sora_jax.data.packing.packs import grid_of
from sora_jax.data.sources import SourceConfig
from sora_jax.data.storing.drawn import DrawnConfig
from sora_jax.data.viewing.sheets import contact_sheet
from sora_jax.data.viewing.write import save_png
from sora_jax.files import as_path, read_text, write_json
from sora_jax.generate.run import Run, load_run, read_run_config
from sora_jax.kinds.run import train
from sora_jax.models.first_stage import latent_grid
from sora_jax.models.flops import autoencoder_train_flops
from sora_jax.models.pixels import PixelsConfig
from sora_jax.parallel.settings import prepare_jax
from sora_jax.train.autoencoder import AutoencoderRun, StageConfig
from sora_jax.train.denoiser import DenoiserRun
from sora_jax.train.encode import encode_dataset
from sora_jax.worlds import HELD_OUT
from sora_jax.worlds.phyworld import GIVEN_FRAMES, ONE_BALL, RANGES, SCENARIOS, PhyworldConfig, count_of, draw, truth
from sora_jax.worlds.phyworld_error import VelocityError, is_counted, measure, summarise

BATCH = 32  # clips that are predicted in one call, and saved
# Kinds of held-out clips outside the ranges of one ball, by their share in the published grids.
SHARES = {"radius": 1.0, "velocity": 2.0, "both": 2.0}
Measured = dict[int, VelocityError]  # by the index of a clip


@dataclasses.dataclass(frozen=True)
class PhyworldBench:
    """Configure the benchmark; `run.drawn`, `run.latents` and the sizes of packs are filled in."""

    world: PhyworldConfig = PhyworldConfig()
    run: DenoiserRun = DenoiserRun()
    autoencoder: AutoencoderRun | None = None  # trained first, to learn latents in place of pixels
    clips: int = 0  # training clips; 0: as many as the world's level has
    count: int = 256  # held-out clips that are measured: of those in range, and of each kind outside
    curve: int = 48  # held-out clips in range that every kept checkpoint is measured on; 0: no curve
    show: int = 4  # clips of the strip of frames, of each kind

    def __post_init__(self):
        rules = {"clips": self.clips >= 0, "count": self.count >= 1, "curve": self.curve >= 0, "show": self.show >= 1}
        for name, good in rules.items():
            check(good, f"{name} is {getattr(self, name)}; it must be at least {int(name in ('count', 'show'))}")
        check(self.world.frames > GIVEN_FRAMES, f"world.frames is {self.world.frames}; it must be above {GIVEN_FRAMES}")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of held-out clips, those in range first."""
        return ONE_BALL if self.world.balls == 1 else tuple(RANGES)


def main(config_file: str | None, changes: Sequence[str], world: dict[str, Any], workdir: Path) -> dict[str, Any]:
    """Train, measure and report in `workdir`, going on where an earlier call stopped.

    world: fields of the world that options set, such as the scenario.
    """
    prepare_jax()
    changes = [*changes, *(f"world.{name}={value}" for name, value in world.items())]
    config = from_dict(PhyworldBench, load(config_file or default_config(world.get("scenario")), changes), "--config")
    folder = workdir / "denoiser"
    check_same_world(config, folder)
    options = prepared(config, workdir)
    train(options, folder)
    result = report(config, options, folder, workdir)
    write_json(workdir / "result.json", json.loads(console.as_json(result)))  # where a value is not finite, null
    draw_plot(config.world.scenario, result, workdir / "error_against_flops.png")
    rows = [*published_rows(config.world.scenario), *own_rows(config, result)]
    notes = f"{workdir}: result.json, error_against_flops.png, clips.png"
    if result["autoencoder_flops"]:
        notes = f"the autoencoder took {result['autoencoder_flops'] / 1e15:.3f} PFLOP more\n{notes}"
    console.result(result, f"{table(rows)}\n{shares(result)}\n{notes}")
    return result


def default_config(scenario: str | None = None) -> str:
    """Return the path of configs/phyworld.py, as it came with the package, with the variant of a scenario."""
    return str(package_config("phyworld.py")) + (f":{scenario}" if scenario in SCENARIOS else "")


def check_same_world(config: PhyworldBench, folder: Path) -> None:
    """Raise a UserError if the run in the folder has learnt another world, or other values than this config."""
    if not (folder / "config.json").exists():
        return
    drawn, kinds = read_run_config(folder).drawn, ("pixels", "latents")
    wanted, found = (kinds[bool(latents)] for latents in (config.autoencoder, drawn is None))
    other = f"--workdir is {str(folder.parent)!r}; the run there learns {found} and this config {wanted}: take another"
    check(wanted == found, other)
    for name, value in to_dict(config.world).items() if drawn else ():
        have = to_dict(drawn)["world"].get(name, value)
        learnt = f"that run has learnt one with {have!r}; take another --workdir than {str(folder.parent)!r}"
        check(have == value, f"--config.world.{name} is {value!r}; {learnt}")


def of_kind(world: PhyworldConfig, kind: Any) -> PhyworldConfig:
    """Return the world with held-out clips of a kind, one of `PhyworldBench.kinds`."""
    return dataclasses.replace(world, ranges=kind)


# Training


def prepared(config: PhyworldBench, workdir: Path) -> DenoiserRun:
    """Return the run of the denoiser: its data, made here if they are latents, and packs as long as a large clip."""
    world, run = config.world, config.run
    clips = config.clips or count_of(world)
    first_stage = config.autoencoder.model if config.autoencoder else PixelsConfig()
    tokens = [
        int(np.prod(grid_of(latent_grid(first_stage, world.frames, *size), run.model.patch))) for size in world.sizes
    ]
    factor, given = first_stage.time_factor, given_frames(run)
    check(factor == 1, f"--config.autoencoder.model.time_factor is {factor}; it must be 1, as three frames are given")
    say = f"--config.run.model.patch[0] is {run.model.patch[0]}; times run.diffusion.given.first_frames it must be"
    check(given == GIVEN_FRAMES, f"{say} {GIVEN_FRAMES}")
    packing = dataclasses.replace(run.packing, length=max(tokens), slots=max(tokens) // min(tokens))
    run = dataclasses.replace(run, packing=packing)
    if config.autoencoder is None:
        return dataclasses.replace(run, drawn=DrawnConfig(world, clips), latents="")
    data, autoencoder, latents = (workdir / name for name in ("clips", "autoencoder", "latents"))
    source = SourceConfig("world", world=world, limit=clips + 64, world_held_out=64)
    build(BuildConfig(out=str(data), sources=(source,), max_frames=world.frames, multiple=first_stage.space_factor))
    train(dataclasses.replace(config.autoencoder, data=str(data)), autoencoder)
    encode_dataset(autoencoder, data, latents)
    return dataclasses.replace(run, drawn=None, latents=str(latents))


# Predicting and measuring


def predict_clips(run: Run, world: PhyworldConfig, indices: Sequence[int]) -> list[np.ndarray]:
    """Give the first three frames of clips and predict the others; return whole clips, uint8 (T, H, W, 3)."""
    given = [draw(world, index)[:GIVEN_FRAMES] for index in indices]
    shape = run.latent_size(world.frames, world.size, world.size)
    known = [np.pad(z, ((0, shape[0] - len(z)), *[(0, 0)] * 3)) for z in run.autoencoder.encode(given)]
    latents = [*predict(run, known, GIVEN_FRAMES, run.config.sampling, seed=0)]
    clips = run.autoencoder.decode(latents)
    return [np.concatenate([frames, clip[GIVEN_FRAMES:]]) for frames, clip in zip(given, clips, strict=True)]


def measured(run: Run, world: PhyworldConfig, total: int, out: Path) -> Measured:
    """Predict and measure the first `total` held-out clips of a world; those in `out` are measured already.

    `out` counts only for the same world and settings of the sampler.
    """
    settings = to_dict(world), to_dict(run.config.sampling)
    made_by = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    kept = json.loads(read_text(out)) if out.exists() else {}
    rows = kept["errors"] if kept.get("made_by") == made_by else []
    if len(rows) < total:
        rows = rows[: len(rows) // BATCH * BATCH]  # whole calls, so that every clip has the noise that it always has
        with console.progress(total=total, initial=len(rows), desc=out.stem, unit="clip") as bar:
            for start in range(HELD_OUT + len(rows), HELD_OUT + total, BATCH):
                indices = list(range(start, min(start + BATCH, HELD_OUT + total)))
                for index, clip in zip(indices, predict_clips(run, world, indices), strict=True):
                    rows.append(dataclasses.asdict(measure(world, index, clip)))
                    bar.update(1)
                write_json(out, {"made_by": made_by, "errors": rows})
    return {HELD_OUT + place: VelocityError(**row) for place, row in enumerate(rows[:total])}


def report(config: PhyworldBench, options: DenoiserRun, folder: Path, workdir: Path) -> dict[str, Any]:
    """Measure the last checkpoint on all kinds of clips, and the kept ones on some in range."""
    world, run = config.world, load_run(folder)
    cost = cost_of(options)
    each = cost.step_flops
    found = {
        kind: measured(run, of_kind(world, kind), config.count, place_of(workdir, run.step, kind))
        for kind in config.kinds
    }
    show(config, run, workdir / "clips.png")
    curve = [*early(config, folder, workdir, run.step, each)]
    inside = found["in"]
    last = summarise([*inside.values()][: config.curve or None])  # of the clips that the points before are measured on
    true = summarise(measure(world, index, draw(world, index)) for index in inside)
    return {
        "scenario": world.scenario, "size": world.size, "level": world.level, "clips": config.clips or count_of(world),
        "parameters": cost.parameters, "step": run.step, "flops": each * run.step,
        "in": dataclasses.asdict(summarise(inside.values())), "out": outside(config, found, as_published=True),
        "out_all": outside(config, found, as_published=False), "true": dataclasses.asdict(true),
        "kinds": {kind: dataclasses.asdict(summarise(errors.values())) for kind, errors in found.items()},
        "curve_clips": min(config.curve, config.count),
        "curve": [*curve, {"step": run.step, "flops": each * run.step, "in": last.published}],
        "autoencoder_flops": autoencoder_flops(config.autoencoder) if config.autoencoder else 0.0,
    }  # fmt: skip


def autoencoder_flops(config: AutoencoderRun) -> float:
    """Return the model FLOPs of all stages of an autoencoder that learns crops of clips."""
    stages = config.stages or (StageConfig(config.loop.steps),)
    each = [autoencoder_train_flops(config.model, *(stage.crop or config.crop)) for stage in stages]
    return sum(s.steps * (s.batch or config.batch) * flops for s, flops in zip(stages, each, strict=True))


def place_of(workdir: Path, step: int, kind: str) -> Path:
    """Return the file of what is measured of a kind of clips at a step."""
    return workdir / "measured" / f"step_{step}" / f"{kind}.json"


def outside(config: PhyworldBench, found: dict[str, Measured], as_published: bool) -> dict[str, float]:
    """Return the means over the kinds of clips out of range, by their shares in the published grids.

    as_published: leave out the balls that the published evaluation leaves out, as so small that they disappear.
    """
    summaries, weights = [], []
    for kind in config.kinds[1:]:
        world = of_kind(config.world, kind)
        kept = [e for index, e in found[kind].items() if not as_published or is_counted(truth(world, index))]
        if kept:
            summaries.append(dataclasses.asdict(summarise(kept)))
            weights.append(SHARES[kind] if config.world.balls == 1 else 1.0)
    means = {name: weighted([s[name] for s in summaries], weights) for name in summaries[0]}
    return means | {"clips": sum(s["clips"] for s in summaries)}


def weighted(values: Sequence[float], weights: Sequence[float]) -> float:
    """Return the weighted mean of the values that are numbers."""
    known = np.isfinite(values)
    return float(np.average(np.array(values)[known], weights=np.array(weights)[known])) if known.any() else np.nan


def early(config: PhyworldBench, folder: Path, workdir: Path, last: int, each: float) -> Iterator[dict[str, float]]:
    """Yield the step, FLOPs and error in range of every kept checkpoint before the last."""
    names = [path.name for path in as_path(folder / "checkpoints").iterdir()] if config.curve else []
    for step in sorted(int(name) for name in names if name.isdigit() and int(name) < last):
        run = load_run(folder, checkpoint=step)
        clips = min(config.curve, config.count)
        errors = measured(run, config.world, clips, place_of(workdir, step, "in"))
        yield {"step": step, "flops": each * step, "in": summarise(errors.values()).published}


# Showing


def show(config: PhyworldBench, run: Run, out: Path) -> None:
    """Draw a sheet: true clips and below them what is predicted, of each kind; every fourth frame, the first given."""
    clips, captions = [], []
    for kind in config.kinds:
        world = of_kind(config.world, kind)
        indices = [HELD_OUT + place for place in range(config.show)]
        for index, clip in zip(indices, predict_clips(run, world, indices), strict=True):
            ball = truth(world, index).balls[0]
            both = np.concatenate([draw(world, index), np.full_like(clip[:, :1], 160), clip], axis=1)
            clips.append(both[:: max(1, world.frames // 8)])
            captions.append(f"{kind}: radius {ball.radius:.2f}, velocity {ball.speed:.2f}; true above, predicted below")
    save_png(out, contact_sheet(clips, captions, columns=2, scale=max(1, 64 // config.world.size), shown=9))


def own_rows(config: PhyworldBench, result: dict[str, Any]) -> list[Row]:
    """Return the rows of this run: true clips through the readers, and what is predicted."""
    level = f"{result['clips']:,}" if config.clips else config.world.level
    true, inside, out = result["true"], result["in"], result["out"]
    name = f"this run, {result['parameters'] / 1e6:.2f}M, {config.world.size} px"
    errors = inside["published"], out["published"], inside["unbiased"], out["unbiased"], inside["lost"], out["lost"]
    return [
        Row(f"true clips, {config.world.size} px", "", None, true["published"], None, true["unbiased"]),
        Row(name, level, result["flops"], *errors),
    ]


def shares(result: dict[str, Any]) -> str:
    """Return a line for each kind of clips: errors, and how many have lost a ball or its colour; and one of `out`."""
    lines = []
    for kind, s in result["kinds"].items():
        errors = f"{s['published']:.4f}  unbiased {s['unbiased']:.4f}  frame by frame {s['printed']:.3f}"
        lines.append(
            f"{kind:<11} {errors}  of {s['clips']} clips: ball lost {s['lost']:.0%}, faded {s['faded']:.0%}, "
            f"too short to measure {s['unmeasured']:.0%}"
        )
    out, whole = result["out"], result["out_all"]
    weights = "" if result["scenario"] == "collision" else ", radius once, velocity and both twice"
    counted = f"of the {out['clips']} of {whole['clips']} clips that the published evaluation counts"
    lines.append(
        f"out: mean of the other kinds{weights}; {counted} {out['published']:.4f}, of all {whole['published']:.4f}"
    )
    return "\n".join(lines)
