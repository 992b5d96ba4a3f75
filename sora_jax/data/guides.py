"""Guides: pictures that condition a clip beside its own known frames: key frames, and sketches.

A guide is encoded alone, as an image is, and its tokens are packed behind those of the clip, with the time of its
frame. (The latent of an image cannot replace a later latent of a clip: that one is of several frames and depends on
those before. LTX-Video, 2501.00103, has such tokens, too.) A latent cache has a few guides of each clip, to train with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sora_jax.data.draws import generator

KEY_FRAME, SKETCH = 1, 2  # kinds of the tokens of guides; the tokens of the clip itself have 0


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
