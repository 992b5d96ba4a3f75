"""Lay requests out in packs: their tokens, what is known of them, their captions, and which of them share a pack."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from sora_jax.data.packing.packs import (
    EmptyItem,
    Layout,
    PackingConfig,
    add_guides,
    grid_of,
    layout_of,
    pack_batch,
    patchify,
)
from sora_jax.data.packing.planning import plan
from sora_jax.diffusion.given import Given
from sora_jax.generate.requests import Request, Size
from sora_jax.nn.pack import Pack, per_slot
from sora_jax.parallel.mesh import place_batch
from sora_jax.parallel.rules import parts
from sora_jax.train.denoiser import DenoiserRun, Text


@dataclasses.dataclass(frozen=True)
class TrainedDenoiser:
    """Hold a denoiser: its averaged weights and tokenizer, placed on a mesh."""

    config: DenoiserRun
    params: dict
    tokenizer: Text
    mesh: Mesh


class Conditions(NamedTuple):
    """Hold what packs are sampled with: their clips, the same with negative captions, and each clip's guidance scale.

    Without guidance `negative` is None, and `given` where nothing is known of any clip. rings_BS: the token frames of
    clips whose first frame follows the last, else 0; None where no clip is such a ring.
    """

    positive: Pack
    negative: Pack | None
    scale_BS: jax.Array
    given: Given | None = None
    rings_BS: jax.Array | None = None


class _KnownTokens(NamedTuple):
    """Hold what is known of a request: the ceilings of its rows, and its tokens (None where nothing is known).

    ring: the token frames of a clip whose first frame follows the last, else 0.
    """

    ceilings: np.ndarray
    tokens: np.ndarray | None
    layout: Layout
    ring: int = 0


class PackLayout(NamedTuple):
    """Hold requests as items to pack, the same for their negatives, which row holds which, and the sizes of packs.

    sources: the items with the prompts that describe known clips. tokens: what is known of each request.
    """

    items: list[EmptyItem]
    negatives: list[EmptyItem]
    sources: list[EmptyItem]
    rows: list[list[int]]
    packing: PackingConfig
    tokens: list[_KnownTokens]


def place(mesh: Mesh, layout: PackLayout, rows: list[list[int]], requests: Sequence[Request]) -> Conditions:
    """Pack the members of some rows and place them on the mesh."""

    def placed(items: list[EmptyItem]) -> Pack:
        return Pack(**place_batch(pack_batch([[items[i] for i in row] for row in rows], layout.packing), mesh))

    scale_BS = np.ones((len(rows), layout.packing.slots), np.float32)
    for scales, row in zip(scale_BS, rows):
        scales[: len(row)] = [requests[i].guidance for i in row]
    guided = any(request.guidance != 1.0 for request in requests)
    scale_BS = place_batch({"scale_BS": scale_BS}, mesh)["scale_BS"]
    return Conditions(
        placed(layout.items),
        placed(layout.negatives) if guided else None,
        scale_BS,
        _given(mesh, layout, rows) if any(request.known for request in requests) else None,
        _rings(mesh, layout, rows) if any(task.ring for task in layout.tokens) else None,
    )


def _given(mesh: Mesh, layout: PackLayout, rows: list[list[int]]) -> Given:
    """Place the known tokens of some rows, and the ceilings of their noise levels."""
    packing = layout.packing
    width = next(task.tokens.shape[1] for task in layout.tokens if task.tokens is not None)
    x0_BLP = np.zeros((len(rows), packing.length, width), np.float32)
    ceiling_BSr = np.ones((len(rows), packing.slots, packing.rows_per_clip), np.float32)
    rescales_BSr = np.zeros_like(ceiling_BSr)
    for b, row in enumerate(rows):
        begin = 0
        for slot, member in enumerate(row):
            task = layout.tokens[member]
            length = len(task.layout.coords)
            if task.tokens is not None:
                x0_BLP[b, begin : begin + length] = task.tokens
            ceiling_BSr[b, slot, : len(task.ceilings)] = task.ceilings
            rescales_BSr[b, slot] = len(task.ceilings) == 1
            begin += length
    flat = (len(rows), -1)
    arrays = {"x0_BLP": x0_BLP, "ceiling_BR": ceiling_BSr.reshape(flat), "rescales_BR": rescales_BSr.reshape(flat)}
    return Given(**place_batch(arrays, mesh))


def _rings(mesh: Mesh, layout: PackLayout, rows: list[list[int]]) -> jax.Array:
    """Place the token frames of the clips that are rings, 0 for the others."""
    rings_BS = np.zeros((len(rows), layout.packing.slots), np.int32)
    for found, row in zip(rings_BS, rows, strict=True):
        found[: len(row)] = [layout.tokens[member].ring for member in row]
    return place_batch({"rings_BS": rings_BS}, mesh)["rings_BS"]


def lay_out(model: TrainedDenoiser, requests: Sequence[Request]) -> PackLayout:
    """Make items of the requests and plan which share a pack.

    Packs have the sizes of the run's, grown if a single request needs more, and to what the mesh can split.
    """
    packing, text, split = model.config.packs, model.tokenizer, parts("length", model.mesh)
    tasks = [_known_tokens(request, model.config.model.patch) for request in requests]

    def item(request: Request, task: _KnownTokens, caption: str, label: int) -> EmptyItem:
        words = text.encode(caption), text.embed(caption)
        return EmptyItem(request.size, request.clip_id, *words, label, task.layout, request.low)

    items = [item(r, task, r.prompt, r.label) for r, task in zip(requests, tasks, strict=True)]
    negatives = [item(r, task, r.negative, -1) for r, task in zip(requests, tasks, strict=True)]
    sources = [
        item(r, task, r.known.source, r.label) if r.known and r.known.source is not None else same
        for r, task, same in zip(requests, tasks, items, strict=True)
    ]
    margins = packing.margin(np.array([grid_of(request.size, model.config.model.patch) for request in requests]))
    lengths = np.array([len(task.layout.coords) for task in tasks]) + margins
    texts = zip(items, negatives, sources, strict=True)
    words = np.array([max(len(item.text) for item in same) for same in texts])
    longest = int(lengths.max())
    length = packing.length if longest <= packing.length else -(-longest // 128) * 128
    text_length = max(packing.text_length, int(words.max()))
    packing = dataclasses.replace(
        packing,
        length=-(-length // split) * split,
        text_length=-(-text_length // split) * split,
        rows_per_clip=max(len(task.ceilings) for task in tasks),
    )
    planned = plan(0, 0, lengths, words, packing)
    rows = [list(map(int, planned[row])) for row in range(len(planned))]
    return PackLayout(items, negatives, sources, rows, packing, tasks)


def _known_tokens(request: Request, patch: Size) -> _KnownTokens:
    """Return the tokens that are known of a request, and a noise-level row for each ceiling that it has."""
    grid, known = grid_of(request.size, patch), request.known
    if known is None:
        return _KnownTokens(np.ones(1), None, layout_of(grid))
    guides = [patchify(guide.latents, patch) for guide in known.guides]
    own = patchify(known.ceiling[..., None], patch).max(-1)
    each = np.concatenate([own, np.zeros(sum(map(len, guides)), own.dtype)])
    ceilings, rows = np.unique(-each, return_inverse=True)
    layout = Layout(layout_of(grid, first=known.first).coords, rows[: len(own)])
    for guide in known.guides:
        layout = add_guides(layout, grid, guide.kind, guide.times, rows[-1])
    layout = layout._replace(rows=layout.rows.astype(np.int32))
    tokens = np.concatenate([patchify(known.latent, patch), *guides])
    return _KnownTokens(-ceilings, tokens, layout, grid[0] if known.ring else 0)


def row_tokens(pack: Pack) -> jax.Array:
    """Count the tokens of the clip that each row serves."""
    return per_slot(pack.grids_BS3.prod(-1), pack.row_slots_BR)
