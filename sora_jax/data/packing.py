"""Packs: several clips of any size in one fixed-length row of tokens.

`planning.plan` decides which clips share a pack; here `pack` builds one row, `stack` a batch, and `unpack`
takes the clips out again, exactly. Nothing here knows a model, a file or a device. `patchify` and
`unpatchify` use array methods only, so they serve NumPy and JAX arrays alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sora_jax.data.planning import MAX_WINDOW
from sora_jax.errors import UserError


@dataclass(frozen=True)
class PackingConfig:
    """Sizes of a pack; every batch has these shapes, whatever clips it holds."""

    length: int = 256  # L, tokens in a pack
    slots: int = 16  # S, clips in a pack at most
    text_length: int = 256  # M, text tokens in a pack
    patch: tuple[int, int, int] | None = None  # latent frames, rows and columns in one token; None: the model's
    rows_per_clip: int = 1  # noise-level rows kept for each slot, R = slots * rows_per_clip
    window: int = 1024  # clips of the shuffled order that are planned together

    def __post_init__(self):
        for name in ("length", "slots", "text_length", "rows_per_clip", "window"):
            _positive(f"packing.{name}", getattr(self, name))
        if self.patch is not None and len(self.patch) != 3:
            raise UserError(f"packing.patch is {self.patch}; it needs three numbers: frames, rows, columns")
        for size in self.patch or ():
            _positive("packing.patch", size)
        if self.window > MAX_WINDOW:
            raise UserError(f"packing.window is {self.window}; at most {MAX_WINDOW} is allowed")


def _positive(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} is {value!r}; it must be a whole number of at least 1")


# ----------------------------------------------------------------------------------------------------------
# Patches
# ----------------------------------------------------------------------------------------------------------


def grid_of(size: Sequence[int], patch: Sequence[int]) -> tuple[int, int, int]:
    """Token grid (t, h, w) of a latent `size` (t, h, w); UserError if a side is no multiple of its patch."""
    for side, step in zip(size, patch, strict=True):
        if side < 1 or side % step:
            raise UserError(
                f"a latent of {_times(size)} (frames x rows x columns) cannot be cut into patches of "
                f"{_times(patch)}; each side must be a positive multiple of its patch"
            )
    t, h, w = (int(side) // step for side, step in zip(size, patch, strict=True))
    return t, h, w


def coords_of(grid: Sequence[int]) -> np.ndarray:
    """Coordinates (n, 3) float32 of the tokens of a grid in raster order: (t, y, x), in tokens, from 0."""
    return np.indices(tuple(grid)).reshape(3, -1).T.astype(np.float32)


def patchify(latent, patch: Sequence[int]):
    """Latent (..., t, h, w, C) to tokens (..., n, P).

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
    """Tokens (..., n, P) of a token grid back to the latent (..., t, h, w, C)."""
    *lead, _, values = tokens.shape
    pt, ph, pw = patch
    gt, gh, gw = (int(side) for side in grid)
    c = values // (pt * ph * pw)
    split = tokens.reshape(*lead, gt, gh, gw, pt, ph, pw, c)
    b = len(lead)
    apart = split.transpose(*range(b), b, b + 3, b + 1, b + 4, b + 2, b + 5, b + 6)
    return apart.reshape(*lead, gt * pt, gh * ph, gw * pw, c)


def check_fits(grid: Sequence[int], length: int) -> None:
    """UserError, with the nearest token grids that would fit, when a clip is longer than a pack."""
    t, h, w = (int(side) for side in grid)
    tokens = t * h * w
    if tokens <= length:
        return
    shrink = math.sqrt(length / tokens)
    options = [(length // (h * w), h, w), (t, int(h * shrink), int(w * shrink))]
    sizes = " or ".join(_times(option) for option in options if min(option) > 0)
    fits = f", or use clips of at most {sizes} tokens" if sizes else ", or use smaller clips"
    raise UserError(
        f"a clip of {_times(grid)} (frames x rows x columns) has {tokens} tokens but packing.length is "
        f"{length}; set it to at least {tokens}{fits}"
    )


def _times(sides: Sequence[int]) -> str:
    return " x ".join(str(int(side)) for side in sides)


# ----------------------------------------------------------------------------------------------------------
# Pack and unpack
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackItem:
    """One clip on its way into a pack: latent (t, h, w, C) float, uid > 0, text token ids (m,)."""

    latent: np.ndarray
    uid: int
    text: np.ndarray


def pack(items: Sequence[PackItem], config: PackingConfig) -> dict[str, np.ndarray]:
    """One pack of clips; slot s holds `items[s]`, its tokens have segment s + 1, padding is 0 everywhere.

    Returns tokens_LP float32, segments_L, coords_L3 float32, index_L (token in its clip), rows_L (row of the
    conditioning table: the first row of the clip's slot), row_slots_R, clips_S uint32, grids_S3, text_M,
    text_segments_M, text_positions_M; int32 where not said. UserError if the clips do not fit.
    """
    if not 0 < len(items) <= config.slots:
        raise UserError(f"a pack got {len(items)} clips; packing.slots allows 1 to {config.slots}")
    grids = [grid_of(item.latent.shape[:3], config.patch) for item in items]
    for grid in grids:
        check_fits(grid, config.length)
    segments = np.repeat(np.arange(1, len(items) + 1), [math.prod(grid) for grid in grids])
    texts = [np.asarray(item.text) for item in items]
    text_segments = np.repeat(np.arange(1, len(items) + 1), [len(text) for text in texts])
    tokens = np.concatenate([patchify(item.latent, config.patch) for item in items])
    L, S, M = config.length, config.slots, config.text_length
    return {
        "tokens_LP": _pad("length", tokens, L, np.float32),
        "segments_L": _pad("length", segments, L),
        "coords_L3": _pad("length", np.concatenate([coords_of(grid) for grid in grids]), L, np.float32),
        "index_L": _pad("length", np.concatenate([np.arange(math.prod(grid)) for grid in grids]), L),
        "rows_L": _pad("length", (segments - 1) * config.rows_per_clip, L),
        "row_slots_R": np.repeat(np.arange(S, dtype=np.int32), config.rows_per_clip),
        "clips_S": _pad("slots", np.array([item.uid for item in items]), S, np.uint32),
        "grids_S3": _pad("slots", np.array(grids), S),
        "text_M": _pad("text_length", np.concatenate(texts), M),
        "text_segments_M": _pad("text_length", text_segments, M),
        "text_positions_M": _pad("text_length", np.concatenate([np.arange(len(t)) for t in texts]), M),
    }


def _pad(option: str, values: np.ndarray, size: int, dtype: type = np.int32) -> np.ndarray:
    if len(values) > size:
        raise UserError(f"the clips of a pack need packing.{option} of {len(values)}; it is {size}")
    padded = np.zeros((size, *values.shape[1:]), dtype)
    padded[: len(values)] = values
    return padded


def unpack(row: Mapping[str, np.ndarray], patch: Sequence[int]) -> list[np.ndarray]:
    """The latents (t, h, w, C) of one pack, in slot order; reads tokens_LP, segments_L, index_L and grids_S3.

    The exact inverse of `pack` for float32 latents; put generated tokens in the place of `tokens_LP` to take
    generated clips out.
    """
    latents = []
    for slot, grid in enumerate(np.asarray(row["grids_S3"])):
        if grid.all():
            places = np.flatnonzero(row["segments_L"] == slot + 1)
            tokens = row["tokens_LP"][places[np.argsort(row["index_L"][places])]]
            latents.append(unpatchify(tokens, grid, patch))
    return latents


def stack(packs: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Packs to a batch: a B in front of every shape, and in every name (`tokens_LP` to `tokens_BLP`)."""
    return {_with_batch(name): np.stack([row[name] for row in packs]) for name in packs[0]}


def unstack(batch: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The packs of a batch, the inverse of `stack`."""
    count = len(next(iter(batch.values())))
    return [{_without_batch(name): values[b] for name, values in batch.items()} for b in range(count)]


def _with_batch(name: str) -> str:
    stem, _, suffix = name.rpartition("_")
    return f"{stem}_B{suffix}"


def _without_batch(name: str) -> str:
    stem, _, suffix = name.rpartition("_")
    return f"{stem}_{suffix.removeprefix('B')}"
