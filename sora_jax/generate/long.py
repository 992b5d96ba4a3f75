"""Sample clips longer than a model was trained on, window by window, with prompts that may change in time.

A window carries the last latents of what there is, and makes the next ones behind them. Latents are carried, not
pixels: encoding them again would lose quality every time, and the first latent of an encoded clip has another type.
Time begins anew in every window, so that no coordinate is beyond those of training (a model needs the clips without a
first frame of `config.diffusion.given.headless` for that). Carried latents are shown at a small noise level, as
generated history has errors that data have not (Diffusion Forcing Transformer, 2502.06764). They are kept as they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sora_jax.config import check
from sora_jax.diffusion.history import HISTORY_LEVEL
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.generate.packs import TrainedDenoiser
from sora_jax.generate.progress import Watch
from sora_jax.generate.prompts import spans_of
from sora_jax.generate.requests import Known, Request
from sora_jax.generate.sampler import sample_latents


@dataclass(frozen=True)
class Windows:
    """Configure windows, in latent frames: all of a window, and those that it carries. `frames` of the whole clip.

    Beside what it carries a window leaves one place free: that of the first frame, which it does not have. rolls: the
    latents that are not carried have rising noise levels and leave the window one by one, see `generate.rolling`.
    """

    frames: int
    window: int
    carried: int
    rolls: bool = False

    @property
    def rolling_latents(self) -> int:
        """Return the latents of a window that are neither carried nor the first frame."""
        return self.window - 1 - self.carried

    def __post_init__(self):
        most = self.window - 2
        check(0 < self.carried <= most, f"carried is {self.carried}; of {self.window} latents it must be 1 to {most}")


def windows_of(frames: int, window: int, context: int, factor: int) -> Windows:
    """Return the windows of a clip of so many frames: each of `window` frames, of which `context` are carried."""
    length = 1 + (window - 1) // factor
    check(length >= 3, f"--window is {window}; it must be at least {1 + 2 * factor} frames")
    return Windows(1 + (frames - 1) // factor, length, max(1, min(context // factor, length - 2)))


def sample_long(
    model: TrainedDenoiser,
    requests: Sequence[Request],
    windows: Windows,
    factor: int,
    sampling: SamplingConfig,
    seed: int,
    watch: Watch = Watch(),
) -> list[np.ndarray]:
    """Sample normalised latents (t, h, w, C) of `windows.frames` latent frames, one per request.

    A request's prompt may have spans (`prompts.spans_of`); a window ends where one does. Requests whose prompts change
    at the same places share their windows. The noise of a window is keyed by (seed, clip id, its first new latent): a
    longer clip begins as a shorter one, and company changes nothing.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, request in enumerate(requests):
        ends = tuple(latent_of(frame, factor) for frame, _ in spans_of(request.prompt) if frame > 0)
        groups.setdefault(ends, []).append(number)
    found: dict[int, np.ndarray] = {}
    with watch.counting(windows.frames * len(groups), "latent") as count:
        for ends, members in groups.items():
            group = [requests[number] for number in members]
            latents = _sample_group(model, group, windows, ends, factor, sampling, seed, count)
            found |= dict(zip(members, latents, strict=True))
    return [found[number] for number in range(len(requests))]


def _sample_group(
    model: TrainedDenoiser,
    requests: Sequence[Request],
    windows: Windows,
    ends: Sequence[int],
    factor: int,
    sampling: SamplingConfig,
    seed: int,
    count: Callable[[int], None],
) -> list[np.ndarray]:
    """Sample requests whose prompts change at the same latents, `ends`."""
    first = min([windows.window, windows.frames, *ends])
    level = 0.0 if sampling.condition == "replace" else HISTORY_LEVEL  # which takes ceilings of 0 and 1 alone
    made = sample_latents(model, _at(requests, 0, factor, first), sampling, seed)
    count(first)
    while (there := len(made[0])) < windows.frames:
        end = min([windows.frames, *(s for s in ends if s > there)])
        carried = min(windows.carried, there)
        # Every window has the same length, so that one program serves all; what is beyond the end is dropped.
        new = windows.window - 1 - carried
        asked = _at(requests, there, factor, carried + new)
        known = [replace(r, known=_history(z, carried, new, level)) for r, z in zip(asked, made, strict=True)]
        latents = sample_latents(model, known, sampling, seed)
        made = [np.concatenate([z, f[carried:][: end - there]]) for z, f in zip(made, latents, strict=True)]
        count(len(made[0]) - there)
    return made


def latent_of(frame: int, factor: int) -> int:
    """Return the latent that a frame belongs to."""
    return 1 + (frame - 1) // factor if frame > 0 else 0


def _at(requests: Sequence[Request], latent: int, factor: int, length: int) -> list[Request]:
    """Return the requests of a window whose first new latent is `latent`: prompts, length, identities for its noise."""
    found = []
    for request in requests:
        spans = spans_of(request.prompt)
        prompt = [text for frame, text in spans if latent_of(frame, factor) <= latent][-1]
        clip_id = (request.clip_id + 0x9E3779B1 * latent) % 2**32 or 1
        found.append(replace(request, prompt=prompt, size=(length, *request.size[1:]), clip_id=clip_id))
    return found


def _history(z: np.ndarray, carried: int, new: int, level: float = HISTORY_LEVEL) -> Known:
    """Give the last latents of z, at a noise level, and ask for `new` ones behind them.

    Only where the first latent of the clip is among them does time begin at 0: it stands for one frame.
    """
    latent = np.concatenate([z[len(z) - carried :], np.zeros((new, *z.shape[1:]), z.dtype)])
    ceiling = np.ones(latent.shape[:3], np.float32)
    ceiling[:carried] = level
    return Known(latent, ceiling, first=0 if carried == len(z) else 1)
