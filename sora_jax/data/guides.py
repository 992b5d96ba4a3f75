"""Guides: pictures that condition a clip beside its own known frames: key frames, and sketches.

A guide is encoded alone, as an image is, and its tokens are packed behind those of the clip, with the time of its
frame. (The latent of an image cannot replace a later latent of a clip: that one is of several frames and depends on
those before. LTX-Video, 2501.00103, has such tokens, too.) A latent cache has a few guides of each clip, to train with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.ndimage import grey_dilation, grey_erosion, minimum_filter

from sora_jax.data.draws import generator
from sora_jax.data.fit import fit_frames

KEY_FRAME, SKETCH = 1, 2  # kinds of the tokens of guides; the tokens of the clip itself have 0
EDGE = 24  # a pixel is an edge where the 3 x 3 pixels around it differ by so many levels of a channel
DARK = 160  # grey level below which a pixel of a drawing is a line


@dataclass(frozen=True)
class GuideCounts:
    """Largest numbers of guides that a latent cache has of each clip."""

    key_frames: int = 0  # of frames other than the first
    sketches: int = 0  # edge maps: of the first frame, and of others

    def __bool__(self) -> bool:
        return bool(self.key_frames or self.sketches)


class Guides(NamedTuple):
    """The guides of a clip: their kind, the time of each in latent frames (k,), and latents (k, h, w, C)."""

    kind: int
    times: np.ndarray
    latents: np.ndarray


def guide_frames(counts: GuideCounts, clip_id: int, frames: int) -> list[int]:
    """Choose the frames of a clip that become guides of a cache: first those of key frames, then those of sketches.

    Each list is in random order, so that its beginning is a random choice; but a sketch of frame 0 comes first.
    """
    later = 1 + generator(0, "guides", clip_id).permutation(frames - 1)
    return [*later[: counts.key_frames].tolist(), *[0, *later.tolist()][: counts.sketches]]


def counts_of(counts: GuideCounts, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of key frames and of sketches that a cache has of clips of so many frames."""
    return np.minimum(counts.key_frames, frames - 1), np.minimum(counts.sketches, frames)


def guide_pictures(counts: GuideCounts, clip_id: int, clip: np.ndarray) -> list[np.ndarray]:
    """Return the guides of a clip, uint8 (frames, height, width, 3), each (1, height, width, 3)."""
    key_frames = int(counts_of(counts, np.array(len(clip)))[0])
    pictures = [clip[frame : frame + 1] for frame in guide_frames(counts, clip_id, len(clip))]
    return pictures[:key_frames] + [draw_edges(picture) for picture in pictures[key_frames:]]


def draw_edges(frames: np.ndarray) -> np.ndarray:
    """Draw the edges of pictures, uint8 (..., height, width, 3), as black lines on white."""
    around = (*(1 for _ in frames.shape[:-3]), 3, 3, 1)
    steps = grey_dilation(frames, around).astype(int) - grey_erosion(frames, around)
    return _lines(steps.max(-1) >= EDGE)


def trace_lines(drawing: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale a drawing of dark lines, uint8 (frames, height, width, 3), to black on white of another size.

    Lines are first widened to at least one pixel of the new size, so that none is lost.
    """
    wide = max(1, *(round(before / after) for before, after in zip(drawing.shape[1:3], size, strict=True)))
    traced = minimum_filter(_lines(drawing.mean(-1) < DARK), (1, wide, wide, 1))
    return _lines(fit_frames(traced, size).min(-1) < DARK)


def _lines(dark: np.ndarray) -> np.ndarray:
    return np.repeat(np.where(dark, 0, 255).astype(np.uint8)[..., None], 3, axis=-1)
