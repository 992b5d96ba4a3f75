"""Estimate at how many FLOPs a larger rung of the ladder overtakes a smaller one, from the points kept here.

    python experiments/scaling/crossing.py

Fits the held-out loss of each rung by a + b C^-c, C the TFLOPs of training, to the points after the warm-up. Two fits
cross where the larger rung becomes the better one. The intervals are of a bootstrap: residuals of all rungs are drawn
onto each fit, and the fits are made anew. How far such fits can be trusted is measured by fits without the last point
of a rung, which predict it. Prints the tables of README.md and draws crossing.png.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from draw import HERE, by_rung, look

PAIRS = (("XS/9", "S/9"), ("S/9", "M/9"), ("M/9", "L/9"), ("XS/3", "S/3"), ("S/3", "M/3"), ("XS/1", "S/1"))
FIRST = 200  # step: the rate rises over 100 steps, and the averages forget the beginning over 200
EXPONENTS = np.geomspace(0.02, 4.0, 200)
DRAWS = 1000
FAR = 100.0  # times the most FLOPs of both rungs: what would cross later does not cross
GRID = 1000
AHEAD = 4.0  # times its last point, how far a fit is drawn


def law(log_flops: np.ndarray, abc: np.ndarray) -> np.ndarray:
    """Return a + b C^-c of log C (n), for (a, b, c) with any leading axes: (..., n)."""
    a, b, c = (abc[..., i, None] for i in range(3))
    return a + b * np.exp(-c * log_flops)


def fit(log_flops: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Return (..., 3), the (a, b, c) with a >= 0 of the least relative squares: log C (n), loss (..., n).

    For each of EXPONENTS the fit is linear in a and b.
    """
    u, w = np.exp(-EXPONENTS[:, None] * log_flops), 1.0 / loss[..., None, :]  # (k, n), (..., 1, n)
    aa, ab, bb = (np.sum(w**2 * x, axis=-1) for x in (np.ones_like(u), u, u**2))
    ya, yb = np.sum(w * np.ones_like(u), axis=-1), np.sum(w * u, axis=-1)
    a = np.maximum((ya * bb - yb * ab) / (aa * bb - ab**2), 0.0)
    b = (yb - a * ab) / bb
    squares = np.sum((w * (a[..., None] + b[..., None] * u) - 1.0) ** 2, axis=-1)
    best = np.argmin(squares, axis=-1)[..., None]
    found = (np.take_along_axis(x, best, axis=-1)[..., 0] for x in (a, b))
    return np.stack([*found, EXPONENTS[best[..., 0]]], axis=-1)


def course(points: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Return log C in TFLOPs and the loss of the points after the warm-up, by step."""
    kept = sorted((p for p in points if p["step"] >= FIRST), key=lambda p: p["step"])
    return np.log([p["flops"] / 1e12 for p in kept]), np.array([p["loss"] for p in kept])


def residuals(courses: dict) -> np.ndarray:
    """Return the logarithms of loss over fit of all rungs, scaled for the three numbers that a fit takes away."""
    found = []
    for x, y in courses.values():
        if len(x) > 3:
            found.append(np.log(y / law(x, fit(x, y))) * np.sqrt(len(x) / (len(x) - 3)))
    return np.concatenate(found)


def crossing(small: np.ndarray, large: np.ndarray, span: tuple[float, float]) -> np.ndarray:
    """Return the TFLOPs at which fits (..., 3) of the larger rung fall below the smaller's, inf if not in `span`."""
    grid = np.linspace(*span, GRID)
    lower = law(grid, large) < law(grid, small)
    return np.where(lower.any(-1), np.exp(grid[np.argmax(lower, axis=-1)]), np.inf)


def compare(courses: dict, small: str, large: str) -> dict:
    """Return the crossing of two rungs, its interval, and how many of the bootstrap's draws cross."""
    generator, pool = np.random.default_rng(0), residuals(courses)
    ends, fits, draws = [], [], []
    for name in (small, large):
        x, y = courses[name]
        best = fit(x, y)
        ends.append((x[0], x[-1]))
        fits.append(best)
        draws.append(fit(x, law(x, best) * np.exp(generator.choice(pool, (DRAWS, len(x))))))
    span = (max(first for first, _ in ends), max(last for _, last in ends) + np.log(FAR))
    found = crossing(*draws, span)
    low, high = np.quantile(found, (0.16, 0.84), method="nearest")
    both = np.exp(min(last for _, last in ends))
    return {
        "both": both,
        "at": float(crossing(*fits, span)),
        "low": low,
        "high": high,
        "share": np.mean(found < np.inf),
    }


def tflops(value: float) -> str:
    return "later or never" if np.isinf(value) else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def tables(courses: dict) -> str:
    lines = ["| rung | points | up to TFLOPs | a | b | c | last point against its prediction |", "|" + "---|" * 7]
    for name, (x, y) in courses.items():
        a, b, c = fit(x, y)
        off = f"{y[-1] / law(x[-1:], fit(x[:-1], y[:-1]))[0] - 1:+.1%}" if len(x) > 4 else ""
        lines.append(f"| {name} | {len(x)} | {np.exp(x[-1]):.1f} | {a:.3f} | {b:.3f} | {c:.2f} | {off} |")
    lines += ["", "| smaller | larger | both measured up to | crossing, TFLOPs | middle 68 % | draws that cross |"]
    lines.append("|" + "---|" * 6)
    for small, large in PAIRS:
        r = compare(courses, small, large)
        interval = f"{tflops(r['low'])} to {tflops(r['high'])}"
        row = (small, large, f"{r['both']:.1f}", tflops(r["at"]), interval, f"{r['share']:.0%}")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def draw(courses: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(14, 4.5), sharey=True, layout="constrained")
    for panel, places in zip(panels, (9, 3, 1), strict=True):
        for name, (x, y) in courses.items():
            if not name.endswith(f"/{places}"):
                continue
            style, abc = look(name), fit(x, y)
            ahead = np.linspace(x[0], x[-1] + np.log(AHEAD), 200)
            label = "{}: {:.2f} + {:.2f} C^-{:.2f}".format(name, *abc)
            panel.plot(np.exp(x), y, linestyle="", markersize=5, label=label, **style)
            panel.plot(np.exp(ahead), law(ahead, abc), linewidth=1, color=style["color"])
        panel.set(title=f"tokens of {places} places", xlabel="C, TFLOPs of training", xscale="log", yscale="log")
        panel.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("held-out loss")
    panels[0].set_yticks((0.2, 0.3, 0.4, 0.6, 0.8), ("0.2", "0.3", "0.4", "0.6", "0.8"))
    panels[0].tick_params(axis="y", which="minor", left=False)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=Path, default=HERE / "points.jsonl", help="of this ladder, or of another one")
    parser.add_argument("--out", type=Path, default=HERE / "crossing.png")
    options = parser.parse_args()
    points = [json.loads(line) for line in options.points.read_text().splitlines()]
    courses = {name: course(found) for name, found in by_rung(points).items()}
    print(tables(courses))
    draw(courses, options.out)


if __name__ == "__main__":
    main()
