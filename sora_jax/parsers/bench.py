"""Parse and run `sora-jax bench`: benchmarks with published tables."""

import argparse
import dataclasses

from sora_jax.files import as_path
from sora_jax.parsers.base import CONFIG, add_json, make_parser
from sora_jax.parsers.fields import list_fields

ABOUT = "train and evaluate from nothing on a benchmark, and print its published table with the result in it"


def add_bench(commands) -> None:
    """Add the command `bench` with its benchmarks."""
    example = (
        "examples:\n  sora-jax bench phyworld --scenario=uniform --workdir=runs/phyworld/uniform\n"
        "  sora-jax bench moving_mnist --digits=mnist --workdir=runs/moving_mnist"
    )
    p = make_parser(commands.add_parser, "bench", help=ABOUT, epilog=example)
    benchmarks = p.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK")
    _phyworld(benchmarks)
    _moving_mnist(benchmarks)


def _phyworld(benchmarks) -> None:
    example = (
        "examples:\n  sora-jax bench phyworld --scenario=uniform --workdir=runs/phyworld/uniform\n"
        "  sora-jax bench phyworld --scenario=collision --level=300K --workdir=runs/phyworld/collision"
    )
    about = "Phyworld: balls that move by a law of mechanics, beside the table of Kang et al. 2411.02385"
    p = make_parser(benchmarks.add_parser, "phyworld", help=about, epilog=example)
    p.add_argument("--scenario", help="uniform, parabola or collision (default: that of the config, uniform)")
    p.add_argument("--size", type=int, help="height and width of the frames in pixels (default: that of the config)")
    p.add_argument("--level", help="training clips: 30K, 300K or 3M (default: that of the config, 30K)")
    p.add_argument("--workdir", type=as_path, required=True, help="folder for all outputs; a run found there goes on")
    p.add_argument("--config", metavar="FILE[:VARIANT]", help=f"{CONFIG} (default: configs/phyworld.py)")
    add_json(p)
    list_fields(p, usual="configs/phyworld.py")
    p.set_defaults(function=phyworld, changes=[])


def phyworld(options: argparse.Namespace) -> None:
    """Train and evaluate on Phyworld."""
    from sora_jax.benchmarks import phyworld as program

    world = {name: getattr(options, name) for name in ("scenario", "size", "level")}
    given = {name: value for name, value in world.items() if value is not None}
    program.main(options.config, options.changes, given, options.workdir)


def _moving_mnist(benchmarks) -> None:
    example = (
        "examples:\n  sora-jax bench moving_mnist --digits=mnist --workdir=runs/moving_mnist\n"
        "  sora-jax bench moving_mnist --digits=mnist --config=configs/moving_mnist.py:stochastic --workdir=runs/random"
    )
    about = "Moving MNIST: the frames that follow ten given ones, beside OpenSTL's table"
    p = make_parser(benchmarks.add_parser, "moving_mnist", help=about, epilog=example)
    usual = "configs/moving_mnist.py"
    p.add_argument("--workdir", type=as_path, default=as_path("runs/moving_mnist"), help="folder of the run and report")
    p.add_argument("--digits", default="", metavar="PATH", help="folder with the idx files of MNIST, or tfds:mnist")
    p.add_argument("--config", metavar="FILE[:VARIANT]", help=f"{CONFIG} (default: {usual})")
    p.add_argument("--clips", type=int, default=1000, help="held-out clips that are predicted")
    p.add_argument("--sampled", type=int, help="the first of them, of which clips are sampled, too (default: 32)")
    p.add_argument("--samples", type=int, default=8, help="clips that are sampled of each")
    about = "clips of each set of the Frechet distance, for which a classifier is trained; 0: none (default: 256)"
    p.add_argument("--frechet", type=int, help=about)
    p.add_argument("--seed", type=int, default=1, help="seed of the noise of the evaluation")
    add_json(p)
    list_fields(p, usual=usual)
    p.set_defaults(function=moving_mnist, changes=[])


def moving_mnist(options: argparse.Namespace) -> None:
    """Train and evaluate on Moving MNIST."""
    from sora_jax.benchmarks.moving_mnist import Options, main

    names = [field.name for field in dataclasses.fields(Options)]
    usual = {"sampled": min(Options.sampled, options.clips), "frechet": min(Options.frechet, options.clips)}
    usual |= {"frechet": 0} if options.clips < 2 else {}
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    chosen = Options(**usual | given)
    main(options.config, options.changes, options.digits, options.workdir, chosen)
