"""The command line: `sora-jax COMMAND --help` shows each command with an example."""

import argparse
import errno
import sys
from pathlib import Path

from sora_jax.errors import Stopped, UserError

EXAMPLES = """\
examples:
  sora-jax quickstart                                   a text-to-video model from nothing, in ten minutes
  sora-jax data build --source=folder --path=clips --out=data/clips
  sora-jax train --config=configs/tiny.py:autoencoder --workdir=runs/autoencoder --config.data=data/clips
  sora-jax data encode --autoencoder=runs/autoencoder --data=data/clips --out=data/latents
  sora-jax train --config=configs/tiny.py --workdir=runs/video --config.latents=data/latents
  sora-jax sample --workdir=runs/video --prompt="a fox runs" --frames=17 --height=48 --width=80 --out=fox.mp4
  sora-jax data inspect data/clips
"""

NOT_A_BUG = {  # full disks and wrong paths; any other error of the system is shown whole
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; 0 = done, 2 = a user's mistake (one sentence on stderr), 130 = stopped, all saved."""
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    changes = [a.removeprefix("--config.") for a in rest if a.startswith("--config.")]
    unknown = [a for a in rest if not a.startswith("--config.")]
    if unknown or (changes and not hasattr(options, "config")):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    options.changes = changes
    try:
        return run(options)
    except UserError as error:
        print(f"sora-jax: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in NOT_A_BUG:
            raise
        print(f"sora-jax: {error.filename or 'a file'} cannot be used: {error.strerror}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """Imports what the command needs, and calls it."""
    try:
        options.function(options)
    except Stopped as stopped:
        print(f"sora-jax: {stopped}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("sora-jax: interrupted; the same command goes on where the last save was", file=sys.stderr)
        return 130
    return 0


def make_parser() -> argparse.ArgumentParser:
    """One subparser per command."""
    parser = _parser(argparse.ArgumentParser, prog="sora-jax", description=__doc__, epilog=EXAMPLES)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _quickstart(commands)
    _train(commands)
    _sample(commands)
    _data(commands)
    return parser


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Examples as they stand, and after each option its default, where it has one."""

    def _get_help_string(self, action):
        bare = isinstance(action.default, bool) or action.default in (None, "", [])
        return action.help if bare else super()._get_help_string(action)


def _parser(make, *names, **options) -> argparse.ArgumentParser:
    return make(*names, formatter_class=_Help, allow_abbrev=False, **options)


def _quickstart(commands) -> None:
    example = "example:\n  sora-jax quickstart --workdir=runs/quickstart"
    about = "from nothing to generated videos in ten minutes"
    p = _parser(commands.add_parser, "quickstart", help=about, epilog=example)
    p.add_argument("--workdir", type=Path, default=Path("runs/quickstart"), help="folder for everything it makes")
    p.add_argument("--config", help="a config file such as configs/quickstart.py:short (default: the full form)")
    p.set_defaults(function=quickstart)


def quickstart(options) -> None:
    from sora_jax import quickstart as program

    program.main(options.config, options.changes, options.workdir)


def _train(commands) -> None:
    example = (
        "example:\n  sora-jax train --config=configs/tiny.py:transformer --workdir=runs/tiny"
        " --config.latents=data/latents --config.loop.steps=5000"
    )
    p = _parser(commands.add_parser, "train", help="train an autoencoder or a transformer", epilog=example)
    about = "configs/FILE.py or configs/FILE.py:variant; --config.a.b=VALUE changes it"
    p.add_argument("--config", required=True, help=about)
    p.add_argument("--workdir", type=Path, required=True, help="run folder; a run found there goes on")
    p.add_argument("--dry-run", action="store_true", help="print the resolved config and parameter counts, and end")
    p.set_defaults(function=train)


def train(options) -> None:
    from sora_jax import commands
    from sora_jax.config import load

    config = commands.run_config(load(options.config, options.changes))
    if options.dry_run:
        print(commands.describe(config))
        return
    commands.use_compilation_cache()
    commands.train(config, options.workdir)


def _sample(commands) -> None:
    example = (
        'example:\n  sora-jax sample --workdir=runs/quickstart/transformer --prompt="a red circle moves left"'
        " --frames=9 --height=24 --width=36 --out=circle.gif"
    )
    p = _parser(commands.add_parser, "sample", help="generate clips from prompts", epilog=example)
    p.add_argument("--workdir", type=Path, required=True, help="run folder of a trained transformer")
    p.add_argument("--prompt", action="append", default=[], help="what to generate; may be given several times")
    p.add_argument("--prompts-file", type=Path, help="a text file with one prompt a line")
    p.add_argument("--frames", type=int, help="default: as in the run's first preview; 1 for a .png")
    p.add_argument("--height", type=int, help="in pixels; default: as in the run's first preview")
    p.add_argument("--width", type=int, help="in pixels; default: as in the run's first preview")
    p.add_argument("--steps", type=int, default=30, help="solver steps")
    p.add_argument("--solver", default="euler", help="euler or heun")
    p.add_argument("--guidance", type=float, help="1 = none; default: as in the run's previews")
    p.add_argument("--seed", type=int, default=0, help="of the noise")
    p.add_argument("--fps", type=float, help="frames a second of the file; default: as in the run's previews")
    p.add_argument("--upscale", type=int, default=1, help="enlarge pixels by a whole factor, to watch tiny clips")
    p.add_argument("--out", type=Path, required=True, help=".mp4, .gif or .webp; .png for one frame; several: numbered")
    p.set_defaults(function=sample)


def sample(options) -> None:
    from sora_jax import commands

    commands.use_compilation_cache()
    for path in commands.sample(options):
        print(path)


def _data(commands) -> None:
    p = _parser(commands.add_parser, "data", help="build, encode and inspect data", epilog=EXAMPLES)
    verbs = p.add_subparsers(title="verbs", required=True, metavar="build|encode|inspect")
    _build(verbs)
    example = "example:\n  sora-jax data encode --autoencoder=runs/autoencoder --data=data/clips --out=data/latents"
    p = _parser(verbs.add_parser, "encode", help="dataset folder -> latent cache", epilog=example)
    p.add_argument("--autoencoder", type=Path, required=True, help="run folder of a trained autoencoder")
    p.add_argument("--data", type=Path, required=True, help="dataset folder")
    p.add_argument("--out", type=Path, required=True, help="latent cache to write")
    p.add_argument("--batch", type=int, default=16, help="clips encoded at once")
    p.set_defaults(function=encode)
    example = "example:\n  sora-jax data inspect data/clips"
    p = _parser(verbs.add_parser, "inspect", help="what is in a dataset folder", epilog=example)
    p.add_argument("folder", type=Path, help="dataset folder")
    p.set_defaults(function=inspect)


def _build(verbs) -> None:
    example = (
        "example:\n  sora-jax data build --source=folder --path=clips --out=data/clips --max-frames=17 --multiple=16\n"
        "  sora-jax data build --source=world --limit=2000 --multiple=8 --out=data/world"
    )
    p = _parser(verbs.add_parser, "build", help="videos and pictures -> dataset folder", epilog=example)
    p.add_argument("--out", required=True, help="dataset folder to write")
    p.add_argument("--source", default="folder", help="folder or world")
    p.add_argument("--path", default="", help="folder of videos and pictures, with captions beside them")
    p.add_argument("--world", default="simple", help="which world: simple or full")
    p.add_argument("--max-frames", type=int, default=17, help="longest clip; cut to 1 + time_factor * k frames")
    p.add_argument("--time-factor", type=int, default=4, help="compression in time of the autoencoder to come")
    about = "cut to the next shorter allowed length, or pad to the next longer"
    p.add_argument("--length-rule", default="cut", help=about)
    p.add_argument("--min-frames", type=int, default=1, help="clips that end shorter are refused")
    p.add_argument("--place", default="middle", help="part taken of a longer clip: start, middle or random")
    p.add_argument("--multiple", type=int, default=16, help="height and width become multiples of this")
    p.add_argument("--max-pixels", type=int, default=256 * 256, help="height x width at most; aspect ratio is kept")
    p.add_argument("--max-fps", type=float, help="faster clips leave out frames")
    p.add_argument("--missing-caption", default="refuse", help="refuse, or empty")
    p.add_argument("--strip-frames", type=int, help="read each picture as so many frames from left to right")
    p.add_argument("--strip-fps", type=float, default=8.0, help="frames a second of such strips")
    p.add_argument("--holdout", type=float, default=0.05, help="share of clips held out")
    p.add_argument("--limit", type=int, help="at most so many clips, evenly spread over all files")
    p.add_argument("--seed", type=int, default=0, help="of the held-out split and of random places")
    p.add_argument("--workers", type=int, default=1, help="processes that decode")
    p.set_defaults(function=build)


def build(options) -> None:
    import dataclasses

    from sora_jax.config import choose
    from sora_jax.data.build import BuildConfig, build, inspect
    from sora_jax.data.world import FULL_WORLD, WorldConfig

    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(BuildConfig)}
    world = choose("--world", options.world, {"simple": WorldConfig(), "full": FULL_WORLD})
    values["world"] = dataclasses.replace(world, seed=options.seed)
    build(BuildConfig(**values))
    print(inspect(options.out).text)


def encode(options) -> None:
    from sora_jax import commands
    from sora_jax.train.encode import encode_dataset

    commands.use_compilation_cache()
    encode_dataset(options.autoencoder, options.data, options.out, options.batch)


def inspect(options) -> None:
    from sora_jax.data.build import inspect

    found = inspect(options.folder)
    print(f"{found.text}\ncontact sheet    {found.sheet}")


if __name__ == "__main__":
    sys.exit(main())
