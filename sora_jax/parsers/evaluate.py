"""Parse and run `sora-jax evaluate`: of a denoiser's run, or of an autoencoder's."""

import argparse
import re
from collections.abc import Iterator, Sequence
from typing import Any

from sora_jax import console
from sora_jax.config import check
from sora_jax.errors import UserError
from sora_jax.field_docs import Group, groups
from sora_jax.files import as_path
from sora_jax.parsers.base import add_json, add_tiles, make_parser
from sora_jax.parsers.fields import list_groups

EXAMPLE = (
    "examples:\n  sora-jax evaluate runs/video --data=data/clips --count=64\n"
    "  sora-jax evaluate runs/video --metrics=loss,likelihood --likelihood.steps=64\n"
    "  sora-jax evaluate --autoencoder=runs/autoencoder --data=data/clips\n"
    "--sampling.NAME=VALUE overrides any field of the run's config.sampling; --METRIC.NAME=VALUE is for one metric;\n"
    "--metrics=NAME --help lists its fields"
)
ABOUT = "measure a denoiser or an autoencoder on the clips that a dataset holds out"
FIELDS = ("loss", "likelihood", "fvd", "fid", "own")  # metrics with options of their own, --METRIC.NAME=VALUE
# Options that one of the two has alone; not given: None, or an empty list
OF_DENOISER = ("count", "steps", "frames", "metrics", "latents", "split", "checkpoint", "sampling", *FIELDS)
OF_AUTOENCODER = ("clips", "batch", "tile", "tile_overlap")


def add_evaluate(commands) -> None:
    """Add the command `evaluate`."""
    p = make_parser(commands.add_parser, "evaluate", help=ABOUT, epilog=EXAMPLE)
    p.add_argument("run", metavar="RUN", nargs="?", type=as_path, help="run folder of a trained denoiser")
    p.add_argument("--autoencoder", type=as_path, help="run folder of a trained autoencoder, in place of RUN")
    about = "RUN: oracle, consistency (the default), loss, likelihood, fvd, fid, own; all: those that are possible"
    p.add_argument("--metrics", metavar="NAME,NAME..", help=about)
    p.add_argument("--data", type=as_path, help="dataset folder, whose clips are compared with")
    p.add_argument("--latents", type=as_path, help="RUN: latent cache for loss, likelihood (default: the run's)")
    p.add_argument("--split", help="RUN: split of the clips (default: all that the run is not trained on)")
    p.add_argument("--checkpoint", help="RUN: newest (default), best or a step")
    p.add_argument(
        "--count", type=int, help="RUN: clips at most, evenly spread (default: 64; latents: config.held_out.clips)"
    )
    p.add_argument("--steps", help="RUN: steps of the solver (default: those of the run's config)")
    p.add_argument("--frames", type=int, help="RUN: frames of the generated clips (default: those of the real ones)")
    p.add_argument("--clips", type=int, help="--autoencoder: maximum number of clips, evenly spread (default: 64)")
    p.add_argument("--batch", type=int, help="--autoencoder: batch size, in clips or tiles (default: 4)")
    p.add_argument("--out", type=as_path, help="folder for the report, pictures and clips (default: RUN/evaluation)")
    p.add_argument("--seed", type=int, default=0, help="seed of the samples, or of the noise that is added to latents")
    add_json(p)
    add_tiles(p)
    # None tells that they are not given: they are for autoencoders alone.
    list_groups(p, _fields)
    p.set_defaults(function=evaluate, tile=None, tile_overlap=None, sampling=[], **{name: [] for name in FIELDS})


def _fields(words: Sequence[str]) -> Iterator[Group]:
    """Yield the options of the metrics that the words of a command name."""
    from sora_jax.evaluate.suite import METRICS

    named = re.split(r"[ ,=]", next((word for word in " ".join(words).split("--") if word.startswith("metrics")), ""))
    for name in (name for name in FIELDS if name in named or "all" in named):
        yield from groups(METRICS[name].options, f"--{name}", default=METRICS[name].options)


def evaluate(options: argparse.Namespace) -> None:
    """Measure the run of a denoiser or an autoencoder and print its report."""
    from sora_jax.generate.options import named_as_typed
    from sora_jax.parallel.settings import prepare_jax

    if options.run is None and options.autoencoder is None:
        raise UserError("RUN is not given; it must be the folder of a denoiser's run, or give --autoencoder")
    if options.run is not None and options.autoencoder is not None:
        raise UserError(f"RUN is {str(options.run)!r}; it must be left out beside --autoencoder")
    prepare_jax()
    with named_as_typed(options.arguments):
        values, text = _denoiser(options) if options.run is not None else _autoencoder(options)
    console.result(values, text)


def _given(options: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the options among `names` that are given; one that is not stays at the default of the function."""
    return {name: value for name in names if (value := getattr(options, name)) not in (None, [])}


def _refuse(options: argparse.Namespace, names: tuple[str, ...], beside: str) -> None:
    for name, value in _given(options, names).items():
        option, value = (f"{name}.{value[0]}", "given") if isinstance(value, list) else (name, value)
        raise UserError(f"--{option.replace('_', '-')} is {value}; it must be left out with {beside}")


def _denoiser(options: argparse.Namespace) -> tuple[dict, str]:
    from sora_jax.evaluate.denoiser import DenoiserOptions, evaluate_denoiser
    from sora_jax.evaluate.suite import own_options, parse_metrics

    _refuse(options, OF_AUTOENCODER, "RUN")
    given = _given(options, OF_DENOISER)
    metrics = parse_metrics(given.pop("metrics", None))
    own = own_options(metrics, {name: given.pop(name, ()) for name in FIELDS})
    given["sampling"] = tuple(options.sampling)
    chosen = DenoiserOptions(metrics=metrics, own=own, out=options.out, seed=options.seed, **given)
    report = evaluate_denoiser(options.run, options.data, chosen)
    return report.values, report.text


def _autoencoder(options: argparse.Namespace) -> tuple[dict, str]:
    import dataclasses

    from sora_jax.evaluate.autoencoder import EvaluateOptions, evaluate_autoencoder
    from sora_jax.models.tiling import TilingConfig

    check(options.data is not None, "--data is not given; with --autoencoder it must be a dataset folder")
    _refuse(options, OF_DENOISER, "--autoencoder")
    overlap = TilingConfig.overlap if options.tile_overlap is None else options.tile_overlap
    tiles = TilingConfig.parse(options.tile or "", overlap)
    chosen = EvaluateOptions(out=options.out, seed=options.seed, tiles=tiles, **_given(options, ("clips", "batch")))
    report = evaluate_autoencoder(options.autoencoder, options.data, chosen)
    return dataclasses.asdict(report), report.text
