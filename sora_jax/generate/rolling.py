"""Sample clips longer than a model was trained on by rolling noise levels: see `diffusion.rolling`.

The first window is sampled as any clip. From then on a window is a few latents of history and rolling ones behind them,
and every call of the compiled program completes one latent of every clip. Coordinates begin at 1 in every window, as in
`generate.long`. The noise of a latent is keyed by (seed, clip id, its place in the whole clip): a longer clip begins as
a shorter one, and company changes nothing.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sora_jax.config import check
from sora_jax.data.packing import patchify, unpack, unstack
from sora_jax.diffusion.keys import Purpose, step_key, token_noise
from sora_jax.diffusion.process import process_named
from sora_jax.diffusion.rolling import roll, rolling_levels, rolling_times
from sora_jax.diffusion.sampling import SamplingConfig, grid_times
from sora_jax.diffusion.solvers import Problem
from sora_jax.diffusion.spacing import count_steps
from sora_jax.generate.long import Windows, latent_of
from sora_jax.generate.prompts import spans_of
from sora_jax.generate.requests import Known, Request
from sora_jax.generate.sampler import (
    PACKS_AT_ONCE,
    UNPACKED,
    Conditions,
    PackLayout,
    TrainedDenoiser,
    denoiser_of,
    lay_out,
    place,
    row_tokens,
    sample_latents,
)
from sora_jax.nn.pack import per_slot, slot_of
from sora_jax.parallel.rules import parts
from sora_jax.train.denoiser import DenoiserRun

# Draws of Purpose.SAMPLE beside that of the first window, 0: of rolling latents, and of the history.
ROLLING_DRAW, HISTORY_DRAW = 1, 2


def sample_rolling(
    model: TrainedDenoiser,
    requests: Sequence[Request],
    windows: Windows,
    factor: int,
    sampling: SamplingConfig,
    seed: int,
) -> list[np.ndarray]:
    """Sample normalised latents (t, h, w, C) of `windows.frames` latent frames, one per request.

    Of a window, `windows.carried` latents are history, one place is left free for the first frame, and the others roll.
    A request's prompt may have spans (`prompts.spans_of`): a latent is completed under the prompt of the middle of what
    is rolling then.
    """
    check_rolling(model.config, sampling)
    first = min(windows.window, windows.frames)
    starts = [dataclasses.replace(r, prompt=_prompt(r, 0, factor), size=(first, *r.size[1:])) for r in requests]
    made = sample_latents(model, starts, sampling, seed)
    if first == windows.frames:
        return made
    found: dict[int, np.ndarray] = {}
    layout = lay_out(model, [_window(model, r, z, windows) for r, z in zip(requests, made, strict=True)])
    split = parts("batch", model.mesh)
    at_once = -(-min(len(layout.rows), PACKS_AT_ONCE) // split) * split
    for start in range(0, len(layout.rows), at_once):
        rows = layout.rows[start : start + at_once]
        rows += rows[-1:] * (at_once - len(rows))
        found |= _roll_rows(model, requests, made, windows, (layout, rows), factor, sampling, seed)
    return [found[number] for number in range(len(requests))]


def check_rolling(config: DenoiserRun, sampling: SamplingConfig) -> None:
    """Raise a UserError where a run cannot be sampled by rolling noise levels."""
    frames = config.model.patch[0]
    check(
        frames == 1, f"--long is 'rolling'; the run has model.patch[0] = {frames}, which must be 1, a frame to a token"
    )
    way = sampling.condition
    check(way == "times", f"--condition is {way!r}; with --long=rolling it must be 'times'")


def _roll_rows(
    model: TrainedDenoiser,
    requests: Sequence[Request],
    made: Sequence[np.ndarray],
    windows: Windows,
    packs: tuple[PackLayout, list[list[int]]],
    factor: int,
    sampling: SamplingConfig,
    seed: int,
) -> dict[int, np.ndarray]:
    """Complete the clips of some packs, latent by latent, from their first windows."""
    (layout, rows), (rolling, carried) = packs, (windows.rolling_latents, windows.carried)
    members = sorted({member for row in rows for member in row})
    latents = {i: list(made[i][: 1 + carried]) for i in members}
    state = {i: made[i][1:] for i in members}
    sampling = dataclasses.replace(sampling, guidance=dataclasses.replace(sampling.guidance, scale=1.0))
    for there in tqdm(range(1 + carried, windows.frames), "rolling", unit="latent"):
        items, tasks = list(layout.items), list(layout.tokens)
        for i in members:
            prompt = _prompt(requests[i], there + rolling // 2, factor)
            text, embedding = model.tokenizer.encode(prompt), model.tokenizer.embed(prompt)
            items[i] = dataclasses.replace(items[i], text=text, embedding=embedding)
            tasks[i] = tasks[i]._replace(tokens=patchify(state[i], model.config.model.patch))
        conditions = place(model.mesh, layout._replace(items=items, tokens=tasks), rows, requests)
        begins, first = np.bool_(there == 1 + carried), np.int32(there - carried)
        tokens_BLP = roll_packs(
            model.config, sampling, rolling, model.params, np.uint32(seed), conditions, first, begins
        )
        arrays = {name: np.asarray(getattr(conditions.positive, name)) for name in UNPACKED}
        for pack, row in zip(unstack(arrays | {"tokens_BLP": np.asarray(tokens_BLP)}), rows):
            for i, z in zip(row, unpack(pack, model.config.model.patch), strict=True):
                state[i] = z
        for i in members:
            latents[i].append(state[i][carried])
            state[i] = np.concatenate([state[i][1:], np.zeros_like(state[i][:1])])
    return {i: np.stack(frames) for i, frames in latents.items()}


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
    seed: jax.Array,
    conditions: Conditions,
    first: jax.Array,
    begins: jax.Array,
) -> jax.Array:
    """Complete one latent of every clip; return the tokens (B, L, P) of all windows: see `diffusion.rolling.roll`.

    first: the place in the whole clip of the first latent of the windows. begins: they are the first ones.
    """
    pack, given, model = conditions.positive, conditions.given, config.model
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
        lambda step: noise(step_key(seed, first * substeps + step, Purpose.SOLVER)),
        "learned" if model.learned_variance else sampling.solver.variance,
    )
    times_KBR = rolling_times(given, times_KBR, rolling)
    return roll(sampling.solver, problem, given, (eps_BLP, history_eps_BLP), times_KBR, begins)


def _substeps(sampling: SamplingConfig, rolling: int) -> int:
    """Return the steps of a latent: those of an ordinary clip, spread over the calls that it takes part in."""
    return -(-count_steps(sampling.steps, sampling.spacing) // rolling)
