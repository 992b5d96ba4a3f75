"""One packed sampler: requests of any size, side by side in fixed-shape packs, from noise to latents."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from sora_jax.data.packing import EmptyItem, PackingConfig, grid_of, pack_batch, unpack, unstack
from sora_jax.data.planning import plan
from sora_jax.diffusion.guidance import TokenLayout, guided
from sora_jax.diffusion.keys import Purpose, step_key, token_noise
from sora_jax.diffusion.prediction import Denoise
from sora_jax.diffusion.process import process_named
from sora_jax.diffusion.sampling import SamplingConfig, sample
from sora_jax.diffusion.solvers import Problem
from sora_jax.generate.requests import Request
from sora_jax.models.denoiser import encode_condition
from sora_jax.nn.pack import Pack, per_slot, slot_of
from sora_jax.parallel.mesh import place_batch
from sora_jax.parallel.rules import parts
from sora_jax.train.denoiser import DenoiserRun, Text, network

UNPACKED = ("segments_BL", "index_BL", "grids_BS3")  # what `unpack` reads beside the tokens
PACKS_AT_ONCE = 8  # rounded up to the parts of the mesh; bounds the memory of a long list of prompts


@dataclasses.dataclass(frozen=True)
class TrainedDenoiser:
    """Hold a denoiser: its averaged weights and tokenizer, placed on a mesh."""

    config: DenoiserRun
    params: dict
    tokenizer: Text
    mesh: Mesh


class Conditions(NamedTuple):
    """Hold what packs are sampled with: their clips, the same with negative captions, and each clip's guidance scale.

    Without guidance `negative` is None.
    """

    positive: Pack
    negative: Pack | None
    scale_BS: jax.Array


class _Layout(NamedTuple):
    """Hold requests as items to pack, the same for their negatives, which row holds which, and the sizes of packs."""

    items: list[EmptyItem]
    negatives: list[EmptyItem]
    rows: list[list[int]]
    packing: PackingConfig


def sample_latents(
    model: TrainedDenoiser, requests: Sequence[Request], sampling: SamplingConfig, seed: int
) -> list[np.ndarray]:
    """Sample normalised latents (t, h, w, C), one per request, in order.

    All requests travel in as few packs as they fit in, up to PACKS_AT_ONCE in a call of the compiled sampler, with a
    progress bar where that takes more than one call. A clip's noise is keyed by (seed, clip id), so what it is packed
    with changes it by float error at most.
    """
    layout = _lay_out(model, requests)
    split = parts("batch", model.mesh)
    at_once = -(-min(len(layout.rows), PACKS_AT_ONCE) // split) * split
    starts = range(0, len(layout.rows), at_once)
    # The scale is given clip by clip, so that one program serves all scales.
    sampling = dataclasses.replace(sampling, guidance=dataclasses.replace(sampling.guidance, scale=1.0))
    latents: dict[int, np.ndarray] = {}
    for start in tqdm(starts, "sampling", unit="batch", disable=len(starts) == 1):
        rows = layout.rows[start : start + at_once]
        rows += rows[-1:] * (at_once - len(rows))  # the last row again, so that one program serves all
        conditions = _place(model.mesh, layout, rows, requests)
        tokens_BLP = solve_packs(model.config, sampling, model.params, np.uint32(seed), conditions)
        packs = {name: np.asarray(getattr(conditions.positive, name)) for name in UNPACKED}
        for pack, row in zip(unstack(packs | {"tokens_BLP": np.asarray(tokens_BLP)}), rows):
            for member, latent in zip(row, unpack(pack, model.config.model.patch), strict=True):
                latents[member] = latent
    return [latents[member] for member in range(len(requests))]


def _place(mesh: Mesh, layout: _Layout, rows: list[list[int]], requests: Sequence[Request]) -> Conditions:
    """Pack the members of some rows and place them on the mesh."""

    def placed(items: list[EmptyItem]) -> Pack:
        return Pack(**place_batch(pack_batch([[items[i] for i in row] for row in rows], layout.packing), mesh))

    scale_BS = np.ones((len(rows), layout.packing.slots), np.float32)
    for scales, row in zip(scale_BS, rows):
        scales[: len(row)] = [requests[i].guidance for i in row]
    guides = any(request.guidance != 1.0 for request in requests)
    scale_BS = place_batch({"scale_BS": scale_BS}, mesh)["scale_BS"]
    return Conditions(placed(layout.items), placed(layout.negatives) if guides else None, scale_BS)


def _lay_out(model: TrainedDenoiser, requests: Sequence[Request]) -> _Layout:
    """Make items of the requests and plan which share a pack.

    Packs have the sizes of the run's, grown if a single request needs more, and to what the mesh can split.
    """
    packing, text, split = model.config.packs, model.tokenizer, parts("length", model.mesh)

    def item(request: Request, caption: str, label: int) -> EmptyItem:
        return EmptyItem(request.size, request.clip_id, text.encode(caption), text.embed(caption), label)

    items = [item(request, request.prompt, request.label) for request in requests]
    negatives = [item(request, request.negative, -1) for request in requests]
    lengths = np.array([math.prod(grid_of(request.size, model.config.model.patch)) for request in requests])
    words = np.array([max(len(one.text), len(other.text)) for one, other in zip(items, negatives, strict=True)])
    longest = int(lengths.max())
    length = packing.length if longest <= packing.length else -(-longest // 128) * 128
    text_length = max(packing.text_length, int(words.max()))
    packing = dataclasses.replace(
        packing, length=-(-length // split) * split, text_length=-(-text_length // split) * split
    )
    planned = plan(0, 0, lengths, words, packing.length, packing.slots, packing.text_length, packing.window)
    return _Layout(items, negatives, [list(map(int, planned[row])) for row in range(len(planned))], packing)


@functools.partial(jax.jit, static_argnums=(0, 1))
def solve_packs(
    config: DenoiserRun, sampling: SamplingConfig, params: dict, seed: jax.Array, conditions: Conditions
) -> jax.Array:
    """Solve from noise to clean tokens (B, L, P), with the denoiser and times of training."""
    pack, model = conditions.positive, config.model
    clip_ids_BL = per_slot(pack.clip_ids_BS, slot_of(pack.segments_BL))
    noise = lambda key: token_noise(key, clip_ids_BL, pack.index_BL, model.patch_values)  # noqa: E731
    problem = Problem(
        _denoiser(config, sampling, params, conditions),
        config.diffusion.prediction,
        process_named(config.diffusion.process),
        pack.rows_BL,
        lambda step: noise(step_key(seed, step, Purpose.SOLVER)),
        "learned" if model.learned_variance else sampling.solver.variance,
    )
    tokens_BR = per_slot(pack.grids_BS3.prod(-1), pack.row_slots_BR)
    return sample(sampling, config.diffusion.times, problem, noise(step_key(seed, 0, Purpose.SAMPLE)), tokens_BR)


def _denoiser(config: DenoiserRun, sampling: SamplingConfig, params: dict, conditions: Conditions) -> Denoise:
    """Return denoise(x, t) with captions encoded once, guided away from the negative packs if there are any."""

    def conditioned(pack: Pack) -> Denoise:
        return network(params, config, pack, encode_condition(params, config.model, pack))

    pack = conditions.positive
    if conditions.negative is None:
        return conditioned(pack)
    both = conditioned(pack), conditioned(conditions.negative)
    layout = TokenLayout(pack.segments_BL, pack.rows_BL, config.model.latent_channels)
    return guided(sampling.guidance, *both, conditions.scale_BS, layout)
