"""Export a fine-tuned run: its adapters in the names of diffusers, or a run folder with all weights merged."""

import dataclasses
from pathlib import Path

import numpy as np

from sora_jax.config import check
from sora_jax.convert.dit import diffusers_links
from sora_jax.convert.links import Link
from sora_jax.convert.tensors import write_tensors
from sora_jax.errors import UserError
from sora_jax.generate.run import read_run_config, saved_groups
from sora_jax.models.transformer import TransformerConfig
from sora_jax.nn.lora import DOWN, SCALE, UP, merge_adapters
from sora_jax.parallel.mesh import make_mesh
from sora_jax.train.adapt import InitConfig, LoraConfig, restore_weights
from sora_jax.train.checkpoint import NEWEST
from sora_jax.train.denoiser import DenoiserRun, denoiser_parts

PREFIX = "transformer"  # of the names in files that diffusers' `load_lora_weights` reads


def averaged_weights(workdir: Path, which: str = NEWEST) -> tuple[DenoiserRun, dict, int]:
    """Read a denoiser's config, averaged weights, with its adapters beside their weights, and their step."""
    config = read_run_config(workdir)
    return config, *restore_weights(workdir, saved_groups, denoiser_parts(config)[1], make_mesh(), which)


def merged_weights(workdir: Path, which: str = NEWEST) -> tuple[DenoiserRun, dict, int]:
    """Read averaged weights with adapters merged, their step, and the config of a run that has such weights."""
    config, params, step = averaged_weights(workdir, which)
    plain = dataclasses.replace(config, init=InitConfig(), freeze=(), lora=LoraConfig())
    return plain, merge_adapters(params), step


def write_lora(workdir: Path, out: Path) -> list[str]:
    """Write the adapters of a run as safetensors, in the names of diffusers' DiT: `...to_q.lora_A.weight`.

    PEFT computes W + (alpha / rank) B A. The scale is multiplied into B here, so alpha is the rank, its default.

    Raises:
        UserError: the run has no adapters, or some on layers that have no name there.
    """
    config, params, _ = averaged_weights(workdir)
    check(config.lora.rank, f"--workdir is {str(workdir)!r}; config.lora.rank is 0: it must be a run with adapters")
    check(out.suffix == ".safetensors", f"--out is {str(out)!r}; for --to=diffusers-lora it must end in .safetensors")
    if not isinstance(config.model, TransformerConfig):
        raise UserError(f"config.model.name is {config.model.name!r}; for this format it must be 'transformer'")
    links = [link for link in diffusers_links(config.model) if link.path[0] == "blocks" and link.path[-1] == "weight"]
    named = {"/".join(link.path[:-1]) for link in links}
    unnamed = sorted(_adapted(params) - named)
    check(
        not unnamed,
        f"lora.paths is {config.lora.paths}; for --to=diffusers-lora layers must be of DiT's blocks, and these are "
        f"not: {', '.join(unnamed)}",
    )
    tensors: dict[str, np.ndarray] = {}
    for link in links:
        tensors |= _tensors_of(link, params)
    write_tensors(out, tensors)
    return [f"{len(tensors) // 2} adapters of rank {config.lora.rank} were written, with alpha = rank"]


def _adapted(params: dict, path: str = "") -> set[str]:
    """Return the paths of the layers that have adapters."""
    found = {path} if DOWN in params else set()
    for name, value in params.items():
        if isinstance(value, dict):
            found |= _adapted(value, f"{path}/{name}" if path else name)
    return found


def _tensors_of(link: Link, params: dict) -> dict[str, np.ndarray]:
    """Return A and B of the tensors that a link names; those of joint queries, keys and values share A."""
    layer = params
    for name in link.path[:-1]:
        layer = layer[name]
    if DOWN not in layer:
        return {}
    a, b, scale = (np.asarray(layer[name])[link.layer] for name in (DOWN, UP, SCALE))
    parts = np.split((scale * b).reshape(len(b), -1).T, len(link.names))
    found: dict[str, np.ndarray] = {}
    for name, part in zip(link.names, parts, strict=True):
        stem = f"{PREFIX}.{name.removesuffix('.weight')}"
        found |= {f"{stem}.lora_A.weight": a.reshape(-1, a.shape[-1]).T, f"{stem}.lora_B.weight": part}
    return found
