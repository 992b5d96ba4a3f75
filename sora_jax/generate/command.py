"""Run `sora-jax sample` and `sora-jax calibrate`."""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from sora_jax.config import check
from sora_jax.console import note
from sora_jax.data.packing.packs import grid_of
from sora_jax.data.viewing.sheets import grid
from sora_jax.data.viewing.write import watchable_scale, write_chunks
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.diffusion.spacing import count_steps
from sora_jax.errors import UserError
from sora_jax.files import as_path
from sora_jax.generate.doubts import print_lines
from sora_jax.generate.inputs import make_task, read_inputs
from sora_jax.generate.long import Windows
from sora_jax.generate.options import LONG, Asked, resolve, sampling_of, usual_frames, windows_asked
from sora_jax.generate.progress import Progress
from sora_jax.generate.recipe import digest_of, digests_of, make_recipe, read_recipe, save_recipe
from sora_jax.generate.requests import Request, Task, Wanted, plan_requests, size_of
from sora_jax.generate.run import Run, autoencoder_folder, load_run, read_run_config
from sora_jax.generate.sampler import trunk_ratios
from sora_jax.generate.skipping import choose_skipped, save_skipped
from sora_jax.generate.tasks import Tasks
from sora_jax.generate.vbench import export, read_list
from sora_jax.models.denoiser import reads_low
from sora_jax.models.tiling import tiling_warning
from sora_jax.train.exported import run_folder
from sora_jax.train.frozen import autoencoder_config

EARLY = 0.1  # share of the steps of a training before which clips are noise
Clips = Iterable[tuple[int, Iterator[np.ndarray]]]  # clips in parts, each with the number of its request


def sample(options: argparse.Namespace) -> list[Path]:
    """Generate the prompts or classes of the command line, or what it asks to be done with clips; return the files.

    What the command line leaves open is taken from the run's config: size, steps, solver, guidance, frames a second.
    What can be refused without the weights is refused before they are loaded. Pictures of classes go into one file,
    side by side.
    """
    asked = resolve(options)
    return make(asked, functools.partial(load_run, options.workdir, options.autoencoder, options.checkpoint))


def make(asked: Asked, load: Callable[[], Run], progress: Progress | None = None) -> list[Path]:
    """Generate what a resolved command asks for and return the files; load: returns its run."""
    _warn(asked)
    options, wanted, fps = asked.options, asked.wanted, asked.options.fps
    windows = windows_asked(asked)
    if options.vbench:
        check(not windows, f"--vbench is {str(options.vbench)!r}; its clips are not sampled in windows")
        return _sample_vbench(asked, load)
    if windows:
        return _sample_long(asked, windows, load, progress)
    if asked.task:
        _plan(asked, dataclasses.replace(wanted, tasks=[_least_task(asked)]))
        inputs = read_inputs(asked.task, asked.size, asked.multiple, options.sized)
        run, fps = load(), fps or inputs.fps
        wanted = dataclasses.replace(wanted, tasks=[make_task(asked.task, inputs, run, asked.size)])
    else:
        requests = _plan(asked, wanted)  # UserError before the weights are read
        _check_stages(asked, requests)
        draft = _plan(asked, _draft(asked, requests)) if options.draft is not None else []
        run = load()
        if draft:
            wanted = dataclasses.replace(wanted, tasks=_drafted(asked, run, draft, requests))
    requests = _plan(asked, wanted)
    if warning := tiling_warning(asked.first_stage, asked.tiles, [requests[0].size], "decode"):
        print(f"sora-jax: {warning}", file=sys.stderr)
    _check_stages(asked, requests)
    print_lines(asked.learnt.doubts(requests))
    sampling, step = asked.sampling, run.step
    for stage in asked.stages:
        _announce(run, requests, sampling)
        small = run.sample(requests, sampling, options.seed, asked.tiles, wanted.tasks, progress, None)
        run = load_run(stage)
        wanted = dataclasses.replace(wanted, tasks=[Tasks(run).upsample(clip) for clip in small])
        sampling = sampling_of(options, run.config)
        requests = run.plan(wanted, sampling)
        print_lines(run.learnt.doubts(requests))
    _announce(run, requests, sampling)
    clips = run.stream(requests, sampling, options.seed, asked.tiles, wanted.tasks, progress, None)
    if wanted.classes:
        clips = iter([(0, grid([clip for _, clip in sorted(clips, key=lambda pair: pair[0])]))])
    return _write(asked, step, requests, ((number, iter([clip])) for number, clip in clips), fps)


def _least_task(asked: Asked) -> Task:
    """Return a task to be checked before the clips are read, of the least size: theirs is not known yet."""
    least = size_of(asked.first_stage, asked.config.model.patch)
    if not asked.task.upsample:
        return Task(least, None)
    _, height, width = asked.size if asked.options.sized else least
    return Task((least[0], height, width), None, low=np.zeros(0))


def _check_stages(asked: Asked, requests: Sequence[Request]) -> None:
    """Raise a UserError where a run that is to enlarge the clips does not take them."""
    sizes = [size_of(asked.first_stage, request.size) for request in requests]
    for folder in asked.stages:
        sizes = [(frames, 2 * height, 2 * width) for frames, height, width in sizes]
        wanted = dataclasses.replace(asked.wanted, tasks=[Task(size, None, low=np.zeros(0)) for size in sizes])
        config = read_run_config(folder, "--then")
        try:
            first_stage = autoencoder_config(autoencoder_folder(folder, None))
            plan_requests(config, first_stage, wanted, sampling_of(asked.options, config))
        except UserError as error:
            raise UserError(f"--then names {str(folder)!r}, which does not take the clips: {error}") from error


def _sample_vbench(asked: Asked, load: Callable[[], Run]) -> list[Path]:
    """Write the clips of a list of VBench."""
    requests, run = _plan(asked, asked.wanted), load()
    print_lines(asked.learnt.doubts(requests))
    return export(asked, read_list(asked.options.vbench, asked.options.samples), requests, run)


def _warn(asked: Asked) -> None:
    """Say what the run was not trained for."""
    usual, frames = usual_frames(asked.config), asked.options.frames
    if asked.task and frames > LONG * usual and not asked.task.clips_are_videos:
        about = f"the run's clips have {usual}, and one with images or sketches is not sampled in windows"
        print(f"sora-jax: --frames is {frames}; {about}, so expect a poor clip", file=sys.stderr)
    if asked.sampling.guidance.history != 1 and not asked.config.diffusion.given.dropped:
        about = "the run has not trained with its given frames dropped (config.diffusion.given.dropped is 0)"
        print(f"sora-jax: --history-guidance is {asked.sampling.guidance.history}; {about}", file=sys.stderr)


def _plan(asked: Asked, wanted: Wanted) -> list[Request]:
    requests = plan_requests(asked.config, asked.first_stage, wanted, asked.sampling)
    asked.learnt.check_spelt(requests)
    return requests


def _sample_long(
    asked: Asked, windows: Windows, load: Callable[[], Run], progress: Progress | None = None
) -> list[Path]:
    """Sample in windows, or by rolling noise levels, and write each clip in parts."""
    requests, run = _plan(asked, asked.wanted), load()
    sides = [(min(windows.window, request.size[0]), *request.size[1:]) for request in requests]
    print_lines(
        asked.learnt.doubts([dataclasses.replace(r, size=size) for r, size in zip(requests, sides, strict=True)])
    )
    what = f"windows of {windows.window} latent frames, {windows.carried} of them carried"
    what += f", {windows.rolling_latents} rolling" if windows.rolls else ""
    what = "one window, which does not roll" if windows.rolls and windows.frames <= windows.window else what
    frames, height, width = size_of(asked.first_stage, requests[0].size)
    note(f"sampling {_count(requests)} of {frames}x{height}x{width} in {what}")
    parts = run.sample_long(requests, windows, asked.sampling, asked.options.seed, asked.tiles, progress, None)
    return _write(asked, run.step, requests, enumerate(parts), asked.options.fps)


def _draft(asked: Asked, requests: Sequence[Request]) -> Wanted:
    """Return the same clips at about half their height and width, of which the full ones are made."""
    share = asked.options.draft
    check(0 < share <= 1, f"--draft is {share}; it must be above 0, to 1")
    sizes = []
    for frames, *sides in (size_of(asked.first_stage, request.size) for request in requests):
        height, width = (max(side // (2 * step), 1) * step for side, step in zip(sides, asked.multiple, strict=True))
        sizes.append((frames, height, width))
    return dataclasses.replace(asked.wanted, sizes=sizes)


def _drafted(asked: Asked, run: Run, draft: Sequence[Request], requests: Sequence[Request]) -> list[Task]:
    """Sample drafts, and return the tasks that make clips of the full size of them."""
    small = run.sample(draft, asked.sampling, asked.options.seed, bar=None)
    make, sizes = Tasks(run), [size_of(asked.first_stage, request.size) for request in requests]
    return [make.enlarge(clip, size, asked.options.draft) for clip, size in zip(small, sizes, strict=True)]


def _write(asked: Asked, step: int, requests: Sequence[Request], clips: Clips, fps: float | None) -> list[Path]:
    """Write each clip with its recipe as it comes, or, where an earlier file is repeated, the one of that file.

    clips: each with the number of its request. Returns the files in the order of the requests.
    """
    written: dict[int, Path] = {}
    for number, chunks in clips:
        if asked.options.clip not in (None, number):
            continue
        path = asked.options.out if asked.options.clip is not None else asked.paths[number]
        request = requests[number]
        facts = {"prompt": request.prompt, "negative": request.negative, "seed": asked.options.seed}
        facts |= {"guidance": request.guidance, "latent_size": request.size, "clip_id": request.clip_id}
        first = next(chunks)
        scale = watchable_scale(first) if asked.options.upscale == "auto" else asked.options.upscale
        recipe = make_recipe(asked.made_by, step, number, facts | {"upscale": scale, "size": first.shape[1:3]})
        chunks = itertools.chain([first], chunks)
        write_chunks(path, chunks, fps or asked.config.preview.fps, scale, json.dumps(recipe))
        save_recipe(path, recipe)
        written[number] = path
    return [written[number] for number in sorted(written)]


def _count(requests: Sequence[Request]) -> str:
    return "1 clip" if len(requests) == 1 else f"{len(requests)} clips"


def _announce(run: Run, requests: Sequence[Request], sampling: SamplingConfig) -> None:
    """Print what will be sampled."""
    first = requests[0]
    tokens = math.prod(grid_of(first.size, run.config.model.patch))
    frames, height, width = size_of(run.autoencoder.config, first.size)
    length = f"{first.size[0]} latent frames of " if first.known and first.known.first else f"{frames}x"
    what = f"{_count(requests)} of {length}{height}x{width}, {tokens:,} tokens each"
    if guides := sum(len(guide.times) for guide in first.known.guides) if first.known else 0:
        what += f" beside those of {guides} key frames or sketches"
    steps = count_steps(sampling.steps, sampling.spacing)
    skips = f", {len(sampling.skipped)} of them without the blocks" if sampling.skipped else ""
    how = f"{steps} steps of {sampling.solver.name}{skips}, weights of step {_of_training(run)}"
    note(f"sampling {what}; {how}")


def _of_training(run: Run) -> str:
    """Return the step of a run's weights and, of a training that has not ended, the last one."""
    last = run.config.loop.steps
    if not 0 < run.step < last:
        return f"{run.step}"
    return f"{run.step:,} of {last:,}" + ": expect noise" * (run.step < EARLY * last)


def like(options: argparse.Namespace) -> dict:
    """Return the recipe of the file that is to be made again.

    Raises:
        UserError: the file has no recipe, its run has another config by now, or the command line changes prompts.
    """
    for name, value in (
        ("prompt", options.prompt),
        ("class", options.classes),
        ("prompts-file", options.prompts_file),
        ("vbench", options.vbench),
    ):
        check(not value, f"--like is given with --{name}; leave one of them out")
    check(not options.expand, "--like is given with --expand; leave one of them out")
    check(not options.clip_ids, "--like is given with --clip; leave one of them out")
    recipe = read_recipe(options.like)
    words = recipe["command"]
    folder = next((word.removeprefix("--workdir=") for word in words if word.startswith("--workdir=")), None)
    if not any(word.startswith("--upscale=") for word in words):
        recipe["command"] = ["--upscale=1", *words]  # which version 0.1.0 meant, and did not write
    same = digest_of(run_folder(options.workdir or folder)) == recipe["config"]
    other = (
        f"--workdir is {str(options.workdir)!r}; it must be a run of the config of that in {folder!r}, as --like says"
    )
    gone = f"--like is {str(options.like)!r}; its run in {folder!r} has another config by now"
    check(same, other if options.workdir else gone)
    inputs = recipe.get("inputs", {})
    changed = [file for file, digest in inputs.items() if digests_of([as_path(file)]).get(file) != digest]
    check(not changed, f"--like is {str(options.like)!r}; its input {''.join(changed[:1])!r} is gone or has changed")
    return recipe


def calibrate(options: argparse.Namespace) -> Path:
    """Choose the steps at which `sample --skip-steps` skips the blocks, by the prompts of a run's previews.

    Returns the file of the run folder that keeps them.
    """
    workdir = run_folder(options.workdir)
    config = read_run_config(workdir)
    owned = "what is found is kept in the run, so it must be a folder; `sora-jax export` makes one of a model"
    check(as_path(options.workdir).is_dir(), f"--workdir is {str(options.workdir)!r}; {owned}")
    sampling, preview = sampling_of(options, config), config.preview
    alone = "that run makes clips of those of half the size (model.low_resolution), and is not calibrated"
    check(not reads_low(config.model), f"--workdir is {str(options.workdir)!r}; {alone}")
    count = len(preview.prompts or preview.classes)
    check(count, f"--workdir is {str(options.workdir)!r}; its config has no preview.prompts to calibrate with")
    check(options.error > 0, f"--error is {options.error}; it must be positive")
    check(options.most > 0, f"--most is {options.most}; it must be at least 1")
    run, sizes = load_run(workdir), [preview.sizes[i % len(preview.sizes)] for i in range(count)]
    wanted = Wanted(preview.prompts, sizes, preview.classes, options.guidance)
    sampling = dataclasses.replace(sampling, skipped=())
    requests = run.plan(wanted, sampling)
    print_lines(run.learnt.doubts(requests))
    with jax.set_mesh(run.mesh):
        ratios_XK = trunk_ratios(run, requests, sampling, config.seed)
    check(np.isfinite(ratios_XK).all(), f"--workdir is {str(options.workdir)!r}; its samples are not finite")
    sampling = dataclasses.replace(sampling, skipped=choose_skipped(ratios_XK, options.error, options.most))
    facts = {"error": options.error, "most": options.most, "ratios": ratios_XK.astype(float).round(4).tolist()}
    file = save_skipped(workdir, sampling, options.guidance, facts)
    steps = ", ".join(map(str, sampling.skipped))
    note(f"of {ratios_XK.shape[1]} steps {len(sampling.skipped)} skip the blocks: {steps}")
    return file
