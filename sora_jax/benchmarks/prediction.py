"""What benchmarks of video prediction share: train with measurements on the way, and predict from first frames.

A run predicts by the sampler's mask, as every task does: the tokens of the first frames are given, the others are made.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sora_jax import console
from sora_jax.config import check
from sora_jax.data.feeding.pipeline import PackedBatches
from sora_jax.data.feeding.tokenizer import NoText
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.files import as_path, read_text, replacing
from sora_jax.generate.requests import Known, Task, Wanted, size_of
from sora_jax.generate.run import Run, load_run
from sora_jax.generate.sampler import sample_latents
from sora_jax.kinds.run import train
from sora_jax.models.denoiser import denoiser_specs
from sora_jax.nn.params import count
from sora_jax.train.denoiser import DenoiserRun, batch_counts, open_latents
from sora_jax.train.watchdog import FILE as TIME_LOG

POINTS = "points.jsonl"
CHUNK = 64  # clips whose latents are sampled in one call


@dataclasses.dataclass(frozen=True)
class Cost:
    """State what a run is: its parameters, and the model FLOPs (two per multiply-add) of a clip's forward pass.

    step_flops: of a training step, forward and backward. step_clips: the clips of a step.
    """

    parameters: int
    forward_flops: float
    step_flops: float
    step_clips: float


def cost_of(config: DenoiserRun) -> Cost:
    """Count the parameters of a run without text, and the FLOPs of its first batch, which stands for all."""
    check(config.model.text is None, "config.model.text is given; a benchmark of prediction reads no captions")
    batches = PackedBatches(open_latents(config), NoText(), config.packs, config.batch, config.seed, config.split)
    counts = batch_counts(config.model, batches[0])
    forward = counts["flops"] / 3 / counts["clips"]
    return Cost(count(denoiser_specs(config.model)), forward, counts["flops"], counts["clips"])


def given_frames(config: DenoiserRun) -> int:
    """Return the latent frames that training gives of every clip; UserError where that is no fixed number."""
    given = config.diffusion.given
    fixed = given.first == 1 and given.first_frames > 0
    say = f"config.diffusion.given.first is {given.first:g} and first_frames {given.first_frames}; a benchmark of"
    check(fixed, f"{say} prediction needs 1 and the number of token frames")
    return given.first_frames * config.model.patch[0]


def halvings(steps: int, number: int) -> list[int]:
    """Return steps at which to measure: the last, half of it, a quarter..., `number` in all, in rising order."""
    return sorted({max(1, round(steps / 2**i)) for i in range(number)})


def train_and_measure(
    config: DenoiserRun, workdir: Path, steps: Sequence[int], measure: Callable[[Run], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Train a run up to each of some steps in turn, measure it there, and return what was found at each.

    Each point has `step`, `flops` (of all training up to there), `seconds` of training, and what `measure` returns.
    Points stay in the run folder, so that a call goes on where an earlier one stopped. The schedule of the learning
    rate is that of the whole run.
    """
    optim = dataclasses.replace(config.optim, decay_steps=config.optim.decay_steps or config.loop.steps)
    cost, points = cost_of(config), {point["step"]: point for point in _read_points(workdir)}
    for step in steps:
        if step in points:
            continue
        own = dataclasses.replace(config, optim=optim, loop=dataclasses.replace(config.loop, steps=step))
        train(own, workdir)
        seconds = json.loads(read_text(as_path(workdir) / TIME_LOG))["seconds"]
        training = sum(seconds.get(cause, 0.0) for cause in ("data", "step"))
        found = measure(load_run(workdir))
        points[step] = {"step": step, "flops": step * cost.step_flops, "seconds": training} | found
        console.log(f"step {step}: {json.dumps(points[step])}")
        _write_points(workdir, points)
    return [points[step] for step in sorted(points) if step <= max(steps)]


def _read_points(workdir: Path) -> list[dict[str, Any]]:
    file = as_path(workdir) / POINTS
    return [json.loads(line) for line in read_text(file).splitlines()] if file.exists() else []


def _write_points(workdir: Path, points: dict[int, dict[str, Any]]) -> None:
    with replacing(as_path(workdir) / POINTS) as temporary:
        temporary.write_text("".join(json.dumps(points[step]) + "\n" for step in sorted(points)))


def predict(
    run: Run, latents: Sequence[np.ndarray], given: int, sampling: SamplingConfig, seed: int
) -> Iterator[np.ndarray]:
    """Yield clips (t, h, w, C) of which the first `given` latent frames are known, float32 latents, in order.

    latents: of whole clips, of which the sampler sees the given frames alone. Each clip of a call has noise of its own.
    """
    for begin in range(0, len(latents), CHUNK):
        some = latents[begin : begin + CHUNK]
        tasks = [_continue(run, latent, given) for latent in some]
        ids = range(begin + 1, begin + 1 + len(some))
        wanted = Wanted(sizes=[task.size for task in tasks], tasks=tasks, clip_ids=ids)
        with jax.set_mesh(run.mesh):
            yield from sample_latents(run, run.plan(wanted, sampling), sampling, seed)


def _continue(run: Run, latent: np.ndarray, given: int) -> Task:
    known, ceiling = latent.copy(), np.zeros(latent.shape[:3], np.float32)
    known[given:], ceiling[given:] = 0.0, 1.0
    return Task(size_of(run.autoencoder.config, latent.shape[:3]), Known(known, ceiling))


def in_one_step(sampling: SamplingConfig) -> SamplingConfig:
    """Return the sampling that takes what the network says at pure noise: the mean of all clips that begin so.

    A step of Euler from t = 1 to 0 ends at the predicted x_0, whatever the type of the prediction.
    """
    solver = dataclasses.replace(sampling.solver, name="euler")
    return dataclasses.replace(sampling, steps="1", spacing="even", solver=solver, last_time=0.0)


def plot_against_flops(
    out: Path,
    label: str,
    ours: Sequence[tuple[float, float]],
    published: Sequence[tuple[str, float, float, str]],
    name: str = "sora_jax",
) -> None:
    """Draw an error against training FLOPs, both axes logarithmic: ours as a line, others as named points.

    published: (method, FLOPs, error, what it belongs to), a colour for each of the last.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
    panel.plot(*zip(*ours, strict=True), "o-", color="C3", label=name, zorder=3)
    for number, group in enumerate(dict.fromkeys(group for *_, group in published)):
        points = [(flops, error) for _, flops, error, own in published if own == group]
        panel.plot(*zip(*points, strict=True), "o", color=f"C{number}", markersize=4, label=group)
    # Points lie close together, so their names stand in a column beside the panel, the largest error at the top.
    for place, (method, flops, error, _) in enumerate(sorted(published, key=lambda row: -row[2])):
        line = {"arrowstyle": "-", "color": "0.8", "linewidth": 0.6}
        at = (1.02, 1 - (place + 0.5) / len(published))
        panel.annotate(method, (flops, error), at, "data", "axes fraction", line, fontsize=7, va="center", zorder=0)
    panel.set(xscale="log", yscale="log", xlabel="FLOPs of training", ylabel=label)
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("{x:g}")
    panel.tick_params(which="both", labelsize=7)
    panel.legend(frameon=False)
    with replacing(as_path(out)) as temporary:
        figure.savefig(temporary, dpi=130)
    pyplot.close(figure)
