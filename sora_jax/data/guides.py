"""Guides: pictures that a clip is made with, beside what is known of its own frames: key frames, and sketches.

A guide is encoded alone, as an image is, and its tokens are packed behind those of the clip, with the time of its
frame. (The latent of an image cannot stand in the place of a later latent: that one is of several frames that have a
past. LTX-Video, 2501.00103, has such tokens, too.) A latent cache holds a few guides of each clip, so that a denoiser
can be trained with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.ndimage import grey_dilation, grey_erosion, minimum_filter

from sora_jax.data.draws import generator
from sora_jax.data.fit import fit_frames

KEY_FRAME, SKETCH = 1, 2  # kinds of the tokens of guides; those of a clip itself have 0
EDGE = 24  # range of grey levels, in a channel, among the pixels around one, that makes it an edge
DARK = 160  # grey level below which a drawing has a line


@dataclass(frozen=True)
class GuideCounts:
    """Count the guides at most that a latent cache holds of each clip."""

    key_frames: int = 0  # of frames other than the first
    sketches: int = 0  # edge maps: of the first frame, and of others

    def __bool__(self) -> bool:
        return bool(self.key_frames or self.sketches)


class Guides(NamedTuple):
    """Hold the guides of a clip: their kind, the time of each in latent frames (k,), and latents (k, h, w, C)."""

    kind: int
    times: np.ndarray
    latents: np.ndarray


def guide_frames(counts: GuideCounts, clip_id: int, frames: int) -> list[int]:
    """Choose the frames of a clip of which a cache holds guides: those of key frames, then those of sketches.

    Each list is in random order, so that its beginning is a random choice; but a sketch of frame 0 comes first.
    """
    later = 1 + generator(0, "guides", clip_id).permutation(frames - 1)
    return [*later[: counts.key_frames].tolist(), *[0, *later.tolist()][: counts.sketches]]


def counts_of(counts: GuideCounts, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how many key frames, and how many sketches, a cache holds of clips of so many frames."""
    return np.minimum(counts.key_frames, frames - 1), np.minimum(counts.sketches, frames)


def guide_pictures(counts: GuideCounts, clip_id: int, clip: np.ndarray) -> list[np.ndarray]:
    """Return the guides of a clip, uint8 (frames, height, width, 3), each (1, height, width, 3)."""
    chosen = guide_frames(counts, clip_id, len(clip))
    of_key_frames = int(counts_of(counts, np.array(len(clip)))[0])
    pictures = [clip[frame : frame + 1] for frame in chosen]
    return pictures[:of_key_frames] + [draw_edges(picture) for picture in pictures[of_key_frames:]]


def draw_edges(frames: np.ndarray) -> np.ndarray:
    """Draw the edges of pictures, uint8 (..., height, width, 3), as black lines on white."""
    around = (*(1 for _ in frames.shape[:-3]), 3, 3, 1)
    steps = grey_dilation(frames, around).astype(int) - grey_erosion(frames, around)
    return _lines(steps.max(-1) >= EDGE)


def trace_lines(drawing: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Make a drawing of dark lines, uint8 (frames, height, width, 3), black on white at another size.

    Lines are made at least a pixel of the new size wide before the drawing is scaled, so that none is lost.
    """
    wide = max(1, *(round(before / after) for before, after in zip(drawing.shape[1:3], size, strict=True)))
    traced = minimum_filter(_lines(drawing.mean(-1) < DARK), (1, wide, wide, 1))
    return _lines(fit_frames(traced, size).min(-1) < DARK)


def _lines(dark: np.ndarray) -> np.ndarray:
    return np.repeat(np.where(dark, 0, 255).astype(np.uint8)[..., None], 3, axis=-1)
