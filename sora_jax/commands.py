"""What each command of `sora-jax` does; `cli.py` only reads the command line."""

import functools
import json
import os
from pathlib import Path

import jax
import numpy as np

from sora_jax.config import check, choose, first_difference, frozen, plain
from sora_jax.data.latents import LatentCache
from sora_jax.data.manifest import Dataset
from sora_jax.data.media import write_video
from sora_jax.generate.preview import denoiser_preview, held_out_psnr, reconstruction_preview
from sora_jax.generate.run import Run, load_run
from sora_jax.nn import params as param
from sora_jax.parallel.mesh import check_batch, make_mesh
from sora_jax.train.autoencoder import AutoencoderRun, autoencoder_job
from sora_jax.train.denoiser import DenoiserRun, denoiser_job, prepare_tokenizer
from sora_jax.train.encode import copy_autoencoder
from sora_jax.train.frozen import FOLDER, FrozenAutoencoder, load_autoencoder, measure_statistics, save_autoencoder
from sora_jax.train.loop import Job, fit

MAY_CHANGE = ("loop", "preview", "mesh")  # a run may be made longer, watched otherwise, moved to another mesh
STATISTICS_CLIPS = 512
HELD_OUT_CLIPS = 64


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that the next run starts faster; SORA_JAX_CACHE names another folder."""
    folder = os.environ.get("SORA_JAX_CACHE") or Path.home() / ".cache" / "sora_jax" / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def run_config(values) -> AutoencoderRun | DenoiserRun:
    """The validated dataclass of a config; its `kind` says which."""
    kinds = {"autoencoder": AutoencoderRun, "transformer": DenoiserRun}
    return frozen(choose("config.kind", values.get("kind"), kinds), values)


def describe(config: AutoencoderRun | DenoiserRun) -> str:
    """The resolved config and the number of parameters, for `--dry-run`."""
    specs = _specs(config)
    sizes = "\n".join(f"  {name:12} {param.count(tree):>14,}" for name, tree in specs.items())
    return f"{json.dumps(plain(config), indent=1)}\nparameters\n{sizes}\n  {'total':12} {param.count(specs):>14,}"


def _specs(config):
    from sora_jax.models.autoencoder import autoencoder_specs
    from sora_jax.models.transformer import transformer_specs

    return (autoencoder_specs if config.kind == "autoencoder" else transformer_specs)(config.model)


def train(config: AutoencoderRun | DenoiserRun, workdir: Path) -> None:
    """Trains what the config says in `workdir`, going on from the newest checkpoint there."""
    mesh = make_mesh(config.mesh)
    check_batch(mesh, config.batch // config.loop.accumulate, "config.batch / config.loop.accumulate")
    command = train_autoencoder if config.kind == "autoencoder" else train_denoiser
    command(config, Path(workdir), mesh)


def train_autoencoder(config: AutoencoderRun, workdir: Path, mesh) -> None:
    """Trains on crops, then measures the latents and keeps the frozen autoencoder in workdir/frozen."""
    dataset = Dataset(config.data)
    claim_workdir(workdir, config)
    held_out = _some(dataset, "held-out", HELD_OUT_CLIPS)
    job = autoencoder_job(config, dataset, reconstruction_preview(config, held_out[:8], workdir))
    state = _fit(job, config, mesh, workdir)
    params = jax.tree.map(np.asarray, state.ema[0])
    mean, std = measure_statistics(params, config.model, _some(dataset, config.split, STATISTICS_CLIPS))
    autoencoder = FrozenAutoencoder(config.model, params, mean, std)
    notes = {"steps": int(state.step), "held_out_psnr": held_out_psnr(autoencoder, held_out) if held_out else None}
    save_autoencoder(autoencoder, workdir / FOLDER, notes)


def train_denoiser(config: DenoiserRun, workdir: Path, mesh) -> None:
    """Trains on a latent cache; the cache's autoencoder is kept in the run, which can then be used alone."""
    cache = LatentCache(config.latents)
    check(
        cache.channels == config.model.latent_channels,
        f"config.model.latent_channels is {config.model.latent_channels}; the latents in {config.latents!r} "
        f"have {cache.channels}",
    )
    autoencoder = load_autoencoder(config.latents)
    cache.check(autoencoder.fingerprint)
    claim_workdir(workdir, config)
    copy_autoencoder(config.latents, workdir)
    tokenizer = prepare_tokenizer(config, cache, workdir)
    current = functools.partial(Run, config, tokenizer=tokenizer, autoencoder=autoencoder, mesh=mesh)
    preview = denoiser_preview(lambda params: current(params=params), workdir) if config.preview.prompts else None
    _fit(denoiser_job(config, cache, tokenizer, preview), config, mesh, workdir)


def _fit(job: Job, config, mesh, workdir: Path):
    return fit(job, config.loop, config.optim, config.seed, mesh, workdir, plain(config))


def _some(dataset: Dataset, split: str, most: int) -> list[np.ndarray]:
    """At most so many clips of a split, evenly spread, ordered by size so that each size is compiled once."""
    rows = dataset.rows(split)
    chosen = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, most).astype(int))] if rows else []
    chosen.sort(key=lambda row: (row["frames"], row["height"], row["width"]))
    return [dataset[row["index"]].frames for row in chosen]


def claim_workdir(workdir: Path, config) -> None:
    """Writes config.json before the first step; a folder of another config is refused."""
    path = Path(workdir) / "config.json"
    new = plain(config)
    if path.exists():
        old = json.loads(path.read_text())
        keep = [{k: v for k, v in c.items() if k not in MAY_CHANGE} for c in (old, new)]
        different = first_difference(*keep)
        check(
            different is None,
            f"--workdir is {str(workdir)!r}; it holds a run with another config.{different}; take an empty folder",
        )
    else:
        occupied = Path(workdir).is_dir() and any(Path(workdir).iterdir())
        check(not occupied, f"--workdir is {str(workdir)!r}; it is not empty and holds no run; take an empty folder")
    Path(workdir).mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(new, indent=1))
    os.replace(temporary, path)


def sample(options) -> list[Path]:
    """Generates the prompts of the command line; returns the files written."""
    prompts = list(options.prompt)
    if options.prompts_file:
        check(options.prompts_file.is_file(), f"--prompts-file is {str(options.prompts_file)!r}; there is no such file")
        prompts += [line.strip() for line in options.prompts_file.read_text().splitlines() if line.strip()]
    check(bool(prompts), "there is no prompt; give --prompt or --prompts-file")
    paths = _numbered(options.out, len(prompts))
    run = load_run(options.workdir)
    size = (options.frames, options.height, options.width)
    clips = run.generate(prompts, size, options.steps, options.guidance, options.seed, options.solver)
    for path, clip in zip(paths, clips, strict=True):
        write_video(path, clip, options.fps, options.upscale)
    return paths


def _numbered(out: Path, count: int) -> list[Path]:
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}_{i:03d}{out.suffix}") for i in range(count)]
