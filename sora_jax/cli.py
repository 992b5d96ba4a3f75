"""The command line: `sora-jax COMMAND --help` shows each command with an example."""

import argparse
import difflib
import functools
import re
import sys

from sora_jax import __version__
from sora_jax.errors import Stopped, UserError
from sora_jax.files import as_path, no_bug

EXAMPLES = """\
examples:
  sora-jax quickstart                                   a text-to-video model from nothing, in about ten minutes
  sora-jax data build --source=folder --path=clips --out=data/clips
  sora-jax train --config=configs/tiny.py:autoencoder --workdir=runs/autoencoder --config.data=data/clips
  sora-jax data encode --autoencoder=runs/autoencoder --data=data/clips --out=data/latents
  sora-jax train --config=configs/tiny.py --workdir=runs/video --config.latents=data/latents
  sora-jax sample --workdir=runs/video --prompt="a fox runs" --frames=17 --height=48 --width=80 --out=fox.mp4
  sora-jax data inspect data/clips
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; 0: done, 2: a user's mistake (on stderr), 75: to be started again, 130: all is saved."""
    try:
        return run(parsed(arguments))
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else no_bug(error)
        if not reason:
            raise
        print(f"sora-jax: {reason}", file=sys.stderr)
        return error.code if isinstance(error, UserError) else 2


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, with what changes a config as lists of NAME=VALUE."""
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    known = re.findall(r"^ +(?:-h, )?(--[a-z-]+)", options.parser.format_help(), re.MULTILINE)
    for prefix, name in (("--config.", "changes"), ("--sampling.", "sampling")):
        if hasattr(options, name):
            known.append(f"{prefix}NAME")
            setattr(options, name, [a.removeprefix(prefix) for a in rest if a.startswith(prefix)])
            rest = [a for a in rest if not a.startswith(prefix)]
    if rest:
        near = difflib.get_close_matches(rest[0].split("=")[0], dict.fromkeys(known), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        options.parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    return options


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
    parser.add_argument("--version", action="version", version=f"sora_jax {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _quickstart(commands)
    _train(commands)
    _sample(commands)
    _data(commands)
    _convert(commands)
    _plan(commands)
    return parser


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Examples as they stand, and after each option its default, where it has one."""

    def _get_help_string(self, action):
        bare = isinstance(action.default, bool) or action.default in (None, "", [])
        return action.help if bare else super()._get_help_string(action)


def _parser(make, *names, **options) -> argparse.ArgumentParser:
    parser = make(*names, formatter_class=_Help, allow_abbrev=False, **options)
    parser.set_defaults(parser=parser)  # of a command the innermost: it has the options to tell
    return parser


def _quickstart(commands) -> None:
    example = "example:\n  sora-jax quickstart --workdir=runs/quickstart"
    about = "from nothing to generated videos in about ten minutes"
    p = _parser(commands.add_parser, "quickstart", help=about, epilog=example)
    p.add_argument("--workdir", type=as_path, default=as_path("runs/quickstart"), help="folder for everything it makes")
    p.add_argument("--config", help="a config file such as configs/quickstart.py:short (default: the full form)")
    p.set_defaults(function=quickstart, changes=[])


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
    p.add_argument("--workdir", type=as_path, required=True, help="run folder; a run found there goes on")
    p.add_argument("--dry-run", action="store_true", help="print the resolved config and parameter counts, and end")
    p.add_argument("--distributed", action="store_true", help="one of several processes: TPU pods, SLURM, GKE")
    p.add_argument("--coordinator", metavar="HOST:PORT", help="of the first process, where JAX cannot find it")
    p.add_argument("--processes", type=int, metavar="N", help="how many there are, with --coordinator")
    p.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0, with --coordinator")
    p.set_defaults(function=train, changes=[])


def train(options) -> None:
    from sora_jax import commands
    from sora_jax.config import load
    from sora_jax.parallel import distributed

    config = commands.run_config(load(options.config, options.changes))
    if options.dry_run:
        print(commands.describe(config))
        return
    others = (options.coordinator, options.processes, options.process)
    if options.distributed or others != (None, None, None):
        distributed.start(*others)
    commands.use_compilation_cache()
    commands.train(config, options.workdir)


def _sample(commands) -> None:
    example = (
        'examples:\n  sora-jax sample --workdir=runs/quickstart/transformer --prompt="a red circle moves left"'
        " --frames=9 --height=24 --width=36 --out=circle.gif\n"
        "  sora-jax sample --workdir=runs/dit --class=207,360 --size=256 --steps=250 --guidance=4 --out=grid.png\n"
        "  sora-jax sample --workdir=runs/dit --class=88 --solver=dpm3 --steps=20 --sampling.guidance.channels=0\n"
        "--sampling.NAME=VALUE changes any field of the run's config.sampling"
    )
    p = _parser(commands.add_parser, "sample", help="generate clips from prompts or classes", epilog=example)
    p.add_argument("--workdir", type=as_path, required=True, help="run folder of a trained transformer")
    p.add_argument("--prompt", action="append", default=[], help="what to generate; may be given several times")
    p.add_argument("--prompts-file", type=as_path, help="a text file with one prompt a line")
    p.add_argument("--class", dest="classes", action="append", metavar="N,N..", help="classes; all go into one file")
    p.add_argument("--negative", default="", help="a prompt that guidance leads away from")
    p.add_argument("--size", type=int, help="height and width of a square, in pixels")
    p.add_argument("--frames", type=int, help="default: as in the run's first preview; 1 for a .png")
    p.add_argument("--height", type=int, help="in pixels; default: as in the run's first preview")
    p.add_argument("--width", type=int, help="in pixels; default: as in the run's first preview")
    p.add_argument("--steps", help="solver steps; with respaced spacing also 10,15,20 or ddim50; default: the run's")
    p.add_argument("--solver", help="euler, heun, ddpm, ddim, dpm2, dpm3, unipc...; default: the run's")
    p.add_argument("--guidance", type=float, help="1 = none; default: the run's")
    p.add_argument("--seed", type=int, default=0, help="of the noise")
    p.add_argument("--fps", type=float, help="frames a second of the file; default: as in the run's previews")
    p.add_argument("--upscale", type=int, default=1, help="enlarge pixels by a whole factor, to watch tiny clips")
    p.add_argument("--checkpoint", default="newest", help="newest, best (of those kept by loop.keep_best) or a step")
    p.add_argument("--autoencoder", type=as_path, help="run of an autoencoder, where the run holds none")
    _tile(p)
    p.add_argument("--out", type=as_path, help=".mp4, .gif or .webp; .png for one frame; several prompts: numbered")
    p.set_defaults(function=sample, sampling=[])


def _tile(parser) -> None:
    tile = "FRAMESxHEIGHTxWIDTH"
    parser.add_argument("--tile", default="", metavar=tile, help="larger clips go through the autoencoder in tiles")
    parser.add_argument("--tile-overlap", type=float, default=0.25, help="share of a tile, mixed with its neighbour's")


def sample(options) -> None:
    from sora_jax import commands

    commands.use_compilation_cache()
    for path in commands.sample(options):
        print(path)


def _data(commands) -> None:
    p = _parser(commands.add_parser, "data", help="build, encode and inspect data", epilog=EXAMPLES)
    verbs = p.add_subparsers(title="verbs", required=True, metavar="build|encode|inspect")
    _build(verbs)
    _encode(verbs)
    example = "example:\n  sora-jax data inspect data/clips"
    p = _parser(verbs.add_parser, "inspect", help="what is in a dataset folder", epilog=example)
    p.add_argument("folder", type=as_path, help="dataset folder")
    p.add_argument("--pack-length", type=int, help="tokens of the packs whose fill is counted; default: two clips")
    p.set_defaults(function=inspect)


def _encode(verbs) -> None:
    example = (
        "example:\n  sora-jax data encode --autoencoder=runs/autoencoder --data=data/clips --out=data/latents\n"
        "  sora-jax data encode --autoencoder=runs/autoencoder --data=data/clips --out=data/latents --shard=0/4"
    )
    p = _parser(verbs.add_parser, "encode", help="dataset folder -> latent cache", epilog=example)
    p.add_argument("--autoencoder", type=as_path, required=True, help="run folder of a trained autoencoder")
    p.add_argument("--data", type=as_path, required=True, help="dataset folder")
    p.add_argument("--out", type=as_path, required=True, help="latent cache to write")
    p.add_argument("--batch", type=int, default=16, help="clips (or tiles) encoded at once")
    _tile(p)
    p.add_argument("--shapes", type=int, default=4, help="compiled programs at most; clips of all sizes share them")
    p.add_argument("--shard", default="0/1", help="i/n: the share of this process where n share the work")
    p.add_argument("--text-encoder", help="name or folder of a T5, UMT5 or CLIP of transformers, to embed the captions")
    p.add_argument("--text-tokens", type=int, default=128, help="most tokens of a caption for --text-encoder")
    p.set_defaults(function=encode)


SOURCE_FLAGS = dict(source="name", path="path", strip_frames="strip_frames", strip_fps="strip_fps", limit="limit")


def _build(verbs) -> None:
    example = (
        "example:\n  sora-jax data build --path=clips --out=data/clips --max-frames=17 --multiple=16\n"
        "  sora-jax data build --source=webdataset --path='shards/*.tar' --out=data/clips --workers=8\n"
        "  sora-jax data build --source=world --limit=2000 --multiple=8 --out=data/world\n"
        "  sora-jax data build --config=configs/data.py:mixed --out=data/mixed      several sources"
    )
    p = _parser(verbs.add_parser, "build", help="videos and pictures -> dataset folder", epilog=example)
    p.add_argument("--out", required=True, help="dataset folder to write")
    p.add_argument("--config", help="config file with a list of sources; what is given here changes it")
    # Without defaults of their own: what is not given is that of the config, or of BuildConfig.
    add = functools.partial(p.add_argument, default=argparse.SUPPRESS)
    add("--source", help="folder (the default), webdataset, tfds:NAME[:CONFIG], array_record or world")
    add("--path", help="where it is: a folder, tar shards, ArrayRecord files")
    add("--limit", type=int, help="at most so many entries of the source, evenly spread")
    add("--strip-frames", type=int, help="read each picture as so many frames from left to right")
    add("--strip-fps", type=float, help="frames a second of such strips (8)")
    add("--world", help="which world: simple (the default) or full")
    add("--max-frames", type=int, help="longest clip; cut to 1 + time_factor * k frames (17)")
    add("--time-factor", type=int, help="compression in time of the autoencoder to come (4)")
    add("--length-rule", help="cut to the next shorter allowed length, or pad to the next longer (cut)")
    add("--min-frames", type=int, help="clips that end shorter are refused (1)")
    add("--fps", type=float, help="frames a second of all clips, by time stamps; slower files repeat frames")
    add("--max-fps", type=float, help="faster clips leave out frames")
    add("--place", help="part taken of a longer clip: start, middle or random (middle)")
    add("--clips-per-file", type=int, help="so many clips of a file that is long enough (1)")
    add("--cuts", action="store_true", help="shorten clips to their longest part without a scene cut")
    add("--multiple", type=int, help="height and width become multiples of this (16)")
    add("--max-pixels", type=int, help="height x width at most; aspect ratio is kept (65536)")
    add("--max-tokens", type=int, help="of a clip: one is time_factor frames of multiple x multiple pixels")
    add("--resolution", help="largest that is allowed, or drawn at random: uniform or navit (largest)")
    add("--min-pixels", type=int, help="smallest height x width that is drawn (four multiples a side)")
    add("--framing", help="native, or square: crop to a square (native)")
    add("--variants", type=int, help="sizes or places of each clip that epochs take in turn (1)")
    add("--mirror", action="store_true", help="of each clip also the mirror image, which epochs take in turn")
    add("--missing-caption", help="refuse, or empty (refuse)")
    add("--holdout", type=float, help="share of clips held out (0.05)")
    add("--seed", type=int, help="of the held-out split, places and sizes (0)")
    add("--workers", type=int, help="processes that decode; 0: this one, unprotected from crashes (1)")
    add("--seconds", type=float, help="a file that takes longer is refused (60)")
    add("--shard", help="i/n: make every n-th part of 128 files; who is last joins them (0/1)")
    p.add_argument("--beam", help="build by Apache Beam; its pipeline options, such as --beam=--runner=DirectRunner")
    p.set_defaults(function=build, changes=[])


def build(options) -> None:
    from sora_jax.data.build import build
    from sora_jax.data.inspect import inspect

    config = build_config(options)
    if options.beam is None:
        dataset = build(config)
    else:
        from sora_jax.data.beam import build_with_beam

        dataset = build_with_beam(config, options.beam)
    if dataset is None:
        print(f"this share is done; {options.out} appears when the others are, too")
        return
    print(inspect(options.out).text)
    if dataset.refused:
        print(f"{len(dataset.refused)} files are not used: {as_path(options.out) / 'refused.jsonl'} says why")


def build_config(options):
    """The BuildConfig of the command line: of the config file, or of one source, changed by what is given."""
    import dataclasses

    from sora_jax.config import check, from_dict, load
    from sora_jax.data.prepare import BuildConfig

    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(BuildConfig) if hasattr(options, f.name)}
    single = [name for name in (*SOURCE_FLAGS, "world") if hasattr(options, name)]
    if options.config:
        check(not single, f"--{single and single[0]} is given beside --config; change --config.sources[0] instead")
        return dataclasses.replace(from_dict(BuildConfig, load(options.config, options.changes)), **given)
    check(not options.changes, "--config.NAME=VALUE is given without --config; give the file, or --NAME=VALUE")
    return BuildConfig(
        sources=(source_config(options, given.get("seed", 0), given.get("holdout")),), **{"workers": 1} | given
    )


def source_config(options, seed: int, holdout: float):
    """The one source of the command line."""
    import dataclasses

    from sora_jax.config import choose
    from sora_jax.data.prepare import BuildConfig
    from sora_jax.data.sources import SourceConfig
    from sora_jax.data.world import FULL_WORLD, WorldConfig

    values = {field: getattr(options, flag) for flag, field in SOURCE_FLAGS.items() if hasattr(options, flag)}
    if values.get("name") == "world":
        world = choose("--world", getattr(options, "world", "simple"), {"simple": WorldConfig(), "full": FULL_WORLD})
        share = BuildConfig.holdout if holdout is None else holdout
        values |= {
            "world": dataclasses.replace(world, seed=seed),
            "world_held_out": round(values.get("limit", 0) * share),
        }
    return SourceConfig(**values)


def encode(options) -> None:
    from sora_jax import commands
    from sora_jax.data.latents import LatentCache
    from sora_jax.data.parts import Share
    from sora_jax.models.pretrained import PretrainedText
    from sora_jax.models.tiling import TilingConfig
    from sora_jax.train.encode import encode_dataset

    commands.use_compilation_cache()
    text = PretrainedText(options.text_encoder, options.text_tokens) if options.text_encoder else None
    share = Share.parse(options.shard)
    tiles = TilingConfig.parse(options.tile, options.tile_overlap)
    folders = options.autoencoder, options.data, options.out
    if encode_dataset(*folders, options.batch, options.shapes, share, text, tiles=tiles):
        print(f"latents of {len(LatentCache(options.out))} clips in {options.out}")
    else:
        print(f"this share is done; {options.out} appears when the others are, too")


def _convert(commands) -> None:
    example = (
        "example:\n  sora-jax convert --from=diffusers-vae --weights=sd-vae-ft-ema --out=runs/kl4\n"
        "  sora-jax convert --from=dit --weights=DiT-XL-2-256x256.safetensors --autoencoder=runs/kl4 --out=runs/dit\n"
        "  sora-jax convert --to=diffusers-dit --workdir=runs/dit --out=DiT-XL-2-256"
    )
    p = _parser(commands.add_parser, "convert", help="published weights -> run folder, and back", epilog=example)
    about = "dit (official checkpoint), diffusers-dit or diffusers-vae (folders)"
    way = p.add_mutually_exclusive_group(required=True)
    way.add_argument("--from", dest="source", metavar="FORMAT", help=f"read {about}, into a run folder")
    way.add_argument("--to", metavar="FORMAT", help=f"write {about}, of a run folder")
    p.add_argument("--weights", type=as_path, help="for --from: file, or folder with config.json")
    p.add_argument("--autoencoder", type=as_path, help="for --from: the run whose frozen autoencoder belongs to it")
    p.add_argument("--heads", type=int, help="for --from=dit: attention heads, of a network of none of DiT's sizes")
    p.add_argument("--workdir", type=as_path, help="for --to: run folder")
    p.add_argument("--out", type=as_path, required=True, help="run folder, file or folder to write")
    p.set_defaults(function=convert)


def convert(options) -> None:
    from sora_jax.config import check
    from sora_jax.convert.command import convert_from, convert_to

    needed, spare = ("weights", ("workdir",)) if options.source else ("workdir", ("weights", "autoencoder", "heads"))
    way = "--from" if options.source else "--to"
    check(getattr(options, needed) is not None, f"--{needed} is not given; {way} needs it")
    for name in spare:
        check(getattr(options, name) is None, f"--{name} is {str(getattr(options, name))!r}; {way} takes none")
    if options.source:
        said = convert_from(options.source, options.weights, options.out, options.autoencoder, options.heads)
    else:
        said = convert_to(options.to, options.workdir, options.out)
    print("\n".join([*said, str(options.out)]))


def _plan(commands) -> None:
    example = (
        "examples:\n  sora-jax plan --config=configs/sora.py:3b --topology=v5p:4x4x8\n"
        "  sora-jax plan --config=configs/sora.py:14b --topology=v5p:4x4x8 --slices=2 --pack-length=16384 --json\n"
        "  sora-jax plan --config=configs/sora.py:b --topology=v5e:4x4 --what=sample --config.model.remat=dots"
    )
    about = "what a run would need of TPUs or GPUs that are not here: memory, FLOPs, network, time"
    p = _parser(commands.add_parser, "plan", help=about, epilog=example)
    p.add_argument("--config", required=True, help="as for train; --config.a.b=VALUE changes it")
    p.add_argument(
        "--topology", required=True, help="chip and shape of a slice, in chips: v5e:4x4, v5p:4x4x8, v6e:16x16, h100:8"
    )
    p.add_argument(
        "--slices", type=int, default=1, help="so many slices (nodes of GPUs), joined by the data-centre network"
    )
    p.add_argument("--pack-length", type=int, help="tokens of a pack, in place of config.packing.length")
    p.add_argument(
        "--what", default="train", help="train, sample (of a transformer) or autoencoder (encode and decode)"
    )
    p.add_argument("--json", action="store_true", help="print all figures as JSON")
    p.set_defaults(function=plan, changes=[])


def plan(options) -> None:
    from sora_jax.commands import run_config
    from sora_jax.config import load
    from sora_jax.plan.command import plan

    config = run_config(load(options.config, options.changes))
    print(plan(config, options.topology, options.slices, options.pack_length, options.what, options.json))


def inspect(options) -> None:
    from sora_jax.data.inspect import inspect

    found = inspect(options.folder, options.pack_length)
    print(f"{found.text}\ncontact sheet    {found.sheet}\nhistogram        {found.histogram}")


if __name__ == "__main__":
    sys.exit(main())
