"""Sample clips longer than a model was trained on by rolling noise levels: see `diffusion.rolling`.

The first window is sampled as any clip. From then on a window is a few latents of history and rolling ones behind them,
and every call of the compiled program completes one latent of every clip. Coordinates begin at 1 in every window, as in
`generate.long`. The noise of a latent is keyed by (seed, clip id, its place in the whole clip): a longer clip begins as
a shorter one, and company changes nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.config import check
from sora_jax.data.packing.packs import patchify, unpack, unstack
from sora_jax.diffusion.keys import Purpose, step_key, token_noise
from sora_jax.diffusion.process import process_named
from sora_jax.diffusion.rolling import roll, rolling_levels, rolling_times
from sora_jax.diffusion.sampling import SamplingConfig, grid_times
from sora_jax.diffusion.solvers import Problem, clip_x0
from sora_jax.diffusion.spacing import count_steps
from sora_jax.generate.long import Windows, latent_of
from sora_jax.generate.packs import Conditions, PackLayout, TrainedDenoiser, lay_out, place, row_tokens
from sora_jax.generate.progress import Watch
from sora_jax.generate.prompts import spans_of
from sora_jax.generate.requests import Known, Request
from sora_jax.generate.sampler import PACKS_AT_ONCE, UNPACKED, denoiser_of, sample_latents
from sora_jax.nn.pack import per_slot, slot_of
from sora_jax.parallel.rules import parts
from sora_jax.train.denoiser import DenoiserRun

# Draws of Purpose.SAMPLE beside that of the first window, 0: of rolling latents, and of the history.
ROLLING_DRAW, HISTORY_DRAW = 1, 2


class WindowPlace(NamedTuple):
    """Say which windows of a long clip are denoised: `first` is the place of their first latent in the whole clip.

    begins: they are the first windows that roll.
    """

    seed: jax.Array
    first: jax.Array
    begins: jax.Array


@dataclasses.dataclass(frozen=True)
class _Setting:
    """Hold what is the same for all clips: the arguments of `sample_rolling`."""

    model: TrainedDenoiser
    windows: Windows
    factor: int
    sampling: SamplingConfig
    seed: int


@dataclasses.dataclass(frozen=True)
class _Clips:
    """Hold clips that roll: requests, first windows, requests for the windows behind them, and these as packs."""

    requests: Sequence[Request]
    firsts: Sequence[np.ndarray]
    asked: Sequence[Request]
    layout: PackLayout


def sample_rolling(
    model: TrainedDenoiser,
    requests: Sequence[Request],
    windows: Windows,
    factor: int,
    sampling: SamplingConfig,
    seed: int,
    watch: Watch = Watch(),
) -> list[np.ndarray]:
    """Sample normalised latents (t, h, w, C) of `windows.frames` latent frames, one per request.

    Of a window, `windows.carried` latents are history, one place is left free for the first frame, and the others roll.
    A request's prompt may have spans (`prompts.spans_of`): the prompt of a window is that of the middle of what rolls.
    """
    check_rolling(model.config, sampling)
    first = min(windows.window, windows.frames)
    starts = [dataclasses.replace(r, prompt=_prompt(r, 0, factor), size=(first, *r.size[1:])) for r in requests]
    made = sample_latents(model, starts, sampling, seed)
    if first == windows.frames:
        return made
    asked = [_window(model, r, z, windows) for r, z in zip(requests, made, strict=True)]
    clips = _Clips(requests, made, asked, lay_out(model, asked))
    # The scale is given clip by clip, so that one program serves all scales.
    sampling = dataclasses.replace(sampling, guidance=dataclasses.replace(sampling.guidance, scale=1.0))
    setting = _Setting(model, windows, factor, sampling, seed)
    split, rows = parts("batch", model.mesh), clips.layout.rows
    at_once = -(-min(len(rows), PACKS_AT_ONCE) // split) * split
    found: dict[int, np.ndarray] = {}
    places = range(0, len(rows), at_once)
    with watch.counting(len(places) * (windows.frames - 1 - windows.carried), "latent") as count:
        for place in places:
            some = rows[place : place + at_once]
            some = some + some[-1:] * (at_once - len(some))  # the last row again, so that one program serves all
            found |= _roll_rows(setting, clips, some, count)
    return [found[number] for number in range(len(requests))]


def check_rolling(config: DenoiserRun, sampling: SamplingConfig) -> None:
    """Raise a UserError where a run cannot be sampled by rolling noise levels."""
    frames = config.model.patch[0]
    check(
        frames == 1, f"--long is 'rolling'; the run has model.patch[0] = {frames}, which must be 1, a frame to a token"
    )
    way = sampling.condition
    check(way == "clean", f"--condition is {way!r}; with --long=rolling it must be 'clean'")
    check(not sampling.skipped, "--skip-steps is given; with --long=rolling no step can be skipped")
    listed = sampling.spacing == "times"
    check(not listed, "--sampling.spacing is 'times'; with --long=rolling it must be one that takes a number of steps")


def _roll_rows(
    setting: _Setting, clips: _Clips, rows: list[list[int]], count: Callable[[int], None]
) -> dict[int, np.ndarray]:
    """Complete the clips of some packs, latent by latent, from their first windows."""
    carried, frames = setting.windows.carried, setting.windows.frames
    latents = {i: list(clips.firsts[i][: 1 + carried]) for row in rows for i in row}
    states = {i: clips.firsts[i][1:] for i in latents}
    for there in range(1 + carried, frames):
        states = _roll_once(setting, clips, rows, states, there)
        for i, z in states.items():
            latents[i].append(z[carried])
            states[i] = np.concatenate([z[1:], np.zeros_like(z[:1])])
        count(1)
    return {i: np.stack(found) for i, found in latents.items()}


def _roll_once(
    setting: _Setting, clips: _Clips, rows: list[list[int]], states: dict[int, np.ndarray], there: int
) -> dict[int, np.ndarray]:
    """Denoise the windows of some packs by one latent, which is at the place `there` of the whole clips."""
    model, windows, layout = setting.model, setting.windows, clips.layout
    items, tasks = list(layout.items), list(layout.tokens)
    for i, z in states.items():
        prompt = _prompt(clips.requests[i], there + windows.rolling_latents // 2, setting.factor)
        text, embedding = model.tokenizer.encode(prompt), model.tokenizer.embed(prompt)
        items[i] = dataclasses.replace(items[i], text=text, embedding=embedding)
        tasks[i] = tasks[i]._replace(tokens=patchify(z, model.config.model.patch))
    conditions = place(model.mesh, layout._replace(items=items, tokens=tasks), rows, clips.asked)
    first, begins = there - windows.carried, there == 1 + windows.carried
    where = WindowPlace(jnp.uint32(setting.seed), jnp.int32(first), jnp.bool_(begins))
    tokens_BLP = roll_packs(model.config, setting.sampling, windows.rolling_latents, model.params, conditions, where)
    packs = {name: np.asarray(getattr(conditions.positive, name)) for name in UNPACKED}
    found: dict[int, np.ndarray] = {}
    for pack, row in zip(unstack(packs | {"tokens_BLP": np.asarray(tokens_BLP)}), rows, strict=True):
        found |= dict(zip(row, unpack(pack, model.config.model.patch), strict=True))
    return found


def _window(model: TrainedDenoiser, request: Request, z: np.ndarray, windows: Windows) -> Request:
    """Ask for the window behind the first latent, with the longest of the prompts, which is to fit into a pack."""
    prompts = [text for _, text in spans_of(request.prompt)]
    longest = max(prompts, key=lambda prompt: len(model.tokenizer.encode(prompt)))
    levels = rolling_levels(windows.carried, windows.rolling_latents)
    ceiling = np.broadcast_to(levels[:, None, None], z[1:].shape[:3])
    known = Known(z[1:], ceiling, first=1)
    return dataclasses.replace(request, prompt=longest, size=z[1:].shape[:3], known=known)


def _prompt(request: Request, latent: int, factor: int) -> str:
    """Return the prompt of a request at a latent."""
    return [text for frame, text in spans_of(request.prompt) if latent_of(frame, factor) <= latent][-1]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def roll_packs(
    config: DenoiserRun,
    sampling: SamplingConfig,
    rolling: int,
    params: dict,
    conditions: Conditions,
    where: WindowPlace,
) -> jax.Array:
    """Complete one latent of every clip; return the tokens (B, L, P) of all windows: see `diffusion.rolling.roll`."""
    (seed, first, begins), pack = where, conditions.positive
    given, model = conditions.given, config.model
    assert given is not None
    slots_BL = slot_of(pack.segments_BL)
    clip_ids_BL = per_slot(pack.clip_ids_BS, slots_BL)
    index_BL = pack.index_BL + first * per_slot(pack.grids_BS3[..., 1] * pack.grids_BS3[..., 2], slots_BL)
    noise = lambda key: token_noise(key, clip_ids_BL, index_BL, model.patch_values)  # noqa: E731
    eps_BLP, history_eps_BLP = (noise(step_key(seed, draw, Purpose.SAMPLE)) for draw in (ROLLING_DRAW, HISTORY_DRAW))
    process, substeps = process_named(config.diffusion.process), _substeps(sampling, rolling)
    grid = dataclasses.replace(sampling, steps=str(rolling * substeps))
    times_KBR = grid_times(grid, config.diffusion.times, process, row_tokens(pack))
    # For history guidance: rolling rows are no history, however low their levels are.
    plain = given._replace(ceiling_BR=jnp.where(given.ceiling_BR > 0, 1.0, 0.0))
    problem = Problem(
        denoiser_of(config, sampling, params, conditions._replace(given=plain), history_eps_BLP),
        config.diffusion.prediction,
        process,
        pack.rows_BL,
        # Behind the steps of the first window, which has drawn for the same latents.
        lambda step: noise(step_key(seed, (first + rolling) * substeps + step, Purpose.SOLVER)),
        "learned" if model.learned_variance else sampling.solver.variance,
    )
    times_KBR = rolling_times(given, times_KBR, rolling)
    problem = clip_x0(problem, sampling.clip_x0)
    return roll(sampling.solver, problem, given, (eps_BLP, history_eps_BLP), times_KBR, begins)


def _substeps(sampling: SamplingConfig, rolling: int) -> int:
    """Return the steps of a latent: those of an ordinary clip, spread over the calls that it takes part in."""
    return -(-count_steps(sampling.steps, sampling.spacing) // rolling)
