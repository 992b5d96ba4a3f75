"""Tables and plot of what train.py has measured.

    python experiments/unet/draw.py --world=runs/unet_world --sprites=runs/unet_sprites

Gathers found.json of all folders into points.jsonl beside this file, prints the tables of README.md from it and draws
unet.png. Without folders it draws the points that are there.
"""

import argparse
import json
from pathlib import Path

HERE = Path(__file__).parent
LOOKS = {"transformer": ("tab:blue", "o"), "unet": ("tab:orange", "s")}
RUNGS = ("XS", "S", "M", "L")
IDENTITY = "identity_by_frame"
# Of the world, then of sprites: what is shown, under which heading of `found`, and its name there.
COLUMNS = {
    "world": [
        ("agreement", "held-out", "all"),
        ("kind", "held-out", "kind"),
        ("motion", "held-out", "motion"),
        ("identity", "held-out", IDENTITY),
        ("shapes", "held-out", "shape"),
    ],
    "sprites": [
        ("all seven", "held-out", "all seven"),
        ("colours", "held-out", "colours"),
        ("action", "held-out", "action"),
        ("direction", "held-out", "direction"),
    ],
}
DURATIONS = ("5 frames", "9 frames", "13 frames", "17 frames")
SIZES = ("24 x 36", "36 x 24", "36 x 36", "24 x 48")


def gather(folders: dict[str, Path]) -> list[dict]:
    """Return what was measured of all runs, each with the name of its world."""
    points = []
    for world, folder in folders.items():
        for path in sorted(folder.glob("*/found.json")):
            points.append({"world": world} | json.loads(path.read_text()))
    return sorted(points, key=lambda p: (p["world"], RUNGS.index(p["rung"]), p["network"]))


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def rate(point: dict, group: str, name: str) -> float | None:
    return point["found"].get(group, {}).get(name)


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def rungs_table(points: list[dict], world: str) -> str:
    """Return the table of all rungs of a world: sizes, training, loss, and rates for held-out prompts."""
    names = [name for name, _, _ in COLUMNS[world]]
    lines = [row(["rung", "network", "parameters", "MFLOPs a clip", "steps", "TFLOPs", "held-out loss", *names])]
    lines.append("|" + "---|" * (7 + len(names)))
    for p in (p for p in points if p["world"] == world):
        cells = [p["rung"], p["network"], f"{p['parameters'] / 1e6:.2f} M", f"{p['forward_flops_per_clip'] / 1e6:.0f}"]
        cells += [str(p["steps"]), f"{p['steps'] * p['flops'] / 1e12:.2f}", f"{p['held_out_loss']:.4f}"]
        lines.append(row(cells + [shown(rate(p, group, name)) for _, group, name in COLUMNS[world]]))
    return "\n".join(lines)


def lengths_table(points: list[dict], name: str) -> str:
    """Return a rate of the world for durations and sizes, of which the last two of each were never trained."""
    lines = [row(["rung", "network", *DURATIONS, *SIZES]), "|" + "---|" * (2 + len(DURATIONS) + len(SIZES))]
    for p in (p for p in points if p["world"] == "world"):
        lines.append(row([p["rung"], p["network"], *(shown(rate(p, group, name)) for group in (*DURATIONS, *SIZES))]))
    return "\n".join(lines)


def draw(points: list[dict], path: Path) -> None:
    """Draw rates over the FLOPs of training, and those of the largest rung for each duration and size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(14, 8), layout="constrained")
    world, sprites = ([p for p in points if p["world"] == name] for name in COLUMNS)
    course(panels[0, 0], world, "world: held-out loss", lambda p: p["held_out_loss"])
    course(panels[0, 1], world, "world: everything right", lambda p: rate(p, "held-out", "all"))
    if sprites:
        course(panels[0, 2], sprites, "sprites: everything right", lambda p: rate(p, "held-out", "all seven"))
    else:
        course(panels[0, 2], world, "world: identity from frame to frame", lambda p: rate(p, "held-out", IDENTITY))
    largest = [p for p in world if RUNGS.index(p["rung"]) == max(RUNGS.index(p["rung"]) for p in world)]
    compare(panels[1, 0], largest, DURATIONS, {"everything right": "all"})
    compare(panels[1, 1], largest, DURATIONS, {"identity": IDENTITY, "shapes": "shape"})
    compare(panels[1, 2], largest, SIZES, {"everything right": "all", "identity": IDENTITY})
    panels[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def course(panel, points: list[dict], title: str, value) -> None:
    """Draw a value over the FLOPs of training, a line for each network and a point for each rung."""
    for network, (colour, marker) in LOOKS.items():
        own = [p for p in points if p["network"] == network and value(p) is not None]
        x, y = [p["steps"] * p["flops"] / 1e12 for p in own], [value(p) for p in own]
        panel.plot(x, y, color=colour, marker=marker, label=network)
        for p, *place in zip(own, x, y, strict=True):
            panel.annotate(p["rung"], place, xytext=(5, 4), textcoords="offset points", fontsize=8)
    panel.set(title=title, xlabel="TFLOPs of training", xscale="log")
    panel.xaxis.set_minor_formatter("")


def compare(panel, points: list[dict], groups: tuple[str, ...], names: dict[str, str]) -> None:
    """Draw rates for each duration or size, of which the last two were never trained."""
    for p in points:
        colour, marker = LOOKS[p["network"]]
        for (label, name), line in zip(names.items(), ("-", "--"), strict=False):
            values = [value if (value := rate(p, group, name)) is not None else float("nan") for group in groups]
            panel.plot(values, line, color=colour, marker=marker, label=f"{p['network']}: {label}")
    rung = points[0]["rung"] if points else ""
    panel.axvspan(1.5, 3.3, color="0.93", zorder=0)
    panel.set(title=f"world, rung {rung} (grey: never trained)", ylim=(-0.03, 1.03))
    panel.set_xticks(range(len(groups)), groups)
    panel.legend(frameon=False, fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, default=None)
    parser.add_argument("--sprites", type=Path, default=None)
    parser.add_argument("--picture", type=Path, default=HERE / "unet.png")
    options = parser.parse_args()
    kept = HERE / "points.jsonl"
    folders = {name: path for name in COLUMNS if (path := getattr(options, name))}
    if folders:
        kept.write_text("".join(json.dumps(point) + "\n" for point in gather(folders)))
    points = [json.loads(line) for line in kept.read_text().splitlines()]
    for world in COLUMNS:
        if any(p["world"] == world for p in points):
            print(f"{world}\n\n{rungs_table(points, world)}\n")
    for name in ("all", IDENTITY, "shape"):
        print(f"the world, {name}\n\n{lengths_table(points, name)}\n")
    draw(points, options.picture)


if __name__ == "__main__":
    main()
