"""Train and sample text-to-video models. `sora-jax COMMAND --help` shows each command with an example."""

import argparse
import difflib
import functools
import re
import sys
from collections.abc import Mapping

from sora_jax import __version__, cli_evaluate
from sora_jax.errors import Stopped, UserError
from sora_jax.files import as_path, storage_message

EXAMPLES = """\
examples:
  sora-jax quickstart                                   a text-to-video model from scratch, in about ten minutes
  sora-jax data build --path=clips --out=data/clips --max-frames=9 --multiple=8 --max-pixels=384
  sora-jax train --config=configs/tiny.py:autoencoder --workdir=runs/autoencoder --config.data=data/clips
  sora-jax data encode --autoencoder=runs/autoencoder --data=data/clips --out=data/latents
  sora-jax train --config=configs/tiny.py --workdir=runs/video --config.latents=data/latents
  sora-jax sample --workdir=runs/video --prompt="a fox runs" --frames=9 --height=16 --width=24 --out=fox.gif
  sora-jax data inspect data/clips
"""


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
    options, rest = make_parser().parse_known_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else arguments
    prefixes = {"--config.": "changes", "--sampling.": "sampling"}
    prefixes = {prefix: name for prefix, name in prefixes.items() if hasattr(options, name)}
    for prefix, name in prefixes.items():
        setattr(options, name, [a.removeprefix(prefix) for a in rest if a.startswith(prefix)])
    rest = [a for a in rest if not a.startswith(tuple(prefixes))]
    if rest:
        known = re.findall(r"^ +(?:-h, )?(--[a-z-]+)", options.parser.format_help(), re.MULTILINE)
        known += [f"{prefix}NAME" for prefix in prefixes]
        near = difflib.get_close_matches(rest[0].split("=")[0], dict.fromkeys(known), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        options.parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    return options


def run(options: argparse.Namespace) -> int:
    """Call the function of the command; it imports what it needs."""
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
    """Build the parser, with one subparser per command."""
    parser = _parser(argparse.ArgumentParser, prog="sora-jax", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--version", action="version", version=f"sora_jax {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _quickstart(commands)
    _train(commands)
    _sample(commands)
    _calibrate(commands)
    _data(commands)
    _evaluate(commands)
    _convert(commands)
    _plan(commands)
    return parser


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keep the line breaks of examples, and show the default of each option that has one."""

    defaults: Mapping[str, object] = {}  # by option; they replace those of the parser

    def _get_help_string(self, action):
        default = self.defaults.get(action.dest, action.default)
        hidden = isinstance(default, bool) or default in (None, "", [], argparse.SUPPRESS)
        return action.help if hidden else f"{action.help} (default: {default})"


class _BuildHelp(_Help):
    """Show the defaults of the configs that `data build` fills."""

    def format_help(self):
        self.defaults = build_defaults()  # not before help is asked for: the import takes 0.3 seconds
        return super().format_help()


def _parser(make, *names, formatter_class=_Help, **options) -> argparse.ArgumentParser:
    parser = make(*names, formatter_class=formatter_class, allow_abbrev=False, **options)
    parser.set_defaults(parser=parser)  # the innermost one wins: its options are those to suggest
    return parser


def _quickstart(commands) -> None:
    example = "example:\n  sora-jax quickstart --workdir=runs/quickstart"
    about = "train a small text-to-video model from scratch and sample it, in about ten minutes"
    p = _parser(commands.add_parser, "quickstart", help=about, epilog=example)
    p.add_argument("--workdir", type=as_path, default=as_path("runs/quickstart"), help="folder for all outputs")
    p.add_argument("--config", help="config file, such as configs/quickstart.py:short (default: configs/quickstart.py)")
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
    p = _parser(commands.add_parser, "train", help="train an autoencoder or a denoiser", epilog=example)
    about = "configs/FILE.py or configs/FILE.py:VARIANT; --config.a.b=VALUE overrides a field"
    p.add_argument("--config", required=True, help=about)
    p.add_argument("--workdir", type=as_path, required=True, help="run folder; a run found there is resumed")
    p.add_argument("--dry-run", action="store_true", help="print the resolved config and parameter counts, then exit")
    p.add_argument("--distributed", action="store_true", help="run as one of several processes: TPU pods, SLURM, GKE")
    p.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, if JAX cannot detect it")
    p.add_argument("--processes", type=int, metavar="N", help="number of processes, with --coordinator")
    p.add_argument("--process", type=int, metavar="I", help="index of this process, from 0, with --coordinator")
    p.set_defaults(function=train, changes=[])


def train(options) -> None:
    from sora_jax import commands
    from sora_jax.config import load
    from sora_jax.kinds import run, run_config
    from sora_jax.parallel import distributed

    config = run_config(load(options.config, options.changes))
    if options.dry_run:
        print(run.describe(config))
        return
    others = (options.coordinator, options.processes, options.process)
    if options.distributed or others != (None, None, None):
        distributed.start(*others)
    commands.use_compilation_cache()
    run.train(config, options.workdir)


def _sample(commands) -> None:
    example = (
        'examples:\n  sora-jax sample --workdir=runs/quickstart/transformer --prompt="a red circle moves left"'
        " --frames=9 --height=24 --width=36 --out=circle.gif\n"
        "  sora-jax sample --workdir=runs/dit --class=207,360 --size=256 --steps=250 --guidance=4 --out=grid.png\n"
        "  sora-jax sample --workdir=runs/dit --class=88 --solver=dpm3 --steps=20 --sampling.guidance.channels=0\n"
        '  sora-jax sample --workdir=runs/video --video=fox.mp4 --extend=+16 --prompt="a fox runs" --out=longer.mp4\n'
        '  sora-jax sample --workdir=runs/video --prompt="waves" --loop --frames=16 --out=waves.gif\n'
        "--sampling.NAME=VALUE overrides any field of the run's config.sampling"
    )
    p = _parser(commands.add_parser, "sample", help="generate clips from prompts or class labels", epilog=example)
    p.add_argument("--like", type=as_path, metavar="FILE", help="make a generated file again; other options change it")
    p.add_argument("--workdir", type=as_path, help="run folder of a trained denoiser")
    p.add_argument(
        "--prompt",
        action="append",
        default=[],
        help='text prompt; "0: ... 24: ..." changes in time; may be given several times',
    )
    p.add_argument("--prompts-file", type=as_path, help="text with one prompt a line; .jsonl or .csv: more columns")
    about = "rewrite prompts as captions: world, http://HOST/v1#MODEL (OpenAI's interface) or transformers:MODEL"
    p.add_argument("--expand", default="", metavar="HOW", help=about)
    p.add_argument("--class", dest="classes", action="append", metavar="N,N..", help="class labels; one file of all")
    p.add_argument("--negative", default="", help="negative prompt, for guidance")
    p.add_argument("--size", type=int, help="height and width of a square clip, in pixels")
    preview = "(default: as in the run's first preview"
    p.add_argument("--frames", type=int, help=f"number of frames {preview}; 1 for a .png)")
    p.add_argument("--height", type=int, help=f"in pixels {preview})")
    p.add_argument("--width", type=int, help=f"in pixels {preview})")
    p.add_argument("--steps", help="solver steps; with respaced spacing also 10,15,20 or ddim50 (default: the run's)")
    p.add_argument("--solver", help="euler, heun, ddpm, ddim, dpm2, dpm3, unipc... (default: the run's)")
    p.add_argument("--guidance", type=float, help="guidance scale; 1: no guidance (default: the run's)")
    p.add_argument("--skip-steps", action="store_true", help="skip the blocks at the steps that calibrate has chosen")
    p.add_argument("--seed", type=int, default=0, help="seed of the noise")
    p.add_argument("--fps", type=float, help="frames per second of the file (default: as in the run's previews)")
    p.add_argument("--upscale", type=int, default=1, help="integer factor that enlarges pixels, to view tiny clips")
    p.add_argument("--checkpoint", default="newest", help="newest, best (of those kept by loop.keep_best) or a step")
    p.add_argument("--autoencoder", type=as_path, help="run folder of an autoencoder, if the run contains none")
    _tile(p)
    p.add_argument("--out", type=as_path, help=".mp4, .gif or .webp; .png for one frame; several prompts: numbered")
    _tasks(p.add_argument_group("what to do with clips", "files are videos or images of any size and kind"))
    p.set_defaults(function=sample, sampling=[], clip=None, rows=None)


def _calibrate(commands) -> None:
    example = "example:\n  sora-jax calibrate --workdir=runs/video --error=0.12 --most=2"
    about = "choose the steps at which sample --skip-steps skips the blocks"
    p = _parser(commands.add_parser, "calibrate", help=about, epilog=example)
    p.add_argument("--workdir", type=as_path, required=True, help="run folder of a trained denoiser")
    p.add_argument("--error", type=float, default=0.12, help="bound of the accumulated error; larger skips more")
    p.add_argument("--most", type=int, default=2, help="steps that are skipped in a row at most")
    p.add_argument("--steps", help="solver steps (default: the run's)")
    p.add_argument("--solver", help="solver that calls the model once a step (default: the run's)")
    p.add_argument("--guidance", type=float, help="guidance scale (default: the run's)")
    p.set_defaults(function=calibrate, sampling=[])


def calibrate(options) -> None:
    from sora_jax import commands

    commands.use_compilation_cache()
    print(commands.calibrate(options))


def _tasks(p) -> None:
    picture = dict(action="append", default=[], metavar="FILE[@FRAME]")
    p.add_argument("--image", **picture, help="the first frame, or frame FRAME; may be given several times")
    p.add_argument("--sketch", **picture, help="dark lines on white: the edges of a frame (first); for runs trained so")
    p.add_argument("--edges", action="store_true", help="--sketch names pictures, whose edges are drawn")
    p.add_argument("--video", type=as_path, metavar="FILE", help="a clip, for one of the next six options")
    p.add_argument("--extend", type=int, metavar="N", help="make N frames after the clip; -N: before it")
    p.add_argument("--loop", action="store_true", help="a loop: of the prompt alone, or one that closes the clip")
    p.add_argument("--mask", type=as_path, metavar="FILE", help="make anew what is white in this image or video")
    p.add_argument("--pad", metavar="L,T,R,B", help="make so many more pixels left, above, right, below")
    p.add_argument("--strength", type=float, metavar="S", help="edit: 0 keeps the clip, 1 ignores it")
    about = "what the clip shows: change that to what --prompt says, and keep the rest"
    p.add_argument("--from-prompt", metavar="TEXT", help=about)
    p.add_argument("--connect", default="", metavar="FILE,FILE", help="fill the gap between two clips")
    p.add_argument(
        "--gap", type=int, help="frames to make between clips, or to close a loop; a multiple of the time factor (8)"
    )
    p.add_argument("--context", type=int, default=9, help="frames of a clip at most that a continuation sees")
    about = "sample a longer clip in windows of so many frames (default: those of the previews, if it is far longer)"
    p.add_argument("--window", type=int, metavar="FRAMES", help=about)
    p.add_argument(
        "--long", metavar="HOW", help="windows (one after the other; the usual way) or rolling (noise levels)"
    )
    about = "how given frames condition: times (at time 0), or replace, for runs trained without (default: the run's)"
    p.add_argument("--condition", metavar="HOW", help=about)
    p.add_argument("--resamplings", type=int, metavar="N", help="with --condition=replace: repeat each step N times")
    about = "guide by given or carried frames so strongly; 1: not (default: the run's)"
    p.add_argument("--history-guidance", type=float, metavar="W", help=about)
    about = (
        "noise level of those frames where guidance leads away from; 1: nothing is left of them (default: the run's)"
    )
    p.add_argument("--history-level", type=float, metavar="S", help=about)
    about = "sample at half the size first; the clip is then made of that from the noise level S on, such as 0.7"
    p.add_argument("--draft", type=float, metavar="S", help=about)
    p.add_argument("--keep-pixels", action="store_true", help="put the very pixels that were given into the result")


def _tile(parser) -> None:
    about = "process clips by one program in chunks and tiles of this size, in pixels; 0: all; encode takes auto, too"
    parser.add_argument("--tile", default="", metavar="FRAMESxHEIGHTxWIDTH", help=about)
    about = "overlap of tiles, as a fraction of a tile, where they are not exact"
    parser.add_argument("--tile-overlap", type=float, default=0.25, help=about)


def sample(options) -> None:
    from sora_jax import commands

    if options.like:
        recipe = commands.like(options)
        options = parsed([options.arguments[0], *recipe["command"], *options.arguments[1:]])
        options.clip, options.rows = recipe["clip"], recipe["rows"]
    commands.use_compilation_cache()
    for path in commands.sample(options):
        print(path)


def _data(commands) -> None:
    p = _parser(commands.add_parser, "data", help="build, encode and inspect datasets", epilog=EXAMPLES)
    verbs = p.add_subparsers(title="verbs", required=True, metavar="build|encode|inspect|caption")
    _build(verbs)
    _encode(verbs)
    example = "example:\n  sora-jax data inspect data/clips"
    p = _parser(verbs.add_parser, "inspect", help="summarise a dataset folder", epilog=example)
    p.add_argument("folder", type=as_path, help="dataset folder")
    p.add_argument("--pack-length", type=int, help="tokens per pack for the packing statistics (default: two clips)")
    p.set_defaults(function=inspect)
    example = (
        "example:\n  sora-jax data caption --path=clips --how=transformers:Salesforce/blip-image-captioning-base"
        " --out=clips/captions.csv"
    )
    p = _parser(verbs.add_parser, "caption", help="caption the clips of a folder by a model", epilog=example)
    p.add_argument("--path", type=as_path, required=True, help="folder of videos and images")
    p.add_argument("--how", required=True, help="world (its oracle) or transformers:MODEL (an image-to-text model)")
    p.add_argument("--kind", default="synthetic", help="kind of the captions; the column is caption_KIND")
    p.add_argument(
        "--out", type=as_path, required=True, help="table to write; as captions.csv in the folder it is used"
    )
    p.set_defaults(function=caption)


def _encode(verbs) -> None:
    example = (
        "example:\n  sora-jax data encode --autoencoder=runs/autoencoder --data=data/clips --out=data/latents\n"
        "  sora-jax data encode --autoencoder=runs/autoencoder --data=data/clips --out=data/latents --shard=0/4\n"
        "  sora-jax data encode --autoencoder=runs/autoencoder --data=data/clips --out=data/latents --tile=auto"
    )
    p = _parser(verbs.add_parser, "encode", help="encode a dataset folder into a latent cache", epilog=example)
    p.add_argument("--autoencoder", type=as_path, required=True, help="run folder of a trained autoencoder")
    p.add_argument("--data", type=as_path, required=True, help="dataset folder")
    p.add_argument("--out", type=as_path, required=True, help="latent cache to write")
    p.add_argument("--batch", type=int, default=16, help="batch size, in clips (or tiles)")
    _tile(p)
    p.add_argument("--shapes", type=int, default=4, help="maximum number of padded shapes; each compiles a program")
    p.add_argument("--shard", default="0/1", help="i/n: encode every n-th part; the last process to finish merges them")
    p.add_argument("--text-encoder", help="embed captions with this T5, UMT5 or CLIP of transformers (name or folder)")
    p.add_argument("--text-tokens", type=int, default=128, help="maximum tokens of a caption, with --text-encoder")
    about = "of each clip, encoded alone, for models that are given some (config.diffusion.given)"
    p.add_argument("--key-frames", type=int, default=0, metavar="K", help=f"frames {about}")
    p.add_argument("--sketches", type=int, default=0, metavar="K", help=f"edge maps of frames {about}")
    p.set_defaults(function=encode)


# Option of `data build` -> field of SourceConfig
SOURCE_FLAGS = dict(source="name", path="path", strip_frames="strip_frames", strip_fps="strip_fps", limit="limit")
WORLD = "simple"


def _build(verbs) -> None:
    example = (
        "example:\n  sora-jax data build --path=clips --out=data/clips --max-frames=17 --multiple=16\n"
        "  sora-jax data build --source=webdataset --path='shards/*.tar' --out=data/clips --workers=8\n"
        "  sora-jax data build --source=world --limit=2000 --multiple=8 --out=data/world\n"
        "  sora-jax data build --config=configs/data.py:mixed --out=data/mixed      several sources"
    )
    about = "build a dataset folder from videos and images"
    p = _parser(verbs.add_parser, "build", help=about, epilog=example, formatter_class=_BuildHelp)
    p.add_argument("--out", required=True, help="dataset folder to write")
    p.add_argument("--config", help="config file with a list of sources; other options override it")
    # An option that is not given leaves the field of --config, or the default of the dataclass, as it is.
    add = functools.partial(p.add_argument, default=argparse.SUPPRESS)
    add("--source", help="folder, webdataset, tfds:NAME[:CONFIG], array_record or world")
    add("--path", help="folder, tar shards or ArrayRecord files to read")
    add("--limit", type=int, help="maximum number of entries of the source, evenly spaced")
    add("--strip-frames", type=int, help="split each image into so many frames, from left to right")
    add("--strip-fps", type=float, help="frames per second of such strips")
    add("--world", help="variant of the embedded world: simple or full")
    add("--max-frames", type=int, help="maximum length; clips are cut to 1 + time_factor * k frames")
    add("--time-factor", type=int, help="temporal compression of the autoencoder you will train")
    add("--length-rule", help="cut to the next shorter allowed length, or pad to the next longer")
    add("--min-frames", type=int, help="refuse clips that end shorter")
    add("--fps", type=float, help="resample all clips to this frame rate, by time stamps")
    add("--max-fps", type=float, help="drop frames of clips with a higher frame rate")
    add("--place", help="part to take of a longer clip: start, middle or random")
    add("--clips-per-file", type=int, help="clips to take of a file that is long enough")
    add("--cuts", action="store_true", help="shorten clips to their longest part without a scene cut")
    add("--multiple", type=int, help="height and width become multiples of this")
    add("--max-pixels", type=int, help="maximum height x width; the aspect ratio is kept")
    add("--max-tokens", type=int, help="maximum tokens; one is time_factor frames of multiple x multiple pixels")
    add("--resolution", help="largest that is allowed, or sampled: uniform or navit")
    add("--min-pixels", type=int, help="minimum height x width when sampled (default: (4 * multiple)^2)")
    add("--framing", help="native aspect ratio, or square crops: native or square")
    add("--variants", type=int, help="sizes or places of each clip; epochs take them in turn")
    add("--mirror", action="store_true", help="add the mirror image of each clip; epochs take the two in turn")
    add("--missing-caption", help="refuse clips without a caption, or use an empty one: refuse or empty")
    add("--holdout", type=float, help="fraction of clips held out")
    add("--seed", type=int, help="seed of the held-out split, places and sizes")
    add("--workers", type=int, help="decoding processes; 0: decode in this one, unprotected from crashes")
    add("--seconds", type=float, help="refuse a file that takes longer to decode")
    add("--shard", help="i/n: build every n-th part of 128 files; the last process to finish merges them")
    p.add_argument("--beam", help="build with Apache Beam; its pipeline options, such as --beam=--runner=DirectRunner")
    p.set_defaults(function=build, changes=[])


def build_defaults() -> dict:
    """Return the default of each option of `data build`: that of the config field which it sets."""
    from sora_jax.data.prepare import BuildConfig
    from sora_jax.data.sources import SourceConfig

    source = {flag: getattr(SourceConfig, field) for flag, field in SOURCE_FLAGS.items()}
    return vars(BuildConfig) | source | {"world": WORLD}


def build(options) -> None:
    """Build a dataset folder and print its summary."""
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
    """Return the BuildConfig of --config, or that of a single source, with the fields that options set."""
    import dataclasses

    from sora_jax.config import check, from_dict, load
    from sora_jax.data.prepare import BuildConfig

    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(BuildConfig) if hasattr(options, f.name)}
    if options.config is None:
        first = next(iter(options.changes), "")
        check(not first, f"--config is not given; it must be the file that --config.{first} changes")
        return BuildConfig(sources=(source_config(options),), **given)
    for flag in (*SOURCE_FLAGS, "world"):
        name, value = flag.replace("_", "-"), getattr(options, flag, None)
        check(value is None, f"--{name} is {value!r}; beside --config it must be a field of --config.sources[0]")
    return dataclasses.replace(from_dict(BuildConfig, load(options.config, options.changes)), **given)


def source_config(options):
    """Return the SourceConfig of the options."""
    import dataclasses

    from sora_jax.config import choose
    from sora_jax.data.prepare import BuildConfig
    from sora_jax.data.sources import SourceConfig
    from sora_jax.data.world import FULL_WORLD, WorldConfig

    values = {field: getattr(options, flag) for flag, field in SOURCE_FLAGS.items() if hasattr(options, flag)}
    if values.get("name") == "world":
        world = choose("--world", getattr(options, "world", WORLD), {"simple": WorldConfig(), "full": FULL_WORLD})
        seed = getattr(options, "seed", BuildConfig.seed)
        holdout = getattr(options, "holdout", BuildConfig.holdout)
        values["world"] = dataclasses.replace(world, seed=seed)
        values["world_held_out"] = round(values.get("limit", 0) * holdout)
    return SourceConfig(**values)


def encode(options) -> None:
    """Encode a dataset folder into a latent cache."""
    from sora_jax import commands
    from sora_jax.data.guides import GuideCounts
    from sora_jax.data.latents import LatentCache
    from sora_jax.data.share import Share
    from sora_jax.models.pretrained import PretrainedText
    from sora_jax.models.tiling import TilingConfig
    from sora_jax.train.encode import EncodeOptions, encode_dataset

    commands.use_compilation_cache()
    text = PretrainedText(options.text_encoder, options.text_tokens) if options.text_encoder else None
    share = Share.parse(options.shard)
    choose_tile = options.tile == "auto"
    tiles = TilingConfig.parse("" if choose_tile else options.tile, options.tile_overlap)
    folders = options.autoencoder, options.data, options.out
    guides = GuideCounts(options.key_frames, options.sketches)
    how = dict(tiles=tiles, choose_tile=choose_tile, guides=guides)
    chosen = EncodeOptions(options.batch, options.shapes, share, text, **how)
    if encode_dataset(*folders, chosen):
        print(f"latents of {len(LatentCache(options.out))} clips in {options.out}")
    else:
        print(f"this share is done; {options.out} appears when the others are, too")


def _evaluate(commands) -> None:
    p = _parser(commands.add_parser, "evaluate", help=cli_evaluate.ABOUT, epilog=cli_evaluate.EXAMPLE)
    cli_evaluate.add_options(p)
    _tile(p)
    p.set_defaults(tile=None, tile_overlap=None)  # which tells if they are given: they are for autoencoders alone


def _convert(commands) -> None:
    example = (
        "example:\n  sora-jax convert --from=diffusers-vae --weights=sd-vae-ft-ema --out=runs/kl4\n"
        "  sora-jax convert --from=dit --weights=DiT-XL-2-256x256.safetensors --autoencoder=runs/kl4 --out=runs/dit\n"
        "  sora-jax convert --to=diffusers-dit --workdir=runs/dit --out=DiT-XL-2-256"
    )
    about = "import published weights into a run folder, or export them"
    p = _parser(commands.add_parser, "convert", help=about, epilog=example)
    about = "dit (official checkpoint), diffusers-dit or diffusers-vae (folders)"
    way = p.add_mutually_exclusive_group(required=True)
    way.add_argument("--from", dest="source", metavar="FORMAT", help=f"import {about}")
    way.add_argument("--to", metavar="FORMAT", help=f"export {about}")
    p.add_argument("--weights", type=as_path, help="with --from: file, or folder with config.json")
    p.add_argument("--autoencoder", type=as_path, help="with --from: run folder of the autoencoder that decodes it")
    p.add_argument("--heads", type=int, help="with --from=dit: attention heads, if the size is none of DiT's")
    p.add_argument("--workdir", type=as_path, help="with --to: run folder")
    p.add_argument("--out", type=as_path, required=True, help="run folder, file or folder to write")
    p.set_defaults(function=convert)


def convert(options) -> None:
    """Import or export published weights."""
    from sora_jax.config import check
    from sora_jax.convert.command import convert_from, convert_to

    needed, spare = ("weights", ("workdir",)) if options.source else ("workdir", ("weights", "autoencoder", "heads"))
    way = "--from" if options.source else "--to"
    check(getattr(options, needed) is not None, f"--{needed} is not given; it must be, with {way}")
    for name in spare:
        value = getattr(options, name)
        check(value is None, f"--{name} is {str(value)!r}; it must not be given with {way}")
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
    about = "estimate memory, FLOPs, communication and time of a run on TPUs or GPUs that are not attached"
    p = _parser(commands.add_parser, "plan", help=about, epilog=example)
    p.add_argument("--config", required=True, help="as for train; --config.a.b=VALUE overrides a field")
    about = "chip and shape of a slice, in chips: v5e:4x4, v5p:4x4x8, v6e:16x16, h100:8"
    p.add_argument("--topology", required=True, help=about)
    p.add_argument("--slices", type=int, default=1, help="number of slices (nodes of GPUs) joined by the network")
    p.add_argument("--pack-length", type=int, help="tokens per pack (default: config.packing.length)")
    p.add_argument("--what", default="train", help="train, sample (a denoiser) or autoencoder (encode and decode)")
    p.add_argument("--json", action="store_true", help="print all figures as JSON")
    p.set_defaults(function=plan, changes=[])


def plan(options) -> None:
    from sora_jax.config import load
    from sora_jax.kinds import kind_of, run_config
    from sora_jax.plan.command import PlanOptions, plan

    config = run_config(load(options.config, options.changes))
    chosen = PlanOptions(options.topology, options.slices, options.pack_length, options.what, options.json)
    print(plan(kind_of(config), config, chosen))


def caption(options) -> None:
    """Caption the clips of a folder and print what came of it."""
    from sora_jax.data.recaption import caption_folder

    written, refused = caption_folder(options.path, options.how, options.out, options.kind)
    print(f"{written} clips captioned in {options.out}, {refused} not readable")


def inspect(options) -> None:
    """Print the summary of a dataset folder."""
    from sora_jax.data.inspect import inspect

    found = inspect(options.folder, options.pack_length)
    print(f"{found.text}\ncontact sheet    {found.sheet}\nhistogram        {found.histogram}")


if __name__ == "__main__":
    sys.exit(main())
