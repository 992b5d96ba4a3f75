"""Table and plot of the ladder that train_ladder.py has trained.

    python experiments/scaling/draw.py --out=runs/scaling

Gathers OUT/*/rung.json and points.jsonl into points.jsonl beside this file, prints the tables of README.md from it and
draws scaling.png. Without --out it draws the points that are there.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SIZES, PLACES = ("XS", "S", "M", "L"), (9, 3, 1)
LABELS = {"loss": "held-out loss", "agreement": "prompts right, %"}


def gather(out: Path) -> list[dict]:
    """All measurements, each with what its rung is; of a step measured twice the later one."""
    points = {}
    for folder in sorted(path.parent for path in out.glob("*/points.jsonl")):
        rung = json.loads((folder / "rung.json").read_text())
        about = {
            "rung": rung["rung"],
            "parameters": rung["parameters"],
            "tokens_per_clip": rung["tokens"] / rung["clips"],
            "forward_flops_per_clip": rung["flops"] / rung["clips"] / 3,
        }
        for line in (folder / "points.jsonl").read_text().splitlines():
            point = json.loads(line)
            points[rung["rung"], point["step"]] = about | point
    return sorted(points.values(), key=lambda p: (p["forward_flops_per_clip"], p["step"]))


def by_rung(points: list[dict]) -> dict[str, list[dict]]:
    found = {}
    for point in points:
        found.setdefault(point["rung"], []).append(point)
    return found


def at_steps(rungs: dict, steps: int) -> list[dict]:
    """Every rung after so many steps, as far as it has come there."""
    return [point for points in rungs.values() for point in points if point["step"] == steps]


def at_flops(rungs: dict, flops: float) -> list[dict]:
    """Of every rung the measurement that is nearest to the budget, within 5 %."""
    found = []
    for points in rungs.values():
        near = min(points, key=lambda p: abs(math.log(p["flops"] / flops)))
        if abs(math.log(near["flops"] / flops)) < math.log(1.05):
            found.append(near)
    return found


def table(points: list[dict]) -> str:
    lines = [
        "| rung | parameters | tokens per clip | MFLOPs per clip, forward | steps | TFLOPs of training | held-out loss "
        "| agreement | colour | kind | motion |",
        "|" + "---|" * 11,
    ]
    for p in points:
        rates = " | ".join(f"{p[name]:.0%}" if name in p else "" for name in ("agreement", "colour", "kind", "motion"))
        size = f"{p['parameters'] / 1e6:.2f} M | {p['tokens_per_clip']:.0f} | {p['forward_flops_per_clip'] / 1e6:.0f}"
        lines.append(f"| {p['rung']} | {size} | {p['step']} | {p['flops'] / 1e12:.2f} | {p['loss']:.4f} | {rates} |")
    return "\n".join(lines)


def correlation(points: list[dict], of: str, value: str = "loss") -> float:
    """Of the logarithm of `of` with `value`, over points."""
    return float(np.corrcoef([math.log(p[of]) for p in points], [p[value] for p in points])[0, 1])


def draw(rungs: dict, steps: int, budget: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    values = ("loss", "agreement") if sum("agreement" in points[-1] for points in rungs.values()) > 2 else ("loss",)
    size = {"figsize": (14, 4 * len(values)), "squeeze": False, "layout": "constrained"}
    figure, panels = pyplot.subplots(len(values), 3, **size)
    forward = "MFLOPs per clip, forward"
    for row, value in zip(panels, values, strict=True):
        scatter(row[0], at_steps(rungs, steps), value)
        row[0].set(title=f"every rung after {steps} steps", xlabel=forward, xscale="log", ylabel=LABELS[value])
        scatter(row[1], at_flops(rungs, budget), value)
        row[1].set(title=f"every rung after {budget / 1e12:.2f} TFLOPs", xlabel=forward, xscale="log")
        courses(row[2], rungs, value)
        row[2].set(title="along the training", xlabel="TFLOPs of training", xscale="log")
        for panel in row:
            panel.margins(x=0.12, y=0.08)
    panels[0, 2].legend(frameon=False, fontsize=8, ncols=2)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def look(rung: str) -> dict:
    """Colour by size, marker by patch."""
    size, places = rung.split("/")
    colours = dict(zip(SIZES, ("tab:green", "tab:orange", "tab:blue", "tab:red"), strict=True))
    return {"color": colours[size], "marker": dict(zip(PLACES, "os^", strict=True))[int(places)]}


def scale(value: str) -> float:
    return 100.0 if value == "agreement" else 1.0


def scatter(panel, points: list[dict], value: str) -> None:
    for p in points:
        if value in p:
            x, y = p["forward_flops_per_clip"] / 1e6, scale(value) * p[value]
            panel.plot([x], [y], linestyle="", **look(p["rung"]))
            panel.annotate(p["rung"], (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)


def courses(panel, rungs: dict, value: str) -> None:
    for name, points in rungs.items():
        drawn = [(p["flops"] / 1e12, scale(value) * p[value]) for p in points if value in p]
        panel.plot(*zip(*drawn), label=name, linewidth=1, markersize=4, **look(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--reference", default="M/9", help="the rung whose FLOPs at --steps are the budget")
    options = parser.parse_args()
    kept = HERE / "points.jsonl"
    if options.out:
        kept.write_text("".join(json.dumps(point) + "\n" for point in gather(options.out)))
    rungs = by_rung([json.loads(line) for line in kept.read_text().splitlines()])
    (reference,) = (p for p in rungs[options.reference] if p["step"] == options.steps)
    tables = {
        f"after {options.steps} steps": at_steps(rungs, options.steps),
        f"after {reference['flops'] / 1e12:.2f} TFLOPs": at_flops(rungs, reference["flops"]),
    }
    for title, points in tables.items():
        print(f"{title}\n\n{table(points)}\n")
        for of in ("forward_flops_per_clip", "parameters", "tokens_per_clip", "flops"):
            if len(points) > 2:
                print(f"correlation of the loss with log {of}: {correlation(points, of):.2f}")
        print()
    draw(rungs, options.steps, reference["flops"], HERE / "scaling.png")


if __name__ == "__main__":
    main()
