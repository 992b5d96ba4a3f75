"""Parse and run `sora-jax bench`: benchmarks with published tables."""

import argparse

from sora_jax.files import as_path
from sora_jax.parsers.base import CONFIG, add_json, make_parser
from sora_jax.parsers.fields import list_fields

ABOUT = "train and measure on a benchmark, and put the result among the published ones"
PHYWORLD = "predict balls that move by a law of mechanics (Phyworld, Kang et al. 2411.02385)"


def add_bench(commands) -> None:
    """Add the command `bench` with a verb for each benchmark."""
    example = "example:\n  sora-jax bench phyworld --scenario=uniform --workdir=runs/phyworld/uniform"
    p = make_parser(commands.add_parser, "bench", help=ABOUT, epilog=example)
    verbs = p.add_subparsers(title="benchmarks", required=True, metavar="phyworld")
    example += "\n  sora-jax bench phyworld --scenario=collision --level=300K --workdir=runs/phyworld/collision"
    p = make_parser(verbs.add_parser, "phyworld", help=PHYWORLD, epilog=example)
    p.add_argument("--scenario", help="uniform, parabola or collision (default: that of the config, uniform)")
    p.add_argument("--size", type=int, help="height and width of the frames in pixels (default: that of the config)")
    p.add_argument("--level", help="training clips: 30K, 300K or 3M (default: that of the config, 30K)")
    p.add_argument("--workdir", type=as_path, required=True, help="folder for all outputs; a run found there goes on")
    p.add_argument("--config", metavar="FILE[:VARIANT]", help=f"{CONFIG} (default: configs/phyworld.py)")
    add_json(p)
    list_fields(p, usual="configs/phyworld.py")
    p.set_defaults(function=phyworld, changes=[])


def phyworld(options: argparse.Namespace) -> None:
    """Run the benchmark of Phyworld."""
    from sora_jax.benchmarks import phyworld as program

    world = {name: getattr(options, name) for name in ("scenario", "size", "level")}
    given = {name: value for name, value in world.items() if value is not None}
    program.main(options.config, options.changes, given, options.workdir)
