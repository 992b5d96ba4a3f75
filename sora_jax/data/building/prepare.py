"""From one entry of a source to one clip of a dataset: span, size and length, or the reason why there is none.

All choices are functions of (seed, variant, clip id), so they do not depend on order, workers or machines.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from math import isqrt
from typing import NamedTuple

import numpy as np

from sora_jax.data.draws import uniform
from sora_jax.data.fit import LENGTH_RULES, SizeRule, fit_length, longest_length, pad_frames
from sora_jax.data.reading.media import SpanRule
from sora_jax.data.reading.tracks import MediaError, reason
from sora_jax.data.sources import Entry, Source, SourceConfig, make_source
from sora_jax.data.storing.clips import Clip
from sora_jax.errors import UserError
from sora_jax.worlds import WorldConfig

PLACES = {"start": 0.0, "middle": 0.5, "random": None}


@dataclass(frozen=True)
class BuildConfig:
    """Options of a build; all but `out`, `workers`, `seconds` and `shard` decide what is in the dataset.

    sources: where clips come from, see `data/sources`. max_frames, time_factor, length_rule: lengths, see
    `data/fit.py`; a clip that ends shorter than min_frames is refused. fps: every clip is brought to that rate by its
    time stamps; max_fps only slows faster ones down. place: which part of a longer file is taken; "random" is a
    function of seed, variant and clip. clips_per_file: so many clips from a file that is long enough. cuts: shorten a
    clip to its longest part without a scene cut (PySceneDetect). multiple, max_pixels, max_tokens, resolution,
    min_pixels, framing: sizes, see `data/fit.py`. variants: so many sizes or places of each clip, which epochs take in
    turn. mirror: of each of these also the mirror image, left for right, whatever the caption says of it; epochs take
    it in turn, too. missing_caption: "refuse" the clip, or let the caption be "empty". holdout: share of the clips
    without a given split that get the split "held-out", by a hash of seed and id. workers: processes that decode; 0
    decodes in this one, without protection from crashes. seconds: a file that takes longer is refused. shard: "i/n",
    the share of this process where n share the work; they must see the same files. clips_per_shard: entries to a part
    of the work.
    """

    out: str = ""
    sources: tuple[SourceConfig, ...] = ()
    max_frames: int = 17
    time_factor: int = 4
    length_rule: str = "cut"
    min_frames: int = 1
    fps: float | None = None
    max_fps: float | None = None
    place: str = "middle"
    clips_per_file: int = 1
    cuts: bool = False
    multiple: int = 16
    max_pixels: int | None = 256 * 256
    max_tokens: int | None = None
    resolution: str = "largest"
    min_pixels: int | None = None
    framing: str = "native"
    variants: int = 1
    mirror: bool = False
    missing_caption: str = "refuse"
    holdout: float = 0.05
    seed: int = 0
    workers: int = 1
    seconds: float = 60.0
    shard: str = "0/1"
    clips_per_shard: int = 128

    def __post_init__(self):
        self.size_rule  # noqa: B018 - raises where the sizes contradict each other
        for name, allowed in _WORDS.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}={getattr(self, name)!r} is not allowed: {' or '.join(allowed)} is.")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} is not allowed: at least {least} is.")
        if not 0 <= self.holdout < 1:
            raise UserError(f"holdout={self.holdout} is not allowed: a share from 0 to below 1 is.")
        for name in ("fps", "max_fps", "seconds"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise UserError(f"{name}={value} is not allowed: a number above 0 is.")
        if not self.sources:
            raise UserError("sources is empty: at least one source is needed.")
        if self.variants > 1 and self.resolution == "largest" and self.place != "random":
            raise UserError(
                f"variants={self.variants} would all be equal: with resolution=uniform or navit, or place=random, "
                "they differ."
            )

    @property
    def versions(self) -> int:
        """How many clips are made of one: its variants, and their mirror images."""
        return self.variants * (2 if self.mirror else 1)

    @property
    def size_rule(self) -> SizeRule:
        return SizeRule(
            self.multiple, self.max_pixels, self.max_tokens, self.time_factor, self.resolution, self.min_pixels,
            self.framing,
        )  # fmt: skip


_WORDS = {"length_rule": LENGTH_RULES, "place": tuple(PLACES), "missing_caption": ("refuse", "empty")}
_LEAST = dict(
    max_frames=1, time_factor=1, min_frames=1, clips_per_file=1, variants=1, workers=0, seed=0, clips_per_shard=1
)


class Refusal(NamedTuple):
    """Why a clip is not used."""

    reason: str


@dataclass(frozen=True)
class Mix:
    """Several sources, one after the other, as one; `entry(i)` and `open(i)` are those of source `which(i)`."""

    sources: tuple[Source, ...]
    ends: list[int] = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "ends", np.cumsum([len(source) for source in self.sources]).tolist())

    def __len__(self) -> int:
        return self.ends[-1]

    def find(self, index: int) -> tuple[Source, int]:
        """The source of an index, and the index there."""
        which = int(np.searchsorted(self.ends, index, side="right"))
        return self.sources[which], index - (self.ends[which] - len(self.sources[which]))

    def entry(self, index: int) -> Entry:
        source, place = self.find(index)
        return source.entry(place)

    @property
    def refused(self) -> list[tuple[str, str]]:
        return [pair for source in self.sources for pair in source.refused]

    @property
    def digests(self) -> list[str]:
        return [source.digest() for source in self.sources]


def open_sources(config: BuildConfig) -> Mix:
    """The sources that the options name. UserError where one is missing, or its sizes do not fit."""
    for source in config.sources:
        for size in (source.world or WorldConfig()).sizes if source.name == "world" else ():
            if any(side % config.multiple for side in size):
                raise UserError(f"multiple={config.multiple} does not divide the world's size {size}: 4 or 8 does.")
    return Mix(tuple(make_source(source) for source in config.sources))


class Unit(NamedTuple):
    """What is prepared at once: clip `number` of an entry, in its size and place number `variant`, mirrored or not."""

    entry: int
    number: int
    variant: int
    mirrored: bool = False


def unit_at(config: BuildConfig, index: int) -> Unit:
    """Unit `index` of a build; variants of a clip, and clips of a file, follow each other."""
    rest, version = divmod(index, config.versions)
    mirrored, variant = divmod(version, config.variants)
    return Unit(*divmod(rest, config.clips_per_file), variant, bool(mirrored))


def prepare(mix: Mix, config: BuildConfig, unit: Unit) -> Clip | Refusal | None:
    """The clip of a unit at its final size and length, or why there is none; None where the file has no such span."""
    source, place = mix.find(unit.entry)
    entry = source.entry(place)
    if not entry.captions and config.missing_caption == "refuse":
        return Refusal(
            "no caption: neither a text file of the same name nor a row of a table; missing_caption=empty takes it"
        )
    try:
        media = source.open(place)
        clip_id = media.content_id() + (f".{unit.number}" if config.clips_per_file > 1 else "")
        span = _span(config, unit, clip_id)
        decoded = media.decode(span, _fit(config, unit, source, clip_id))
    except UserError:
        raise
    except MediaError as error:
        return Refusal(str(error))
    except Exception as error:  # a damaged archive or dataset raises one of many types
        return Refusal(f"unreadable: {reason(error)}")
    if decoded is None:
        return None
    frames = decoded.frames[:, :, ::-1] if unit.mirrored else decoded.frames
    clip = Clip(clip_id, frames, decoded.fps, entry.captions, source.name, entry.label, decoded.start, decoded.flags)
    return _to_length(clip, config, span.place)


def _span(config: BuildConfig, unit: Unit, clip_id: str) -> SpanRule:
    place = PLACES[config.place]
    return SpanRule(
        max_frames=longest_length(config.time_factor, config.max_frames),
        fps=config.fps,
        max_fps=config.max_fps,
        place=uniform(config.seed, f"place/{unit.variant}", clip_id) if place is None else place,
        number=unit.number,
        count=config.clips_per_file,
        cuts=config.cuts,
    )


def _fit(config: BuildConfig, unit: Unit, source: Source, clip_id: str):
    if source.name.startswith("world") and config.framing == "native":
        return None  # it comes as it is drawn
    return partial(_size, config, uniform(config.seed, f"size/{unit.variant}", clip_id))


def _size(config: BuildConfig, draw: float, height: int, width: int, frames: int) -> tuple[int, int]:
    length = fit_length(frames, config.time_factor, config.max_frames, config.length_rule)
    return config.size_rule(height, width, length, draw)


def _to_length(clip: Clip, config: BuildConfig, place: float) -> Clip | Refusal:
    have = len(clip.frames)
    length = fit_length(have, config.time_factor, config.max_frames, config.length_rule)
    if length < config.min_frames:
        damage = f" ({'; '.join(clip.flags)})" if clip.flags else ""
        return Refusal(f"too short: {have} frames give {length}, min_frames is {config.min_frames}{damage}")
    first = round(place * max(0, have - length))
    frames = pad_frames(clip.frames[first : first + length], length)
    return _within_budget(replace(clip, frames=frames, start=clip.start + first / clip.fps), config)


def _within_budget(clip: Clip, config: BuildConfig) -> Clip | Refusal:
    """The clip, unless it comes as it is (the world does) and has more tokens than are allowed."""
    frames, height, width, _ = clip.frames.shape
    tokens, most = config.size_rule.tokens(frames, height, width), config.max_tokens
    if most is None or tokens <= most:
        return clip
    each = config.size_rule.tokens(1, height, width)
    shorter = f"{1 + config.time_factor * (most // each - 1)} frames of that size" if each <= most else ""
    side = config.multiple * isqrt(most * each // tokens)
    smaller = f"{frames} frames of {side}x{side}" if side else ""
    fits = " or ".join(filter(None, (shorter, smaller)))
    return Refusal(
        f"too long: {frames} frames of {width}x{height} have {tokens} tokens, max_tokens is {most}; {fits} would fit"
    )


def hashed_split(config: BuildConfig, clip_id: str) -> str:
    """The split of a clip that was given none: a function of seed and id, the same for all clips of a file."""
    return "held-out" if uniform(config.seed, "split", clip_id.split(".")[0]) < config.holdout else "train"
