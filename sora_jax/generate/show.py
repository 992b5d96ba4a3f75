"""Show clips in a notebook, and save them to files."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from sora_jax.config import check
from sora_jax.console import note
from sora_jax.data.viewing.write import check_ending, watchable_scale, write_video
from sora_jax.errors import UserError
from sora_jax.generate.preview import scale_of

ELSEWHERE = "outside of notebooks, write a file by sora_jax.save(clip, path)"
FIGURE = (
    '<figure style="display: inline-block; vertical-align: top; margin: 8px; width: {width}px">'
    '<img src="data:image/{kind};base64,{data}" alt="{caption}">'
    '<figcaption style="font: 12px sans-serif">{caption}</figcaption></figure>'
)


def show(clips: Sequence[np.ndarray], captions: Sequence[str] | None = None, fps: float = 8.0) -> Any:
    """Show clips side by side as `IPython.display.HTML`, pixels enlarged; the page holds them, no file is left.

    clips: uint8 (frames, height, width, 3) of any sizes; one frame becomes a picture, more a GIF at `fps`.
    UserError unless there is one caption for each clip, or none at all.
    """
    try:
        from IPython.core.getipython import get_ipython
        from IPython.display import HTML
    except ModuleNotFoundError as error:
        message = f"show() needs IPython: `pip install ipython`; {ELSEWHERE}"
        raise UserError(message) from error
    if get_ipython() is None:
        note(f"show() returns HTML, which notebooks display; {ELSEWHERE}")
    captions = [""] * len(clips) if captions is None else captions
    check(len(captions) == len(clips), f"there are {len(clips)} clips and {len(captions)} captions; give one for each")
    return HTML("".join(_figure(clip, str(caption), fps) for clip, caption in zip(clips, captions, strict=True)))


def save(clip: np.ndarray, path: str | Path, fps: float = 8.0, upscale: int | None = None) -> Path:
    """Write a clip, uint8 (frames, height, width, 3), as .mp4, .gif, .webp or, of one frame, .png; return the path.

    upscale: whole factor that enlarges pixels; None: so that a tiny clip can be watched. UserError for other endings.
    """
    check(upscale is None or upscale >= 1, f"upscale is {upscale}; it must be at least 1")
    clip = np.asarray(clip)
    check_ending(path, len(clip) if clip.ndim == 4 else 1, "path")
    return write_video(path, clip, fps, watchable_scale(clip) if upscale is None and clip.ndim == 4 else upscale or 1)


def _figure(clip: np.ndarray, caption: str, fps: float) -> str:
    kind, scale = "png" if len(clip) == 1 else "gif", scale_of(clip)
    with TemporaryDirectory() as folder:
        file = write_video(Path(folder, f"clip.{kind}"), clip, fps, upscale=scale)
        data = base64.b64encode(file.read_bytes()).decode()
    return FIGURE.format(width=max(160, scale * clip.shape[2]), kind=kind, data=data, caption=escape(caption))
