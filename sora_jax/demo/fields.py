"""Translate the fields of the page into the words of `sora-jax sample`, and its sentences into those of the page.

The page has no sampling code of its own: each of its tabs is a command, see `WORDS`.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax.config import check
from sora_jax.errors import UserError
from sora_jax.generate.requests import Size

Values = Mapping[str, Any]  # of the fields, by the names in `LABELS`
File = Callable[[str], Path]  # the file of a clip that was chosen, by the name of its field

LABELS = {  # field or option -> what the page calls it
    "prompt": "Prompt",
    "negative": "Negative prompt",
    "size": "Size",
    "height": "Height",
    "width": "Width",
    "frames": "Frames",
    "steps": "Steps",
    "guidance": "Guidance",
    "seed": "Seed",
    "image": "Image",
    "video": "Clip",
    "first": "First clip",
    "second": "Second clip",
    "connect": "A clip",
    "mask": "Mask",
    "pad": "Around it",
    "extend": "Frames to add",
    "gap": "Frames between",
    "strength": "Strength",
    "from-prompt": "What the clip shows now",
    "then": "Then",
    "at": "From frame",
    "long": "Frames of the long clip",
}
LEFT, RIGHT, UPPER, LOWER, MIDDLE = "left half", "right half", "upper half", "lower half", "middle"
WIDER, OWN = "around it: a wider clip", "my own mask"
AREAS = {  # area -> (top, bottom, left, right) as shares of the sides
    LEFT: (0, 1, 0, 1 / 2),
    RIGHT: (0, 1, 1 / 2, 1),
    UPPER: (0, 1 / 2, 0, 1),
    LOWER: (1 / 2, 1, 0, 1),
    MIDDLE: (1 / 4, 3 / 4, 1 / 4, 3 / 4),
}
BEFORE, AFTER = "before the clip", "after the clip"


@dataclasses.dataclass(frozen=True)
class Clip:
    """Hold a clip that was made or chosen: its file, and (frames, height, width) as the run takes it.

    command: the line that makes it again. notes: what was said while it was made.
    """

    name: str
    data: bytes
    size: Size
    prompt: str = ""
    command: str = ""
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bound what one visitor can ask for, so that a public page serves all."""

    pixels: int = 1_000_000  # frames x height x width of a clip that is made
    steps: int = 100  # denoising steps
    seconds: float = 120.0  # time of one clip, beside what is compiled for it
    megabytes: int = 8  # size of a file that is uploaded
    frames: int = 256  # frames of a clip that is uploaded
    letters: int = 500  # length of a text
    queue: int = 16  # visitors who wait for their turn

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            option = field.name if field.name == "queue" else f"max-{field.name}"
            check(value > 0, f"--{option} is {value}; it must be positive")


def check_field(condition: object, name: str, value: object, allowed: str) -> None:
    """Raise a UserError that names a field as the page does, unless the condition holds."""
    check(condition, f"{LABELS[name]} is {value}; it must be {allowed}")


def sides_of(text: object) -> tuple[int, int]:
    """Read the height and the width of a field such as "24 x 36"."""
    found = re.fullmatch(r"\s*(\d{1,5})\s*[x×*,]\s*(\d{1,5})\s*", str(text or ""))
    if found is None:
        raise UserError(f"Size is {str(text or '')!r}; it must be height x width, such as 24 x 36")
    height, width = int(found[1]), int(found[2])
    check(min(height, width) > 0, f"Size is '{height} x {width}'; both must be at least 1, such as 24 x 36")
    return height, width


def whole(values: Values, name: str) -> int:
    """Return the whole number of a field."""
    value = values.get(name)
    right = isinstance(value, (int, float)) and not isinstance(value, bool) and float(value).is_integer()
    check_field(right, name, "empty" if value is None else value, "a whole number")
    return int(values[name])


def _size_words(values: Values) -> list[str]:
    height, width = sides_of(values.get("size"))
    return [f"--height={height}", f"--width={width}"]


def _text(values: Values, file: File) -> list[str]:
    return [f"--frames={whole(values, 'frames')}", *_size_words(values)]


def _image(values: Values, file: File) -> list[str]:
    return [f"--image={file('image')}", f"--frames={whole(values, 'frames')}", "--keep-pixels"]


def _extend(values: Values, file: File) -> list[str]:
    frames = whole(values, "extend")
    check_field(frames > 0, "extend", frames, "at least 1")
    sign = "-" if values.get("side") == BEFORE else "+"
    return [f"--video={file('video')}", f"--extend={sign}{frames}", "--keep-pixels"]


def _loop(values: Values, file: File) -> list[str]:
    if values.get("video") is None:
        return ["--loop", f"--frames={whole(values, 'gap')}", *_size_words(values)]
    return [f"--video={file('video')}", "--loop", f"--gap={whole(values, 'gap')}", "--keep-pixels"]


def _connect(values: Values, file: File) -> list[str]:
    return [f"--connect={file('first')},{file('second')}", f"--gap={whole(values, 'gap')}", "--keep-pixels"]


def _fill(values: Values, file: File) -> list[str]:
    words = [f"--video={file('video')}", f"--frames={whole(values, 'frames')}"]
    if values["area"] == WIDER:
        more = wider_by(values["video"].size[2], values["multiple"])
        return [*words, f"--pad={more},0,{more},0", "--keep-pixels"]
    return [*words, f"--mask={file('mask')}", "--keep-pixels"]


def _edit(values: Values, file: File) -> list[str]:
    words = [f"--video={file('video')}", f"--frames={whole(values, 'frames')}", f"--strength={values['strength']:g}"]
    shown = (values.get("from-prompt") or "").strip()
    return [*words, f"--from-prompt={shown}"] if shown else words


def _long(values: Values, file: File) -> list[str]:
    return [f"--frames={whole(values, 'long')}", "--long=windows", *_size_words(values)]


WORDS: dict[str, Callable[[Values, File], list[str]]] = {
    "text": _text,
    "image": _image,
    "extend": _extend,
    "loop": _loop,
    "connect": _connect,
    "fill": _fill,
    "edit": _edit,
    "long": _long,
}


def words_of(task: str, values: Values, file: File) -> list[str]:
    """Return the words of `sora-jax sample` that ask for what the fields of a tab hold, without run and output."""
    prompt, negative = (str(values.get(name) or "").strip() for name in ("prompt", "negative"))
    alone = task in ("text", "long") or (task == "loop" and values.get("video") is None)
    check(prompt or not alone, "Prompt is empty; say what the clip shows")
    if task == "long" and (then := str(values.get("then") or "").strip()):
        prompt = f"0: {prompt} {whole(values, 'at')}: {then}"
    words = [f"--prompt={prompt}", *WORDS[task](values, file)]
    words += [f"--negative={negative}"] if negative else []
    words += [f"--guidance={values['guidance']:g}"] if values.get("guidance") is not None else []
    words += [f"--steps={whole(values, 'steps')}"] if values.get("steps") is not None else []
    return [*words, f"--seed={whole(values, 'seed')}"]


def frames_asked(task: str, values: Values) -> int:
    """Return the frames that are made."""
    names = {"extend": "extend", "loop": "gap", "connect": "gap", "long": "long"}
    return whole(values, names.get(task, "frames"))


def area_mask(area: str, height: int, width: int) -> np.ndarray:
    """Return a picture (1, height, width, 3) that is white in an area of `AREAS`, and black elsewhere."""
    top, bottom, left, right = AREAS[area]
    mask = np.zeros((1, height, width, 3), np.uint8)
    mask[:, round(top * height) : round(bottom * height), round(left * width) : round(right * width)] = 255
    return mask


def wider_by(width: int, multiple: int) -> int:
    """Return the pixels that are added on the left and on the right, about a quarter of the width."""
    return max(round(width / 4 / multiple), 1) * multiple


def on_page(message: str, folder: Path | None = None) -> str:
    """Return a sentence of the command line as the page says it: names of fields, and no folder of the server."""
    if folder is not None:
        message = message.replace(f"{folder}/", "")
    message = re.sub(r"--([a-z][a-z-]*)", lambda found: LABELS.get(found[1], found[0]), message)
    first = re.match(r"([a-z-]+)(?= is )", message)
    message = LABELS.get(first[1], first[1]) + message[first.end() :] if first else message
    return message[:1].upper() + message[1:]
