"""Parse the command `curves`: draw the metrics of runs."""

import argparse

from sora_jax.files import as_path
from sora_jax.parsers.base import add_json, make_parser

EXAMPLE = (
    "examples:\n  sora-jax curves runs/video\n"
    "  sora-jax curves runs/a runs/b --metrics=loss,held_out/loss --out=both.png"
)


def add_curves(commands) -> None:
    """Add the command `curves`."""
    about = "draw the metrics of runs against their steps, and print the last values"
    p = make_parser(commands.add_parser, "curves", help=about, epilog=EXAMPLE)
    p.add_argument("runs", metavar="RUN", nargs="+", type=as_path, help="run folders")
    about = "picture to write, .png, .pdf or .svg (default: RUN/curves.png; of several runs curves.png)"
    p.add_argument("--out", type=as_path, help=about)
    about = "metrics of metrics.jsonl, a panel for each, or what several begin with (default: all that matter)"
    p.add_argument("--metrics", default="", metavar="NAMES", help=about)
    add_json(p)
    p.set_defaults(function=curves)


def curves(options: argparse.Namespace) -> None:
    """Draw the metrics and print a table of the last values."""
    from sora_jax import console
    from sora_jax.evaluate.curves import draw_curves, last_values, read_runs, table

    runs = read_runs(options.runs)
    out = options.out or (options.runs[0] / "curves.png" if len(runs) == 1 else as_path("curves.png"))
    draw_curves(runs, out, tuple(filter(None, options.metrics.split(","))))
    console.result(last_values(runs), f"{table(runs)}\n{out}")
