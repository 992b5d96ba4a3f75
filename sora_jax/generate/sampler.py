"""One packed sampler: requests of any size, side by side in fixed-shape packs, from noise to latents."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from sora_jax.data.packing import PackingConfig, PackItem, grid_of, pack_batch, unpack, unstack
from sora_jax.data.planning import plan
from sora_jax.data.tokenizer import NoText, Tokenizer
from sora_jax.diffusion.guidance import guided
from sora_jax.diffusion.keys import Purpose, step_key, token_noise
from sora_jax.diffusion.process import process_named
from sora_jax.diffusion.sampling import SamplingConfig, sample
from sora_jax.diffusion.solvers import Problem
from sora_jax.models.pretrained import PretrainedText
from sora_jax.models.text import encode_text
from sora_jax.nn.layers import compute_dtype
from sora_jax.nn.pack import Pack, per_slot, slot_of
from sora_jax.parallel.mesh import place_batch
from sora_jax.parallel.rules import parts
from sora_jax.train.denoiser import DenoiserRun, network

UNPACKED = ("segments_BL", "index_BL", "grids_BS3")  # what `unpack` reads beside the tokens
PACKS_AT_ONCE = 8  # rounded up to the parts of the mesh; bounds the memory of a long list of prompts


@dataclasses.dataclass(frozen=True)
class Request:
    """A clip to generate: caption, latent size (t, h, w), identity, class (-1: none) and guidance (1: none).

    `negative` is the caption that guidance leads away from. Equal requests give equal clips.
    """

    prompt: str
    size: tuple[int, int, int]
    clip: int
    label: int = -1
    guidance: float = 1.0
    negative: str = ""


def sample_latents(
    params,
    run: DenoiserRun,
    tokenizer: Tokenizer | PretrainedText | NoText,
    requests: Sequence[Request],
    sampling: SamplingConfig,
    seed: int,
    mesh: Mesh,
) -> list[np.ndarray]:
    """Normalised latents (t, h, w, C), one per request, in order.

    All requests travel in as few packs as they fit in, up to PACKS_AT_ONCE in a call of the compiled sampler, with a
    progress bar where that takes more than one; a clip's noise is keyed by (seed, clip), so what it is packed with
    changes it by float error at most.
    """
    items, negatives, packing = _pack_items(run, tokenizer, requests, parts("length", mesh))
    places = _arrange(items, negatives, packing)
    split = parts("batch", mesh)
    at_once = -(-min(len(places), PACKS_AT_ONCE) // split) * split
    starts = range(0, len(places), at_once)
    guides = any(request.guidance != 1.0 for request in requests)
    # The scale is given clip by clip, so that one program serves all scales.
    sampling = dataclasses.replace(sampling, guidance=dataclasses.replace(sampling.guidance, scale=1.0))
    latents: list[np.ndarray | None] = [None] * len(requests)
    for start in tqdm(starts, "sampling", unit="batch", disable=len(starts) == 1):
        members = places[start : start + at_once]
        members += members[-1:] * (at_once - len(members))  # the last row again, so that one program serves all

        def placed(of: Sequence[PackItem], members=members) -> Pack:
            return Pack(**place_batch(pack_batch([[of[i] for i in row] for row in members], packing), mesh))

        scale_BS = np.ones((at_once, packing.slots), np.float32)
        for row, inside in zip(scale_BS, members):
            row[: len(inside)] = [requests[i].guidance for i in inside]
        scale_BS = place_batch({"scale_BS": scale_BS}, mesh)["scale_BS"]
        batch, negative = placed(items), placed(negatives) if guides else None
        tokens_BLP = solve_packs(params, run, sampling, np.uint32(seed), batch, negative, scale_BS)
        rows = unstack(
            {name: np.asarray(getattr(batch, name)) for name in UNPACKED} | {"tokens_BLP": np.asarray(tokens_BLP)}
        )
        for row, inside in zip(rows, members):
            for member, latent in zip(inside, unpack(row, packing.patch), strict=True):
                latents[member] = latent
    return latents


def _pack_items(run: DenoiserRun, text: Tokenizer | PretrainedText | NoText, requests: Sequence[Request], split: int):
    """Requests as items to pack, the same without class and with the negative caption, and the sizes of packs.

    These are the run's, grown if a single request needs more, and to what the mesh can split into `split` parts.
    """
    channels = run.model.latent_channels

    def item(request: Request, caption: str, label: int) -> PackItem:
        latent = np.zeros((*request.size, channels), np.float32)
        return PackItem(latent, np.uint32(request.clip), text.encode(caption), text.embed(caption), label)

    items = [item(request, request.prompt, request.label) for request in requests]
    negatives = [item(request, request.negative, -1) for request in requests]
    longest = max(int(np.prod(grid_of(r.size, run.packs.patch))) for r in requests)
    wordiest = max(len(item.text) for item in items + negatives)
    sizes = {
        "length": run.packs.length if longest <= run.packs.length else -(-longest // 128) * 128,
        "text_length": max(run.packs.text_length, wordiest),
    }
    sizes = {name: -(-size // split) * split for name, size in sizes.items()}
    return items, negatives, dataclasses.replace(run.packs, **sizes)


def _arrange(items: list, negatives: list, packing: PackingConfig) -> list[list[int]]:
    """Which items each row holds, slot by slot."""
    lengths = np.array([np.prod(grid_of(item.values.shape[:3], packing.patch)) for item in items])
    texts = np.array([max(len(one.text), len(other.text)) for one, other in zip(items, negatives, strict=True)])
    planned = plan(0, 0, lengths, texts, packing.length, packing.slots, packing.text_length, packing.window)
    return [list(map(int, planned[row])) for row in range(len(planned))]


@functools.partial(jax.jit, static_argnums=(1, 2))
def solve_packs(params, run: DenoiserRun, sampling: SamplingConfig, seed, batch: Pack, negative: Pack | None, scale_BS):
    """Noise to clean tokens (B, L, P): the same denoiser and times as in training, under a solver."""
    clip_ids_BL = per_slot(batch.clip_ids_BS, slot_of(batch.segments_BL))
    noise = lambda key: token_noise(key, clip_ids_BL, batch.index_BL, run.model.patch_values)  # noqa: E731
    problem = Problem(
        _denoiser(params, run, sampling, batch, negative, scale_BS),
        run.diffusion.prediction,
        process_named(run.diffusion.process),
        batch.rows_BL,
        lambda step: noise(step_key(seed, step, Purpose.SOLVER)),
        "learned" if run.model.learned_variance else sampling.solver.variance,
    )
    tokens_BR = per_slot(batch.grids_BS3.prod(-1), batch.row_slots_BR)
    return sample(sampling, run.diffusion.times, problem, noise(step_key(seed, 0, Purpose.SAMPLE)), tokens_BR)


def _denoiser(params, run: DenoiserRun, sampling: SamplingConfig, batch: Pack, negative: Pack | None, scale_BS):
    """denoise(x, t) with captions encoded once, guided away from the negative one, or the null one, if there is any."""
    model = run.model

    def conditioned(pack: Pack):
        text = encode_text(params["text"], model.text, pack, compute_dtype(model.dtype)) if model.text else None
        return network(params, run, pack, text)

    if negative is None:
        return conditioned(batch)
    both = conditioned(batch), conditioned(negative)
    return guided(sampling.guidance, *both, scale_BS, batch.segments_BL, batch.rows_BL, model.latent_channels)
