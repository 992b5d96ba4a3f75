"""Draw what runs have reported: curves of their metrics, and a table of the last values."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax.config import check, choose, did_you_mean
from sora_jax.files import as_path, replacing
from sora_jax.train.exported import run_inside
from sora_jax.train.metrics import read_metrics

Rows = list[dict]
HELD_OUT = "held_out/"
NOISE = "loss by noise level"
# Panels by title: the metrics in them, and if the axis is logarithmic. What no run reports is left out.
PANELS: dict[str, tuple[tuple[str, ...], bool]] = {
    "loss": (("loss", "held_out/loss"), True),
    "PSNR of held-out clips (dB)": (("held_out/psnr",), False),
    NOISE: (("loss_by_noise", "held_out/by_noise"), False),
    "held-out loss by size": (("held_out/by_size",), False),
    "held-out loss by frames": (("held_out/by_frames",), False),
    "gradient norm": (("gradient_norm",), True),
    "learning rate": (("learning_rate",), False),
    "clips a second": (("clips_per_second",), False),
    "padding share": (("padding_share",), False),
}
SHOWN = ("loss", "held_out/loss", "held_out/psnr", "gradient_norm", "learning_rate", "clips_per_second")  # of the table
RECENT = 0.1  # share of the reports that a loss by noise level is the mean of
SMOOTH = 20  # one in so many reports is half the window of a smoothed curve
EXACT = ("learning_rate", HELD_OUT)  # beginnings of metrics without noise, which are not smoothed
COLUMNS = 3


def draw_losses(runs: Mapping[str, Path], out: Path) -> None:
    """Plot the loss of each run by name in a panel of its own, and save the figure to `out`."""
    figure, panels = _figure(1, len(runs))
    for panel, (name, run) in zip(panels, runs.items(), strict=True):
        _draw(panel, {name: read_metrics(run)}, *PANELS["loss"])
        panel.set_title(name)
    _save(figure, out)


def read_runs(folders: Sequence[Path]) -> dict[str, Rows]:
    """Read the reports of runs, by folder; UserError where a folder has none."""
    runs = {str(folder): read_metrics(folder) for folder in folders}
    for name, rows in runs.items():
        stages = sorted(str(entry) for entry in as_path(name).glob("stage_*")) if not rows else []
        usual = f"; it must be a run folder that has trained{run_inside(name)}"
        way_out = f": give its stages, {' '.join(stages)}" if stages else usual
        check(rows, f"RUN is {name!r}; there is no report in its metrics.jsonl{way_out}")
    return runs


def draw_curves(runs: Mapping[str, Rows], out: Path, metrics: Sequence[str] = ()) -> None:
    """Plot the metrics of runs, by name, and save the figure to `out`.

    metrics: a panel for each, by its name, or the beginning of several ("held_out/by_size"); () for all of `PANELS`.
    """
    known = sorted({key for rows in runs.values() for row in rows for key in row if key != "step"})
    for metric in metrics:
        there = any(_is_of(key, metric) for key in known)
        check(there, f"--metrics is {','.join(metrics)!r}; no run reports {metric!r}{did_you_mean(metric, known)}")
    chosen = {metric: ((metric,), "loss" in metric or "norm" in metric) for metric in metrics} or PANELS
    shown = {t: panel for t, panel in chosen.items() if any(_is_of(key, name) for key in known for name in panel[0])}
    columns = min(COLUMNS, len(shown))
    figure, panels = _figure(-(-len(shown) // columns), columns)
    for panel, (title, (names, logarithmic)) in zip(panels, shown.items(), strict=False):
        (_draw_noise if title == NOISE else _draw)(panel, runs, names, logarithmic)
        panel.set_title(title)
    for panel in panels[len(shown) :]:
        panel.axis("off")
    _save(figure, out)


def last_values(runs: Mapping[str, Rows]) -> list[dict[str, Any]]:
    """Return the last value of every metric of each run, its last step, and the seconds that it took."""
    found = []
    for name, rows in runs.items():
        values: dict[str, Any] = {}
        for row in rows:
            values |= {key: value for key, value in row.items() if value is not None}
        seconds = sum(value for key, value in values.items() if key.startswith("seconds/"))
        found.append({"run": name, "step": rows[-1]["step"], "seconds": seconds} | values)
    return found


def table(runs: Mapping[str, Rows]) -> str:
    """Return a table of the last values."""
    values = last_values(runs)
    names = [name for name in SHOWN if any(name in each for each in values)]
    lines = [["run", "step", "minutes", *names]]
    for each in values:
        numbers = [f"{each[name]:.4g}" if name in each else "-" for name in names]
        lines.append([each["run"], f"{each['step']:,}", f"{each['seconds'] / 60:.1f}", *numbers])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the centred running mean of values; at the ends the window is as wide as fits on both sides."""
    half, sums = len(values) // SMOOTH, np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    reach = np.minimum(half, np.minimum(places, places[::-1]))
    return (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)


def _is_of(key: str, metric: str) -> bool:
    return key == metric or key.startswith(f"{metric}/")


def _keys(rows: Rows, metric: str) -> list[str]:
    """Return the metric itself if it is reported, else those that begin with its name."""
    found = list(dict.fromkeys(key for row in rows for key in row if _is_of(key, metric)))
    return [metric] if metric in found else sorted(found, key=_order)


def _order(key: str) -> tuple:
    return tuple(int(part) if part.isdigit() else 0 for part in key.rpartition("/")[2].split("x")), key


def _points(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values of a metric, without reports in which it is not a number."""
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return np.array([step for step, _ in points]), np.array([value for _, value in points], float)


def _draw(panel: Any, runs: Mapping[str, Rows], names: Sequence[str], logarithmic: bool) -> None:
    """Plot metrics against steps, held-out ones dashed; a colour for each run or, for a single one, each metric."""
    keys = [(run, key) for run, rows in runs.items() for name in names for key in _keys(rows, name)]
    curves = [(run, key, *_points(runs[run], key)) for run, key in keys]
    several = len(runs) > 1
    colours: dict[str, str] = {}
    for run, key, steps, values in curves:
        colour = colours.setdefault(run if several else key, f"C{len(colours) % 10}")
        held_out = key.startswith(HELD_OUT)
        style: dict[str, Any] = {"linestyle": "--", "marker": "o", "markersize": 3} if held_out else {}
        own = next(name for name in names if _is_of(key, name))
        short = key.removeprefix(f"{own}/") if len(names) == 1 else key
        label = ", ".join([*([run] if several else []), *([short] if len(keys) > len(runs) else [])])
        if not key.startswith(EXACT) and len(values) > SMOOTH:
            panel.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            values = smooth(values)
        panel.plot(steps, values, color=colour, label=label, linewidth=1.4, **style)
    positive = all((values > 0).all() for *_, values in curves)
    panel.set(xlabel="step", yscale="log" if logarithmic and positive else "linear")
    if len(curves) > 1:
        panel.legend(frameon=False, fontsize=7)


def _draw_noise(panel: Any, runs: Mapping[str, Rows], names: Sequence[str], logarithmic: bool) -> None:
    """Plot losses against the noise level: means of the last reports; held-out ones dashed."""
    for number, (run, rows) in enumerate(runs.items()):
        recent = rows[-max(1, round(RECENT * len(rows))) :]
        for name in names:
            keys = _keys(rows, name)
            held_out = name.startswith(HELD_OUT)
            means = [_points(rows if held_out else recent, key)[1] for key in keys]
            points = [((i + 0.5) / len(keys), v[-1] if held_out else v.mean()) for i, v in enumerate(means) if len(v)]
            label = ", ".join([*([run] if len(runs) > 1 else []), "held out" if held_out else "training"])
            if points:
                panel.plot(
                    *zip(*points, strict=True), "o--" if held_out else "o-", color=f"C{number}", ms=3, label=label
                )
    panel.set(xlabel="noise level", xlim=(0, 1))
    panel.legend(frameon=False, fontsize=7)


def _figure(rows: int, columns: int) -> tuple[Any, list]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (5 * columns, 3.4 * rows)
    figure, panels = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    return figure, list(panels.flat)


def _save(figure: Any, out: Path) -> None:
    from matplotlib import pyplot

    kinds = {name: name for name in figure.canvas.get_supported_filetypes()}
    choose("the ending of --out", as_path(out).suffix.removeprefix("."), kinds)
    with replacing(as_path(out)) as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot.close(figure)
