"""The published results of Phyworld, a run's row among them, and the plot of error against FLOPs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sora_jax.files import replacing

# Velocity errors (in, out of distribution) by scenario, model and training clips: Kang et al. 2411.02385, read from the
# vector curves of their figure 3; six of them also stand in its text and agree.
PUBLISHED = {
    "uniform": {
        "S": {"30K": (0.0221, 0.435), "300K": (0.0184, 0.293), "3M": (0.0149, 0.287)},
        "B": {"30K": (0.0166, 0.433), "300K": (0.0148, 0.328), "3M": (0.0138, 0.358)},
        "L": {"30K": (0.0150, 0.378), "300K": (0.0140, 0.385), "3M": (0.0124, 0.427)},
    },
    "parabola": {
        "S": {"30K": (0.0509, 0.306), "300K": (0.0493, 0.285), "3M": (0.0472, 0.307)},
        "B": {"30K": (0.0430, 0.316), "300K": (0.0381, 0.376), "3M": (0.0358, 0.288)},
        "L": {"30K": (0.0379, 0.314), "300K": (0.0345, 0.351), "3M": (0.0331, 0.337)},
    },
    "collision": {
        "S": {"30K": (0.0267, 0.187), "300K": (0.0241, 0.200), "3M": (0.0227, 0.152)},
        "B": {"30K": (0.0302, 0.241), "300K": (0.0193, 0.166), "3M": (0.0181, 0.210)},
        "L": {"30K": (0.0240, 0.270), "300K": (0.0158, 0.172), "3M": (0.0153, 0.161)},
    },
}
# Of true clips, and of their reconstructions by the published autoencoder, through the published parser.
FLOORS = {"uniform": (0.0099, 0.0105), "parabola": (0.0210, 0.0212), "collision": (0.0117, 0.0131)}
# Of a run of 100,000 steps of 256 clips: arithmetic from the depth, width and tokens that the paper states.
PUBLISHED_FLOPS = {"S": 2.1e18, "B": 7.8e18, "L": 26e18}
HEADER = ("model", "clips", "PFLOP", "in", "out", "in, unbiased", "out, unbiased", "ball lost, in", "out")


class Row(NamedTuple):
    """A row of the table; errors in units of the world a second, shares of clips; None where they are not known."""

    name: str
    clips: str
    flops: float | None
    inside: float | None
    outside: float | None = None
    unbiased_inside: float | None = None
    unbiased_outside: float | None = None
    lost_inside: float | None = None
    lost_outside: float | None = None


def published_rows(scenario: str) -> list[Row]:
    """Return the published rows, and what true clips and reconstructions have."""
    true, reconstructed = FLOORS[scenario]
    rows = [Row("true clips, published", "", None, true), Row("their autoencoder", "", None, reconstructed)]
    for model, levels in PUBLISHED[scenario].items():
        rows += [Row(f"DiT-{model}, published", level, PUBLISHED_FLOPS[model], *both) for level, both in levels.items()]
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return the rows as text; FLOPs in units of 10^15."""
    lines: list[tuple[str, ...]] = [HEADER]
    for row in rows:
        flops = "" if row.flops is None else f"{row.flops / 1e15:,.{0 if row.flops > 1e17 else 3}f}"
        errors = ["" if error is None else f"{error:.4f}" for error in row[3:7]]
        lost = ["" if share is None else f"{share:.0%}" for share in row[7:]]
        lines.append((row.name, row.clips, flops, *errors, *lost))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def draw_plot(scenario: str, result: Mapping[str, Any], out: Path) -> None:
    """Plot the error against training FLOPs, in and out of distribution, ours as it falls, and save it to `out`.

    result: that of `benchmarks.phyworld`: `flops`, `in`, `out`, and `curve`, a list of {"flops", "in"}.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for side, (panel, name) in enumerate(zip(panels, ("in", "out"), strict=True)):
        for number, (model, levels) in enumerate(PUBLISHED[scenario].items()):
            errors = [both[side] for both in levels.values()]
            label = f"DiT-{model}, published: {', '.join(levels)} clips"
            panel.plot([PUBLISHED_FLOPS[model]] * len(errors), errors, "o", color=f"C{number + 1}", label=label)
        curve = [(point["flops"], point[name]) for point in result["curve"] if point.get(name)]
        if curve:
            clips = f", {result['curve_clips']} clips" if result.get("curve_clips") else ""
            panel.plot(*zip(*sorted(curve), strict=True), "-", color="C0", lw=1, label=f"this run on the way{clips}")
        panel.plot(result["flops"], result[name]["published"], "*", color="C0", ms=12, label="this run")
        if side == 0:
            panel.axhline(FLOORS[scenario][0], color="grey", linestyle=":", label="true clips, published")
        panel.set(
            xscale="log",
            yscale="log",
            xlabel="training FLOPs",
            ylabel="error of the velocity, frame widths / 10 a second",
        )
        panel.set_title(f"{scenario}: {name} of distribution" if name == "out" else f"{scenario}: in distribution")
        panel.legend(frameon=False, fontsize=7)
    with replacing(out) as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot.close(figure)
