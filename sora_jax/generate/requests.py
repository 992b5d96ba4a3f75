"""Turn what a user asks for into requests: checked once, before any weights are read."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sora_jax.config import check
from sora_jax.data.guides import Guides
from sora_jax.data.packing.packs import grid_of
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.models.denoiser import has_trunk, reads_low
from sora_jax.models.first_stage import FirstStageConfig, latent_grid
from sora_jax.train.denoiser import DenoiserRun

Size = tuple[int, int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """Hold what is known of a clip before it is sampled, by latent position; `generate.tasks` makes them.

    latent: (t, h, w, C) normalised; it does not matter where nothing is known. ceiling: (t, h, w), the highest noise
    level of each position: 0 is given, 1 is made, between is an edit of that strength. A token has the greatest ceiling
    of its positions. first: the time coordinate of the first token frame; it is 1 for a clip whose frames all have a
    past. ring: the first frame follows the last. source: the prompt that describes `latent`; with it the clip is not
    sampled but changed, from the noise level of `ceiling` on, by the difference that the prompt makes. guides: key
    frames and sketches that the clip is made with.
    """

    latent: np.ndarray
    ceiling: np.ndarray
    first: int = 0
    ring: bool = False
    source: str | None = None
    guides: Sequence[Guides] = ()


def unchanged(values: np.ndarray) -> np.ndarray:
    """Return the values as they are."""
    return values


@dataclasses.dataclass(frozen=True)
class Task:
    """Ask for a clip of which something is known (None: nothing); `generate.tasks` makes them.

    size: (frames, height, width) of what is sampled. latent: makes the latent that is decoded of the sampled one.
    clip: makes the result (frames, height, width, 3) of the decoded clip. loops: decode the latent as a ring. low: the
    latent (t, h / 2, w / 2, C) of the clip at half its height and width, for a run that reads it.
    """

    size: Size
    known: Known | None
    latent: Callable[[np.ndarray], np.ndarray] = unchanged
    clip: Callable[[np.ndarray], np.ndarray] = unchanged
    loops: bool = False
    low: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """Ask for a clip: caption, latent size (t, h, w), identity, class (-1: none) and guidance (1: none).

    `negative` is the caption that guidance leads away from. `known`: what is known of the clip; None for nothing.
    `low`: its latent at half its rows and columns, for a run that reads it. Equal requests give equal clips.
    """

    prompt: str
    size: Size
    clip_id: int
    label: int = -1
    guidance: float = 1.0
    negative: str = ""
    known: Known | None = None
    low: np.ndarray | None = None

    def __str__(self) -> str:
        about = f"class {self.label}" if self.label >= 0 else f"prompt {self.prompt!r}"
        return f"the clip of {about} (clip id {self.clip_id}, guidance {self.guidance:g})"


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Hold what a user asks for: one clip for each prompt or class; other values are one for all, or one for each.

    A run that takes neither prompts nor classes makes one clip for each size.
    """

    prompts: Sequence[str] = ()
    sizes: Size | Sequence[Size] = ()  # (frames, height, width) in pixels
    classes: Sequence[int] = ()
    guidance: float | Sequence[float] | None = None  # 1: none; None: that of the run
    negative: str | Sequence[str] = ""  # captions that guidance leads away from
    clip_ids: Sequence[int] | None = None  # identities that key the noise; None: 1, 2, ...
    tasks: Sequence[Task] = ()  # what is known of the clips, one for all or one for each; empty: nothing of any


def plan_requests(
    config: DenoiserRun, first_stage: FirstStageConfig, wanted: Wanted, sampling: SamplingConfig
) -> list[Request]:
    """Check what is asked for and return a request for each clip.

    Raises:
        UserError: the run takes no such; the sentence names the nearest sizes that are allowed.
    """
    wanted = _with_tasks(wanted)
    lows = [task.low for task in wanted.tasks] or [None]
    for low in lows:
        _check_low(config, low is not None)
    check(len(wanted.sizes) > 0, "there is no size; give (frames, height, width), one for all or one for each prompt")
    prompts, classes = _subjects(config, wanted)
    count = len(prompts)
    channels, most = sampling.guidance.channels, config.model.latent_channels
    check(channels <= most, f"sampling.guidance.channels is {channels}; it must be from 0 (all) to {most}")
    scales = _each("guidance", sampling.guidance.scale if wanted.guidance is None else wanted.guidance, count)
    if not (config.model.text or config.model.classes):
        scales = [1.0] * count  # there is nothing to be guided away from
    check(all(map(math.isfinite, scales)), f"guidance is {wanted.guidance}; it must be a finite number")
    check(min(scales, default=1) >= 0, f"guidance is {wanted.guidance}; it must be at least 0")
    negatives = _each("negative", wanted.negative, count)
    if any(negatives):
        check(config.model.text, f"negative is {wanted.negative!r}; this run reads no text, leave it out")
        check(any(s != 1 for s in scales), f"negative is {wanted.negative!r}; it needs a guidance other than 1")
    given: Any = wanted.sizes  # one, or one for each
    sizes: list[Size] = [given] * count if is_whole(given[0]) else list(given)
    check(len(sizes) == count, _unequal(count, "size", sizes))
    clip_ids = range(1, count + 1) if wanted.clip_ids is None else wanted.clip_ids
    check(len(clip_ids) == count, _unequal(count, "clip id", clip_ids))
    check(
        all(is_whole(clip_id) and 0 < clip_id < 2**32 for clip_id in clip_ids),
        f"clip_ids is {list(clip_ids)}; each must be a whole number from 1 to 4294967295",
    )
    known = [task.known for task in wanted.tasks] or [None] * count
    check(len(known) == count, _unequal(count, "task", known))
    if sampling.skipped:
        check(has_trunk(config.model), f"model.name is {config.model.name!r}; it has no blocks to skip")
        rings = any(one is not None and one.ring for one in known)
        check(not rings, "--loop is given; a loop has other positions at every step, so that none may be skipped")
    check_replacement(sampling, known)
    latents = [_size(config, first_stage, *one) for one in zip(sizes, known, strict=True)]
    columns = (prompts, latents, clip_ids, classes, scales, negatives, known, lows if wanted.tasks else lows * count)
    return [Request(*one) for one in zip(*columns, strict=True)]


def _check_low(config: DenoiserRun, given: bool) -> None:
    """Raise a UserError where a run reads the low resolution of a clip and has none, or is given one and reads none."""
    reads = reads_low(config.model)
    alone = "this run makes clips of those of half the size (model.low_resolution)"
    check(given or not reads, f"{alone}; give `sora-jax sample` one by --video=FILE --upsample")
    unread = "this run does not read one (model.low_resolution)"
    check(reads or not given, f"a clip of half the size is given, by --upsample or --then; {unread}")


def check_replacement(sampling: SamplingConfig, known: Sequence[Known | None]) -> None:
    """Raise a UserError where replacement cannot do what is asked: tokens of clips are given or made, not edited."""
    if sampling.condition != "replace":
        return
    for one in known:
        edits = one is not None and (one.source is not None or ((one.ceiling > 0) & (one.ceiling < 1)).any())
        check(not edits, "--condition is 'replace'; for edits of a clip it must be 'clean'")
        guided = one is not None and len(one.guides) > 0
        check(not guided, "--condition is 'replace'; with key frames or sketches it must be 'clean'")


def _size(config: DenoiserRun, first_stage: FirstStageConfig, size: Size, known: Known | None) -> Size:
    """Return the latent size of a clip: that of what is known of it, if anything is."""
    if known is None:
        return latent_size(config, first_stage, size)
    t, h, w = known.latent.shape[:3]
    grid_of((t, h, w), config.model.patch)  # UserError where it does not fill whole patches
    return t, h, w


def _with_tasks(wanted: Wanted) -> Wanted:
    """Give every prompt its task, and every clip the size of its task."""
    tasks, count = list(wanted.tasks), max(len(wanted.prompts), len(wanted.classes))
    if not tasks:
        return wanted
    tasks = tasks * max(count, 1) if len(tasks) == 1 else tasks
    return dataclasses.replace(wanted, tasks=tasks, sizes=[task.size for task in tasks])


def _subjects(config: DenoiserRun, wanted: Wanted) -> tuple[list[str], list[int]]:
    """Return a prompt ("" for none) and a class (-1 for none) for each clip."""
    prompts, classes, known = wanted.prompts, wanted.classes, config.model.classes
    check(not isinstance(prompts, str), f"prompts is {prompts!r}; it must be a list of texts")
    if not (config.model.text or known):
        check(not len(prompts) and not len(classes), "this run takes neither prompts nor classes; give sizes alone")
        count = 1 if is_whole(wanted.sizes[0]) else len(wanted.sizes)
        return [""] * count, [-1] * count
    count = max(len(prompts), len(classes))
    check(count > 0, "there is no prompt; give at least one, or a class")
    check(config.model.text or not len(prompts), "this run takes classes, not prompts; give classes")
    check(known or not len(classes), "this run takes prompts, not classes; give prompts")
    for label in classes:
        check(
            is_whole(label) and 0 <= label < known,
            f"class is {label!r}; it must be a whole number from 0 to {known - 1}",
        )
    prompts, classes = list(prompts) or [""] * count, list(classes) or [-1] * count
    same = len(prompts) == len(classes)
    check(same, _unequal(len(prompts), "class", classes))
    return prompts, classes


def check_seed(seed: Any) -> None:
    """Raise a UserError unless the seed is a whole number of 32 bits."""
    check(is_whole(seed) and 0 <= seed < 2**32, f"seed is {seed!r}; it must be a whole number from 0 to 4294967295")


def latent_size(config: DenoiserRun, first_stage: FirstStageConfig, size: Size) -> Size:
    """Return the latent (t, h, w) of a clip of (frames, height, width); UserError with the sizes that are allowed."""
    frames, height, width = size
    _, *patch = config.model.patch
    factor = first_stage.space_factor
    for name, value, step in (("height", height, factor * patch[0]), ("width", width, factor * patch[1])):
        below = max(value // step, 1) * step
        nearest = f"{below} or {below + step}"
        check(value == below, f"{name} is {value}; it must be a multiple of {step}, such as {nearest}")
    in_time = config.model.positions_in_time
    check(frames == 1 or in_time, f"frames is {frames}; this model tells no frames apart, it must be 1")
    latent = latent_grid(first_stage, frames, height, width)
    grid_of(latent, config.model.patch)  # UserError where the frames do not fill whole patches
    return latent


def size_of(first_stage: FirstStageConfig, latent: Size) -> Size:
    """Return the (frames, height, width) of a clip with this latent (t, h, w)."""
    t, h, w = latent
    return 1 + first_stage.time_factor * (t - 1), first_stage.space_factor * h, first_stage.space_factor * w


def is_whole(value: Any) -> bool:
    """Return True for a whole number, of Python or of NumPy; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _unequal(prompts: int, what: str, values: Sequence[Any]) -> str:
    """Say that there is not one value for each prompt."""
    counts = (f"{count} {name}{'s' * (count != 1)}" for count, name in ((prompts, "prompt"), (len(values), what)))
    return f"there must be one {what} for each prompt, not {' and '.join(counts)}"


def _each(name: str, values: Any, count: int) -> list:
    """Return one value for each clip, from one for all or a list; UserError where there are too many or too few."""
    if np.ndim(values) == 0:
        return [values] * count
    check(
        len(values) == count, f"there are {len(values)} values of {name} for {count} clips; give one, or one for each"
    )
    return list(values)
