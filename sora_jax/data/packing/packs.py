"""Packs: several clips of any size in one fixed-length row of tokens.

`planning.plan` decides which clips share a pack; here `pack` builds one row, `stack` a batch, and `unpack`
takes the clips out again, exactly. Nothing here knows a model, a file or a device. `patchify` and
`unpatchify` use array methods only, so they serve NumPy and JAX arrays alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from sora_jax.config import check
from sora_jax.errors import UserError

MAX_WINDOW = 1 << 20  # `planning` keeps the age of a clip in its window in the low 20 bits of a score


@dataclass(frozen=True)
class PackingConfig:
    """Sizes of a pack; every batch has these shapes, whatever clips it holds."""

    length: int = 256  # L, tokens in a pack
    slots: int = 16  # S, clips in a pack at most
    text_length: int = 256  # M, text tokens in a pack
    patch: tuple[int, int, int] | None = None  # latent frames, rows and columns in one token; None: the model's
    # Noise-level rows for each slot, R = slots * rows_per_clip. 1: one level for all tokens of a clip; 2: the last
    # for given tokens; more: a row for each token frame, and the last.
    rows_per_clip: int = 1
    window: int = 1024  # clips of the shuffled order that are planned together
    guides: bool = False  # mark the tokens of guides; set by the model
    low: bool = False  # pack clips at half their rows and columns, too; set by the model
    # Rows and columns of tokens that the room of a clip is a multiple of; set by models that halve resolutions.
    multiple: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        for name in ("length", "slots", "text_length", "rows_per_clip", "window"):
            value = getattr(self, name)
            check(value >= 1, f"packing.{name} is {value}; it must be at least 1")
        three = self.patch is None or len(self.patch) == 3 and min(self.patch) >= 1
        check(three, f"packing.patch is {self.patch}; it must be three numbers from 1: frames, rows, columns")
        check(self.window <= MAX_WINDOW, f"packing.window is {self.window}; it must be at most {MAX_WINDOW}")
        two = len(self.multiple) == 2 and min(self.multiple) >= 1
        check(two, f"packing.multiple is {self.multiple}; it must be two numbers from 1: rows, columns")

    def margin(self, grids: np.ndarray) -> np.ndarray:
        """Count the tokens that clips leave free beside their own in a pack: token grids (..., 3) -> (...).

        A clip has the room of its grid with rows and columns rounded up to `multiple`. So a model that halves
        resolutions, rounding up, finds room for all clips of a pack in a half of its rows and columns, too.
        """
        grids = np.asarray(grids, np.int64)
        sides = -(-grids[..., 1:] // self.multiple) * self.multiple
        return grids[..., 0] * sides.prod(-1) - grids.prod(-1)


def grid_of(size: Sequence[int], patch: Sequence[int]) -> tuple[int, int, int]:
    """Return the token grid (t, h, w) of a latent `size` (t, h, w); UserError if a side is no multiple of its patch."""
    for side, step in zip(size, patch, strict=True):
        if side < 1 or side % step:
            raise UserError(
                f"a latent of {_product(size)} (frames x rows x columns) cannot be cut into patches of "
                f"{_product(patch)}; each side must be a positive multiple of its patch"
            )
    t, h, w = (int(side) // step for side, step in zip(size, patch, strict=True))
    return t, h, w


def coords_of(grid: Sequence[int]) -> np.ndarray:
    """Return coordinates (n, 3) float32 of the tokens of a grid in raster order: (t, y, x), in tokens, from 0."""
    return np.indices(tuple(grid)).reshape(3, -1).T.astype(np.float32)


def patchify(latent, patch: Sequence[int]):
    """Cut a latent (..., t, h, w, C) into tokens (..., n, P).

    Tokens run in raster order (t, then y, then x); the P values of a token run in the order
    (frame in patch, row in patch, column in patch, channel). `unpatchify` is the exact inverse.
    """
    *lead, t, h, w, c = latent.shape
    pt, ph, pw = patch
    gt, gh, gw = grid_of((t, h, w), patch)
    split = latent.reshape(*lead, gt, pt, gh, ph, gw, pw, c)
    b = len(lead)
    together = split.transpose(*range(b), b, b + 2, b + 4, b + 1, b + 3, b + 5, b + 6)
    return together.reshape(*lead, gt * gh * gw, pt * ph * pw * c)


def unpatchify(tokens, grid: Sequence[int], patch: Sequence[int]):
    """Put the tokens (..., n, P) of a token grid together to the latent (..., t, h, w, C)."""
    *lead, _, values = tokens.shape
    pt, ph, pw = patch
    gt, gh, gw = (int(side) for side in grid)
    c = values // (pt * ph * pw)
    split = tokens.reshape(*lead, gt, gh, gw, pt, ph, pw, c)
    b = len(lead)
    apart = split.transpose(*range(b), b, b + 3, b + 1, b + 4, b + 2, b + 5, b + 6)
    return apart.reshape(*lead, gt * pt, gh * ph, gw * pw, c)


def check_fits(grid: Sequence[int], length: int) -> None:
    """Raise UserError, with the nearest token grids that would fit, if a clip is longer than a pack."""
    t, h, w = (int(side) for side in grid)
    tokens = t * h * w
    if tokens <= length:
        return
    shrink = math.sqrt(length / tokens)
    options = [(length // (h * w), h, w), (t, int(h * shrink), int(w * shrink))]
    sizes = " or ".join(_product(option) for option in options if min(option) > 0)
    fits = f", or use clips of at most {sizes} tokens" if sizes else ", or use smaller clips"
    raise UserError(
        f"a clip of {_product(grid)} (frames x rows x columns) has {tokens} tokens but packing.length is "
        f"{length}; set it to at least {tokens}{fits}"
    )


def _product(sides: Sequence[int]) -> str:
    return " x ".join(str(int(side)) for side in sides)


class Layout(NamedTuple):
    """Coordinates (t, y, x) of the tokens of a clip, (n, 3), and the row of noise levels that each reads, (n,).

    kinds (n,): 0 for the tokens of the clip itself, then those of its guides, see `data.guides`; None where all are 0.
    """

    coords: np.ndarray
    rows: np.ndarray
    kinds: np.ndarray | None = None


@dataclass(frozen=True)
class PackItem:
    """A clip to pack: values (t, h, w, C), such as a latent, clip id > 0, text token ids (m,).

    embedding (m, E): of a pretrained text encoder; the ids then only mark the null caption. label: class, -1 = none.
    layout: None for that of the grid, see `layout_of`. guides (k, h, w, C): latents whose tokens the layout includes.
    low (t, h / 2, w / 2, C): the clip at half its rows and columns, where the config has `low`.
    """

    values: np.ndarray
    clip_id: int
    text: np.ndarray
    embedding: np.ndarray | None = None
    label: int = -1
    layout: Layout | None = None
    guides: np.ndarray | None = None
    low: np.ndarray | None = None

    @property
    def size(self) -> tuple[int, int, int]:
        """Return (t, h, w)."""
        t, h, w, _ = self.values.shape
        return t, h, w


@dataclass(frozen=True)
class EmptyItem:
    """A `PackItem` whose values are yet to be generated: only its size (t, h, w) is known."""

    size: tuple[int, int, int]
    clip_id: int
    text: np.ndarray
    embedding: np.ndarray | None = None
    label: int = -1
    layout: Layout | None = None
    low: np.ndarray | None = None


Item = Any  # a PackItem, an EmptyItem, or another object with the fields of one


def pack(items: Sequence[Item], config: PackingConfig) -> dict[str, np.ndarray]:
    """Pack clips; slot s holds `items[s]`, its tokens have segment s + 1, padding is 0 everywhere.

    Returns tokens_LP in the float type of the latents, segments_L, coords_L3 float32, index_L (token in its clip),
    rows_L (row of the conditioning table), row_slots_R, clip_ids_S uint32, labels_S (class + 1), grids_S3, text_M,
    text_segments_M, text_positions_M, and embeddings_ME float16 where the clips have them, guides_L (kind of guide)
    where the config has guides, low_LQ where it has low; int32 unless noted. UserError if the clips do not fit.
    """
    return unstack(pack_batch([items], config))[0]


def pack_batch(rows: Sequence[Sequence[Item]], config: PackingConfig) -> dict[str, np.ndarray]:
    """Pack several lists of clips and stack the packs: the arrays of `pack` with a B in front (tokens_BLP, ...).

    This is what feeds the accelerator: one copy of the values of each clip, and a few array operations for all clips
    together. Rows of `EmptyItem`s give no tokens_BLP.
    """
    items = [item for row in rows for item in row]
    clips = np.array([len(row) for row in rows])
    if not 0 < clips.min() or clips.max() > config.slots:
        wrong = clips[(clips == 0) | (clips > config.slots)][0]
        raise UserError(f"packing.slots is {config.slots}; a pack of {wrong} clips must have 1 to {config.slots}")
    assert config.patch is not None  # the model sets it
    B, L, S, M = len(rows), config.length, config.slots, config.text_length
    grids = [grid_of(item.size, config.patch) for item in items]
    layouts = [item.layout or layout_of(grid, config.rows_per_clip) for item, grid in zip(items, grids)]
    tokens = _Runs(clips, np.array([len(layout.coords) for layout in layouts]), L)
    if max(tokens.used) > L:
        for grid in grids:
            check_fits(grid, L)
        raise UserError(f"packing.length is {L}; the clips of a pack need at least {max(tokens.used)}")
    if config.multiple != (1, 1):
        _check_room(np.add.reduceat(tokens.lengths + config.margin(np.array(grids)), np.cumsum(clips) - clips), L)
    texts = _Runs(clips, np.array([len(item.text) for item in items]), M)
    check(max(texts.used) <= M, f"packing.text_length is {M}; the clips of a pack need at least {max(texts.used)}")
    slots = _Runs(clips, np.ones(len(items), np.int64), S)
    slot = slots.starts - slots.row * S
    batch = {
        "segments_BL": tokens.repeat(slot + 1),
        "coords_BL3": tokens.place(np.concatenate([layout.coords for layout in layouts])),
        "index_BL": tokens.place(tokens.within),
        "rows_BL": tokens.repeat(slot * config.rows_per_clip)
        + tokens.place(np.concatenate([layout.rows for layout in layouts])),
        "row_slots_BR": np.tile(np.repeat(np.arange(S, dtype=np.int32), config.rows_per_clip), (B, 1)),
        "clip_ids_BS": slots.place(np.array([item.clip_id for item in items], np.uint32)),
        "labels_BS": slots.place(np.array([item.label + 1 for item in items], np.int32)),
        "grids_BS3": slots.place(np.array(grids, np.int32)),
        "text_BM": texts.place(np.concatenate([item.text for item in items]).astype(np.int32, copy=False)),
        "text_segments_BM": texts.repeat(slot + 1),
        "text_positions_BM": texts.place(texts.within),
    }
    if not isinstance(items[0], EmptyItem):
        batch = {"tokens_BLP": _tokens(items, grids, tokens, config.patch)} | batch
    if config.guides:
        kinds = [np.zeros(len(x.coords), np.int32) if x.kinds is None else x.kinds for x in layouts]
        batch["guides_BL"] = tokens.place(np.concatenate(kinds))
    if config.low:
        frames, height, width = config.patch
        batch["low_BLQ"] = _tokens(items, grids, tokens, (frames, height // 2, width // 2), "low")
    if items[0].embedding is not None:
        embeddings = np.concatenate([item.embedding for item in items])
        batch["embeddings_BME"] = texts.place(embeddings.astype(np.float16, copy=False))
    return batch


def _check_room(rooms: np.ndarray, length: int) -> None:
    most = int(rooms.max())
    check(most <= length, f"packing.length is {length}; the clips of a pack have the room of {most} tokens")


def _tokens(
    items: Sequence[Item], grids: Sequence[Sequence[int]], runs: _Runs, patch: Sequence[int], name: str = "values"
) -> np.ndarray:
    """Cut all latents into patches (B, L, P), each written once; only the padding of a row is set to zero.

    name: of the latents; the low resolution of a clip has patches of half the rows and columns, and so the same grid.
    """
    tokens: np.ndarray | None = None
    for item, grid, start, length in zip(items, grids, runs.starts.tolist(), runs.lengths.tolist()):
        latent = getattr(item, name)  # read now, and still in the processor's cache when it is copied
        if tokens is None:
            tokens = np.empty((len(runs.used) * runs.width, math.prod(patch) * latent.shape[-1]), latent.dtype)
        own = math.prod(grid)
        _write_patches(tokens[start : start + own], latent, grid, patch)
        if length > own:  # guides, each a frame
            _write_patches(tokens[start + own : start + length], item.guides, (len(item.guides), *grid[1:]), patch)
    assert tokens is not None
    tokens_BLP = tokens.reshape(-1, runs.width, tokens.shape[-1])
    for row, used in zip(tokens_BLP, runs.used):
        row[used:] = 0
    return tokens_BLP


class _Runs:
    """Runs of values, one for each clip, that follow each other from the start of rows of a fixed width.

    counts: runs in each row. lengths: of each run. row, starts (flat): where each run begins. within: index in its run
    of each value. used: values in each row.
    """

    def __init__(self, counts: np.ndarray, lengths: np.ndarray, width: int):
        self.width, self.lengths = width, lengths
        self.row = np.repeat(np.arange(len(counts)), counts)
        ends = np.cumsum(lengths)
        before = ends - lengths  # values before each run, of all rows
        row_starts = before[np.cumsum(counts) - counts]
        self.starts = self.row * width + before - row_starts[self.row]
        self.within = np.arange(ends[-1], dtype=np.int32) - np.repeat(before.astype(np.int32), lengths)
        self.used: list[int] = np.diff(row_starts, append=ends[-1]).tolist()

    def place(self, values: np.ndarray) -> np.ndarray:
        """Return (rows, width, ...) with all values in their rows, 0 after them."""
        out = np.zeros((len(self.used), self.width, *values.shape[1:]), values.dtype)
        start = 0
        for row, used in zip(out, self.used):
            row[:used] = values[start : start + used]
            start += used
        return out

    def repeat(self, values: np.ndarray) -> np.ndarray:
        """Return (rows, width) int32 with the value of each run at all its places, 0 after them."""
        return self.place(np.repeat(values.astype(np.int32), self.lengths))


@lru_cache(maxsize=4096)
def layout_of(grid: tuple[int, int, int], rows_per_clip: int = 1, first: int = 0) -> Layout:
    """Return the layout of a grid whose first frame has the time coordinate `first`.

    With more than two rows per clip each token frame has its own; frames beyond them share the last but one.
    """
    coords = coords_of(grid)
    frames = np.minimum(coords[:, 0], rows_per_clip - 2) if rows_per_clip > 2 else np.zeros(len(coords))
    return Layout(coords + np.array([first, 0, 0], np.float32), frames.astype(np.int32))


def add_guides(layout: Layout, grid: tuple[int, int, int], kind: int, times: np.ndarray, row: int) -> Layout:
    """Add the tokens of guides of one kind, with the time coordinates (k,), that read the row `row` of levels."""
    coords = coords_of((len(times), *grid[1:]))
    coords[:, 0] = np.repeat(times, grid[1] * grid[2])
    kinds = np.zeros(len(layout.coords), np.int32) if layout.kinds is None else layout.kinds
    return Layout(
        np.concatenate([layout.coords, coords]),
        np.concatenate([layout.rows, np.full(len(coords), row, np.int32)]),
        np.concatenate([kinds, np.full(len(coords), kind, np.int32)]),
    )


def _write_patches(out: np.ndarray, latent: np.ndarray, grid: Sequence[int], patch: Sequence[int]) -> None:
    """`out[:] = patchify(latent, patch)` in one copy."""
    (gt, gh, gw), (pt, ph, pw), c = grid, patch, latent.shape[-1]
    apart = latent.reshape(gt, pt, gh, ph, gw, pw, c).transpose(0, 2, 4, 1, 3, 5, 6)
    out.reshape(gt, gh, gw, pt, ph, pw, c)[...] = apart


def token_counts(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Count the tokens of each clip of a batch, (B, S) int64, those of its guides among them."""
    own = batch["grids_BS3"].astype(np.int64).prod(-1)
    if "guides_BL" not in batch:
        return own
    segments = np.where(batch["guides_BL"] > 0, batch["segments_BL"], 0)
    return own + np.stack([np.bincount(row, minlength=own.shape[1] + 1)[1:] for row in segments])


def text_counts(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Count the text tokens of each clip of a batch, (B, S) int64."""
    segments, slots = batch["text_segments_BM"], batch["grids_BS3"].shape[1]
    return np.stack([(segments == slot).sum(-1) for slot in range(1, slots + 1)], axis=-1).astype(np.int64)


def unpack(row: Mapping[str, np.ndarray], patch: Sequence[int]) -> list[np.ndarray]:
    """Take the latents (t, h, w, C) out of one pack, in slot order; reads tokens_LP, segments_L, index_L and grids_S3.

    The exact inverse of `pack` for float32 latents; put generated tokens in the place of `tokens_LP` to take
    generated clips out.
    """
    latents = []
    for slot, grid in enumerate(np.asarray(row["grids_S3"])):
        if grid.all():
            places = np.flatnonzero(row["segments_L"] == slot + 1)
            places = places[np.argsort(row["index_L"][places])][: math.prod(grid)]  # without guides
            latents.append(unpatchify(row["tokens_LP"][places], grid, patch))
    return latents


def stack(packs: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Stack packs to a batch: a B in front of every shape, and in every name (`tokens_LP` to `tokens_BLP`)."""
    return {"_B".join(name.rsplit("_", 1)): np.stack([row[name] for row in packs]) for name in packs[0]}


def unstack(batch: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Split a batch into its packs, the inverse of `stack`."""
    names = {name: "_".join(name.rsplit("_B", 1)) for name in batch}
    count = len(next(iter(batch.values())))
    return [{names[name]: values[b] for name, values in batch.items()} for b in range(count)]
