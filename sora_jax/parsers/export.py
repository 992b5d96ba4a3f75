"""Parse and run `sora-jax export`."""

import argparse

from sora_jax.files import as_path
from sora_jax.parsers.base import make_parser

EXAMPLE = (
    "examples:\n  sora-jax export runs/video --out=models/video\n"
    "  sora-jax export runs/video --out=video.safetensors --dtype=float32\n"
    '  sora-jax sample --workdir=video.safetensors --prompt="a fox runs"'
)


def add_export(commands) -> None:
    """Add the command `export`."""
    about = "write a run as a model to pass on: weights, config, tokenizer, autoencoder and model card"
    p = make_parser(commands.add_parser, "export", help=about, epilog=EXAMPLE)
    p.add_argument("run", metavar="RUN", type=as_path, help="run folder of a denoiser or an autoencoder")
    p.add_argument("--out", type=as_path, required=True, help="folder, or one file NAME.safetensors")
    p.add_argument("--checkpoint", default="newest", help="newest, best (of those kept by loop.keep_best) or a step")
    p.add_argument("--dtype", default="bfloat16", help="of the weights: bfloat16, or float32, twice as large")
    p.add_argument("--autoencoder", type=as_path, help="run folder of an autoencoder, if the run contains none")
    p.add_argument("--card", type=as_path, metavar="FILE", help="text that the model card begins with: data, licence")
    p.set_defaults(function=export)


def export(options: argparse.Namespace) -> None:
    """Export a run and print what was written."""
    from sora_jax.convert.export import ExportOptions
    from sora_jax.convert.export import export as write
    from sora_jax.parallel.settings import prepare_jax

    chosen = ExportOptions(options.checkpoint, options.dtype, options.autoencoder, options.card)
    prepare_jax()
    print("\n".join(write(options.run, options.out, chosen)))
