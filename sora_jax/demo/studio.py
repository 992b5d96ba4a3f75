"""Make clips for the page with one run: one at a time, within limits, in a folder that is removed again."""

import argparse
import contextlib
import dataclasses
import io
import re
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import jax

from sora_jax.config import check
from sora_jax.data.reading.media import DecodedClip, FitClip, SpanRule, decode
from sora_jax.data.viewing.write import save_png, write_video
from sora_jax.demo.fields import (
    AREAS,
    LABELS,
    Clip,
    Limits,
    Values,
    area_mask,
    check_field,
    frames_asked,
    on_page,
    sides_of,
    whole,
    words_of,
)
from sora_jax.errors import UserError
from sora_jax.generate import command
from sora_jax.generate.inputs import read_clip
from sora_jax.generate.options import DEFAULT_SIZE, Asked, named_as_typed, resolve
from sora_jax.generate.progress import Progress
from sora_jax.generate.recipe import enlarged_by
from sora_jax.generate.requests import Size
from sora_jax.generate.run import Run
from sora_jax.models.denoiser import reads_low

Parse = Callable[[list[str]], argparse.Namespace]  # of the words of a command line
EXAMPLES = 6
PROGRAMS = 64  # shapes of clips whose compiled programs are kept
SHAPELESS = {"prompt", "negative", "from-prompt", "then", "seed"}  # fields that change no program


class Cancelled(Exception):
    """Report that a visitor cancelled the clip that was being made."""


@dataclasses.dataclass
class Studio:
    """Make clips with a run for many visitors in turn.

    name: how the run is called on a command line. folder: where it is. parse: reads a command line.
    """

    run: Run
    name: str
    folder: Path
    parse: Parse
    limits: Limits = Limits()

    def __post_init__(self):
        text = self.run.config.model.text
        check(text, f"--workdir is {str(self.folder)!r}; that run reads no text, and the page is for runs that do")
        alone = not reads_low(self.run.config.model)
        check(alone, f"--workdir is {str(self.folder)!r}; that run makes clips of others of half the size")
        self.examples: list[Clip] = []
        self.ready = threading.Event()  # the examples are made
        self._turn, self._jobs = threading.Lock(), dict[str, threading.Event]()  # visitor -> what ends the clip
        self._count, self._shapes = 0, set[tuple]()

    # What the run has learnt

    @property
    def sizes(self) -> list[Size]:
        """Return the sizes (frames, height, width) of the run's previews."""
        return list(dict.fromkeys(self.run.config.preview.sizes)) or [DEFAULT_SIZE]

    @property
    def prompts(self) -> list[tuple[str, Size]]:
        """Return prompts to try, with a size for each: those of the run's previews."""
        sizes = self.run.config.preview.sizes or [DEFAULT_SIZE]
        return [(prompt, sizes[i % len(sizes)]) for i, prompt in enumerate(self.run.config.preview.prompts)]

    @property
    def factor(self) -> int:
        """Return the frames of a later latent."""
        return self.run.autoencoder.config.time_factor

    @property
    def multiple(self) -> tuple[int, int]:
        """Return what heights and widths are multiples of."""
        _, rows, columns = self.run.config.model.patch
        factor = self.run.autoencoder.config.space_factor
        return factor * rows, factor * columns

    # Clips

    def pick(self, name: str, data: bytes, field: str = "video") -> Clip:
        """Return a file that was uploaded as a clip that the run takes; UserError where it is none, or too large."""
        most, name = self.limits.frames, _file_name(name)
        label, size = LABELS[field], len(data) / 2**20
        fits = len(data) <= self.limits.megabytes * 2**20
        check(fits, f"{label} is a file of {size:.1f} MB; it must be at most {self.limits.megabytes} MB")
        with tempfile.TemporaryDirectory(prefix="sora-jax-") as folder:
            file = Path(folder) / name
            file.write_bytes(data)
            with _quiet(file.parent):
                _, height, width = self.sizes[0]
                found = read_clip(field, file, None, self.multiple, height * width, rule=SpanRule(most + 1))
            frames = found.frames
        check(len(frames) <= most, f"{label} has more than {most} frames; cut it before")
        return Clip(name, data, frames.shape[:3], command="")

    def make(self, task: str, values: Values, visitor: str = "", progress: Progress | None = None) -> Clip:
        """Make the clip that the fields of a tab ask for.

        values: of the fields, by the names of `fields.LABELS`; each clip that was chosen is a `Clip`.

        Raises:
            UserError: the fields, or the limits, do not allow it; the sentence is one for the page.
            Cancelled: the visitor has cancelled it.
        """
        self._check(task, values)
        job = self._jobs[visitor] = threading.Event()
        try:
            return self._make(task, values, self._watched(job, progress))
        finally:
            if self._jobs.get(visitor) is job:  # else the visitor has begun another
                del self._jobs[visitor]

    def _make(self, task: str, values: Values, progress: Progress) -> Clip:
        """Make the clip, in its turn."""
        with tempfile.TemporaryDirectory(prefix="sora-jax-") as name, _quiet(Path(name)):
            folder = Path(name)
            words = words_of(task, {**values, "multiple": self.multiple[1]}, self._files(folder, values))
            still = task in ("text", "image", "fill", "edit") and frames_asked(task, values) == 1
            self._count += 1
            out = folder / f"{_stem(values)}-{self._count}{'.png' if still else '.mp4'}"
            words = ["sample", f"--workdir={self.folder}", *words, f"--out={out}"]
            asked = self._public(resolve(self.parse(words)), folder)
            line = " ".join(["sora-jax", *(_quoted(self._bare(word, folder)) for word in words)])
            with self._turn, named_as_typed(words), _heard() as notes:
                self._bound_programs(task, values)
                (path,) = command.make(asked, lambda: self.run, progress)
            data, (frames, height, width, _) = path.read_bytes(), _decoded(path).frames.shape
            factor = enlarged_by(path, height, width)
        size = (frames, height // factor, width // factor)
        own = not any(isinstance(clip, Clip) and not clip.command for clip in values.values())
        left_out = ("sampling ", "--video is scaled", "--image is scaled", "--connect is scaled")[: 4 if own else 1]
        lines = [on_page(note, folder) for note in notes if not note.startswith(left_out)]
        if values.get("area") in AREAS:
            lines.append(f"{_mask_name(values)}, of the command, is white in this area of the clip and black elsewhere")
        return Clip(path.name, data, size, str(values.get("prompt") or ""), line, tuple(lines))

    def prepare(self) -> None:
        """Make a clip of each prompt to try; this compiles the program, too."""
        try:
            for prompt, (frames, height, width) in self.prompts[:EXAMPLES]:
                values = {"prompt": prompt, "frames": frames, "size": f"{height} x {width}", "seed": 0}
                self.examples = [*self.examples, self.make("text", values)]
        except UserError as error:  # the limits do not allow the sizes of the previews
            print(f"sora-jax: there are no more examples: {error}", file=sys.stderr)
        finally:
            self.ready.set()

    def cancel(self, visitor: str) -> None:
        """End what is being made for a visitor."""
        if job := self._jobs.get(visitor):
            job.set()

    # Details

    def _check(self, task: str, values: Values) -> None:
        """Raise a UserError for what is beyond the limits; what the run does not take is found later."""
        for name in ("prompt", "negative", "from-prompt", "then"):
            text, most = str(values.get(name) or ""), self.limits.letters
            check(len(text) <= most, f"{LABELS[name]} has {len(text)} letters; it must have at most {most}")
        if values.get("steps") is not None:
            steps, most = whole(values, "steps"), self.limits.steps
            check_field(0 < steps <= most, "steps", steps, f"from 1 to {most}")
        chosen = [values[name] for name in ("image", "video", "first") if isinstance(values.get(name), Clip)]
        height, width = chosen[0].size[1:] if chosen else sides_of(values.get("size"))
        frames, most = frames_asked(task, values), self.limits.pixels // max(height * width, 1)
        about = f"at most {most:,} with a size of {height} x {width}" if most else "of a smaller size"
        check(frames <= most, f"Frames is {frames:,}; it must be {about}")

    def _files(self, folder: Path, values: Values) -> Callable[[str], Path]:
        """Return what writes the clip of a field into the folder, under its own name, and returns the file."""

        def file(name: str) -> Path:
            clip, area = values.get(name), values.get("area")
            if name == "mask" and area in AREAS:
                _, height, width = values["video"].size
                return save_png(folder / _mask_name(values), area_mask(area, height, width)[0])
            if not isinstance(clip, Clip):
                raise UserError(f"{LABELS[name]} is missing; choose one, by the buttons")
            path = folder / clip.name
            if path.exists() and path.read_bytes() != clip.data:
                path = folder / f"{name}-{clip.name}"
            path.write_bytes(clip.data)
            return path

        return file

    def _bound_programs(self, task: str, values: Values) -> None:
        """Drop the compiled programs when the visitors have asked for too many: each shape has its own."""
        fields = sorted(values.items())
        shape = (task, *(getattr(value, "size", value) for name, value in fields if name not in SHAPELESS))
        if shape not in self._shapes and len(self._shapes) >= PROGRAMS:
            jax.clear_caches()
            self._shapes.clear()
        self._shapes.add(shape)

    def _watched(self, job: threading.Event, progress: Progress | None) -> Progress:
        """Return a progress callback that ends what was cancelled, or takes too long.

        The time begins with the first step that is done: before it the program may be compiled, once for all visitors.
        """
        start, most = 0.0, self.limits.seconds

        def watch(done: int, total: int) -> None:
            nonlocal start
            if job.is_set():
                raise Cancelled
            start = start or (time.monotonic() if done else 0.0)
            spent = time.monotonic() - start if start else 0.0
            check(spent <= most, f"The clip takes longer than {most:g} s; take fewer frames or steps")
            if progress:
                progress(done, total)

        return watch

    def _bare(self, word: str, folder: Path) -> str:
        """Return a word of a command without folders of this machine."""
        return word.replace(f"{folder}/", "").replace(str(self.folder.absolute()), self.name).replace(
            str(self.folder), self.name)  # fmt: skip

    def _public(self, asked: Asked, folder: Path) -> Asked:
        """Return a command whose recipe, which stands in the file, names no folder of this machine."""
        made_by = asked.made_by
        words = [self._bare(word, folder) for word in made_by.command]
        inputs = {self._bare(file, folder): digest for file, digest in made_by.inputs.items()}
        return dataclasses.replace(asked, made_by=dataclasses.replace(made_by, command=words, inputs=inputs))


def preview_of(clip: Clip) -> bytes:
    """Return the frames of a chosen clip as the run takes them, as a GIF for the page."""
    with tempfile.TemporaryDirectory(prefix="sora-jax-") as folder:
        file = Path(folder) / clip.name
        file.write_bytes(clip.data)
        decoded = _decoded(file, SpanRule(clip.size[0]), lambda height, width, frames: clip.size[1:])
        out = write_video(Path(folder) / "preview.gif", decoded.frames, max(decoded.fps, 1.0))
        return out.read_bytes()


def _decoded(file: Path, rule: SpanRule = SpanRule(), fit: FitClip | None = None) -> DecodedClip:
    decoded = decode(file, rule, fit)
    assert decoded is not None  # every file has a first span
    return decoded


def _file_name(name: str) -> str:
    """Return the last part of a name, of letters that need no quotes on a command line."""
    stem, dot, ending = name.replace("\\", "/").rpartition("/")[2].rpartition(".")
    clean = [re.sub(r"[^\w]+", "-", part, flags=re.ASCII).strip("-") for part in (stem, ending)]
    return f"{(clean[0] or 'clip')[:60]}{dot}{clean[1][:8]}"


def _mask_name(values: Values) -> str:
    return f"{str(values['area']).replace(' ', '-')}.png"


def _quoted(word: str) -> str:
    """Return a word of a command line as a person quotes it: --prompt='a red circle'."""
    name, equals, value = word.partition("=")
    return f"{name}={shlex.quote(value)}" if equals and name.startswith("--") else shlex.quote(word)


def _stem(values: Values) -> str:
    """Return a name for the file of a prompt."""
    return "-".join(re.findall(r"[a-z0-9]+", str(values.get("prompt") or "clip").lower())[:4]) or "clip"


@contextlib.contextmanager
def _quiet(folder: Path) -> Iterator[None]:
    """Say a UserError as the page does."""
    try:
        yield
    except UserError as error:
        raise UserError(on_page(str(error), folder)) from error


class _Ear(io.TextIOBase):
    """Pass what is written to stderr on, and keep the lines for the user that the thread which made it writes."""

    def __init__(self, stream: TextIO):
        self.stream, self.lines, self.thread = stream, list[str](), threading.get_ident()

    def write(self, text: str) -> int:
        if threading.get_ident() == self.thread:  # others read uploads meanwhile
            lines = text.splitlines()
            self.lines.extend(line.removeprefix("sora-jax: ") for line in lines if line.startswith("sora-jax: "))
        return self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()


@contextlib.contextmanager
def _heard() -> Iterator[Sequence[str]]:
    """Yield the list of lines for the user that go to stderr meanwhile. One clip at a time is made, so they are its."""
    ear = _Ear(sys.stderr)
    with contextlib.redirect_stderr(ear):
        yield ear.lines
