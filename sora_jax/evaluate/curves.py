"""Plot the loss curves of runs."""

from pathlib import Path
from typing import Any

from sora_jax.files import as_path, replacing
from sora_jax.train.metrics import read_metrics


def draw_losses(runs: dict[str, Path], out: Path) -> None:
    """Plot the loss of each run by name against steps, also by noise level if it is reported, and save it to `out`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(runs), figsize=(5 * len(runs), 3.6), squeeze=False, layout="constrained")
    for panel, (name, run) in zip(panels[0], runs.items(), strict=True):
        rows = read_metrics(run)
        _draw(panel, name, rows)
    with replacing(as_path(out)) as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot.close(figure)


def _draw(panel: Any, name: str, rows: list[dict]) -> None:
    """Plot the rows of one run on the axes `panel`."""
    steps = [row["step"] for row in rows]
    levels = sorted({key for row in rows for key in row if key.startswith("loss_by_noise/")}, key=lambda k: int(k[14:]))
    for i, level in enumerate(levels):
        shade = str(0.85 - 0.5 * i / max(len(levels) - 1, 1))
        # A level without tokens in a batch is reported as 0 or None, which a logarithmic axis cannot show.
        drawn = [(row["step"], row[level]) for row in rows if row.get(level)]
        panel.plot(*zip(*drawn), color=shade, linewidth=0.8)
    panel.plot(steps, [row["loss"] for row in rows], color="tab:blue", label="all" if levels else "loss")
    if levels:
        panel.plot([], [], color="0.6", label="by noise level (dark = noisy)")
    panel.set(title=name, xlabel="step", ylabel="loss", yscale="log")
    panel.legend(frameon=False, fontsize=8)
