"""Make one clip of a dataset from one entry of a source: its span, size and length, or the reason why it is refused.

All choices are functions of (seed, variant, clip id), so they do not depend on order, workers or machines.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from math import inf, isqrt
from typing import NamedTuple

from sora_jax.config import check, check_option, check_word
from sora_jax.data.building.pool import Refusal
from sora_jax.data.draws import uniform
from sora_jax.data.fit import LENGTH_RULES, SizeRule, fit_length, longest_length, pad_frames
from sora_jax.data.reading.media import FitClip, SpanRule
from sora_jax.data.reading.tracks import MediaError, reason
from sora_jax.data.sources import Source, SourceConfig, make_source
from sora_jax.data.storing.clips import Clip
from sora_jax.errors import UserError
from sora_jax.worlds import WorldConfig

PLACES = {"start": 0.0, "middle": 0.5, "random": None}
MAX_SECONDS = 86400
NO_CAPTION = {"tfds": "--caption-field is not given or its feature is empty", "array_record": "the dataset has none"}


@dataclass(frozen=True)
class BuildConfig:
    """Options of a build; all but `build.MACHINERY` decide what is in the dataset."""

    out: str = ""  # dataset folder to write
    sources: tuple[SourceConfig, ...] = ()  # where clips come from, see `data/sources/config.py`
    max_frames: int = 17  # longest clip; lengths and sizes: see `data/fit.py`
    time_factor: int = 4  # frames for each token in time: clips have 1 + time_factor * k frames
    length_rule: str = "cut"  # cut to the next shorter allowed length, or pad to the next longer
    min_frames: int = 1  # clips that end shorter are refused
    fps: float | None = None  # frame rate of all clips, by time stamps
    max_fps: float | None = None  # frame rate above which frames are dropped
    place: str = "middle"  # part taken of a longer file: start, middle or random (by seed, variant and clip)
    clips_per_file: int = 1  # clips taken of a file that is long enough
    cuts: bool = False  # shorten clips to their longest part without a scene cut (PySceneDetect)
    multiple: int = 16  # height and width are multiples of it
    max_pixels: int | None = 256 * 256  # largest height x width
    max_tokens: int | None = None  # most tokens of a clip: one for time_factor frames of multiple x multiple pixels
    resolution: str = "largest"  # size of a clip: the largest that is allowed, or drawn at random (uniform or navit)
    min_pixels: int | None = None  # smallest height x width that is drawn (default: (4 * multiple)^2)
    framing: str = "native"  # native aspect ratio, or square crops
    variants: int = 1  # sizes or places of each clip, which epochs take in turn
    mirror: bool = False  # also the mirror image of each variant, whatever its caption says of left and right
    missing_caption: str = "refuse"  # refuse a clip without a caption, or give it an empty one
    holdout: float = 0.05  # share of clips without a given split that get "held-out", by a hash; of 5 files at least 1
    seed: int = 0  # seed of the held-out split, of places and of sizes
    workers: int = 1  # processes that decode; 0 decodes in this one, unprotected from crashes
    seconds: float = 60.0  # a file that takes longer to decode is refused
    shard: str = "0/1"  # i/n builds every n-th part; all n processes must see the same files
    clips_per_shard: int = 128  # entries in a part
    train_config: str = ""  # FILE:VARIANT of the training that will read the clips; reports count its packs

    def __post_init__(self):
        self.size_rule  # noqa: B018 - raises where the sizes contradict each other
        for name, allowed in _WORDS.items():
            check_word(f"--{name.replace('_', '-')}", getattr(self, name), allowed)
        for name, least in _LEAST.items():
            check_option(getattr(self, name) >= least, name, getattr(self, name), f"at least {least}")
        for name in ("fps", "max_fps"):
            value = getattr(self, name)
            check_option(value is None or 0 < value < inf, name, value, "finite and above 0")
        check_option(0 < self.seconds <= MAX_SECONDS, "seconds", self.seconds, f"above 0 and at most {MAX_SECONDS}")
        check_option(0 <= self.holdout < 1, "holdout", self.holdout, "at least 0 and less than 1")
        check(self.sources, "sources is empty; it must have at least one source")
        check_option(
            self.min_frames <= self.max_frames,
            "min_frames",
            self.min_frames,
            f"at most --max-frames, {self.max_frames}",
        )
        vary = self.resolution != "largest" or self.place == "random"
        what = "1 unless place is random or resolution is uniform or navit"
        check_option(self.variants == 1 or vary, "variants", self.variants, what)

    @property
    def size_rule(self) -> SizeRule:
        """Return the rule of the sizes of clips."""
        return SizeRule(**{field.name: getattr(self, field.name) for field in fields(SizeRule)})

    def length_of(self, frames: int) -> int:
        """Return the number of frames that a clip of so many gets."""
        return fit_length(frames, self.time_factor, self.max_frames, self.length_rule)


_WORDS = {"length_rule": LENGTH_RULES, "place": tuple(PLACES), "missing_caption": ("refuse", "empty")}
_LEAST = dict(
    max_frames=1, time_factor=1, min_frames=1, clips_per_file=1, variants=1, workers=0, seed=0, clips_per_shard=1
)


class Mix:
    """Join several sources, one after the other, into one."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = sources
        self.starts = [0, *accumulate(map(len, sources))]
        classes = {pair for source in sources for pair in source.reader.classes} if len(sources) > 1 else set()
        names = sorted({name for name, _ in classes})  # those of one source may be numbered otherwise in another
        agree = len(names) == len(classes) == len({number for _, number in classes})
        self.numbers = {} if agree else {name: number for number, name in enumerate(names)}

    def __len__(self) -> int:
        return self.starts[-1]

    def find(self, index: int) -> tuple[Source, int]:
        """Return the source of an index, and the index there."""
        which = bisect_right(self.starts, index) - 1
        return self.sources[which], index - self.starts[which]

    @property
    def refused(self) -> list[tuple[str, str]]:
        """Return pairs (file, reason) of the files that were refused when the sources were listed."""
        return [pair for source in self.sources for pair in source.refused]


def open_sources(config: BuildConfig) -> Mix:
    """Open the sources of the options; UserError if one is missing or its sizes do not fit."""
    for source in config.sources:
        for size in (source.world or WorldConfig()).sizes if source.name == "world" else ():
            fits = not any(side % config.multiple for side in size)
            check_option(fits, "multiple", config.multiple, f"a divisor of the world's size {size}, as 4 or 8 may be")
    return Mix([make_source(source) for source in config.sources])


class Unit(NamedTuple):
    """Hold what is prepared at once: clip `number` of an entry, mirrored or not, in one of its variants."""

    entry: int
    number: int
    mirrored: bool
    variant: int


def prepare(mix: Mix, config: BuildConfig, unit: Unit) -> Clip | Refusal | None:
    """Return the clip of a unit at its final size and length, or why it is refused; None if the file has no such span.

    UserErrors are raised: they are of the options, not of one file.
    """
    source, place = mix.find(unit.entry)
    entry = source.entry(place)
    if not entry.captions and config.missing_caption == "refuse":
        have = NO_CAPTION.get(source.config.name.partition(":")[0], "no text file of the same name and no row has one")
        return Refusal(f"no caption: {have}; --missing-caption=empty takes it")
    try:
        media = source.open(place)
        clip_id = media.content_id() + (f".{unit.number}" if config.clips_per_file > 1 else "")
        span = _span(config, unit, clip_id)
        decoded = media.decode(span, _fit(config, unit, source, clip_id))
        if decoded is None:
            return None
        frames = decoded.frames[:, :, ::-1] if unit.mirrored else decoded.frames
        label = None if entry.label is None else mix.numbers.get(entry.label_name or str(entry.label), entry.label)
        clip = Clip(clip_id, frames, decoded.fps, entry.captions, source.name, label, decoded.start, decoded.flags)
        return _to_length(clip, config, span.place)
    except UserError:
        raise
    except MediaError as error:
        return Refusal(str(error))
    except Exception as error:  # a damaged archive or dataset raises one of many types
        return Refusal(f"unreadable: {reason(error)}")


def _span(config: BuildConfig, unit: Unit, clip_id: str) -> SpanRule:
    longest, place = longest_length(config.time_factor, config.max_frames), PLACES[config.place]
    if place is None:
        place = uniform(config.seed, f"place/{unit.variant}", clip_id)
    return SpanRule(longest, config.fps, config.max_fps, place, unit.number, config.clips_per_file, config.cuts)


def _fit(config: BuildConfig, unit: Unit, source: Source, clip_id: str) -> FitClip | None:
    if source.name.startswith("world") and config.framing == "native":
        return None  # it comes as it is drawn
    draw = uniform(config.seed, f"size/{unit.variant}", clip_id)

    def size(height: int, width: int, frames: int) -> tuple[int, int]:
        return config.size_rule(height, width, config.length_of(frames), draw)

    return size


def _to_length(clip: Clip, config: BuildConfig, place: float) -> Clip | Refusal:
    have = len(clip.frames)
    length = config.length_of(have)
    if length < config.min_frames:
        flags = f" ({'; '.join(clip.flags)})" if clip.flags else ""
        return Refusal(f"too short: {have} frames give {length}, --min-frames is {config.min_frames}{flags}")
    first = round(place * max(0, have - length))
    frames = pad_frames(clip.frames[first : first + length], length)
    return _within_budget(replace(clip, frames=frames, start=clip.start + first / clip.fps), config)


def _within_budget(clip: Clip, config: BuildConfig) -> Clip | Refusal:
    """Refuse a clip that comes as it is, as those of the world do, and has more tokens than are allowed."""
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
        f"too long: {frames} frames of {width}x{height} have {tokens} tokens, --max-tokens is {most}; {fits} would fit"
    )


def hashed_split(config: BuildConfig, clip_id: str) -> str:
    """Return the split of a clip without a given one: a function of seed and id, the same for all clips of a file."""
    return "held-out" if split_draw(config, clip_id) < config.holdout else "train"


def split_draw(config: BuildConfig, clip_id: str) -> float:
    """Return the number from 0 to 1 that decides on the split of a clip."""
    return uniform(config.seed, "split", clip_id.split(".")[0])
