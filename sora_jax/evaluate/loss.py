"""The metric `loss`: the loss of held-out latents by noise level, size and length, on fixed noise."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sora_jax.config import check
from sora_jax.data.viewing.write import save_png
from sora_jax.evaluate.evaluation import Evaluation, counted, measuring
from sora_jax.evaluate.metric import Found, Line, Metric
from sora_jax.train.held_out import ClipLosses, HeldOut, loss_by_noise, mean_loss
from sora_jax.train.state import MODEL

PARTS = {"by_size": "size", "by_frames": "frames"}  # groups of clips


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """Choose how the loss of held-out clips is measured."""

    levels: int = 0  # noise levels of each clip; 0: as many as the run's config.held_out.levels

    def __post_init__(self):
        check(self.levels >= 0, f"loss.levels is {self.levels}; it must be at least 1, or 0 for those of the run")


def _check(evaluation: Evaluation, options: LossOptions) -> None:
    evaluation.check_latents()


def _measure(evaluation: Evaluation, options: LossOptions) -> Found:
    clips, config = evaluation.latent_clips, evaluation.model.config
    levels = options.levels or config.held_out.levels
    config = dataclasses.replace(config, held_out=dataclasses.replace(config.held_out, levels=levels))
    with jax.set_mesh(evaluation.model.mesh):
        batches = clips.batches()
        with measuring(len(batches), "batch") as bar:
            found = HeldOut(config, clips).losses({MODEL: evaluation.model.params}, counted(batches, bar))
    values: dict[str, Any] = {
        "loss": mean_loss(found),
        "standard_error": standard_error(found),
        "by_noise": [None if np.isnan(x) else x for x in loss_by_noise(found).tolist()],
        "clips": len(clips),
        "levels": levels,
    }
    groups = clips.groups()
    values |= {part: {key: mean_loss(found, own[:, None]) for key, own in groups[part].items()} for part in PARTS}
    picture = save_png(evaluation.out / "loss.png", draw(found, groups))
    about = f"{evaluation.about_latents()}, {levels} noise levels of each, weights as in training"
    return Found({"model": {"loss": values}}, _lines(values), about=about, files=[str(picture)])


def standard_error(found: ClipLosses) -> float | None:
    """Return the standard error of the mean loss of a token over clips, which are drawn whole; None for one clip."""
    loss, weight = (np.sum(x, axis=1) for x in (found.loss, found.weight))
    if len(loss) < 2:
        return None
    # The ratio of two means, linearised: Cochran, Sampling Techniques, 3rd edition, equation 6.13.
    rest = loss - weight * (loss.sum() / weight.sum())
    return float(np.sqrt(len(loss) * rest.var(ddof=1)) / weight.sum())


def _lines(values: Mapping[str, Any]) -> list[Line]:
    error = values["standard_error"]
    whole = f"{values['loss']:.4f}" + ("" if error is None else f" ± {error:.4f}")
    bins = values["by_noise"]
    each = [(f"noise {i / len(bins):.1f} to {(i + 1) / len(bins):.1f}", x) for i, x in enumerate(bins)]
    each += [(f"{name} {key}", x) for part, name in PARTS.items() for key, x in values[part].items()]
    lines = [("all", whole), *((label, f"{x:.4f}") for label, x in each if x is not None)]
    return [Line("loss", label, {"model": text}) for label, text in lines]


def draw(found: ClipLosses, groups: Mapping[str, Mapping[str, np.ndarray]]) -> np.ndarray:
    """Draw the loss against the noise level, of all clips and of each size and length, uint8 (H, W, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for panel, (part, name) in zip(figure.subplots(1, len(PARTS), sharey=True), PARTS.items(), strict=True):
        each = found.loss / np.maximum(found.weight, 1e-9)
        panel.plot(np.ravel(found.time), np.ravel(each), ".", color="0.8", markersize=3, label="a clip at a level")
        curves = {f"{name} {key}": own[:, None] for key, own in groups[part].items()} if len(groups[part]) > 1 else {}
        for number, (label, own) in enumerate(curves.items()):
            _curve(panel, loss_by_noise(found, own), color=f"C{number}", linewidth=1.2, label=label)
        _curve(panel, loss_by_noise(found), color="black", linewidth=2, label="all")
        panel.set(xlabel="noise level", xlim=(0, 1), title=f"loss by {'length' if part == 'by_frames' else name}")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=8)
    figure.axes[0].set_ylabel("loss")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _curve(panel: Any, bins: np.ndarray, **style: Any) -> None:
    known = ~np.isnan(bins)
    panel.plot(((np.arange(len(bins)) + 0.5) / len(bins))[known], bins[known], marker="o", markersize=3, **style)


LOSS = Metric(_check, _measure, LossOptions())
