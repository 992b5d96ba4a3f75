"""Draw the pictures of guides: frames as they are, and sketches of their edges."""

import numpy as np
from scipy.ndimage import grey_dilation, grey_erosion, minimum_filter

from sora_jax.data.fit import fit_frames
from sora_jax.data.guides import GuideCounts, counts_of, guide_frames

EDGE = 24  # a pixel is an edge where the 3 x 3 pixels around it differ by so many levels of a channel
DARK = 160  # grey level below which a pixel of a drawing is a line


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
