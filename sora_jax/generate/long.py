"""Sample clips longer than a model was trained on, window by window, with prompts that may change in time.

A window carries the last latents of what there is, and makes the next ones behind them. Latents are carried, not
pixels: encoding them again would lose quality every time, and the first latent of an encoded clip has another type.
Time begins anew in every window, so that no coordinate is beyond those of training (a model needs the clips without a
first frame of `config.diffusion.given.headless` for that). Carried latents are shown at a small noise level, as
generated history has errors that data have not (Diffusion Forcing Transformer, 2502.06764). They are kept as they are.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from sora_jax.config import check
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.generate.requests import Known, Request
from sora_jax.generate.sampler import TrainedDenoiser, sample_latents

HISTORY_LEVEL = 0.02
Span = tuple[int, str]  # first frame, prompt


@dataclasses.dataclass(frozen=True)
class Windows:
    """Configure windows, in latent frames: all of a window, and those that it carries. `frames` of the whole clip.

    Beside what it carries a window leaves one place free: that of the first frame, which it does not have.
    """

    frames: int
    window: int
    carried: int

    def __post_init__(self):
        most = self.window - 2
        check(0 < self.carried <= most, f"carried is {self.carried}; of {self.window} latents it must be 1 to {most}")


def windows_of(frames: int, window: int, context: int, factor: int) -> Windows:
    """Return the windows of a clip of so many frames: each of `window` frames, of which `context` are carried."""
    length = 1 + (window - 1) // factor
    check(length >= 3, f"--window is {window}; it must be at least {1 + 2 * factor} frames")
    return Windows(1 + (frames - 1) // factor, length, max(1, min(context // factor, length - 2)))


def spans_of(prompt: str) -> list[Span]:
    """Read a prompt that changes in time, "0: a fox runs 24: a fox sleeps"; any other prompt is for all frames.

    Raises:
        UserError: the frames do not rise.
    """
    if not re.match(r"\s*0\s*:", prompt):
        return [(0, prompt)]
    parts = re.split(r"(?:^|\s)(\d+)\s*:\s*", prompt)
    spans = [(int(frame), text.strip()) for frame, text in zip(parts[1::2], parts[2::2], strict=True)]
    frames = [frame for frame, _ in spans]
    check(frames == sorted(set(frames)), f"--prompt is {prompt!r}; its frames must rise, such as 0: ... 24: ...")
    return spans


def sample_long(
    model: TrainedDenoiser,
    requests: Sequence[Request],
    windows: Windows,
    factor: int,
    sampling: SamplingConfig,
    seed: int,
) -> list[np.ndarray]:
    """Sample normalised latents (t, h, w, C) of `windows.frames` latent frames, one per request.

    A request's prompt may have spans (`spans_of`); a window ends where one of any request does. All requests share the
    windows. The noise of a window is keyed by (seed, clip id, window): a longer clip begins as a shorter one.
    """
    spans = [spans_of(request.prompt) for request in requests]
    switches = sorted({1 + (frame - 1) // factor for prompts in spans for frame, _ in prompts if frame > 0})
    first = min([windows.window, windows.frames, *(s for s in switches if s > 0)])
    made = sample_latents(model, _at(requests, spans, 0, factor, 0, first), sampling, seed)
    bar = tqdm(total=windows.frames, desc="windows", unit="latent", initial=len(made[0]))
    number = 0
    while (there := len(made[0])) < windows.frames:
        number += 1
        end = min([windows.frames, *(s for s in switches if s > there)])
        carried = min(windows.carried, there)
        # Every window has the same length, so that one program serves all; what is beyond the end is dropped.
        new = windows.window - 1 - carried
        asked = _at(requests, spans, there, factor, number, carried + new)
        known = [dataclasses.replace(r, known=_history(z[-carried:], new)) for r, z in zip(asked, made, strict=True)]
        found = sample_latents(model, known, sampling, seed)
        made = [np.concatenate([z, f[carried:][: end - there]]) for z, f in zip(made, found, strict=True)]
        bar.update(len(made[0]) - there)
    bar.close()
    return [z[: windows.frames] for z in made]


def _at(
    requests: Sequence[Request], spans: Sequence[list[Span]], latent: int, factor: int, window: int, length: int
) -> list[Request]:
    """Return the requests of one window: its prompts, its length, and an identity that keys its noise."""
    frame = 0 if latent == 0 else 1 + factor * (latent - 1)
    found = []
    for request, prompts in zip(requests, spans, strict=True):
        prompt = [text for begin, text in prompts if begin <= frame + factor - 1 or begin == 0][-1]
        clip_id = (request.clip_id + 0x9E3779B1 * window) % 2**32 or 1
        found.append(dataclasses.replace(request, prompt=prompt, size=(length, *request.size[1:]), clip_id=clip_id))
    return found


def _history(z: np.ndarray, new: int) -> Known:
    """Give the latents z, at the level of history, and ask for `new` ones behind them."""
    latent = np.concatenate([z, np.zeros((new, *z.shape[1:]), z.dtype)])
    ceiling = np.ones(latent.shape[:3], np.float32)
    ceiling[: len(z)] = HISTORY_LEVEL
    return Known(latent, ceiling, first=1)
