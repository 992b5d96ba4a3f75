"""One packed sampler: requests of any size, side by side in fixed-shape packs, from noise to latents."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from sora_jax.config import check
from sora_jax.data.packing import PackingConfig, PackItem, grid_of, pack, stack, unpack, unstack
from sora_jax.data.planning import plan
from sora_jax.data.tokenizer import Tokenizer
from sora_jax.diffusion.guidance import guided
from sora_jax.diffusion.keys import Purpose, step_key, token_noise
from sora_jax.diffusion.process import process_named
from sora_jax.diffusion.solvers import Problem, solver_named
from sora_jax.diffusion.times import sampling_times
from sora_jax.models.pretrained import PretrainedText
from sora_jax.models.text import encode_text
from sora_jax.models.transformer import denoise
from sora_jax.nn.layers import compute_dtype
from sora_jax.nn.pack import Pack, drop_captions, per_slot, slot_of
from sora_jax.parallel.mesh import place_batch
from sora_jax.parallel.rules import parts
from sora_jax.train.denoiser import DenoiserRun

PACKS_AT_ONCE = 8  # rounded up to the parts of the mesh; bounds the memory of a long list of prompts


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """How to sample: solver steps, guidance scale (1 = none), seed."""

    solver: str = "euler"
    steps: int = 30
    guidance: float = 4.0
    seed: int = 0

    def __post_init__(self):
        solver_named(self.solver)
        check(self.steps > 0, f"--steps is {self.steps}; it must be positive")
        check(math.isfinite(self.guidance), f"--guidance is {self.guidance}; it must be a finite number")


@dataclasses.dataclass(frozen=True)
class Request:
    """A clip to generate: caption, latent size (t, h, w) and identity; equal requests give equal clips."""

    prompt: str
    size: tuple[int, int, int]
    clip: int


def sample_latents(
    params,
    run: DenoiserRun,
    tokenizer: Tokenizer | PretrainedText,
    requests: Sequence[Request],
    config: SampleConfig,
    mesh: Mesh,
) -> list[np.ndarray]:
    """Normalised latents (t, h, w, C), one per request, in order.

    All requests travel in as few packs as they fit in, up to PACKS_AT_ONCE in a call of the compiled sampler, with a
    progress bar where that takes more than one; a clip's noise is keyed by (seed, clip), so what it is packed with
    changes it by float error at most.
    """
    items, packing = _pack_items(run, tokenizer, requests)
    places = _arrange(items, packing)
    split = parts("batch", mesh)
    at_once = -(-min(len(places), PACKS_AT_ONCE) // split) * split
    starts = range(0, len(places), at_once)
    guidance = None if config.guidance == 1.0 else jnp.float32(config.guidance)
    key = step_key(config.seed, 0, Purpose.SAMPLE)
    latents: list[np.ndarray | None] = [None] * len(requests)
    for start in tqdm(starts, "sampling", unit="batch", disable=len(starts) == 1):
        members = places[start : start + at_once]
        rows = [pack([items[i] for i in row], packing) for row in members]
        batch = stack(rows + rows[-1:] * (at_once - len(rows)))  # the last row again, so that one program serves all
        tokens_BLP = _solve(params, run, config.solver, config.steps, Pack(**place_batch(batch, mesh)), key, guidance)
        for row, inside in zip(unstack(batch | {"tokens_BLP": np.asarray(tokens_BLP)}), members):
            for member, latent in zip(inside, unpack(row, packing.patch), strict=True):
                latents[member] = latent
    return latents


def _pack_items(run: DenoiserRun, text: Tokenizer | PretrainedText, requests: Sequence[Request]):
    """Requests as items to pack, and the run's pack sizes, grown if a single request needs more."""
    channels = run.model.latent_channels
    items = [
        PackItem(
            np.zeros((*r.size, channels), np.float32), np.uint32(r.clip), text.encode(r.prompt), text.embed(r.prompt)
        )
        for r in requests
    ]
    longest = max(int(np.prod(grid_of(r.size, run.packs.patch))) for r in requests)
    wordiest = max(len(item.text) for item in items)
    sizes = {
        "length": run.packs.length if longest <= run.packs.length else -(-longest // 128) * 128,
        "text_length": max(run.packs.text_length, wordiest),
    }
    return items, dataclasses.replace(run.packs, **sizes)


def _arrange(items: list, packing: PackingConfig) -> list[list[int]]:
    """Which items each row holds, slot by slot."""
    lengths = np.array([np.prod(grid_of(item.latent.shape[:3], packing.patch)) for item in items])
    texts = np.array([len(item.text) for item in items])
    planned = plan(0, 0, lengths, texts, packing.length, packing.slots, packing.text_length, packing.window)
    return [list(map(int, planned[row])) for row in range(len(planned))]


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _solve(params, run: DenoiserRun, solver: str, steps: int, batch: Pack, key, guidance) -> jax.Array:
    """Noise to clean tokens (B, L, P): the same denoiser and times as in training, under a solver."""
    model, diffusion = run.model, run.diffusion
    clips_BL = per_slot(batch.clips_BS, slot_of(batch.segments_BL))
    noise_BLP = token_noise(key, clips_BL, batch.index_BL, model.patch_values)
    tokens_BR = per_slot(batch.grids_BS3.prod(-1), batch.row_slots_BR)
    times_KBR = sampling_times(diffusion.times, steps, tokens_BR)
    problem = Problem(
        _denoiser(params, model, batch, guidance),
        diffusion.prediction,
        process_named(diffusion.process),
        batch.rows_BL,
    )
    return solver_named(solver)(problem, noise_BLP, times_KBR)


def _denoiser(params, model, batch: Pack, guidance: jax.Array | None):
    """denoise(x, t) with captions encoded once, guided away from the null caption unless guidance is None."""
    dtype = compute_dtype(model.dtype)

    def conditioned(pack: Pack):
        text = encode_text(params["text"], model.text, pack, dtype)
        return lambda x_BLP, t_BR: denoise(params, model, pack, x_BLP, t_BR, text)

    if guidance is None:
        return conditioned(batch)
    nothing = drop_captions(batch, jnp.ones_like(batch.clips_BS, bool))
    scale_BS = jnp.full_like(batch.clips_BS, guidance, jnp.float32)
    return guided(conditioned(batch), conditioned(nothing), scale_BS, batch.segments_BL)
