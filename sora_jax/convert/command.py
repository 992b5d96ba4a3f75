"""Convert published weights to a run folder and back: `sora-jax convert`."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from sora_jax.config import check, choose, read_json, to_dict
from sora_jax.convert.adapted import merged_weights, write_lora
from sora_jax.convert.dit import (
    Network,
    read_diffusers,
    read_dit,
    read_sit,
    write_diffusers,
    write_dit,
    write_sit,
)
from sora_jax.convert.vae import read_vae, write_vae
from sora_jax.data.packing.packs import PackingConfig
from sora_jax.diffusion.guidance import GuidanceConfig
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.diffusion.solvers import SolverConfig
from sora_jax.diffusion.times import TimesConfig
from sora_jax.errors import UserError
from sora_jax.files import as_path, is_empty, write_json
from sora_jax.models.autoencoder_kl import KLConfig
from sora_jax.models.autoencoder_wan import WanConfig
from sora_jax.models.transformer import TransformerConfig
from sora_jax.nn import params as param
from sora_jax.parallel.mesh import make_mesh
from sora_jax.train.autoencoder import AutoencoderRun, autoencoder_groups
from sora_jax.train.checkpoint import Checkpoints
from sora_jax.train.denoiser import DenoiserRun, DiffusionConfig, PreviewConfig, denoiser_groups
from sora_jax.train.encode import copy_autoencoder
from sora_jax.train.exported import run_folder
from sora_jax.train.frozen import FOLDER, RECORD, autoencoder_config, load_autoencoder, save_autoencoder
from sora_jax.train.loop import LoopConfig
from sora_jax.train.optim import OptimConfig
from sora_jax.train.run_config import RunConfig
from sora_jax.train.state import Group, TrainState, make_optimizers

FACTOR = 8  # pixels to a latent position of the autoencoder that DiT was trained with
SHOWN = (207, 360, 387, 974, 88, 979, 417, 279)  # classes of the preview, as in configs/dit.py

# The recipes of the papers, as in configs/dit.py and configs/sit.py.
DIT_RECIPE = (
    DiffusionConfig("vp_linear", "eps", TimesConfig("steps", base_tokens=0)),
    SamplingConfig("250", "respaced", SolverConfig("ddpm")),
)
SIT_RECIPE = (
    DiffusionConfig("linear_flow", "velocity", TimesConfig("uniform", base_tokens=0)),
    SamplingConfig("125", "even", SolverConfig("heun")),
)
Recipe = tuple[DiffusionConfig, SamplingConfig]


def convert_from(
    kind: str, weights: Path, out: Path, autoencoder: Path | None = None, heads: int | None = None
) -> list[str]:
    """Write the run folder `out` from published weights, with a checkpoint at step 0; return notes for the user.

    Args:
        kind: "dit", "sit", "diffusers-dit" or "diffusers-vae".
        weights: file or folder of the weights.
        out: a new or empty folder.
        autoencoder: the run whose frozen autoencoder the denoiser decodes with; it is copied into `out`.
        heads: attention heads of a "dit" or "sit" whose depth and width are not those of a published size.

    Raises:
        UserError: a tensor is missing, unknown, not finite or of another shape, or options do not fit the kind.
    """
    read = choose("--from", kind, READERS)
    out = as_path(out)
    check(not out.is_file() and is_empty(out), f"--out is {str(out)!r}; it must be a new or empty folder")
    check(
        autoencoder is None or kind != VAE,
        f"--autoencoder is {str(autoencoder)!r}; with --from={VAE} it must not be given",
    )
    check(heads is None or kind in OFFICIAL, f"--heads is {heads}; with --from={kind} it must not be given")
    check(heads is None or heads > 0, f"--heads is {heads}; it must be positive")
    return read(as_path(weights), out, autoencoder, heads)


def convert_to(kind: str, workdir: Path, out: Path) -> list[str]:
    """Write the averaged weights of a run, or its frozen autoencoder, to `out` in the format `kind`; return notes."""
    write = choose("--to", kind, WRITERS)
    out = as_path(out)
    occupied = out.is_file() or not is_empty(out)
    check(not occupied, f"--out is {str(out)!r}; it must not exist yet")
    return write(run_folder(workdir), out)


def _read_autoencoder(weights: Path, out: Path, autoencoder: Path | None, heads: int | None) -> list[str]:
    notes: list[str] = []
    vae = read_vae(_model_folder(weights, "vae"), notes)
    assert isinstance(vae.config, KLConfig | WanConfig)  # `read_vae` reads no other
    config = autoencoder_run(vae.config)
    _save_run(out, config, vae.params, autoencoder_groups(config))
    save_autoencoder(vae, out / FOLDER, {"steps": 0, "held_out_psnr": None})
    return [*notes, f"latents are normalised by mean {vae.mean_C.tolist()} and deviation {vae.std_C.tolist()}"]


def _read_denoiser(read: Callable, weights: Path, out: Path, autoencoder: Path | None, heads: int | None) -> list[str]:
    factor, channels = FACTOR, None
    if autoencoder is not None:
        first_stage = autoencoder_config(autoencoder)
        factor, channels = first_stage.space_factor, first_stage.latent_channels
    notes: list[str] = []
    network: Network = read(weights, heads, notes)
    found = network.config.latent_channels
    check(
        channels in (None, found),
        f"--autoencoder is {str(autoencoder)!r}; its latents must have {found} channels, and have {channels}",
    )
    config = denoiser_run(network, factor)
    _save_run(out, config, network.params, denoiser_groups(config))
    notes += [
        "the position table is not stored: it is computed",
        f"it samples images of {network.side * factor} x {network.side * factor} pixels",
    ]
    if autoencoder is None:
        return [*notes, "the run has no autoencoder: give one to `sora-jax sample` by --autoencoder"]
    copy_autoencoder(autoencoder, out)
    return notes


def denoiser_run(network: Network, factor: int = FACTOR) -> DenoiserRun:
    """Return the config that trains a network at its own image size by the recipe of its paper.

    It is that of configs/sit.py if the network is shown the times of SiT, else that of configs/dit.py. `factor` is the
    number of pixels to a latent position.
    """
    model, side = network.config, network.side
    diffusion, sampling = SIT_RECIPE if model.data_times else DIT_RECIPE
    # The official codes guide only the first three channels.
    sampling = dataclasses.replace(sampling, guidance=GuidanceConfig(4.0, min(3, model.latent_channels)))
    return DenoiserRun(
        batch=256,
        model=model,
        packing=PackingConfig(length=(side // model.patch[1]) ** 2, slots=1),
        diffusion=diffusion,
        optim=OptimConfig(warmup_steps=0, clip_norm=0.0, b2=0.999, ema=(0.9999,), ema_warmup=False),
        loop=LoopConfig(steps=400_000, log_every=100, save_every=5000),
        preview=PreviewConfig(
            classes=tuple(c for c in SHOWN if c < model.classes), sizes=((1, side * factor, side * factor),)
        ),
        sampling=sampling,
    )


def autoencoder_run(model: KLConfig | WanConfig) -> AutoencoderRun:
    """Return the config that trains an autoencoder by the recipe of configs/autoencoder.py: kl4, or base for clips."""
    side = 16 * model.space_factor
    videos = isinstance(model, WanConfig)
    return AutoencoderRun(
        batch=16,
        crop=(1 + 4 * model.time_factor, side, side) if videos else (1, 256, 256),
        image_share=0.25 if videos else 0.0,
        model=model,
        optim=OptimConfig(schedule="cosine", warmup_steps=1000),
        loop=LoopConfig(steps=200_000, log_every=50, save_every=2000, preview_every=2000),
    )


def _save_run(out: Path, config: RunConfig, params: dict, groups: Mapping[str, Group]) -> None:
    """Write config.json and a checkpoint of step 0, as training would have left them; the EMAs equal the weights."""
    mesh = make_mesh()
    optimizers = make_optimizers(groups, config.loop.steps)
    ((name, group),) = groups.items()
    with jax.set_mesh(mesh), Checkpoints(out / "checkpoints", config.loop.keep) as checkpoints:
        placed = jax.device_put(params, param.shardings(group.specs, mesh))
        averages = (placed,) * len(group.optim.ema)
        opt_state = jax.jit(optimizers[name].transformation.init)(placed)
        state = TrainState(jnp.zeros((), jnp.int32), {name: placed}, {name: averages}, {name: opt_state})
        notes = {"config": to_dict(config), "step": 0, "seed": config.seed, "means": {}, "position": None}
        checkpoints.save(0, state, notes)
    write_json(out / "config.json", to_dict(config))


def _model_folder(folder: Path, name: str) -> Path:
    """Return the folder of a model: `folder` itself, or its subfolder `name` if it is that of a whole pipeline."""
    return folder / name if (folder / "model_index.json").exists() else folder


def _write_autoencoder(workdir: Path, out: Path) -> list[str]:
    write_vae(load_autoencoder(workdir), out)
    return []


def _write_denoiser(write: Callable, recipe: Recipe, workdir: Path, out: Path) -> list[str]:
    config, params, _ = merged_weights(workdir)
    if not isinstance(config.model, TransformerConfig):
        raise UserError(f"config.model.name is {config.model.name!r}; for this format it must be 'transformer'")
    factor = autoencoder_config(workdir).space_factor if (workdir / FOLDER / RECORD).exists() else FACTOR
    frames, height, width = config.preview.sizes[0] if config.preview.sizes else (0, 0, 0)
    check(
        frames == 1 and height == width and height % (factor * config.model.patch[1]) == 0,
        f"config.preview.sizes is {config.preview.sizes}; the first must be that of a square image, for which the "
        "format has a position table",
    )
    found, wanted = config.diffusion, recipe[0]
    check(
        (found.process, found.prediction) == (wanted.process, wanted.prediction),
        f"config.diffusion.process is {found.process!r} and prediction {found.prediction!r}; for this format they must "
        f"be {wanted.process!r} and {wanted.prediction!r}",
    )
    write(Network(config.model, params, height // factor), out)
    return [f"the EMA of decay {config.optim.ema[0]} was written"]


def _write_run(workdir: Path, out: Path) -> list[str]:
    """Write a run folder with the merged weights of a run, as its step 0, that needs no other run."""
    config, params, step = merged_weights(workdir)
    _save_run(out, config, params, denoiser_groups(config))
    if (workdir / FOLDER / RECORD).exists():
        copy_autoencoder(workdir, out)
    for name in ("tokenizer.json", "data.json", "seen.json"):
        if (workdir / name).exists():
            write_json(out / name, read_json(workdir / name))
    return [f"the EMA of decay {config.optim.ema[0]} at step {step} was written: a new run, at its step 0"]


OFFICIAL = ("dit", "sit")
FOLDERS = "diffusers-dit"
VAE = "diffusers-vae"
LORA = "diffusers-lora"
RUN = "run"
READERS: dict[str, Callable] = {
    "dit": functools.partial(_read_denoiser, read_dit),
    "sit": functools.partial(_read_denoiser, read_sit),
    FOLDERS: functools.partial(
        _read_denoiser, lambda path, heads, notes: read_diffusers(_model_folder(path, "transformer"), notes)
    ),
    VAE: _read_autoencoder,
}
WRITERS: dict[str, Callable] = {
    "dit": functools.partial(_write_denoiser, write_dit, DIT_RECIPE),
    "sit": functools.partial(_write_denoiser, write_sit, SIT_RECIPE),
    FOLDERS: functools.partial(_write_denoiser, write_diffusers, DIT_RECIPE),
    VAE: _write_autoencoder,
    LORA: write_lora,
    RUN: _write_run,
}
