"""Parse the options of `sora-jax sample` and `sora-jax calibrate`."""

import argparse

from sora_jax import console
from sora_jax.config import check
from sora_jax.files import as_path
from sora_jax.parsers.base import add_json, add_tiles, make_parser
from sora_jax.parsers.fields import list_fields


def add_sample(commands) -> argparse.ArgumentParser:
    """Add the command `sample`; return its parser."""
    example = (
        'examples:\n  sora-jax sample --prompt="a red circle moves left"\n'
        '  sora-jax sample --workdir=runs/quickstart/transformer --prompt="a red circle moves left"'
        " --frames=9 --height=24 --width=36 --out=circle.gif\n"
        "  sora-jax sample --workdir=runs/dit --class=207,360 --size=256 --steps=250 --guidance=4 --out=grid.png\n"
        "  sora-jax sample --workdir=runs/dit --class=88 --solver=dpm3 --steps=20 --sampling.guidance.channels=0\n"
        '  sora-jax sample --workdir=runs/video --video=fox.mp4 --extend=+16 --prompt="a fox runs" --out=longer.mp4\n'
        '  sora-jax sample --workdir=runs/video --prompt="waves" --loop --frames=16 --out=waves.gif\n'
        "  sora-jax sample --workdir=runs/video --vbench=VBench_full_info.json --out=vbench/video\n"
        "--sampling.NAME=VALUE overrides any field of the run's config.sampling; with --workdir, --help lists them"
    )
    p = make_parser(commands.add_parser, "sample", help="generate clips from prompts or class labels", epilog=example)
    p.add_argument("--like", type=as_path, metavar="FILE", help="make a generated file again; other options change it")
    about = "run folder, exported model, or the name of one that comes with the package (default: world)"
    p.add_argument("--workdir", type=as_path, help=about)
    p.add_argument(
        "--prompt",
        action="append",
        default=[],
        help='text prompt; "0: ... 24: ..." changes in time; may be given several times',
    )
    p.add_argument("--prompts-file", type=as_path, help="text with one prompt a line; .jsonl or .csv: more columns")
    about = "VBench's list of prompts, .json or .txt: write those clips PROMPT-INDEX.mp4 that the folder --out lacks"
    p.add_argument("--vbench", type=as_path, metavar="FILE", help=about)
    about = "with --vbench: clips of each prompt, with seeds from --seed on (default: 5; temporal_flickering: 25)"
    p.add_argument("--samples", type=int, metavar="N", help=about)
    about = "rewrite prompts as captions: world, http://HOST/v1#MODEL (OpenAI's interface) or transformers:MODEL"
    p.add_argument("--expand", default="", metavar="HOW", help=about)
    p.add_argument("--class", dest="classes", action="append", metavar="N,N..", help="class labels; one file of all")
    p.add_argument("--negative", default="", help="negative prompt, for guidance")
    p.add_argument("--size", type=int, help="height and width of a square clip, in pixels")
    preview = "(default: as in the run's first preview"
    p.add_argument("--frames", type=int, help=f"number of frames {preview}; 1 for a .png)")
    p.add_argument("--height", type=int, help=f"in pixels {preview})")
    p.add_argument("--width", type=int, help=f"in pixels {preview})")
    p.add_argument(
        "--steps", help="solver steps; respaced: also 10,15,20 or ddim50; times: a list (default: the run's)"
    )
    p.add_argument("--solver", help="euler, heun, ddpm, ddim, dpm2, dpm3, unipc... (default: the run's)")
    p.add_argument("--guidance", type=float, help="guidance scale; 1: no guidance (default: the run's)")
    p.add_argument("--skip-steps", action="store_true", help="skip the blocks at the steps that calibrate has chosen")
    p.add_argument("--seed", type=int, default=0, help="seed of the noise")
    about = "numbers that key the noise, one for each clip (default: 1,2..); the third of several prompts alone: 3"
    p.add_argument("--clip", dest="clip_ids", action="append", metavar="N,N..", help=about)
    p.add_argument("--fps", type=float, help="frames per second of the file (default: as in the run's previews)")
    about = "whole factor that enlarges pixels; 1: none; auto: so that a tiny clip can be watched"
    p.add_argument("--upscale", type=upscale, default="auto", help=about)
    p.add_argument("--checkpoint", default="newest", help="newest, best (of those kept by loop.keep_best) or a step")
    p.add_argument("--autoencoder", type=as_path, help="run folder of an autoencoder, if the run contains none")
    add_tiles(p)
    about = ".mp4, .gif or .webp; .png for one frame; several prompts: numbered (default: clip.mp4, here)"
    p.add_argument("--out", type=as_path, help=about)
    add_json(p)
    list_fields(p, "--workdir")
    _tasks(p.add_argument_group("what to do with clips", "files are videos or images of any size and kind"))
    p.set_defaults(sampling=[], clip=None, rows=None)
    return p


def check_first(options: argparse.Namespace) -> None:
    """Raise a UserError for what is commonly forgotten or mistyped, before seconds are spent on importing JAX."""
    if options.workdir is not None:
        from sora_jax.train.exported import no_run, run_folder

        there = (run_folder(options.workdir) / "config.json").exists()
        check(there, no_run("--workdir", options.workdir))
    elif not options.like:
        sources = ("prompt", "prompts_file", "classes", "image", "sketch", "video", "connect", "loop")
        given = any(getattr(options, name) for name in sources)
        check(given, "there is no prompt; give --prompt or --prompts-file, or --class")


def upscale(text: str) -> int | str:
    """Parse a factor, or "auto"."""
    return text if text == "auto" else int(text)


def _tasks(p) -> None:
    picture = dict(action="append", default=[], metavar="FILE[@FRAME]")
    p.add_argument("--image", **picture, help="the first frame, or frame FRAME; may be given several times")
    p.add_argument("--sketch", **picture, help="dark lines on white: the edges of a frame (first); for runs trained so")
    p.add_argument("--edges", action="store_true", help="--sketch names pictures, whose edges are drawn")
    p.add_argument("--video", type=as_path, metavar="FILE", help="a clip, for one of the next seven options")
    p.add_argument("--extend", type=int, metavar="N", help="make N frames after the clip; -N: before it")
    p.add_argument("--loop", action="store_true", help="a loop: of the prompt alone, or one that closes the clip")
    p.add_argument("--mask", type=as_path, metavar="FILE", help="make anew what is white in this image or video")
    p.add_argument("--pad", metavar="L,T,R,B", help="make so many more pixels left, above, right, below")
    p.add_argument("--strength", type=float, metavar="S", help="edit: 0 keeps the clip, 1 ignores it")
    about = "what the clip shows: change that to what --prompt says, and keep the rest"
    p.add_argument("--from-prompt", metavar="TEXT", help=about)
    about = "make it at twice its height and width, by a run with model.low_resolution"
    p.add_argument("--upsample", action="store_true", help=about)
    about = "run folders that make what comes of it, in turn, at twice its height and width: --upsample in one command"
    p.add_argument("--then", default="", metavar="RUN,RUN..", help=about)
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
    about = "how given frames condition: clean (at time 0), or replace, for runs trained without (default: the run's)"
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


def add_calibrate(commands) -> None:
    """Add the command `calibrate`."""
    example = "example:\n  sora-jax calibrate --workdir=runs/video --error=0.12 --most=2"
    about = "choose the steps at which sample --skip-steps skips the blocks"
    p = make_parser(commands.add_parser, "calibrate", help=about, epilog=example)
    p.add_argument("--workdir", type=as_path, required=True, help="run folder or exported model")
    p.add_argument("--error", type=float, default=0.12, help="bound of the accumulated error; larger skips more")
    p.add_argument("--most", type=int, default=2, help="steps that are skipped in a row at most")
    p.add_argument("--steps", help="solver steps (default: the run's)")
    p.add_argument("--solver", help="solver that calls the model once a step (default: the run's)")
    p.add_argument("--guidance", type=float, help="guidance scale (default: the run's)")
    add_json(p)
    list_fields(p, "--workdir")
    p.set_defaults(function=calibrate, sampling=[])


def calibrate(options) -> None:
    from sora_jax.generate import command
    from sora_jax.generate.options import named_as_typed
    from sora_jax.parallel.settings import prepare_jax

    prepare_jax()
    with named_as_typed(options.arguments):
        file = command.calibrate(options)
    console.result({"file": file}, str(file))
