"""Train and sample text-to-video models. `sora-jax COMMAND --help` shows each command with an example."""

import argparse
import contextlib
import importlib.metadata
import os
import platform
import select
import sys
from collections.abc import Iterator, Sequence

from sora_jax import __version__
from sora_jax import console as terminal
from sora_jax.errors import Stopped, UserError
from sora_jax.files import as_path, storage_message
from sora_jax.parsers import base, interrupt
from sora_jax.parsers.bench import add_bench
from sora_jax.parsers.completion import add_completion
from sora_jax.parsers.configs import add_configs
from sora_jax.parsers.curves import add_curves
from sora_jax.parsers.data import add_data
from sora_jax.parsers.demo import add_demo
from sora_jax.parsers.doctor import add_doctor
from sora_jax.parsers.evaluate import FIELDS, add_evaluate
from sora_jax.parsers.export import add_export
from sora_jax.parsers.fields import list_fields
from sora_jax.parsers.sample import add_calibrate, add_sample, check_first

NO_READER = 141  # 128 + SIGPIPE, the exit code in shells of a command whose output nobody reads any more
# Beginnings of options for fields, and what collects them
PREFIXES = {"--config.": "changes", "--sampling.": "sampling"} | {f"--{name}.": name for name in FIELDS}


def console() -> int:
    """Run the command line as a process: `main`, which Ctrl-C ends at once and by its own exit code."""
    with _quiet_pipe(), interrupt.watched(interrupt.sentence(sys.argv[1:])):
        code = main()
        if code == interrupt.CODE and not _several_processes():
            interrupt.end(code)
    return code


@contextlib.contextmanager
def _quiet_pipe() -> Iterator[None]:
    """End the process without a traceback where the reader of its output has ended, as `head` does."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        poll = select.poll()
        poll.register(sys.stdout, 0)  # errors and hang-ups are always reported
        if not poll.poll(0):
            raise  # another pipe broke
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at the end
        sys.exit(NO_READER)


def _several_processes() -> bool:
    """Return True for one of several processes of a run, which JAX must take leave of."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit code: 0 success, 2 user error, 75 restart the command, 130 stopped and saved."""
    try:
        return run(parsed(arguments))
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else storage_message(error)
        if not reason:
            raise
        print(f"sora-jax: {reason}", file=sys.stderr)
        return error.code if isinstance(error, UserError) else 2


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line; --config.NAME=VALUE and --sampling.NAME=VALUE become lists of NAME=VALUE."""
    arguments = _joined(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    elif arguments[:1] == ["version"]:
        arguments = ["--version"]
    options, rest = make_parser().parse_known_args(arguments)
    options.arguments = arguments
    prefixes = {prefix: name for prefix, name in PREFIXES.items() if hasattr(options, name)}
    for prefix, name in prefixes.items():
        setattr(options, name, [a.removeprefix(prefix) for a in rest if a.startswith(prefix)])
    rest = [a for a in rest if not a.startswith(tuple(prefixes))]
    if rest:
        options.parser.refuse(rest, [f"{prefix}NAME" for prefix in prefixes])
    return options


def _joined(arguments: Sequence[str]) -> list[str]:
    """Return the words of a command line with `--config.NAME VALUE` as one word, `--config.NAME=VALUE`."""
    words: list[str] = []
    for word in arguments:
        before = words[-1] if words else ""
        if before.startswith(tuple(PREFIXES)) and "=" not in before and not word.startswith("--"):
            words[-1] = f"{before}={word}"
        else:
            words.append(word)
    return words


def run(options: argparse.Namespace) -> int:
    """Call the function of the command; it imports what it needs."""
    terminal.HABITS = terminal.Habits(getattr(options, "quiet", False), getattr(options, "json", False))
    try:
        options.function(options)
    except Stopped as stopped:
        print(f"sora-jax: {stopped}", file=sys.stderr)
        return interrupt.CODE
    except KeyboardInterrupt:
        print(interrupt.sentence(options.arguments), file=sys.stderr)
        return interrupt.CODE
    return 0


def make_parser() -> base.Parser:
    """Build the parser, with one subparser per command."""
    parser = base.make_parser(base.Parser, prog="sora-jax", description=__doc__, epilog=base.EXAMPLES)
    parser.add_argument("--version", action=Version, nargs=0, help="print the versions of sora_jax, JAX and Python")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _quickstart(commands)
    _train(commands)
    add_sample(commands).set_defaults(function=sample)
    add_calibrate(commands)
    add_data(commands)
    add_evaluate(commands)
    add_bench(commands)
    add_curves(commands)
    add_doctor(commands)
    add_demo(commands, parsed)
    add_export(commands)
    _convert(commands)
    _plan(commands)
    add_configs(commands)
    add_completion(commands, make_parser)
    return parser


class Version(argparse.Action):
    """Print versions, which take no import of JAX, and end."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        jax = importlib.metadata.version("jax")
        print(f"sora_jax {__version__}, JAX {jax}, Python {platform.python_version()}")
        parser.exit()


def _quickstart(commands) -> None:
    example = "example:\n  sora-jax quickstart --workdir=runs/quickstart"
    about = "train a small text-to-video model from scratch and sample it, in about ten minutes"
    p = base.make_parser(commands.add_parser, "quickstart", help=about, epilog=example)
    p.add_argument("--workdir", type=as_path, default=as_path("runs/quickstart"), help="folder for all outputs")
    p.add_argument("--config", metavar="FILE[:VARIANT]", help=f"{base.CONFIG} (default: configs/quickstart.py)")
    base.add_json(p)
    list_fields(p, usual="configs/quickstart.py")
    p.set_defaults(function=quickstart, changes=[])


def quickstart(options) -> None:
    """Run all stages of the quickstart."""
    from sora_jax import quickstart as program

    program.main(options.config, options.changes, options.workdir)


def _train(commands) -> None:
    example = (
        "example:\n  sora-jax train --config=configs/tiny.py:transformer --workdir=runs/tiny"
        " --config.latents=data/latents --config.loop.steps=5000"
    )
    p = base.make_parser(commands.add_parser, "train", help="train an autoencoder or a denoiser", epilog=example)
    about = f"{base.CONFIG} (default: that of the run in --workdir, or of --init-from)"
    p.add_argument("--config", metavar="FILE[:VARIANT]", help=about)
    p.add_argument("--workdir", type=as_path, required=True, help="run folder; a run found there is resumed")
    about = "begin with the averaged weights of another run, at its newest checkpoint or RUN@STEP, RUN@best"
    p.add_argument("--init-from", default="", metavar="RUN", help=about)
    about = "with --init-from: parameters that begin at random all the same, by path: classes,text/table"
    p.add_argument("--renew", type=paths, default=(), metavar="PATHS", help=about)
    about = "with --init-from: parameters that are not trained, by path: text,blocks/mlp"
    p.add_argument("--freeze", type=paths, default=(), metavar="PATHS", help=about)
    about = "check config, mesh and data; print the config, parameters, memory, and what a step and an epoch are"
    p.add_argument("--dry-run", action="store_true", help=about)
    p.add_argument("--finish", action="store_true", help="do not train; freeze an autoencoder at its newest checkpoint")
    p.add_argument("--distributed", action="store_true", help="run as one of several processes: TPU pods, SLURM, GKE")
    p.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, if JAX cannot detect it")
    p.add_argument("--processes", type=int, metavar="N", help="number of processes, with --coordinator")
    p.add_argument("--process", type=int, metavar="I", help="index of this process, from 0, with --coordinator")
    base.add_json(p)
    list_fields(p)
    p.set_defaults(function=train, changes=[])


def paths(text: str) -> tuple[str, ...]:
    """Parse names between commas."""
    return tuple(name for name in text.split(",") if name)


def train(options) -> None:
    from sora_jax.kinds import dry_run, run
    from sora_jax.kinds.begin import given_config
    from sora_jax.parallel import distributed
    from sora_jax.parallel.settings import prepare_jax
    from sora_jax.train.adapt import InitConfig

    init = InitConfig(options.init_from, options.renew)
    config = given_config(options.config, options.changes, options.workdir, init, options.freeze)
    others = (options.coordinator, options.processes, options.process)
    if options.distributed or others != (None, None, None):
        distributed.start(*others)
    prepare_jax()
    if options.dry_run:
        found = dry_run.describe(config, options.workdir)
        terminal.result(found, dry_run.as_text(found))
    else:
        (run.finish if options.finish else run.train)(config, options.workdir)


def sample(options) -> None:
    check_first(options)
    from sora_jax.generate import command
    from sora_jax.generate.options import named_as_typed
    from sora_jax.parallel.settings import prepare_jax

    if options.like:
        recipe = command.like(options)
        # Pictures of the command line stand in the place of the recipe's, not beside them.
        several = tuple(f"--{name}=" for name in ("image", "sketch") if getattr(options, name))
        kept = [word for word in recipe["command"] if not (several and word.startswith(several))]
        options = parsed([options.arguments[0], *kept, *options.arguments[1:]])
        options.clip, options.rows = recipe["clip"], recipe["rows"]
    prepare_jax()
    with named_as_typed(options.arguments):
        files = [str(path) for path in command.sample(options)]
    terminal.result({"files": files}, "\n".join(files))


def _convert(commands) -> None:
    example = (
        "example:\n  sora-jax convert --from=diffusers-vae --weights=sd-vae-ft-ema --out=runs/kl4\n"
        "  sora-jax convert --from=dit --weights=DiT-XL-2-256x256.safetensors --autoencoder=runs/kl4 --out=runs/dit\n"
        "  sora-jax convert --to=diffusers-dit --workdir=runs/dit --out=DiT-XL-2-256"
    )
    about = "import published weights into a run folder, or export them"
    p = base.make_parser(commands.add_parser, "convert", help=about, epilog=example)
    about = "dit or sit (official checkpoint), diffusers-dit or diffusers-vae (folders)"
    way = p.add_mutually_exclusive_group(required=True)
    way.add_argument("--from", dest="source", metavar="FORMAT", help=f"import {about}")
    way.add_argument("--to", metavar="FORMAT", help=f"export {about}")
    p.add_argument("--weights", type=as_path, help="with --from: file, or folder with config.json")
    p.add_argument("--autoencoder", type=as_path, help="with --from: run folder of the autoencoder that decodes it")
    p.add_argument("--heads", type=int, help="with --from=dit or sit: attention heads, if the size is none of DiT's")
    p.add_argument("--workdir", type=as_path, help="with --to: run folder")
    p.add_argument("--out", type=as_path, required=True, help="run folder, file or folder to write")
    base.add_json(p)
    p.set_defaults(function=convert)


def convert(options) -> None:
    """Import or export published weights."""
    from sora_jax.config import check
    from sora_jax.convert.command import convert_from, convert_to
    from sora_jax.parallel.settings import prepare_jax

    needed, spare = ("weights", ("workdir",)) if options.source else ("workdir", ("weights", "autoencoder", "heads"))
    way = "--from" if options.source else "--to"
    check(getattr(options, needed) is not None, f"--{needed} is not given; it must be, with {way}")
    for name in spare:
        value = getattr(options, name)
        check(value is None, f"--{name} is {str(value)!r}; it must not be given with {way}")
    prepare_jax()
    if options.source:
        said = convert_from(options.source, options.weights, options.out, options.autoencoder, options.heads)
    else:
        said = convert_to(options.to, options.workdir, options.out)
    terminal.result({"out": options.out, "notes": said}, "\n".join([*said, str(options.out)]))


def _plan(commands) -> None:
    example = (
        "examples:\n  sora-jax plan --config=configs/sora.py:3b --topology=v5p:4x4x8\n"
        "  sora-jax plan --config=configs/sora.py:14b --topology=v5p:4x4x8 --slices=2 --pack-length=16384 --json\n"
        "  sora-jax plan --config=configs/sora.py:b --topology=v5e:4x4 --what=sample --config.model.remat=dots"
    )
    about = "estimate memory, FLOPs, communication and time of a run on TPUs or GPUs that are not attached"
    p = base.make_parser(commands.add_parser, "plan", help=about, epilog=example)
    p.add_argument("--config", metavar="FILE[:VARIANT]", required=True, help=base.CONFIG)
    about = "chip and shape of a slice, in chips: v5e:4x4, v5p:4x4x8, v6e:16x16, h100:8"
    p.add_argument("--topology", required=True, help=about)
    p.add_argument("--slices", type=int, default=1, help="number of slices (nodes of GPUs) joined by the network")
    p.add_argument("--pack-length", type=int, help="tokens per pack (default: config.packing.length)")
    p.add_argument("--what", default="train", help="train, sample (a denoiser) or autoencoder (encode and decode)")
    base.add_json(p)
    list_fields(p)
    p.set_defaults(function=plan, changes=[])


def plan(options) -> None:
    from sora_jax.config import load
    from sora_jax.kinds import kind_of, run_config
    from sora_jax.plan.command import PlanOptions, plan

    config = run_config(load(options.config, options.changes))
    chosen = PlanOptions(options.topology, options.slices, options.pack_length, options.what, options.json)
    print(plan(kind_of(config), config, chosen))


if __name__ == "__main__":
    sys.exit(console())
