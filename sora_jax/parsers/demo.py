"""Parse and run `sora-jax demo`."""

import argparse
from collections.abc import Callable

from sora_jax.files import as_path
from sora_jax.parsers.base import make_parser

EXAMPLE = (
    "examples:\n  sora-jax demo --open\n  sora-jax demo --workdir=runs/video --host=0.0.0.0 --queue=8 --max-steps=50"
)


def add_demo(commands, parse: Callable[[list[str]], argparse.Namespace]) -> None:
    """Add the command `demo`; parse: reads a command line, as the page makes clips by that of `sample`."""
    p = make_parser(commands.add_parser, "demo", help="show a run as a web page (extra [demo])", epilog=EXAMPLE)
    about = "run folder, exported model, or the name of one that comes with the package (default: world)"
    p.add_argument("--workdir", type=as_path, help=about)
    p.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: all of this machine")
    p.add_argument("--port", type=int, default=7860, help="port to listen at")
    p.add_argument("--open", action="store_true", help="open the page in a browser of this machine")
    p.add_argument(
        "--share", action="store_true", help="make a public address through a tunnel of Gradio, for 72 hours"
    )
    p.add_argument("--queue", type=int, default=16, help="visitors who may wait; one clip is made at a time")
    p.add_argument("--max-pixels", type=int, default=1_000_000, help="frames x height x width of a clip at most")
    p.add_argument("--max-steps", type=int, default=100, help="denoising steps of a clip at most")
    p.add_argument("--max-seconds", type=float, default=120.0, help="time of a clip at most")
    p.add_argument("--max-megabytes", type=int, default=8, help="size of an uploaded file at most")
    p.set_defaults(function=demo, parse=parse)


def demo(options: argparse.Namespace) -> None:
    """Serve the page until the process is interrupted."""
    from sora_jax.demo.fields import Limits
    from sora_jax.demo.serve import Address, serve
    from sora_jax.parallel.settings import prepare_jax

    prepare_jax()
    limits = Limits(
        options.max_pixels, options.max_steps, options.max_seconds, options.max_megabytes, queue=options.queue
    )
    address = Address(options.host, options.port, options.share, options.open)
    serve(options.workdir, options.parse, address, limits)
