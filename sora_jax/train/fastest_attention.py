"""Choose the backend of attention by measurement, where nothing else can tell."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sora_jax.config import read_json
from sora_jax.files import as_path, write_json
from sora_jax.nn.attention.measured import Load, candidates, fastest
from sora_jax.nn.layers import compute_dtype
from sora_jax.parallel import distributed
from sora_jax.parallel.rules import parts
from sora_jax.train.denoiser import DenoiserRun
from sora_jax.train.loop import log

CHOICES = "attention.json"  # {kind of device: backend}


def with_fastest_attention(config: DenoiserRun, mesh: Mesh, workdir: Path) -> DenoiserRun:
    """Replace "auto" attention by the fastest backend, where only a measurement can tell: to compute with, not to keep.

    The choice that `keep_attention` wrote for this kind of device is taken again, so that a run that goes on, and what
    is sampled from it, is computed by the same program.
    """
    model: Any = config.model  # whose fields below are not those of every network
    measurable = getattr(model, "attention", None) == "auto" and hasattr(model, "head_width")
    if not measurable or not candidates():
        return config
    kept = kept_attention(workdir).get(device_kind())
    if not distributed.all_true(kept is not None):
        packs = max(config.batch // config.loop.accumulate // parts("batch", mesh), 1)
        heads, dtype = model.heads // parts("heads", mesh), jnp.dtype(compute_dtype(model.dtype)).name
        kept, found = fastest(Load(packs, config.packing.length, heads, model.head_width, dtype))
        log(f"attention: {kept} ({found})")
    return dataclasses.replace(config, model=dataclasses.replace(model, attention=kept))


def keep_attention(config: DenoiserRun, workdir: Path) -> None:
    """Write what computes attention on this kind of device to WORKDIR/attention.json."""
    model: Any = config.model
    write_json(as_path(workdir) / CHOICES, kept_attention(workdir) | {device_kind(): model.attention})


def kept_attention(workdir: Path) -> dict[str, str]:
    """Read the choices of a run folder, by kind of device."""
    path = as_path(workdir) / CHOICES
    return read_json(path) if path.exists() else {}


def device_kind() -> str:
    """Return what JAX calls the devices of this process."""
    return jax.local_devices()[0].device_kind
