"""Make tasks of clips: extension, loops, connections, in-painting, edits. A task is a table of ceilings (`Known`).

A task knows which latents are given to the sampler, and how the sampled latents become the clip that was asked for:
what the sampler need not see of a long clip is put back as it is.

Latents of an autoencoder with the time factor f are of two types: the first stands for one frame, every later one for f
frames that have a past. What is given must be of the type that its place asks for. So a clip is continued from its last
1 + f (m - 1) frames, encoded by themselves; a clip that is an ending is encoded behind a past that is dropped again.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.ndimage import binary_dilation, distance_transform_edt, gaussian_filter

from sora_jax.config import check
from sora_jax.data.fit import fit_frames, longest_length
from sora_jax.data.guides import KEY_FRAME, SKETCH, Guides
from sora_jax.generate.requests import Known, Size, Task
from sora_jax.generate.run import Run
from sora_jax.models.first_stage import receptive_field
from sora_jax.train.denoiser import DenoiserRun
from sora_jax.train.frozen import FrozenAutoencoder

Pictures = Mapping[int, np.ndarray]  # by the number of their frame
MADE, GIVEN = 1.0, 0.0
FEATHER = 1 / 8  # of the shorter side, over which kept pixels fade into made ones around a mask


@dataclass(frozen=True)
class Tasks:
    """Make tasks for a run. Clips and images are uint8 (frames, height, width, 3), of sizes that the run takes.

    context: the frames at most that a continuation sees of a clip. keep_pixels: put the very pixels that were given
    into the result, in place of what the autoencoder makes of them.

    Raises:
        UserError: a token of the run has several latent frames.
    """

    run: Run
    context: int = 9
    keep_pixels: bool = False

    def __post_init__(self):
        frames = self.run.config.model.patch[0]
        check(frames == 1, f"the run has model.patch[0] = {frames}; what is given of clips needs 1, a frame to a token")

    @property
    def factor(self) -> int:
        """Return the frames of a later latent."""
        return self.autoencoder.config.time_factor

    @property
    def autoencoder(self) -> FrozenAutoencoder:
        """Return the autoencoder of the run."""
        return self.run.autoencoder

    def whole(self, clip: np.ndarray, frames: int) -> np.ndarray:
        """Return the first 1 + f k frames of a clip, at most `frames`."""
        return clip[: longest_length(self.factor, min(len(clip), frames))]

    def animate(self, image: np.ndarray, frames: int) -> Task:
        """Begin a clip of so many frames with an image (1, height, width, 3)."""
        return self.guide((frames, *image.shape[1:3]), {0: image})

    def guide(self, size: Size, images: Pictures | None = None, sketches: Pictures | None = None) -> Task:
        """Make a clip of (frames, height, width) that has some images as frames, and the edges that sketches draw.

        images, sketches: by the number of their frame, each (1, height, width, 3); sketches are black lines on white.
        The image of frame 0 is given as what the clip begins with; others stand beside the clip and guide it.

        Raises:
            UserError: the run was not trained with guides of that kind, or the clip has no such frame.
        """
        images, sketches = images or {}, sketches or {}
        check_guides(self.run.config, size[0], images, sketches)
        later = {frame: image for frame, image in images.items() if frame > 0}
        begins = [(slice(0, 1), self._encode(images[0]))] if 0 in images else []
        guides = [*self._guides(KEY_FRAME, later), *self._guides(SKETCH, sketches)]
        whole = (1 + -(-(size[0] - 1) // self.factor) * self.factor, *size[1:])
        known = dataclasses.replace(self._known(whole, begins), guides=guides)
        check(known.ceiling.any(), "--image is the only frame; nothing is to be made: --frames must be at least 2")

        def finish(made: np.ndarray) -> np.ndarray:
            for frame, image in images.items():
                made = self._kept(made, slice(frame, frame + 1), image)
            return made[: size[0]]

        return Task(whole, known, clip=finish)

    def _guides(self, kind: int, pictures: Pictures) -> list[Guides]:
        """Encode the pictures of frames, each alone, as guides of a kind."""
        latents = [self._encode(picture) for picture in pictures.values()]
        times = np.array(list(pictures), np.float32) / self.factor
        return [Guides(kind, times, np.concatenate(latents))] if latents else []

    def extend(self, clip: np.ndarray, frames: int) -> Task:
        """Continue a clip by so many frames; before its beginning if `frames` is negative."""
        return self._preceded(clip, -frames) if frames < 0 else self._continued(clip, frames, self.context)

    def _continued(self, clip: np.ndarray, frames: int, context: int) -> Task:
        head = self._first_type(clip, context)
        total = len(head) + -(-frames // self.factor) * self.factor
        z, count = self._encode(head), self._latents(len(head))
        known = self._known((total, *clip.shape[1:3]), [(slice(0, count), z)])
        before = clip[: len(clip) - len(head)]

        def finish(made: np.ndarray) -> np.ndarray:
            made = self._kept(made, slice(0, len(head)), head)
            return np.concatenate([before, made[: len(head) + frames]])

        return Task((total, *clip.shape[1:3]), known, clip=finish)

    def _preceded(self, clip: np.ndarray, frames: int) -> Task:
        f, tail = self.factor, self._later_type(clip, self.context)
        check(len(tail) > 0, f"--video has {len(clip)} frames; to be preceded it must have at least {f}")
        count, total = len(tail) // f, 1 + -(-(frames - 1) // f) * f + len(tail)
        known = self._known((total, *clip.shape[1:3]), [(slice(-count, None), self._encode_later(tail))])

        def finish(made: np.ndarray) -> np.ndarray:
            made = self._kept(made, slice(-len(tail), None), tail)
            return np.concatenate([made[-len(tail) - frames :], clip[len(tail) :]])

        return Task((total, *clip.shape[1:3]), known, clip=finish)

    def connect(self, first: np.ndarray, second: np.ndarray, frames: int) -> Task:
        """Fill the gap of so many frames, a multiple of the time factor, between two clips of one size."""
        self._check_multiple("gap", frames)
        same = first.shape[1:] == second.shape[1:]
        check(same, f"--connect has clips of {first.shape[1:3]} and {second.shape[1:3]}; they must have one size")
        head, tail = self._first_type(first, self.context), self._later_type(second, self.context)
        check(
            len(tail) > 0, f"--connect has a second clip of {len(second)} frames; it must have at least {self.factor}"
        )
        total = len(head) + frames + len(tail)
        parts = [
            (slice(0, self._latents(len(head))), self._encode(head)),
            (slice(-(len(tail) // self.factor), None), self._encode_later(tail)),
        ]
        known = self._known((total, *first.shape[1:3]), parts)

        def finish(made: np.ndarray) -> np.ndarray:
            made = self._kept(self._kept(made, slice(0, len(head)), head), slice(-len(tail), None), tail)
            return np.concatenate([first[: len(first) - len(head)], made, second[len(tail) :]])

        return Task((total, *first.shape[1:3]), known, clip=finish)

    def loop(self, size: Size) -> Task:
        """Make a loop of (frames, height, width) from text alone: its first frame follows its last."""
        self._check_multiple("frames", size[0])
        grid = self.run.latent_size(1 + size[0], *size[1:])
        shape = (grid[0] - 1, *grid[1:])
        nothing = np.zeros((*shape, self.autoencoder.config.latent_channels), np.float32)
        return Task(size, Known(nothing, np.ones(shape, np.float32), first=1, ring=True), loops=True)

    def close(self, clip: np.ndarray, frames: int) -> Task:
        """Close a clip into a loop: make so many frames that lead from its end back to its beginning.

        `frames` is a multiple of the time factor; frames of the clip beyond such a multiple are left out at its end.
        """
        self._check_multiple("gap", frames)
        f = self.factor
        loop = clip[: len(clip) // f * f]
        check(len(loop) >= 2 * f, f"--video has {len(clip)} frames; to become a loop it must have at least {2 * f}")
        z = self._encode_later(loop)
        count, gap = len(z), frames // f
        side = max(1, min(count // 2, self._latents(self.context)))
        whole = np.concatenate([z[-side:], np.zeros((gap, *z.shape[1:]), z.dtype), z[:side]])
        ceiling = np.full(whole.shape[:3], GIVEN, np.float32)
        ceiling[side : side + gap] = MADE
        known = Known(whole, ceiling, first=1)

        def latent(made: np.ndarray) -> np.ndarray:
            return np.concatenate([z, made[side : side + gap]])

        def finish(made: np.ndarray) -> np.ndarray:
            return self._kept(made, slice(0, len(loop)), loop)

        return Task((f * len(whole), *clip.shape[1:3]), known, latent, finish, loops=True)

    def fill(self, clip: np.ndarray, mask: np.ndarray) -> Task:
        """Make what lies under a mask (frames or 1, height, width) and keep the rest; True is what is to be made.

        A token is given if no pixel of it or of its neighbours is masked: latents near the mask have seen it.
        """
        mask = np.broadcast_to(mask, clip.shape[:3])
        check(mask.any(), "nothing is to be made: --mask has no white pixel, or --pad adds none")
        z = self._encode(_filled(clip, mask))
        touched = self._to_latents(mask)
        wide = binary_dilation(touched, np.ones((1, 3, 3), bool))
        known = Known(z, np.where(wide, MADE, GIVEN).astype(np.float32))

        def finish(made: np.ndarray) -> np.ndarray:
            if not self.keep_pixels:
                return made
            distance = np.stack([distance_transform_edt(~frame) if frame.any() else np.full(frame.shape, np.inf)
                                 for frame in mask])  # fmt: skip
            share = np.clip(1.0 - distance / max(1.0, FEATHER * min(mask.shape[1:])), 0.0, 1.0)[..., None]
            return (share * made + (1.0 - share) * clip + 0.5).astype(np.uint8)

        return Task(clip.shape[:3], known, clip=finish)

    def edit(self, clip: np.ndarray, strength: float) -> Task:
        """Denoise a clip from the noise level `strength`, 0 to 1, on (SDEdit, 2108.01073).

        0 returns what the autoencoder makes of the clip, 1 the plain sample.
        """
        check(0 <= strength <= 1, f"--strength is {strength}; it must be from 0 to 1")
        z = self._encode(clip)
        known = Known(z, np.full(z.shape[:3], strength, np.float32)) if strength < 1 else None
        return Task(clip.shape[:3], known)

    def enlarge(self, clip: np.ndarray, size: Size, strength: float = 0.7) -> Task:
        """Make a clip of a larger height and width from a small one, whose pixels are enlarged and then edited."""
        return self.edit(fit_frames(clip, size[1:]), strength)

    def upsample(self, clip: np.ndarray) -> Task:
        """Make a clip of twice the height and width, by a run that reads the clip itself (`model.low_resolution`)."""
        frames, height, width = clip.shape[:3]
        return Task((frames, 2 * height, 2 * width), None, low=self._encode(clip))

    def rewrite(self, clip: np.ndarray, source: str, strength: float = 0.7) -> Task:
        """Change a clip from what the prompt `source` says to what the request says (FlowEdit, 2412.08629).

        strength: the noise level at which the change begins, above 0 to 1; what both prompts say stays.
        """
        check(0 < strength <= 1, f"--strength is {strength}; with --from-prompt it must be above 0, to 1")
        z = self._encode(clip)
        return Task(clip.shape[:3], Known(z, np.full(z.shape[:3], strength, np.float32), source=source))

    # ------------------------------------------------------------------------------------------------------
    # Latents
    # ------------------------------------------------------------------------------------------------------

    def _check_multiple(self, option: str, frames: int) -> None:
        """Raise a UserError unless so many frames are whole latents that all have a past."""
        below = max(frames // self.factor, 1) * self.factor
        nearest = f"{below} or {below + self.factor}"
        check(frames == below, f"--{option} is {frames}; it must be a multiple of {self.factor}, such as {nearest}")

    def _latents(self, frames: int) -> int:
        return 1 + (frames - 1) // self.factor

    def _first_type(self, clip: np.ndarray, context: int) -> np.ndarray:
        """Return the last 1 + f k frames of a clip, at most `context`."""
        return clip[-longest_length(self.factor, min(len(clip), context)) :]

    def _later_type(self, clip: np.ndarray, context: int) -> np.ndarray:
        """Return the first f k frames of a clip, at most `context`, but at least one latent of them if there is one."""
        return clip[: max(min(len(clip), context) // self.factor, len(clip) >= self.factor) * self.factor]

    def _encode(self, clip: np.ndarray) -> np.ndarray:
        return next(iter(self.autoencoder.encode([clip], 1)))

    def _encode_later(self, clip: np.ndarray) -> np.ndarray:
        """Encode f k frames into k latents that have a past: still pictures of the first frame, as many as are seen."""
        back = math.ceil(receptive_field(self.autoencoder.config, "encode")[0]) + 1
        past = np.repeat(clip[:1], 1 + self.factor * (back - 1), axis=0)
        return self._encode(np.concatenate([past, clip]))[back:]

    def _known(self, size: Size, parts: list[tuple[slice, np.ndarray]]) -> Known:
        """Give the latents of some frames; the others are made."""
        shape = self.run.latent_size(*size)
        latent = np.zeros((*shape, self.autoencoder.config.latent_channels), np.float32)
        ceiling = np.full(shape, MADE, np.float32)
        for place, z in parts:
            latent[place], ceiling[place] = z, GIVEN
        return Known(latent, ceiling)

    def _to_latents(self, mask: np.ndarray) -> np.ndarray:
        """Return which latent positions (t, h, w) have a masked pixel."""
        f, s = self.factor, self.autoencoder.config.space_factor
        whole = np.concatenate([np.repeat(mask[:1], f - 1, axis=0), mask])
        t, h, w = len(whole) // f, mask.shape[1] // s, mask.shape[2] // s
        return np.asarray(whole.reshape(t, f, h, s, w, s).any((1, 3, 5)))

    def _kept(self, made: np.ndarray, frames: slice, pixels: np.ndarray) -> np.ndarray:
        """Put given frames into a clip, where the very pixels are to be kept."""
        if self.keep_pixels:
            made = made.copy()
            made[frames] = pixels
        return made


def check_guides(config: DenoiserRun, frames: int, images: Mapping[int, Any], sketches: Mapping[int, Any]) -> None:
    """Raise a UserError unless a clip has the frames of its images and sketches, and the run was trained with such."""
    given = config.diffusion.given
    for option, name, pictures in (("image", "key_frames", images), ("sketch", "sketches", sketches)):
        for frame in pictures:
            there = 0 <= frame < frames
            check(there, f"--{option} is for frame {frame}; the clip has the frames 0 to {frames - 1}")
            first = frame == 0 and option == "image"
            allowed = "none" if option == "sketch" else "that of frame 0 alone"
            trained = first or getattr(given, name) > 0
            check(trained, f"--{option} is for frame {frame}; a run with diffusion.given.{name} = 0 takes {allowed}")


def pad(clip: np.ndarray, left: int, top: int, right: int, bottom: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a clip with more pixels on its sides, copies of the nearest, and the mask (1, height, width) of those."""
    sides = ((top, bottom), (left, right))
    larger = np.pad(clip, ((0, 0), *sides, (0, 0)), "edge")
    return larger, np.pad(np.zeros(clip.shape[1:3], bool), sides, constant_values=True)[None]


def _filled(clip: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Fill masked pixels by a blurred copy of their nearest neighbours, so that latents beside them see nothing odd."""
    filled = clip.copy()
    for frame, hidden, out in zip(clip, mask, filled, strict=True):
        if hidden.all():
            out[:] = clip[~mask].mean(0) if (~mask).any() else 127
        elif hidden.any():
            near = distance_transform_edt(hidden, return_distances=False, return_indices=True)
            smooth = gaussian_filter(frame[tuple(near)].astype(np.float32), (2.0, 2.0, 0.0))
            out[hidden] = smooth[hidden]
    return filled
