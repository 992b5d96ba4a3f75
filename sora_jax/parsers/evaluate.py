"""Parse and run `sora-jax evaluate`: of a denoiser's run, or of an autoencoder's."""

import argparse
from typing import Any

from sora_jax import console
from sora_jax.errors import UserError
from sora_jax.files import as_path
from sora_jax.parsers.base import add_json, add_tiles, make_parser

EXAMPLE = (
    "examples:\n  sora-jax evaluate runs/video --data=data/clips --count=64\n"
    "  sora-jax evaluate --autoencoder=runs/autoencoder --data=data/clips"
)
ABOUT = "measure a denoiser or an autoencoder on the clips that a dataset holds out"
# Options that one of the two has alone; None where they are not given
OF_DENOISER = ("count", "steps", "frames")
OF_AUTOENCODER = ("clips", "batch", "tile", "tile_overlap")


def add_evaluate(commands) -> None:
    """Add the command `evaluate`."""
    p = make_parser(commands.add_parser, "evaluate", help=ABOUT, epilog=EXAMPLE)
    p.add_argument("run", metavar="RUN", nargs="?", type=as_path, help="run folder of a trained denoiser")
    p.add_argument("--autoencoder", type=as_path, help="run folder of a trained autoencoder, in place of RUN")
    p.add_argument("--data", type=as_path, required=True, help="dataset folder")
    p.add_argument("--count", type=int, help="RUN: maximum number of prompts, evenly spread (default: 64)")
    p.add_argument("--steps", help="RUN: steps of the solver (default: those of the run's config)")
    p.add_argument("--frames", type=int, help="RUN: frames of the generated clips (default: those of the real ones)")
    p.add_argument("--clips", type=int, help="--autoencoder: maximum number of clips, evenly spread (default: 64)")
    p.add_argument("--batch", type=int, help="--autoencoder: batch size, in clips or tiles (default: 4)")
    p.add_argument("--out", type=as_path, help="folder for the report and the pictures (default: RUN/evaluation)")
    p.add_argument("--seed", type=int, default=0, help="seed of the samples, or of the noise that is added to latents")
    add_json(p)
    add_tiles(p)
    # None tells that they are not given: they are for autoencoders alone.
    p.set_defaults(function=evaluate, tile=None, tile_overlap=None)


def evaluate(options: argparse.Namespace) -> None:
    """Measure the run of a denoiser or an autoencoder and print its report."""
    import dataclasses

    from sora_jax.generate.options import named_as_typed
    from sora_jax.parallel.settings import prepare_jax

    if options.run is None and options.autoencoder is None:
        raise UserError("RUN is not given; it must be the folder of a denoiser's run, or give --autoencoder")
    if options.run is not None and options.autoencoder is not None:
        raise UserError(f"RUN is {str(options.run)!r}; it must be left out beside --autoencoder")
    prepare_jax()
    with named_as_typed(options.arguments):
        report = _denoiser(options) if options.run is not None else _autoencoder(options)
    console.result(dataclasses.asdict(report), report.text)


def _given(options: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the options among `names` that are given; one that is not stays at the default of the function."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _refuse(options: argparse.Namespace, names: tuple[str, ...], beside: str) -> None:
    for name, value in _given(options, names).items():
        raise UserError(f"--{name.replace('_', '-')} is {value}; it must be left out with {beside}")


def _denoiser(options: argparse.Namespace) -> Any:
    from sora_jax.evaluate.denoiser import DenoiserOptions, evaluate_denoiser

    _refuse(options, OF_AUTOENCODER, "RUN")
    chosen = DenoiserOptions(out=options.out, seed=options.seed, **_given(options, OF_DENOISER))
    return evaluate_denoiser(options.run, options.data, chosen)


def _autoencoder(options: argparse.Namespace) -> Any:
    from sora_jax.evaluate.autoencoder import EvaluateOptions, evaluate_autoencoder
    from sora_jax.models.tiling import TilingConfig

    _refuse(options, OF_DENOISER, "--autoencoder")
    overlap = TilingConfig.overlap if options.tile_overlap is None else options.tile_overlap
    tiles = TilingConfig.parse(options.tile or "", overlap)
    chosen = EvaluateOptions(out=options.out, seed=options.seed, tiles=tiles, **_given(options, ("clips", "batch")))
    return evaluate_autoencoder(options.autoencoder, options.data, chosen)
