"""Read the clips that a user names for a task, and make the task.

The names of the options are those of `sora-jax sample`. What contradicts itself is refused before a file is read.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sora_jax.config import check
from sora_jax.data.fit import MAX_PIXELS, SizeRule, shrink
from sora_jax.data.reading.media import DecodedClip, SpanRule, decode
from sora_jax.data.reading.tracks import MediaError
from sora_jax.errors import UserError
from sora_jax.files import as_path
from sora_jax.generate.recipe import enlarged_by
from sora_jax.generate.requests import Size, Task
from sora_jax.generate.run import Run
from sora_jax.generate.tasks import Pictures, Tasks, pad
from sora_jax.train.drawings import draw_edges, trace_lines

GAP = 8  # frames of --gap where it is not given
WITH_VIDEO = ("extend", "loop", "mask", "pad", "strength", "from_prompt", "upsample")


@dataclass(frozen=True)
class TaskOptions:
    """Hold what a user asks to be done with clips. Without any of it the task is text to video."""

    image: Sequence[str] = ()  # FILE or FILE@FRAME: the frames that are these images; the first, where none is named
    sketch: Sequence[str] = ()  # FILE or FILE@FRAME: drawings of the edges of frames
    edges: bool = False  # the sketches are pictures, whose edges are drawn
    video: Path | None = None  # do something with this clip: what is one of WITH_VIDEO
    connect: str = ""  # FILE,FILE: fill the gap between two clips
    extend: int | None = None  # frames to make after the clip, or, negative, before it
    loop: bool = False  # a loop: of text alone, or one that closes the clip
    mask: Path | None = None  # make what is white in this image or clip
    pad: str | None = None  # LEFT,TOP,RIGHT,BOTTOM: make so many more pixels on the sides
    strength: float | None = None  # change the clip so much, from 0 to 1
    from_prompt: str | None = None  # what the clip shows; the prompt says what it is to show
    upsample: bool = False  # make the clip at twice its height and width, by a run that reads it
    gap: int | None = None  # frames to make between two clips, or between end and beginning of a loop; None: 8
    context: int = 9  # frames at most of a clip that a continuation sees
    keep_pixels: bool = False  # put the very pixels that were given into the result

    def __post_init__(self):
        pictures = "image" if self.image or not self.sketch else "sketch"
        sources = [name for name in (pictures, "video", "connect") if getattr(self, name)]
        check(len(sources) < 2, f"--{' and --'.join(sources)} are given; give one of them")
        check(self.sketch or not self.edges, "--edges is given without --sketch; it is for pictures that it names")
        asked = [name for name in WITH_VIDEO if getattr(self, name) is not None and getattr(self, name) is not False]
        if self.from_prompt is not None and self.strength is not None:
            asked.remove("strength")  # of the change
        names = ", ".join(f"--{name}" for name in WITH_VIDEO).replace("_", "-")
        if self.video:
            what = " and ".join(f"--{name}" for name in asked).replace("_", "-") or "nothing that is done with it"
            check(len(asked) == 1, f"--video is given with {what}; give one of {names}")
        else:
            alone = [frame for _, frame in pictures_of([*self.image, *self.sketch])] == [0] and not self.sketch
            allowed = ("mask", "pad") if alone else () if sources else ("loop",)
            wrong = ["--" + name.replace("_", "-") for name in asked if name not in allowed]
            beside = f"beside --{sources[0]}" if sources else "without --video"
            check(not wrong, f"{''.join(wrong[:1])} is given {beside}; it is for a clip named by --video")
            check(len(asked) < 2, f"--{' and --'.join(asked)} are given; give one of them")
        check(self.extend != 0, "--extend is 0; it must be a number of frames, such as +16 or -16")
        fills = self.connect or (self.video and self.loop)
        check(self.gap is None or fills, f"--gap is {self.gap}; it is for --connect, or for --video with --loop")
        check(self.gap is None or self.gap > 0, f"--gap is {self.gap}; it must be at least 1")
        check(self.context > 0, f"--context is {self.context}; it must be at least 1")
        self.clips  # noqa: B018 - raises where --connect names no two files
        self.sides  # noqa: B018
        for name in ("image", "sketch"):
            for text in getattr(self, name):
                file, _, frame = text.rpartition("@")
                named = frame.isdecimal() or as_path(text).exists() or not (file and as_path(file).exists())
                check(named, f"--{name} is {text!r}; behind @ there must be the number of a frame, from 0")
            frames = [frame for _, frame in pictures_of(getattr(self, name))]
            check(len(set(frames)) == len(frames), f"--{name} is given twice for a frame; add @FRAME to a file's name")
        keeps = self.gives and (self.image or self.video or self.connect)
        where = "--image, --connect, or --video with --extend, --loop, --mask or --pad"
        check(keeps or not self.keep_pixels, f"--keep-pixels is given; it must stand beside {where}")

    def __bool__(self) -> bool:
        return bool(self.image or self.sketch or self.video or self.connect or self.loop)

    @property
    def gives(self) -> bool:
        """Return True if something of the clip is given: it is neither made of text alone nor edited as a whole."""
        edits = self.strength is not None or self.from_prompt is not None or self.upsample
        return bool(self) and not edits and not (self.loop and not self.video)

    @property
    def clips_are_videos(self) -> bool:
        """Return True if the clips that are read say how long the result is."""
        return bool(self.video or self.connect)

    @property
    def clips(self) -> list[tuple[str, Path]]:
        """Return the option and the file of each clip that is read."""
        if self.connect:
            files = self.connect.split(",")
            check(len(files) == 2, f"--connect is {self.connect!r}; it must be two files with a comma between")
            return [("connect", as_path(file)) for file in files]
        if self.video:
            return [("video", self.video)]
        return [(name, file) for name in ("image", "sketch") for file, _ in pictures_of(getattr(self, name))]

    @property
    def files(self) -> list[Path]:
        """Return all files that are read."""
        return [file for _, file in self.clips] + ([self.mask] if self.mask else [])

    @property
    def sides(self) -> tuple[int, ...]:
        """Return the pixels to add: left, top, right, bottom."""
        try:
            sides = (0,) * 4 if self.pad is None else tuple(int(side) for side in self.pad.split(","))
        except ValueError:
            sides = ()
        allowed = "four numbers of pixels, 0 or more, with commas between: LEFT,TOP,RIGHT,BOTTOM"
        check(len(sides) == 4 and min(sides) >= 0, f"--pad is {self.pad!r}; it must be {allowed}")
        return sides


def pictures_of(names: Sequence[str]) -> list[tuple[Path, int]]:
    """Read FILE@FRAME: the files, and the frame of each; 0 where none is named."""
    parts = [name.rpartition("@") for name in names]
    return [(as_path(file), int(frame)) if file and frame.isdecimal() else (as_path(name), 0)
            for name, (file, _, frame) in zip(names, parts, strict=True)]  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """Hold the clips of a task, uint8 (frames, height, width, 3), its mask, and the frames a second of the clips.

    images, sketches: pictures by the number of their frame, which are the clips, too.
    """

    clips: list[np.ndarray]
    mask: np.ndarray | None
    fps: float | None
    images: Pictures
    sketches: Pictures


def read_inputs(options: TaskOptions, size: Size, multiple: tuple[int, int], fixed: bool) -> Inputs:
    """Read the clips of a task and bring them to a size that the run takes.

    size: (frames, height, width) of the command; where the user gave no height and width (not `fixed`), a clip keeps
    its shape, within the same area. multiple: what heights and widths are multiples of. A clip to upsample has half of
    all of these, and where the user gave no height and width it keeps its own.
    """
    if options.upsample:
        size, multiple = (size[0], size[1] // 2, size[2] // 2), (multiple[0] // 2, multiple[1] // 2)
    clips, fps, shape = [], None, size[1:] if fixed else None
    for option, file in options.clips:
        draws = option == "sketch" and not options.edges
        area = MAX_PIXELS if options.upsample else size[1] * size[2]
        decoded = read_clip(option, file, shape, multiple, area, draws)
        shape, fps = decoded.frames.shape[1:3], fps or decoded.fps
        clips.append(decoded.frames[:1] if option in ("image", "sketch") else decoded.frames)
    mask = None
    if options.mask:
        frames = read_clip("mask", options.mask, shape, multiple, size[1] * size[2]).frames
        mask = frames.mean(-1) > 127
        check(len(mask) in (1, len(clips[0])), f"--mask has {len(mask)} frames; it must have 1 or {len(clips[0])}")
    images = {frame: clip for (_, frame), clip in zip(pictures_of(options.image), clips)}
    drawn = clips[len(images) :] if options.sketch else []
    sketches = {frame: draw_edges(clip) if options.edges else clip
                for (_, frame), clip in zip(pictures_of(options.sketch), drawn, strict=True)}  # fmt: skip
    for (file, _), sketch in zip(pictures_of(options.sketch), sketches.values(), strict=True):
        what = "picture has no edge" if options.edges else "drawing has no dark line"
        check((sketch == 0).any(), f"--sketch is {str(file)!r}; that {what}")
        lines = options.edges or (sketch == 0).mean() < 0.5
        check(lines, f"--sketch is {str(file)!r}; most of it is dark: it must be dark lines on white, or give --edges")
    return Inputs(clips, mask, None if images or sketches else fps, images, sketches)


def read_clip(
    option: str,
    file: Path,
    shape: tuple[int, int] | None,
    multiple: tuple[int, int],
    area: int,
    draws: bool = False,
    rule: SpanRule = SpanRule(),
) -> DecodedClip:
    """Read a file at a given height and width, or at its own, fitted; say so on stderr where it changes.

    draws: the file is a drawing, whose lines are traced before it is scaled. rule: the part that is read.
    """
    native: list[tuple[int, int]] = []
    fitted: list[tuple[int, int]] = []
    factor = 1

    def fit(height: int, width: int, frames: int) -> tuple[int, int]:
        nonlocal factor
        factor, step = enlarged_by(file, height, width), math.lcm(*multiple)
        native.append((height // factor, width // factor))
        fitted.append(shape or SizeRule(step, max_pixels=max(area, step**2))(*native[0]))
        return (height, width) if draws or fitted[0] == native[0] else fitted[0]

    try:
        decoded = decode(file, rule, fit)
    except (MediaError, OSError) as error:
        why = str(error).removeprefix("unreadable: ")
        raise UserError(f"--{option} is {str(file)!r}; it cannot be read: {why}") from error
    assert decoded is not None  # every file has a first span
    if draws:
        decoded = dataclasses.replace(decoded, frames=trace_lines(decoded.frames[:1], fitted[0]))
    elif native and fitted[0] == native[0]:
        decoded = dataclasses.replace(decoded, frames=shrink(decoded.frames, factor))
    found = decoded.frames.shape[1:3]
    if native and native[0] != found:
        before, after = ("x".join(map(str, sides)) for sides in (native[0], found))
        print(f"sora-jax: --{option} is scaled and cropped from {before} to {after} (height x width)", file=sys.stderr)
    return decoded


def make_task(options: TaskOptions, inputs: Inputs, run: Run, size: Size) -> Task:
    """Make the task that the options ask for; say so where it takes a part of a clip alone."""
    tasks, clips, gap = Tasks(run, options.context, options.keep_pixels), inputs.clips, options.gap or GAP

    def whole() -> np.ndarray:
        clip = tasks.whole(clips[0], size[0])
        if len(clip) < len(clips[0]):
            message = f"the first {len(clip)} of {len(clips[0])} frames are used; --frames takes more"
            print(f"sora-jax: {message}", file=sys.stderr)
        return clip

    if options.connect:
        first, second = clips
        return tasks.connect(first, second, gap)
    if options.mask is not None and inputs.mask is not None:
        clip = whole()
        return tasks.fill(clip, inputs.mask[: len(clip)])
    if options.pad is not None:
        _check_padded(clips[0].shape[1:3], options, run)
        return tasks.fill(*pad(whole(), *options.sides))
    if options.image or options.sketch:
        return tasks.guide((size[0], *clips[0].shape[1:3]), inputs.images, inputs.sketches)
    if options.extend is not None:
        return tasks.extend(clips[0], options.extend)
    if options.from_prompt is not None:
        return tasks.rewrite(whole(), options.from_prompt, 0.7 if options.strength is None else options.strength)
    if options.upsample:
        return tasks.upsample(whole())
    if options.strength is not None:
        return tasks.edit(whole(), options.strength)
    return tasks.close(clips[0], gap) if options.video else tasks.loop(size)


def _check_padded(sides: tuple[int, int], options: TaskOptions, run: Run) -> None:
    """Raise a UserError where --pad makes a size that the run does not take."""
    left, top, right, bottom = options.sides
    _, *patch = run.config.model.patch
    for name, side, more, places in (
        ("height", sides[0], top + bottom, patch[0]),
        ("width", sides[1], left + right, patch[1]),
    ):
        step = run.autoencoder.config.space_factor * places
        below = max((side + more) // step, 1) * step
        nearest = f"{below} or {below + step}"
        message = f"--pad is {options.pad}; it makes the {name} {side + more}, which must be a multiple of {step}"
        check(side + more == below, f"{message}, such as {nearest}")
