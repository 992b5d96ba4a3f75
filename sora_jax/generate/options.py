"""Resolve the options of `sora-jax sample`: what they leave open is taken from the run, what cannot be is refused.

All of this is done before any weights are read.
"""

import argparse
import contextlib
import dataclasses
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sora_jax.config import check, choose, override
from sora_jax.console import note
from sora_jax.data.viewing.write import check_ending
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.diffusion.solvers import SOLVERS
from sora_jax.errors import UserError
from sora_jax.files import as_path
from sora_jax.generate.doubts import Learnt
from sora_jax.generate.expand import expand_prompts
from sora_jax.generate.inputs import TaskOptions, pictures_of
from sora_jax.generate.long import Windows, windows_of
from sora_jax.generate.prompts import Row, read_prompts, spans_of
from sora_jax.generate.recipe import MadeBy, command_of, digest_of, digests_of
from sora_jax.generate.requests import Size, Wanted, check_seed, is_whole
from sora_jax.generate.rolling import check_rolling
from sora_jax.generate.run import autoencoder_folder, read_run_config
from sora_jax.generate.skipping import read_skipped
from sora_jax.generate.tasks import check_guides
from sora_jax.generate.vbench import read_list
from sora_jax.models.first_stage import FirstStageConfig
from sora_jax.models.tiling import TilingConfig
from sora_jax.train.denoiser import DenoiserRun, load_tokenizer
from sora_jax.train.exported import output_folder, run_folder
from sora_jax.train.frozen import autoencoder_config
from sora_jax.train.seen import read_seen

DEFAULT_SIZE = (17, 64, 64)
SAMPLING_FLAGS = {  # option -> field of config.sampling
    "steps": "steps",
    "solver": "solver.name",
    "guidance": "guidance.scale",
    "condition": "condition",
    "resamplings": "resamplings",
    "history-guidance": "guidance.history",
    "history-level": "guidance.history_level",
}
LONG = 4  # clips of more than so many times the frames of a run's previews are sampled in windows


@contextlib.contextmanager
def named_as_typed(words: Sequence[str]) -> Iterator[None]:
    """Name the option of a UserError as the command line has it: --steps, not sampling.steps."""
    typed = {word.split("=")[0] for word in words}
    try:
        yield
    except UserError as error:
        found = re.match(r"(?:(?:--)?sampling\.)?([a-z_]+)(\.[a-z_.]+)?(?= is |=)", str(error))
        option = f"--{found[1].replace('_', '-')}" if found else ""
        if found is None or option not in typed:
            raise
        raise type(error)(option + str(error)[found.end() :]) from error


@dataclasses.dataclass(frozen=True)
class Asked:
    """Hold what a command asks for, and the run that it asks.

    options: those of the command line, with no gaps. paths: of the files, one for each clip; one for all where they are
    pictures of classes. task: what is to be done with clips. learnt: what requests are compared with.
    """

    options: argparse.Namespace
    config: DenoiserRun
    first_stage: FirstStageConfig
    sampling: SamplingConfig
    tiles: TilingConfig
    wanted: Wanted
    task: TaskOptions
    paths: Sequence[Path]
    made_by: MadeBy
    learnt: Learnt
    stages: Sequence[Path] = ()  # runs that enlarge the clips, in turn

    @property
    def size(self) -> Size:
        """Return the (frames, height, width) of the command."""
        return self.options.frames, self.options.height, self.options.width

    @property
    def multiple(self) -> tuple[int, int]:
        """Return what heights and widths are multiples of."""
        _, rows, columns = self.config.model.patch
        return self.first_stage.space_factor * rows, self.first_stage.space_factor * columns


def resolve(options: argparse.Namespace) -> Asked:
    """Check the options of a command and fill their gaps from the run's config.

    Raises:
        UserError: they contradict each other, or the run does not take them.
    """
    check(options.vbench or options.samples is None, f"--samples is {options.samples}; it is for --vbench")
    if options.vbench:
        _check_vbench(options)
        if options.upscale == "auto":
            options.upscale = 1  # what is scored is the clip, not a larger one
    both = options.extend is not None and options.frames is not None
    check(not both, f"--frames is {options.frames}; with --extend it has no effect, leave it out")
    rows, classes, task = _rows(options), _classes(options.classes), _task_options(options)
    clip_ids = _clip_ids(options.clip_ids, max(len(rows), len(classes), 1))
    command = command_of(options)
    options = argparse.Namespace(**vars(options) | {"given": options.workdir, "workdir": run_folder(options.workdir)})
    if clip_ids and rows:
        twice = any("clip_id" in row for row in rows)
        check(not twice, "--clip is given, and --prompts-file has a column clip_id; give one of them")
        rows = [row | {"clip_id": clip_id} for row, clip_id in zip(rows, clip_ids, strict=True)]
        command = [word for word in command if not word.startswith("--clip=")]  # the rows of the recipe say which
    prompts = [row["prompt"] for row in rows]
    config = read_run_config(options.workdir)
    takes = config.model.text or config.model.classes
    check(prompts or classes or task or not takes, "there is no prompt; give --prompt or --prompts-file, or --class")
    prompts = [""] if task and config.model.text and not (prompts or classes) else prompts
    options = _with_defaults(options, config)
    paths = [options.out] if classes or options.vbench else _paths(options, max(len(prompts), 1))
    _check_output(options, paths)
    _check_tasks(options, task, rows)
    images, sketches = ({frame: file for file, frame in pictures_of(names)} for names in (task.image, task.sketch))
    check_guides(config, options.frames, images, sketches)
    sampling = sampling_of(options, config)
    tiles = TilingConfig.parse(options.tile, options.tile_overlap)
    first_stage = autoencoder_config(autoencoder_folder(options.workdir, options.autoencoder))
    check_seed(options.seed)
    wanted = _wanted(options, rows, prompts, classes)
    if clip_ids and not rows:
        wanted = dataclasses.replace(wanted, clip_ids=clip_ids)
    if options.skip_steps:
        check(not sampling.skipped, "--skip-steps and --sampling.skipped are both given; give one of them")
        sampling = dataclasses.replace(sampling, skipped=read_skipped(options.workdir, sampling, wanted.guidance))
        # The recipe says which: the next calibration may choose others.
        command = [word for word in command if word != "--skip-steps"] + [f"--sampling.skipped={sampling.skipped}"]
    _check_long(options, config, sampling)
    stages = [run_folder(folder, "--then") for folder in options.then.split(",")] if options.then else []
    # What a run that enlarges has logged says whether it has been trained further.
    files = [*task.files, *(stage / name for stage in stages for name in ("config.json", "metrics.jsonl"))]
    made_by = MadeBy(command, rows, digest_of(options.workdir), digests_of(files))
    learnt = Learnt(config, first_stage, load_tokenizer(config, options.workdir), read_seen(options.workdir))
    return Asked(options, config, first_stage, sampling, tiles, wanted, task, paths, made_by, learnt, stages)


def _check_vbench(options: argparse.Namespace) -> None:
    """Raise a UserError for options that do not go with a list of VBench."""
    named = {"prompt": options.prompt, "prompts-file": options.prompts_file, "class": options.classes}
    named |= {"clip": options.clip_ids, "draft": options.draft is not None, "expand": options.expand}
    named["then"] = options.then
    for name in (name for name, value in named.items() if value):
        raise UserError(f"--vbench is given with --{name}; leave one of them out")
    check(not _task_options(options), "--vbench is given with an option for clips; leave one of them out")
    check(options.out is not None, "--out is not given; with --vbench it must be a folder, which VBench reads")
    check(not options.out.is_file(), f"--out is {str(options.out)!r}; with --vbench it must be a folder, it is a file")


def _check_tasks(options: argparse.Namespace, asked: TaskOptions, rows: Sequence[Row]) -> None:
    """Raise a UserError for options that tasks would leave without effect."""
    several = asked.extend is not None or asked.loop or asked.connect
    still = several and options.out.suffix.lower() == ".png"
    check(not still, f"--out is {str(options.out)!r}; a clip of several frames needs .mp4, .gif or .webp")
    check(not (asked and options.draft is not None), "--draft is given with an option for clips; leave one of them out")
    over = [file for file in asked.files if as_path(file).absolute() == as_path(options.out).absolute()]
    check(not over, f"--out is {str(options.out)!r}; that file is read, give another name")
    alone = not asked or asked.upsample
    only = "of the options for clips only --upsample goes with it"
    check(alone or not options.then, f"--then is {options.then!r}; {only}")
    both = options.then and options.skip_steps
    check(not both, "--skip-steps is given with --then, whose runs have other steps; leave one of them out")
    sized = asked and any({"frames", "height", "width"} & set(row) for row in rows)
    check(not sized, "--prompts-file has sizes; with an option for clips the clips have theirs: leave the columns out")


def usual_frames(config: DenoiserRun) -> int:
    """Return the frames of the longest of a run's previews."""
    return max((frames for frames, _, _ in config.preview.sizes), default=DEFAULT_SIZE[0])


def windows_asked(asked: Asked) -> Windows | None:
    """Return the windows of clips that are far longer than those of the run's previews, or whose prompt changes.

    None: the clips are sampled at once.
    """
    options, wanted, factor = asked.options, asked.wanted, asked.first_stage.time_factor
    usual = usual_frames(asked.config)
    given: Any = wanted.sizes  # one, or one for each
    sizes: list[Size] = [given] if is_whole(given[0]) else list(given)
    frames, spans = max(size[0] for size in sizes), [spans_of(prompt) for prompt in wanted.prompts]
    causes = {
        f"--long is {options.long}": options.long is not None,
        f"--window is {options.window}": options.window is not None,
        "--prompt changes in time": any(len(parts) > 1 for parts in spans),
        f"--frames is {frames}": not asked.task and frames > LONG * usual,
    }
    cause = next((name for name, holds in causes.items() if holds), None)
    if cause is None:
        _check_conditioned(options, asked.task.gives)
        return None
    plain = not (asked.task or asked.stages) and options.draft is None
    check(plain, f"{cause}; with other options for clips that cannot be")
    check(not wanted.classes, f"{cause}; pictures of classes cannot be sampled in windows")
    check(len({size[0] for size in sizes}) == 1, f"{cause}; then all clips must have equally many frames")
    for parts in spans:
        late = [frame for frame, _ in parts if frame >= frames]
        check(not late, f"--prompt changes at frame {''.join(map(str, late[:1]))}; the clip has {frames} frames")
        latents = [-(-frame // factor) for frame, _ in parts]
        check(len(set(latents)) == len(latents), f"--prompt changes twice within {factor} frames; they share a latent")
    window = max(usual, 1 + 2 * factor) if options.window is None else options.window
    windows = windows_of(frames, window, min(options.context, window // 2), factor)
    return dataclasses.replace(windows, rolls=options.long == "rolling")


def _check_long(options: argparse.Namespace, config: DenoiserRun, sampling: SamplingConfig) -> None:
    """Raise a UserError where long clips cannot be sampled as asked, and warn where the run was not trained for it."""
    choose("--long", options.long or "windows", dict.fromkeys(("windows", "rolling")))
    if options.long != "rolling":
        return
    check_rolling(config, sampling)
    if not config.diffusion.given.levels:
        about = "has not trained on rows of different noise levels (config.diffusion.given.levels is 0)"
        print(f"sora-jax: --long is rolling; the run {about}, so expect poor clips", file=sys.stderr)


def _check_conditioned(options: argparse.Namespace, gives: bool) -> None:
    """Raise a UserError for options that need something given, where the command gives nothing of any clip."""
    for flag in ("condition", "resamplings", "history-guidance", "history-level"):
        value = getattr(options, flag.replace("-", "_"))
        check(value is None or gives, f"--{flag} is {value}; it is for clips of which something is given, or long ones")


def _task_options(options: argparse.Namespace) -> TaskOptions:
    """Return what the command line asks to be done with clips; UserError where it contradicts itself."""
    return TaskOptions(**{field.name: getattr(options, field.name) for field in dataclasses.fields(TaskOptions)})


def _check_output(options: argparse.Namespace, paths: Sequence[Path]) -> None:
    fps = options.fps
    check(fps is None or 0.1 <= fps <= 240, f"--fps is {fps}; it must be from 0.1 to 240")
    if not options.vbench:
        check_ending(options.out, options.frames)
        for path in paths:
            check(not path.is_dir(), f"--out is {str(path)!r}; it is a folder, give the name of a file")
    factor = options.upscale
    check(factor == "auto" or factor > 0, f"--upscale is {factor}; it must be at least 1, or auto")


def sampling_of(options: argparse.Namespace, config: DenoiserRun) -> SamplingConfig:
    """Return how the run is sampled, as the command line changes it; UserError for what would change nothing."""
    named = [change.partition("=")[0] for change in options.sampling]
    # `calibrate` has some of these options.
    given = {name: getattr(options, flag.replace("-", "_"), None) for flag, name in SAMPLING_FLAGS.items()}
    for flag, name in SAMPLING_FLAGS.items():
        twice = given[name] is not None and name in named
        check(not twice, f"--{flag} and --sampling.{name} are both given; give one of them")
    given["guidance.scale"] = None  # of requests, which may have scales of their own
    changes = [*options.sampling, *(f"{name}={value}" for name, value in given.items() if value is not None)]
    sampling = override(config.sampling, changes, "sampling")
    name = sampling.solver.name
    learnt = config.model.learned_variance
    for option in (name.removeprefix("solver.") for name in named if name.startswith("solver.")):
        users = [solver for solver, method in SOLVERS.items() if option in method.options]
        known = option == "name" or name in users
        check(known, f"--sampling.solver.{option} is given; it is for {', '.join(users)}, and the solver is {name}")
        check(
            not (option == "variance" and learnt), "--sampling.solver.variance is given; this model has learnt its own"
        )
    return sampling


def _rows(options: argparse.Namespace) -> list[Row]:
    """Collect the prompts of the command line and of the file that it names; of a repeated file those of its recipe."""
    if options.rows is not None:
        return options.rows
    rows: list[Row] = [{"prompt": prompt} for prompt in options.prompt]
    rows += read_prompts(options.prompts_file) if options.prompts_file else []
    rows += [listed.row for listed in read_list(options.vbench, options.samples)] if options.vbench else []
    if options.expand:
        long = expand_prompts([row["prompt"] for row in rows], options.expand, options.seed)
        for row, prompt in zip(rows, long, strict=True):
            became = f"is expanded to {prompt!r}" if prompt != row["prompt"] else "is left as it is"
            note(f"{row['prompt']!r} {became}")
        rows = [row | {"prompt": prompt} for row, prompt in zip(rows, long, strict=True)]
    check(not (rows and options.classes), "--prompt and --class are both given; give one of them")
    # "0: ..." alone is a prompt for all frames.
    return [
        row | {"prompt": spans_of(row["prompt"])[0][1]} if len(spans_of(row["prompt"])) == 1 else row for row in rows
    ]


def _wanted(options: argparse.Namespace, rows: Sequence[Row], prompts: Sequence[str], classes: Sequence[int]) -> Wanted:
    """Return what is asked for: of each clip what its row says, else what the command line says."""
    size = (options.frames, options.height, options.width)
    if not any(len(row) > 1 for row in rows):
        return Wanted(prompts, size, classes, options.guidance, options.negative)
    asked = {"frames": size[0], "height": size[1], "width": size[2], "negative": options.negative}
    each = [asked | {"clip_id": number} | row for number, row in enumerate(rows, 1)]
    sizes = [(row["frames"], row["height"], row["width"]) for row in each]
    guidance = None
    if options.guidance is not None or any("guidance" in row for row in rows):
        usual = read_run_config(options.workdir).sampling.guidance.scale
        guidance = [row.get("guidance", usual if options.guidance is None else options.guidance) for row in each]
    clip_ids = [row["clip_id"] for row in each]
    return Wanted(prompts, sizes, classes, guidance, [row["negative"] for row in each], clip_ids)


def _clip_ids(given: list[str] | None, count: int) -> list[int]:
    """Read the numbers that key the noise of `count` clips; [] for the usual ones."""
    text = ",".join(given or [])
    numbers = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")] if text else []
    right = all(0 < number < 2**32 for number in numbers)
    check(right, f"--clip is {text!r}; it must be whole numbers from 1 to 4294967295 with commas between, such as 3,4")
    check(len(numbers) in (0, count), f"--clip is {text!r}; give a number for each clip, of which there are {count}")
    return numbers


def _classes(given: list[str] | None) -> list[int]:
    """Read the classes of the command line."""
    text = ",".join(given or [])
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise UserError(f"--class is {text!r}; it must be numbers with commas between, such as 207,360") from None


def _with_defaults(options: argparse.Namespace, config: DenoiserRun) -> argparse.Namespace:
    """Fill the gaps in the options from the run's config; under a name that ends in .png the clip is an image."""
    preview = config.preview
    frames, height, width = preview.sizes[0] if preview.sizes else DEFAULT_SIZE
    if options.size is not None:
        square = options.height is None and options.width is None
        check(square, f"--size is {options.size}; it is given beside --height or --width, leave one of them out")
        height = width = options.size
    if options.out is None and options.classes:
        options.out = output_folder(options.given) / "samples" / "classes.png"
    if options.out is not None and options.out.suffix.lower() == ".png":
        frames = 1
    sized = not (options.height is None and options.width is None)
    known = dict(frames=frames, height=height, width=width, sized=sized)
    given = {name: value for name, value in vars(options).items() if value is not None}
    return argparse.Namespace(**(dict.fromkeys(vars(options)) | known | given))


def _paths(options: argparse.Namespace, count: int) -> list[Path]:
    """Return a file for each clip. Without --out: in the working folder, under the first name that is free."""
    if options.out is None:
        ending = ".png" if options.frames == 1 and not options.video else ".mp4"
        names = (f"clip{f'_{number}' if number else ''}{ending}" for number in itertools.count())
        options.out = next(as_path(name) for name in names if not any(map(Path.exists, _numbered(Path(name), count))))
    return _numbered(options.out, count)


def _numbered(out: Path, count: int) -> list[Path]:
    """Return a file name for each clip: the given one, with numbers where there are several."""
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}_{i:03d}{out.suffix}") for i in range(count)]
