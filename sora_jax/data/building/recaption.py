"""Caption the clips of a folder anew, as DALL-E 3 and Sora do before training, and write the captions as a table.

A captioner is `world`, the oracle of the embedded world, or `transformers:MODEL`, an image-to-text model of
`transformers` (extra `[text]`), which sees the frame in the middle.
"""

import csv
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from sora_jax.config import check
from sora_jax.console import progress
from sora_jax.data.reading.media import SpanRule
from sora_jax.data.reading.tracks import MediaError
from sora_jax.data.sources import SourceConfig, make_source
from sora_jax.errors import UserError, install_command
from sora_jax.files import as_path, replacing
from sora_jax.worlds.captions import Wanted, WantedShape, write
from sora_jax.worlds.oracle import read

MAX_FRAMES = 33  # frames that a captioner sees, from the middle of a clip


def caption_folder(path: str | Path, how: str, out: str | Path, kind: str = "synthetic") -> tuple[int, int]:
    """Write a table of captions of the clips of a folder; return the numbers of clips captioned and not readable.

    The table has the columns `file`, `caption_KIND` and, where the folder's clips have them, their other captions and
    their split: as `captions.csv` in that folder it serves `data build`.

    Raises:
        UserError: there is no such captioner, or the table exists.
    """
    out = as_path(out)
    check(not out.exists(), f"--out is {str(out)!r}; it exists, give another name")
    describe, source = _captioner(how), make_source(SourceConfig("folder", path=str(path)))
    rows: list[dict[str, str]] = []
    for place in progress(range(len(source)), "caption", unit="clip"):
        entry = source.entry(place)
        with suppress(MediaError):
            decoded = source.open(place).decode(SpanRule(max_frames=MAX_FRAMES, place=0.5), None)
            assert decoded is not None  # every file has a span of any length
            split = {"split": entry.split} if entry.split else {}
            given = {f"caption_{name}": text for name, text in entry.captions.items()}
            rows.append({"file": entry.file, **split, **given, f"caption_{kind}": describe(decoded.frames)})
    names = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(out) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names or ["file"])
        writer.writeheader()
        writer.writerows(rows)
    return len(rows), len(source) - len(rows)


def describe_world(frames: np.ndarray) -> str:
    """Describe a clip of the embedded world, uint8 (T, H, W, 3), as its captions do; "" where no shape is seen."""
    found = read(frames)
    shapes = tuple(WantedShape(s.colour, s.kind, None, s.motion, s.direction) for s in found.shapes)
    return write(Wanted(shapes, found.style, found.tone, found.camera), "sentence") if shapes else ""


def _captioner(how: str) -> Callable[[np.ndarray], str]:
    if how == "world":
        return describe_world
    check(how.startswith("transformers:"), f"--how is {how!r}; it must be world or transformers:MODEL")
    try:
        from transformers import pipeline
    except ImportError as error:
        raise UserError(f"--how is {how!r}; it needs {install_command('text')}") from error
    from PIL import Image

    try:
        look = pipeline("image-text-to-text", model=how.removeprefix("transformers:"))
    except (ImportError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"--how is {how!r}; the model cannot be loaded: {error}") from error

    def describe(frames: np.ndarray) -> str:
        image = Image.fromarray(frames[len(frames) // 2])
        try:
            return str(look(image, text="", return_full_text=False)[0]["generated_text"]).strip()
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"--how is {how!r}; the model does not describe an image: {error}") from error

    return describe
