"""Moving MNIST: ten frames given, ten predicted, beside the published tables of OpenSTL and PredFormer.

One net gives two answers. At pure noise it predicts the mean of all clips that begin so, which squared error rewards
and the published tables measure; with more steps of the sampler it draws single clips, sharp ones.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sora_jax import console
from sora_jax.benchmarks.own_frechet import distances, world_features
from sora_jax.benchmarks.prediction import (
    Cost,
    cost_of,
    given_frames,
    halvings,
    in_one_step,
    plot_against_flops,
    predict,
    train_and_measure,
)
from sora_jax.config import check, from_dict, load
from sora_jax.config_files import package_config
from sora_jax.data.viewing.sheets import contact_sheet
from sora_jax.data.viewing.write import save_png
from sora_jax.errors import UserError
from sora_jax.evaluate.frechet import Distance
from sora_jax.evaluate.prediction_metrics import (
    PredictionQuality,
    SampleQuality,
    average_predictions,
    prediction_quality,
    sample_quality,
)
from sora_jax.files import write_json
from sora_jax.generate.run import Run, load_run
from sora_jax.parallel.settings import prepare_jax
from sora_jax.train.denoiser import DenoiserRun
from sora_jax.worlds import HELD_OUT
from sora_jax.worlds.digits import ALLOWED, load_digits
from sora_jax.worlds.moving_mnist import MovingMnistConfig
from sora_jax.worlds.table import draw

EPOCH = 10_000  # sequences of an epoch of the published trainings
POINTS = 6  # measurements on the way: after all steps, half of them, a quarter...
AT_POINT = 200  # clips that are predicted at those before the last
SHOWN = 3  # clips of the picture


class Published(NamedTuple):
    """Hold a row of a published table; `gmacs`: multiply-adds of a forward pass in 10^9."""

    method: str
    epochs: int
    parameters: float  # millions
    gmacs: float
    mse: float
    mae: float
    ssim: float
    psnr: float | None

    @property
    def train_flops(self) -> float:
        """Estimate the FLOPs of the training: two per multiply-add, forward and twice as much backward."""
        return 2 * 3 * self.gmacs * 1e9 * EPOCH * self.epochs


# OpenSTL (2306.11249), docs/en/model_zoos/video_benchmarks.md at 8cac741. Its FLOPs are those of fvcore, which counts a
# multiply-add as one. PredFormer: 2410.04733, with multiply-adds counted from its architecture.
PUBLISHED = (
    Published("ConvLSTM-S", 200, 15.0, 56.8, 29.80, 90.64, 0.9288, 22.10),
    Published("PhyDNet", 200, 3.1, 15.3, 28.19, 78.64, 0.9374, 22.62),
    Published("MAU", 200, 4.5, 17.8, 26.86, 78.22, 0.9398, 22.76),
    Published("PredRNN++", 200, 38.6, 171.7, 22.06, 69.58, 0.9509, 23.65),
    Published("ConvMixer", 200, 3.9, 5.5, 32.09, 88.93, 0.9259, 21.93),
    Published("ViT", 200, 46.1, 16.9, 35.15, 95.87, 0.9139, 21.67),
    Published("SimVP-IncepU", 200, 58.0, 19.4, 32.15, 89.05, 0.9268, 21.84),
    Published("SimVP-gSTA", 200, 46.8, 16.5, 26.69, 77.19, 0.9402, 22.78),
    Published("TAU", 200, 44.7, 16.0, 24.60, 71.93, 0.9454, 23.19),
    Published("PhyDNet", 2000, 3.1, 15.3, 20.35, 61.47, 0.9559, 24.21),
    Published("PredRNN++", 2000, 38.6, 171.7, 14.07, 48.91, 0.9698, 26.37),
    Published("ConvMixer", 2000, 3.9, 5.5, 22.30, 67.37, 0.9507, 23.73),
    Published("ViT", 2000, 46.1, 16.9, 19.74, 61.65, 0.9539, 24.59),
    Published("SimVP-gSTA", 2000, 46.8, 16.5, 15.05, 49.80, 0.9675, 25.97),
    Published("TAU", 2000, 44.7, 16.0, 15.69, 51.46, 0.9661, 25.71),
    Published("PredFormer, full attention", 2000, 25.3, 21.2, 17.3, 56.0, 0.962, None),
    Published("PredFormer, TSST", 2000, 25.3, 16.4, 12.4, 44.6, 0.973, None),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Configure the evaluation."""

    clips: int = 1000  # held-out clips that are predicted
    sampled: int = 32  # the first of them, of which clips are drawn, too
    samples: int = 8  # clips that are drawn of each
    frechet: int = 256  # held-out clips of which a clip is drawn for the Frechet distance; 0: it is not measured
    seed: int = 1  # of all noise

    def __post_init__(self):
        for name in ("clips", "sampled", "samples"):
            value = getattr(self, name)
            check(value > 0, f"--{name} is {value}; it must be at least 1")
        check(self.samples > 1, f"--samples is {self.samples}; it must be at least 2, to see how clips differ")
        allowed = f"it must be 0 (none), or from 2 to --clips, {self.clips}"
        check(self.frechet in (0, *range(2, self.clips + 1)), f"--frechet is {self.frechet}; {allowed}")
        check(self.sampled <= self.clips, f"--sampled is {self.sampled}; it must be at most --clips, {self.clips}")


def read_config(file: str | None, changes: Sequence[str], digits: str) -> DenoiserRun:
    """Return the config of the run: a DenoiserRun that draws Moving MNIST, with these digits."""
    values = load(file or str(package_config("moving_mnist.py")), changes)
    config = from_dict(DenoiserRun, values, "--config")
    world = world_of(config)
    world = dataclasses.replace(world, digits_path=digits or world.digits_path)
    check(world.digits_path, f"--digits is not given; it must be {ALLOWED}")
    draw(world, 0)  # UserError, now, where there are no digits
    given = given_frames(config)
    check(0 < given < world.frames, f"{given} frames are given; config.drawn.world.frames must be more")
    assert config.drawn is not None
    return dataclasses.replace(config, drawn=dataclasses.replace(config.drawn, world=world))


def check_frechet(config: DenoiserRun, options: Options) -> None:
    """Raise a UserError, before the training, if its Frechet distance is asked for and no file says which digits."""
    world = world_of(config)
    known = load_digits(world.digits_path, world.held_out_digits)["train"].labels is not None
    allowed = f"it must be 0, as there are no labels beside the images of {world.digits_path!r} to learn features from"
    check(not options.frechet or known, f"--frechet is {options.frechet}; {allowed}")


def world_of(config: DenoiserRun) -> MovingMnistConfig:
    """Return the world that a run draws; UserError where it is another."""
    world = config.drawn and config.drawn.world
    if not isinstance(world, MovingMnistConfig):
        raise UserError("--config draws another world; it must be moving_mnist, in config.drawn.world.name")
    return world


def main(config_file: str | None, changes: Sequence[str], digits: str, workdir: Path, options: Options) -> None:
    """Train and evaluate in `workdir`, going on where an earlier call stopped; print and write the report."""
    prepare_jax()
    config = read_config(config_file, changes, digits)
    check_frechet(config, options)
    given, cost = given_frames(config), cost_of(config)
    few = dataclasses.replace(options, clips=min(options.clips, AT_POINT), sampled=1, frechet=0)

    def measure(run: Run) -> dict[str, Any]:
        return {"mse": predict_means(run, few, given)[1].mse}

    points = train_and_measure(config, workdir, halvings(config.loop.steps, POINTS), measure)
    run = load_run(workdir)
    means, quality = predict_means(run, options, given)
    drawn, samples = draw_samples(run, options, given)
    found = measure_frechet(run, options, given, workdir) if options.frechet else {}
    points[-1] = points[-1] | {"mse": quality.mse}
    report = {
        "cost": dataclasses.asdict(cost),
        "steps": points[-1]["step"],
        "train_flops": points[-1]["flops"],
        "seconds": points[-1]["seconds"],
        "given": given,
        "mean": dataclasses.asdict(quality),
        "samples": dataclasses.asdict(samples),
        "frechet": {name: dataclasses.asdict(distance) for name, distance in found.items()},
        "points": points,
    }
    write_json(workdir / "report.json", json.loads(console.as_json(report)))  # where a value is not finite, null
    save_png(workdir / "frames.png", picture(config, given, means[:SHOWN], drawn[:SHOWN]))
    rows = PUBLISHED if as_published(config, given) else ()
    ours = [(point["flops"], point["mse"]) for point in points]
    named = [(row.method, row.train_flops, row.mse, f"published, {row.epochs} epochs") for row in rows]
    plot_against_flops(workdir / "flops.png", "squared error of a frame, summed over its pixels", ours, named)
    text = [table(rows, cost, report["train_flops"], quality)]
    text += [about_digits(config), about_world(config, given), about_samples(samples)]
    text += [about_frechet(found, options.frechet)] if found else []
    console.result(report, "\n".join([*text, f"{workdir / 'flops.png'} {workdir / 'frames.png'}"]))


def as_published(config: DenoiserRun, given: int) -> bool:
    """Return True where clips are those of the published tables: 2 digits on 64 x 64 pixels, 10 frames after 10."""
    world, usual = world_of(config), MovingMnistConfig()
    same = all(getattr(world, name) == getattr(usual, name) for name in ("size", "digits", "digit_size", "stochastic"))
    return same and (given, world.frames) == (10, 20)


def held_out(config: DenoiserRun, count: int) -> list[np.ndarray]:
    """Draw held-out clips, float32 (T, H, W, 1) in [0, 1]."""
    world = world_of(config)
    return [draw(world, HELD_OUT + index)[..., :1].astype(np.float32) / 255 for index in range(count)]


def predict_means(run: Run, options: Options, given: int) -> tuple[list[np.ndarray], PredictionQuality]:
    """Predict held-out clips by the mean; return the first clips whole, in [0, 1], and the quality of all."""
    clips = held_out(run.config, options.clips)
    sampling = in_one_step(run.config.sampling)
    predicted = predict(run, [2 * clip - 1 for clip in clips], given, sampling, options.seed)
    shown: list[np.ndarray] = []
    qualities: list[PredictionQuality] = []
    for clip, latent in zip(clips, predicted, strict=True):
        found = _pixels(latent)
        qualities.append(prediction_quality(found[given:], clip[given:]))
        shown += [found] if len(shown) < SHOWN else []
    return shown, average_predictions(qualities)


def draw_samples(run: Run, options: Options, given: int) -> tuple[list[np.ndarray], SampleQuality]:
    """Draw several clips for each of some held-out beginnings; return the first of each, and how they differ."""
    clips = held_out(run.config, options.sampled)
    copies = [2 * clip - 1 for clip in clips for _ in range(options.samples)]
    drawn = list(map(_pixels, predict(run, copies, given, run.config.sampling, options.seed)))
    made = np.stack(drawn).reshape(len(clips), options.samples, *drawn[0].shape)
    return drawn[:: options.samples], sample_quality(made[:, :, given:], np.stack(clips)[:, given:])


def measure_frechet(run: Run, options: Options, given: int, folder: Path) -> dict[str, Distance]:
    """Return Frechet distances from true clips, of what follows the given frames: of means, samples, other true clips.

    The features are those of a classifier that has learnt, from training clips, which digits there are.
    """
    world, count = world_of(run.config), options.frechet
    clips = held_out(run.config, 2 * count)
    known = [2 * clip - 1 for clip in clips[:count]]
    made = {
        name: list(map(_pixels, predict(run, known, given, sampling, options.seed)))
        for name, sampling in (("samples", run.config.sampling), ("means", in_one_step(run.config.sampling)))
    }
    sets = {name: [_grey(clip[given:]) for clip in some] for name, some in {**made, "true": clips[count:]}.items()}
    return distances(world_features(world, given, folder), [_grey(clip[given:]) for clip in clips[:count]], sets)


def _grey(clip: np.ndarray) -> np.ndarray:
    """Return a clip (T, H, W, 1) in [0, 1] as uint8 (T, H, W, 3)."""
    return (255 * clip.clip(0, 1) + 0.5).astype(np.uint8).repeat(3, axis=-1)


def _pixels(latent: np.ndarray) -> np.ndarray:
    """Return the grey values, in [0, 1] where the network keeps to them, of a latent (T, H, W, C) of pixels."""
    return (latent.mean(-1, keepdims=True) + 1) / 2


def picture(
    config: DenoiserRun, given: int, means: Sequence[np.ndarray], drawn: Sequence[np.ndarray], frames: int = 20
) -> np.ndarray:
    """Draw for each clip the true frames, below them the predicted mean, below that a sample."""
    rows, captions = [], []
    for true, mean, sample in zip(held_out(config, len(means)), means, drawn):
        for name, clip in (("true", true), ("mean", mean), ("sample", sample)):
            whole = np.concatenate([true[:given], clip[given:]]) if name == "true" else clip
            grey = _grey(whole)
            if name != "true":
                grey[:given] = 255  # what is given stands above
            rows.append(grey)
            captions.append(f"{name}, from the first frame on" if name == "true" else f"{name} after {given} frames")
    return contact_sheet(rows, captions, columns=1, shown=frames)


def table(rows: Sequence[Published], cost: Cost, flops: float, quality: PredictionQuality) -> str:
    """Return the published table as text, ordered by the FLOPs of training, with ours among its rows."""
    head = ["method", "epochs", "parameters", "multiply-adds", "FLOPs of training", "MSE", "MAE", "SSIM", "PSNR"]
    epochs = flops / cost.step_flops * cost.step_clips / EPOCH
    ours = Published(
        "sora_jax", 0, cost.parameters / 1e6, cost.forward_flops / 2e9, quality.mse, quality.mae, quality.ssim,
        quality.psnr,
    )  # fmt: skip
    lines = [(row.train_flops, row, f"{row.epochs}") for row in rows] + [(flops, ours, f"{epochs:.3g}")]
    cells = [head]
    for train, row, count in sorted(lines, key=lambda line: line[0]):
        psnr = "-" if row.psnr is None else f"{row.psnr:.2f}"
        sizes = [f"{row.parameters:.1f}M", f"{row.gmacs:.3g}G", f"{train:.2g}"]
        cells.append([row.method, count, *sizes, f"{row.mse:.2f}", f"{row.mae:.2f}", f"{row.ssim:.4f}", psnr])
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
        for line in cells
    )


def about_digits(config: DenoiserRun) -> str:
    """Say in a line how the data differ from those of the published tables."""
    world = world_of(config)
    parts = load_digits(world.digits_path, world.held_out_digits)
    train, test = (len(parts[name].images) for name in ("train", "held-out"))
    return (
        f"sora_jax learns from {train:,} images of digits and is tested on clips of {test:,} others; published rows "
        "learn from 60,000 and are tested on a fixed file of 10,000 clips"
    )


def about_world(config: DenoiserRun, given: int) -> str:
    """Say in a line which clips the errors are of, and if published ones are of others."""
    world = world_of(config)
    kind = f"{world.digits} {'digits that bounce at random' if world.stochastic else 'digits'}"
    size, frames = f"{world.size} x {world.size} pixels", f"{given} given and {world.frames - given} predicted"
    line = f"frames of {size} with {kind}, {frames}"
    return line if as_published(config, given) else f"{line}: published errors are of other clips and not shown"


def about_samples(samples: SampleQuality) -> str:
    """Say in a line how drawn clips differ from the true ones and from each other."""
    return (
        f"{samples.samples} samples of {samples.clips} clips: squared error {samples.mse:.1f}, of the best "
        f"{samples.best_mse:.1f}, of their mean {samples.mean_mse:.1f}; variance between them {samples.variance:.1f}"
    )


def about_frechet(found: Mapping[str, Distance], count: int) -> str:
    """Say in a line how far sets of clips are from true ones."""
    far = ", ".join(f"{name} {one.value:.3g} ({one.low:.3g} to {one.high:.3g})" for name, one in found.items())
    return f"Frechet distance of own features from {count} true clips, and 95 %: {far}"
