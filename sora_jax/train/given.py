"""Draw what is given of the clips of a batch: first or last frames, boxes, or a noise level for each frame.

A token reads its noise level from a row of its clip's table. Given tokens read the last row of the clip, whose level is
0 or small; they are not in the loss. A draw is a function of (seed, step, clip), so a clip has the same in any pack
(Open-Sora 1.1 has such masks; levels of single frames: Diffusion Forcing, 2407.01392; rising: Rolling Diffusion,
2402.09470).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from sora_jax.config import check
from sora_jax.diffusion.keys import clip_keys
from sora_jax.diffusion.process import Process
from sora_jax.diffusion.times import ClipBatch, TimesConfig, draw_times
from sora_jax.nn.pack import Pack, per_slot, slot_of
from sora_jax.shapes import PerClipBS, RowsBL, TimesBR

KINDS = ("first", "last", "ends", "frames", "levels", "boxes")  # the order of the draw; those before boxes need frames
NOISE_MEDIAN, NOISE_SPREAD, NOISE_MOST = -3.5, 0.5, 0.2  # level exp(N(-3.5, 0.5)), as Wan 2.2 has it
_NUMBERS = 16  # uniform numbers of a clip's draw


@dataclasses.dataclass(frozen=True)
class GivenConfig:
    """Configure what is given of clips in training: shares of all clips. In the rest nothing is given."""

    first: float = 0.0  # the first frames: one in half of the draws, else up to half of the clip
    first_frames: int = 0  # number of token frames that `first` gives; 0: it is drawn
    last: float = 0.0  # the last frames, up to half of the clip
    ends: float = 0.0  # first and last frames
    frames: float = 0.0  # frames at random places, or every second one
    boxes: float = 0.0  # what lies outside a box, or inside, in all frames or in some
    levels: float = 0.0  # every frame has a noise level of its own, in a third of the draws rising with time
    headless: float = 0.0  # share of clips, whatever is given of them, that begin at their second token frame
    key_frames: float = 0.0  # share of clips that have key frames beside them; needs model.guides
    sketches: float = 0.0  # share of clips that have edge maps of frames beside them; needs model.guides
    noise: float = 0.2  # share of the draws in which given tokens have a little noise
    dropped: float = 0.0  # share of the draws of frames, or guides, in which these are pure noise: history guidance

    def __post_init__(self):
        for name in (*KINDS, "headless", "key_frames", "sketches", "noise", "dropped"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"diffusion.given.{name} is {value}; it must be from 0 to 1")
        count = self.first_frames
        check(count >= 0, f"diffusion.given.first_frames is {count}; it must be 0 (drawn) or a number of frames")
        shares = math.fsum(getattr(self, kind) for kind in KINDS)
        check(shares <= 1, f"diffusion.given has shares that add up to {shares:g}; it must be at most 1")
        check(self.guides <= 1, f"diffusion.given.key_frames + sketches is {self.guides:g}; it must be at most 1")

    @property
    def guides(self) -> float:
        """The share of clips that have guides."""
        return self.key_frames + self.sketches

    @property
    def any(self) -> bool:
        """True if something is given of some clips."""
        return any(getattr(self, kind) for kind in KINDS) or self.guides > 0


class Drawn(NamedTuple):
    """Hold a draw: the tokens that are given, the row of each token, and the noise level of each row."""

    given_BL: Bool[Array, "B L"]
    rows_BL: RowsBL
    times_BR: TimesBR


def draw_given(
    config: GivenConfig,
    times: TimesConfig,
    process: Process,
    keys: tuple[Key[Array, ""], Key[Array, ""]],
    pack: Pack,
    times_BS: PerClipBS,
) -> Drawn:
    """Draw what is given of the clips of packs, beside their guides, and the noise levels of all rows.

    keys: for the masks, and for the noise levels of single frames. times_BS: the noise level of each clip, which the
    tokens have that are not given. A clip keeps at least one token that is not given.
    """
    (B, S), rows = pack.clip_ids_BS.shape, pack.row_slots_BR.shape[1] // pack.slots
    numbers_BSX = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (_NUMBERS,), jnp.float32)))(
        clip_keys(keys[0], pack.clip_ids_BS)
    )
    kind_BS = _kinds(config, numbers_BSX[..., 0], pack.grids_BS3[..., 0])
    given_BL = _given(keys[0], numbers_BSX, kind_BS, pack, config.first_frames)
    spare_BL = rows * slot_of(pack.segments_BL) + rows - 1
    guided_BS = _have_guides(pack)
    if pack.guides_BL is not None:
        given_BL |= pack.guides_BL > 0
    level_BS = _levels(config, numbers_BSX[..., 1], numbers_BSX[..., 2])
    level_BS = jnp.where((kind_BS < len(KINDS)) | guided_BS, level_BS, 0.0)
    if config.dropped:
        of_frames_BS = (kind_BS < KINDS.index("levels")) | (guided_BS & (kind_BS == len(KINDS)))
        level_BS = jnp.where((numbers_BSX[..., 13] < config.dropped) & of_frames_BS, 1.0, level_BS)
    clips = ClipBatch(pack.clip_ids_BS, pack.grids_BS3.prod(-1))
    times_BSF = jnp.broadcast_to(times_BS[..., None], (B, S, rows - 1))
    if config.levels:
        own_BSF = _frame_times(times, process, keys[1], clips, pack.grids_BS3[..., 0], rows - 1, numbers_BSX[..., 3])
        times_BSF = jnp.where((kind_BS == KINDS.index("levels"))[..., None], own_BSF, times_BSF)
    times_BR = jnp.concatenate([times_BSF, level_BS[..., None]], axis=-1).reshape(B, S * rows)
    return Drawn(given_BL, jnp.where(given_BL, spare_BL, pack.rows_BL).astype(pack.rows_BL.dtype), times_BR)


def _have_guides(pack: Pack) -> Bool[Array, "B S"]:
    """Return True for the clips that have guides beside them."""
    if pack.guides_BL is None:
        return jnp.zeros(pack.clip_ids_BS.shape, bool)
    segments_BL = jnp.where(pack.guides_BL > 0, pack.segments_BL, 0)
    return jnp.any(segments_BL[:, :, None] == jnp.arange(1, pack.slots + 1)[None, None, :], axis=1)


def _kinds(config: GivenConfig, u_BS: Array, frames_BS: Array) -> Array:
    """Draw the number of a kind for each clip, len(KINDS) for none; a clip of one frame has boxes or none."""
    edges = itertools.accumulate(getattr(config, kind) for kind in KINDS)
    kind_BS = sum((u_BS >= edge).astype(jnp.int32) for edge in edges)
    return jnp.where((frames_BS < 2) & (kind_BS < KINDS.index("boxes")), len(KINDS), kind_BS)


def _levels(config: GivenConfig, u_BS: Array, v_BS: Array) -> Array:
    """Draw the noise level of given tokens: 0 or small."""
    normal_BS = jnp.sqrt(2.0) * jax.lax.erf_inv(2.0 * v_BS - 1.0)
    small_BS = jnp.minimum(jnp.exp(NOISE_MEDIAN + NOISE_SPREAD * normal_BS), NOISE_MOST)
    return jnp.where(u_BS < config.noise, small_BS, 0.0)


def _frame_times(
    times: TimesConfig,
    process: Process,
    key: Key[Array, ""],
    clips: ClipBatch,
    frames_BS: Array,
    most: int,
    u_BS: Array,
) -> Float[Array, "B S F"]:
    """Draw a noise level for each frame, for a third of the clips in rising order."""
    alone = dataclasses.replace(times, stratified=False)
    draw = lambda frame: draw_times(alone, process, jax.random.fold_in(key, frame), clips)  # noqa: E731
    times_BSF = jnp.stack([draw(frame) for frame in range(most)], axis=-1)  # keys and shardings do not vmap together
    real_BSF = jnp.arange(most)[None, None, :] < frames_BS[..., None]
    rising_BSF = jnp.sort(jnp.where(real_BSF, times_BSF, 2.0), axis=-1)
    return jnp.where(real_BSF & (u_BS[..., None] < 1 / 3), rising_BSF, times_BSF)


class _Places(NamedTuple):
    """Hold the place of each token in its clip's grid, and the grid's sides."""

    t: Array
    y: Array
    x: Array
    frames: Array
    height: Array
    width: Array


def _given(
    key: Key[Array, ""], numbers_BSX: Array, kind_BS: Array, pack: Pack, first_frames: int
) -> Bool[Array, "B L"]:
    """Return the tokens that are given, by the kind of each clip."""
    slots_BL = slot_of(pack.segments_BL)
    grids_BL3 = per_slot(jnp.maximum(pack.grids_BS3, 1), slots_BL)
    frames, height, width = (grids_BL3[..., axis] for axis in range(3))
    index = pack.index_BL
    places = _Places(index // (height * width), index // width % height, index % width, frames, height, width)
    numbers_BLX, kind_BL = per_slot(numbers_BSX, slots_BL), per_slot(kind_BS, slots_BL)
    u = lambda place: numbers_BLX[..., place]  # noqa: E731

    def one(clip, frame):
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, clip), frame), dtype=jnp.float32)

    own_BL = jax.vmap(jax.vmap(one))(per_slot(pack.clip_ids_BS, slots_BL), places.t)
    rules: dict[str, Callable[[], Array]] = {
        "first": lambda: places.t < _first(places, u(4), u(5), first_frames),
        "last": lambda: places.t >= frames - _up_to(frames // 2, u(5)),
        "ends": lambda: _ends(places, u(4), u(5)),
        "frames": lambda: _frames(places, own_BL, [u(place) for place in range(4, 9)]),
        "boxes": lambda: _boxes(places, [u(place) for place in range(4, 13)]),
    }
    given_BL = jnp.zeros_like(index, dtype=bool)
    for kind, rule in rules.items():
        given_BL = jnp.where(kind_BL == KINDS.index(kind), rule(), given_BL)
    return given_BL & (pack.segments_BL > 0)


def _up_to(most: Array, u: Array) -> Array:
    """Return a whole number from 1 to `most`, or 1."""
    return 1 + jnp.floor(u * jnp.maximum(most, 1)).astype(jnp.int32)


def _first(places: _Places, u: Array, v: Array, count: int) -> Array:
    several = 1 + _up_to(places.frames // 2 - 1, v)
    return jnp.minimum(count or jnp.where(u < 0.5, 1, several), places.frames - 1)


def _ends(places: _Places, u: Array, v: Array) -> Array:
    first = jnp.minimum(_up_to(places.frames // 3, u), places.frames - 1)
    last = jnp.minimum(_up_to(places.frames // 3, v), places.frames - 1 - first)
    return (places.t < first) | (places.t >= places.frames - last)


def _frames(places: _Places, own: Array, u: list[Array]) -> Array:
    """Return every second frame in a quarter of the draws, else each with a probability from 0.1 to 0.9.

    At least one frame is given and one is not.
    """
    second = places.t % 2 == (u[1] < 0.5)
    made = jnp.floor(u[2] * places.frames)
    sure = (made + 1 + jnp.floor(u[3] * (places.frames - 1))) % places.frames
    some = ((own < 0.1 + 0.8 * u[4]) | (places.t == sure)) & (places.t != made)
    return jnp.where(u[0] < 0.25, second, some)


def _boxes(places: _Places, u: list[Array]) -> Array:
    """Return what lies outside a box, or, in half of the draws, inside.

    The box has 0.1 to 0.7 of the area and sides 1:2 to 2:1. It is in all frames, or, in three of ten draws, in an
    interval of them.
    """
    area, aspect = 0.1 + 0.6 * u[0], jnp.exp2(2.0 * u[1] - 1.0)
    rows = jnp.round(jnp.sqrt(area * aspect) * places.height).astype(jnp.int32)
    columns = jnp.round(jnp.sqrt(area / aspect) * places.width).astype(jnp.int32)
    count = jnp.where(u[4] < 0.7, places.frames, _up_to(places.frames, u[5]))
    in_y, all_y = _interval(places.y, places.height, rows, u[2])
    in_x, all_x = _interval(places.x, places.width, columns, u[3])
    in_t, all_t = _interval(places.t, places.frames, count, u[6])
    keeps_inside = (u[7] < 0.5) & ~(all_y & all_x & all_t)
    return (in_y & in_x & in_t) == keeps_inside


def _interval(place: Array, side: Array, length: Array, u: Array) -> tuple[Array, Array]:
    """Return whether a place is in an interval somewhere along a side, and whether the interval is all of the side."""
    length = jnp.clip(length, 1, side)
    begin = jnp.floor(u * (side - length + 1)).astype(jnp.int32)
    return (place >= begin) & (place < begin + length), length == side
