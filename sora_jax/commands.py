"""What each command of `sora-jax` does; `cli.py` only reads the command line."""

import argparse
import functools
import json
import math
import os
import sys
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from sora_jax.config import check, choose, first_difference, from_dict, override, read_json, to_dict
from sora_jax.data.latents import LatentCache, TextInfo
from sora_jax.data.manifest import Dataset
from sora_jax.data.media import check_ending, write_video
from sora_jax.data.packing import grid_of
from sora_jax.data.sheets import grid
from sora_jax.data.tokenizer import Tokenizer
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.diffusion.solvers import SOLVERS
from sora_jax.errors import UserError
from sora_jax.files import as_path, is_empty, read_text, write_json
from sora_jax.generate.preview import denoiser_preview, held_out_psnr, reconstruction_preview
from sora_jax.generate.run import Run, load_run, read_run_config, validate_requests
from sora_jax.models.first_stage import autoencoder_specs
from sora_jax.models.tiling import TilingConfig, nearness
from sora_jax.models.transformer import transformer_specs
from sora_jax.nn import params as param
from sora_jax.parallel import distributed
from sora_jax.parallel.mesh import check_split, make_mesh
from sora_jax.train.autoencoder import AutoencoderRun, autoencoder_job
from sora_jax.train.denoiser import (
    DenoiserRun,
    denoiser_job,
    keep_attention,
    migrate_config,
    prepare_tokenizer,
    with_fastest_attention,
)
from sora_jax.train.encode import copy_autoencoder
from sora_jax.train.frozen import (
    FOLDER,
    RECORD,
    FrozenAutoencoder,
    load_autoencoder,
    measure_statistics,
    save_autoencoder,
)
from sora_jax.train.loop import Job, fit, log

# A run may be made longer, watched otherwise, moved to another mesh; data may lie elsewhere: its digest must agree.
MAY_CHANGE = ("loop", "feed", "preview", "sampling", "mesh", "tiles", "data", "latents")
STATISTICS_CLIPS = 512
HELD_OUT_CLIPS = 64
PREVIEW_CLIPS = 8
DEFAULT_SIZE = (17, 64, 64)


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that the next run starts faster; SORA_JAX_CACHE names another folder."""
    if distributed.several() and jax.default_backend() == "cpu":
        return  # it serves the first process alone, and on CPUs that one waits for the others half a minute at most
    folder = as_path(os.environ.get("SORA_JAX_CACHE") or Path.home() / ".cache" / "sora_jax" / "compiled")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def run_config(values) -> AutoencoderRun | DenoiserRun:
    """The validated dataclass of a config; its `kind` says which."""
    kinds = {"autoencoder": AutoencoderRun, "transformer": DenoiserRun}
    return from_dict(choose("config.kind", values.get("kind"), kinds), values)


def describe(config: AutoencoderRun | DenoiserRun) -> str:
    """The resolved config and the number of parameters, for `--dry-run`."""
    specs = _specs(config)
    sizes = "\n".join(f"  {name:12} {param.count(tree):>14,}" for name, tree in specs.items())
    return f"{json.dumps(plain(config), indent=1)}\nparameters\n{sizes}\n  {'total':12} {param.count(specs):>14,}"


def _specs(config):
    return (autoencoder_specs if config.kind == "autoencoder" else transformer_specs)(config.model)


def train(config: AutoencoderRun | DenoiserRun, workdir: Path) -> None:
    """Trains what the config says in `workdir`, going on from the newest checkpoint there."""
    mesh = make_mesh(config.mesh)
    command = train_autoencoder if config.kind == "autoencoder" else train_denoiser
    command(config, as_path(workdir), mesh)


def train_autoencoder(config: AutoencoderRun, workdir: Path, mesh) -> None:
    """Trains on crops, then measures the latents and keeps the frozen autoencoder in workdir/frozen."""
    check(bool(config.data), "--config.data is not given; it must be a folder made by `sora-jax data build`")
    dataset = Dataset(config.data)
    for name, rows in config.rows.items():
        check_split(
            mesh, "batch", rows // config.loop.accumulate, f"the number of {name} in config.batch / loop.accumulate"
        )
    check_workdir(workdir, config, dataset.digest)
    held_out = _some(dataset, dataset.held_out(config.split), HELD_OUT_CLIPS)
    shown = _spread(held_out, PREVIEW_CLIPS)
    preview = reconstruction_preview(config, shown, workdir) if shown else None
    if not held_out:
        log("the dataset holds out no clip: no reconstructions are shown and no PSNR is measured")
    job = autoencoder_job(config, dataset, preview, distributed.share_of_batch(mesh))
    claim_workdir(workdir, config, dataset.digest)
    state = _fit(job, config, mesh, workdir)
    if distributed.all_true(_finished_before(workdir, int(state.step))):
        return  # written anew it could differ in a last bit, and caches made with it would no longer match
    params = distributed.on_host(state.ema[0])
    if distributed.first():
        with jax.set_mesh(make_mesh(devices=mesh.local_devices)):
            _keep_autoencoder(config, dataset, held_out, params, int(state.step), workdir)
    distributed.barrier("autoencoder kept")


def _keep_autoencoder(config: AutoencoderRun, dataset: Dataset, held_out: list, params, step: int, workdir: Path):
    """Measures the latents of the averaged parameters and writes workdir/frozen."""
    measured = _some(dataset, dataset.rows(config.split), STATISTICS_CLIPS)
    measured = tqdm(measured, "latent statistics", unit="clip")
    mean, std = measure_statistics(params, config.model, measured, tiles=config.tiles)
    autoencoder = FrozenAutoencoder(config.model, params, mean, std)
    quality = held_out_psnr(autoencoder, held_out, config.tiles) if held_out else None
    notes = {"steps": step, "held_out_psnr": quality}
    save_autoencoder(autoencoder, workdir / FOLDER, notes)


def train_denoiser(config: DenoiserRun, workdir: Path, mesh) -> None:
    """Trains on a latent cache; the cache's autoencoder is kept in the run, which can then be used alone."""
    check(bool(config.latents), "--config.latents is not given; it must be a folder made by `sora-jax data encode`")
    cache = LatentCache(config.latents)
    check(
        cache.channels == config.model.latent_channels,
        f"config.model.latent_channels is {config.model.latent_channels}; the latents in {config.latents!r} "
        f"have {cache.channels}",
    )
    autoencoder = load_autoencoder(config.latents)
    cache.check(autoencoder.fingerprint)
    if text := config.model.text:
        cache.check_text(text.pretrained, text.pretrained_width, config.tokenizer.max_tokens)
    if config.model.classes:
        cache.check_labels(config.model.classes, config.split)
    if (as_path(workdir) / FOLDER / RECORD).exists():
        cache.check(load_autoencoder(workdir).fingerprint)  # latents made anew are not those this run has learnt
    param.check_splits(transformer_specs(config.model), mesh)
    check_split(mesh, "batch", config.batch // config.loop.accumulate, "config.batch / config.loop.accumulate")
    check_split(mesh, "length", config.packing.length, "config.packing.length")
    check_split(mesh, "length", config.packing.text_length, "config.packing.text_length")
    check_workdir(workdir, config, cache.digest)
    tokenizer = prepare_tokenizer(config, cache, workdir)
    looking = make_mesh(devices=jax.local_devices()) if distributed.several() else mesh
    here = with_fastest_attention(config, mesh, workdir)
    current = functools.partial(Run, here, tokenizer=tokenizer, autoencoder=autoencoder, mesh=looking)
    for size in config.preview.sizes:
        current(params={}).latent_size(*size)
    preview = denoiser_preview(lambda params: current(params=params), workdir) if config.preview.any else None
    if preview is None:
        log("config.preview names no prompts or classes: no samples are shown while training")
    captions, share = as_path(workdir) / "captions", distributed.share_of_batch(mesh)
    job = denoiser_job(here, cache, tokenizer, preview, captions, share)
    claim_workdir(workdir, config, cache.digest, cache.info.text)
    if distributed.first():
        if here != config:
            keep_attention(here, workdir)
        copy_autoencoder(config.latents, workdir)
        if isinstance(tokenizer, Tokenizer):
            tokenizer.save(as_path(workdir) / "tokenizer.json")
    log(job.note)
    _fit(job, config, mesh, workdir)


def _finished_before(workdir: Path, step: int) -> bool:
    record = workdir / FOLDER / RECORD
    return record.exists() and json.loads(read_text(record))["steps"] == step


def _fit(job: Job, config, mesh, workdir: Path):
    return fit(job, config.loop, config.optim, config.seed, mesh, workdir, to_dict(config))


def _some(dataset: Dataset, rows: list[dict], most: int) -> list[np.ndarray]:
    """At most so many of the clips, evenly spread, ordered by size so that each size is compiled once."""
    chosen = _spread(rows, most)
    chosen.sort(key=lambda row: (row["frames"], row["height"], row["width"]))
    return [dataset[row["index"]].frames for row in chosen]


def _spread(items: list, most: int) -> list:
    """At most so many of the items, evenly spread, the first and the last among them."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, most).astype(int))] if items else []


def check_workdir(workdir: Path, config, data: str) -> None:
    """UserError unless the folder is empty, is yet to be made, or holds a run of this config and of these clips.

    `data` is the digest of the dataset: one built anew, under the same name, may hold out other clips.
    """
    path, learnt_from = as_path(workdir) / "config.json", as_path(workdir) / "data.json"
    if path.exists():
        old, new = to_dict(run_config(migrate_config(read_json(path)))), to_dict(config)
        keep = [{k: v for k, v in c.items() if k not in MAY_CHANGE} for c in (old, new)]
        different = first_difference(*keep)
        check(
            different is None,
            f"--workdir is {str(workdir)!r}; it holds a run with another config.{different}; take an empty folder",
        )
        same = not learnt_from.exists() or read_json(learnt_from)["digest"] == data
        check(
            same,
            f"--workdir is {str(workdir)!r}; it has learnt from other clips than are there now; take an empty folder",
        )
    else:
        check(
            is_empty(as_path(workdir)),
            f"--workdir is {str(workdir)!r}; it is not empty and holds no run; take an empty folder",
        )


def claim_workdir(workdir: Path, config, data: str, text: TextInfo | None = None) -> None:
    """Writes config.json and data.json just before the first step: what was refused leaves no folder behind."""
    distributed.barrier("all have seen the folder as it was")
    if distributed.first():
        write_json(as_path(workdir) / "config.json", to_dict(config))
        write_json(as_path(workdir) / "data.json", {"digest": data, "text": text and text.fingerprint})


def sample(options) -> list[Path]:
    """Generates the prompts or classes of the command line; returns the files written.

    What the command line leaves open is taken from the run's config: size, steps, solver, guidance, frames a second.
    All that can be refused is refused before anything is loaded. Pictures of classes go into one file, side by side.
    """
    prompts, classes = _prompts(options), _classes(options.classes)
    config = read_run_config(options.workdir)
    options = _with_defaults(options, config)
    paths = [options.out] if classes else _numbered(options.out, len(prompts))
    check_ending(options.out, options.frames)
    check(0.1 <= options.fps <= 240, f"--fps is {options.fps}; it must be from 0.1 to 240")
    for path in paths:
        check(not path.is_dir(), f"--out is {str(path)!r}; it is a folder, give the name of a file")
    check(options.upscale > 0, f"--upscale is {options.upscale}; it must be positive")
    sampling = _sampling(options, config)
    validate_requests(config, prompts, classes, options.guidance, options.negative, options.seed, sampling)
    tiles = TilingConfig.parse(options.tile, options.tile_overlap)
    run = load_run(options.workdir, options.autoencoder, options.checkpoint)
    most = run.tokenizer.max_tokens
    for prompt in prompts:
        if (length := run.tokenizer.length(prompt)) > most:
            print(f"sora-jax: {prompt!r} has {length} tokens; this run reads the first {most}", file=sys.stderr)
    size = (options.frames, options.height, options.width)
    latent = run.latent_size(*size)
    if near := nearness(run.autoencoder.config, tiles, [latent], "decode"):
        print(f"sora-jax: {near}", file=sys.stderr)
    tokens = math.prod(grid_of(latent, run.config.model.patch))
    what = f"{len(prompts or classes)} of {options.frames}x{options.height}x{options.width}, {tokens:,} tokens each"
    how = f"{sampling.steps} steps of {sampling.solver.name}, weights of step {run.step}"
    print(f"sora-jax: sampling {what}; {how}", file=sys.stderr)
    more = dict(guidance=options.guidance, seed=options.seed, sampling=sampling, negative=options.negative, tiles=tiles)
    clips = run.generate(prompts, size, classes=classes, **more)
    clips = [grid(clips)] if classes else clips
    for path, clip in zip(paths, clips, strict=True):
        write_video(path, clip, options.fps, options.upscale)
    return paths


def _sampling(options, config: DenoiserRun) -> SamplingConfig:
    """How the run is sampled, with what the command line changes; UserError for what would change nothing."""
    named = [change.partition("=")[0] for change in options.sampling]
    flags = {"steps": "steps", "solver": "solver.name", "guidance": "guidance.scale"}
    for flag, name in flags.items():
        twice = getattr(options, flag) is not None and name in named
        check(not twice, f"--{flag} and --sampling.{name} are both given; give one of them")
    given = {"steps": options.steps, "solver.name": options.solver}
    changes = [*options.sampling, *(f"{name}={value}" for name, value in given.items() if value is not None)]
    sampling = override(config.sampling, changes, "sampling")
    name, learnt = sampling.solver.name, config.model.learned_variance
    for option in (name.removeprefix("solver.") for name in named if name.startswith("solver.")):
        users = [solver for solver, method in SOLVERS.items() if option in method.options]
        known = option == "name" or name in users
        check(known, f"--sampling.solver.{option} is given; it is for {', '.join(users)}, and the solver is {name}")
        check(
            not (option == "variance" and learnt), "--sampling.solver.variance is given; this model has learnt its own"
        )
    return sampling


def _prompts(options) -> list[str]:
    prompts = list(options.prompt)
    if options.prompts_file:
        check(options.prompts_file.is_file(), f"--prompts-file is {str(options.prompts_file)!r}; there is no such file")
        try:
            lines = read_text(options.prompts_file).splitlines()
        except UnicodeDecodeError as error:
            message = f"--prompts-file is {str(options.prompts_file)!r}; it must be UTF-8 text: {error}"
            raise UserError(message) from error
        prompts += [line.strip() for line in lines if line.strip()]
    check(bool(prompts or options.classes), "there is no prompt; give --prompt or --prompts-file, or --class")
    check(not (prompts and options.classes), "--prompt and --class are both given; give one of them")
    return prompts


def _classes(given: list[str] | None) -> list[int]:
    text = ",".join(given or [])
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise UserError(f"--class is {text!r}; it must be numbers with commas between, such as 207,360") from None


def _with_defaults(options, config: DenoiserRun):
    """The options with gaps filled in; under a name that ends in .png the clip is an image."""
    preview = config.preview
    frames, height, width = preview.sizes[0] if preview.sizes else DEFAULT_SIZE
    if options.size is not None:
        square = options.height is None and options.width is None
        check(square, f"--size is {options.size}; it is given beside --height or --width, leave one of them out")
        height = width = options.size
    if options.out is None:
        check(bool(options.classes), "--out is not given; it is the name of the file to write")
        options.out = as_path(options.workdir) / "samples" / "classes.png"
    if options.out.suffix.lower() == ".png":
        frames = 1
    known = dict(frames=frames, height=height, width=width, fps=preview.fps)
    given = {name: value for name, value in vars(options).items() if value is not None}
    return argparse.Namespace(**(dict.fromkeys(vars(options)) | known | given))


def _numbered(out: Path, count: int) -> list[Path]:
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}_{i:03d}{out.suffix}") for i in range(count)]
