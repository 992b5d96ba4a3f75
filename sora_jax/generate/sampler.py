"""One packed sampler: requests of any size, side by side in fixed-shape packs, from noise to latents."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sora_jax.config import check
from sora_jax.data.packing.packs import unpack, unstack
from sora_jax.diffusion.flow_edit import flow_edit
from sora_jax.diffusion.given import limit_times
from sora_jax.diffusion.guidance import HistoryModels, TokenLayout, guided, guided_by_history
from sora_jax.diffusion.history import history_tokens, without_history
from sora_jax.diffusion.keys import Purpose, step_key, token_noise
from sora_jax.diffusion.prediction import Denoise
from sora_jax.diffusion.process import process_named
from sora_jax.diffusion.sampling import SamplingConfig, check_skipping, grid_times, sample
from sora_jax.diffusion.self_conditioning import DenoiseFrom, Estimate
from sora_jax.diffusion.solvers import Problem, clip_x0
from sora_jax.diffusion.solvers.problem import Cut
from sora_jax.diffusion.spacing import count_steps
from sora_jax.generate.estimates import Kept, no_estimate, remembering
from sora_jax.generate.packs import Conditions, PackLayout, TrainedDenoiser, lay_out, place, row_tokens
from sora_jax.generate.progress import Watch
from sora_jax.generate.requests import Request
from sora_jax.generate.skipping import reuse_trunk, watch_trunk
from sora_jax.models.denoiser import RunTrunk, encode_condition, has_trunk, reads_estimate, trunk_zeros
from sora_jax.nn.pack import Pack, per_slot, slot_of
from sora_jax.parallel.rules import parts
from sora_jax.train.denoiser import DenoiserRun, network
from sora_jax.train.low_resolution import with_low_noise

UNPACKED = ("segments_BL", "index_BL", "grids_BS3")  # what `unpack` reads beside the tokens
PART_SECONDS = 0.25  # between two reports of how far a solve is
PACKS_AT_ONCE = 8  # rounded up to the parts of the mesh; bounds the memory of a long list of prompts


class SolveState(NamedTuple):
    """Hold a solve that is cut into parts: the steps that are done, the solver's state, and what branches have kept.

    residuals: of the trunk, of each branch of guidance, where steps are skipped. estimates: of the clean tokens, of
    each branch, where the network reads them.
    """

    done: jax.Array
    solver: Any
    residuals: list[jax.Array]
    estimates: list[jax.Array]


def sample_latents(
    model: TrainedDenoiser,
    requests: Sequence[Request],
    sampling: SamplingConfig,
    seed: int,
    watch: Watch = Watch(),
) -> list[np.ndarray]:
    """Sample normalised latents (t, h, w, C), one per request, in order.

    All requests travel in as few packs as they fit in, up to PACKS_AT_ONCE in a call of the compiled sampler. A clip's
    noise is keyed by (seed, clip id), so what it is packed with changes it by float error at most.
    """
    latents: dict[int, np.ndarray] = {}
    for wait in sample_batches(model, requests, sampling, seed, watch):
        latents |= wait()
    return [latents[member] for member in range(len(requests))]


class _Batch(NamedTuple):
    """Hold packs that are sampled together: their rows of requests, by number, and how they are laid out."""

    layout: PackLayout
    rows: list[list[int]]  # of the numbers of `requests`
    filled: list[list[int]]  # with the last row again, up to the packs of a call: one program serves all
    requests: Sequence[Request]
    numbers: Sequence[int]  # of the requests among all
    edits: bool

    @property
    def members(self) -> Set[int]:
        """Return the numbers, among all, of the requests in the batch."""
        return {self.numbers[member] for row in self.rows for member in row}


def sample_batches(
    model: TrainedDenoiser,
    requests: Sequence[Request],
    sampling: SamplingConfig,
    seed: int,
    watch: Watch = Watch(),
    done: Set[int] = frozenset(),
) -> Iterator[Callable[[], dict[int, np.ndarray]]]:
    """Dispatch the compiled sampler for a batch of packs at a time, and yield what waits for it.

    The yielded function returns the latents of `sample_latents` by the number of their request. Where somebody watches,
    it takes a part of the steps at a time. done: numbers of requests that an earlier call has answered; a batch of such
    alone is left out, and the others are what they were.
    """
    batches = [batch for batch in _batches(model, requests) if not batch.members <= done]
    # The scale is given clip by clip, so that one program serves all scales.
    sampling = dataclasses.replace(sampling, guidance=dataclasses.replace(sampling.guidance, scale=1.0))
    steps = _count(sampling)
    with watch.counting(len(batches) * steps, "step") as count:
        for batch in batches:
            conditions = place(model.mesh, batch.layout, batch.filled, batch.requests)
            sources = batch.layout._replace(items=batch.layout.sources)
            source = place(model.mesh, sources, batch.filled, batch.requests) if batch.edits else None
            solve = functools.partial(solve_packs, model.config, sampling, model.params, np.uint32(seed))
            solve = functools.partial(solve, conditions, source)
            state = _first_state(model, sampling, conditions, source)
            # Dispatched now, so that a device works while the caller uses the clips of the batch before.
            first = 1 if watch.looks else steps
            yield functools.partial(
                _wait, model, batch, conditions.positive, solve, solve(state, np.int32(first)), (first, steps), count
            )


def _wait(
    model: TrainedDenoiser,
    batch: _Batch,
    pack: Pack,
    solve: Callable[[SolveState, np.int32], tuple[jax.Array, SolveState]],
    found: tuple[jax.Array, SolveState],
    steps: tuple[int, int],
    count: Callable[[int], None],
) -> dict[int, np.ndarray]:
    """Take the steps that are left, counting them, and return the latents of a batch. steps: those taken, and all."""
    (done, total), (tokens_BLP, state) = steps, found
    jax.block_until_ready(tokens_BLP)
    count(done)
    taken, begun = 1, None
    while done < total:
        if begun is not None:  # the first part may have been compiled, or dispatched long ago: no time is taken of it
            taken = max(1, int(taken * PART_SECONDS / max(time.monotonic() - begun, 1e-6)))
        taken, begun = min(taken, total - done), time.monotonic()
        tokens_BLP, state = jax.block_until_ready(solve(state, np.int32(done + taken)))
        done += taken
        count(taken)
    packs = {name: np.asarray(getattr(pack, name)) for name in UNPACKED}
    packs["tokens_BLP"] = np.asarray(tokens_BLP)
    latents: dict[int, np.ndarray] = {}
    for one, row in zip(unstack(packs), batch.rows):
        clips = unpack(one, model.config.model.patch)
        latents |= {batch.numbers[member]: latent for member, latent in zip(row, clips, strict=True)}
    return latents


def _batches(model: TrainedDenoiser, requests: Sequence[Request]) -> Iterator[_Batch]:
    """Lay requests out in packs, as many at once as are sampled together."""
    edits = [request.known is not None and request.known.source is not None for request in requests]
    for wanted in sorted(set(edits), reverse=True):  # edits of described clips travel in packs of their own
        members = [number for number, edit in enumerate(edits) if edit == wanted]
        chosen = [requests[number] for number in members]
        layout, split = lay_out(model, chosen), parts("batch", model.mesh)
        at_once = -(-min(len(layout.rows), PACKS_AT_ONCE) // split) * split
        for start in range(0, len(layout.rows), at_once):
            rows = layout.rows[start : start + at_once]
            yield _Batch(layout, rows, rows + rows[-1:] * (at_once - len(rows)), chosen, members, wanted)


def _first_state(
    model: TrainedDenoiser, sampling: SamplingConfig, conditions: Conditions, source: Conditions | None
) -> SolveState:
    """Return a state before the first step: arrays of the right shapes, whose values do not matter."""

    def begin(seed: jax.Array, conditions: Conditions, source: Conditions | None) -> SolveState:
        cut, nothing = Cut(), lambda x_BLP, t_BR: x_BLP
        _solve(model.config, sampling, seed, conditions, source, lambda *_: nothing, cut)
        both = [pack for one in (conditions, source) if one for pack in (one.positive, one.negative) if pack]
        residuals = [trunk_zeros(model.config.model, pack) for pack in both] if sampling.skipped else []
        estimates = (
            [no_estimate(model.config.model, pack) for pack in both] if reads_estimate(model.config.model) else []
        )
        return SolveState(jnp.int32(0), cut.after, residuals, estimates)

    def zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
        sharding = NamedSharding(model.mesh, x.sharding.spec if x.sharding else PartitionSpec())
        return jax.make_array_from_callback(x.shape, sharding, lambda place: np.zeros(x.shape, x.dtype)[place])

    return jax.tree.map(zeros, jax.eval_shape(begin, np.uint32(0), conditions, source))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames=("state",))
def solve_packs(
    config: DenoiserRun,
    sampling: SamplingConfig,
    params: dict,
    seed: jax.Array,
    conditions: Conditions,
    source: Conditions | None = None,
    state: SolveState | None = None,
    last: jax.Array | None = None,
) -> Any:
    """Solve from noise to clean tokens (B, L, P), with the denoiser and times of training.

    source: the known tokens are changed from what it says to what `conditions` say, see `diffusion.flow_edit`. Its
    packs are laid out as those of `conditions`. state: what the part before left; the steps up to `last`, the number of
    the first that is not taken, follow, and the state behind them is returned beside the tokens. One program serves all
    parts: captions are encoded anew in each.
    """
    cut = None if state is None else Cut(state.done, last, state.solver)
    kept: tuple[list[jax.Ref], list[jax.Ref]] = [], []
    residuals, estimates = iter(state.residuals if state else ()), iter(state.estimates if state else ())

    def skipping(pack: Pack) -> RunTrunk | None:
        if not sampling.skipped:
            return None
        residual_BLD, first = (next(residuals), state.done) if state else (trunk_zeros(config.model, pack), 0)
        run, kept_BLD = reuse_trunk(sampling.skipped, _count(sampling), residual_BLD, first)
        kept[0].append(kept_BLD)
        return run

    def keeping(pack: Pack) -> Kept:
        if not reads_estimate(config.model):
            return Kept(skipping(pack))
        kept[1].append(jax.new_ref(next(estimates) if state else no_estimate(config.model, pack)))
        return Kept(skipping(pack), kept[1][-1])

    def denoiser(conditions: Conditions, eps_BLP: jax.Array) -> Denoise:
        return denoiser_of(config, sampling, params, conditions, eps_BLP, keeping)

    tokens_BLP = _solve(config, sampling, seed, conditions, source, denoiser, cut)
    if cut is None:
        return tokens_BLP
    return tokens_BLP, SolveState(jnp.asarray(last), cut.after, *([each[...] for each in refs] for refs in kept))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _trunk_ratios(
    config: DenoiserRun, sampling: SamplingConfig, params: dict, seed: jax.Array, conditions: Conditions
) -> jax.Array:
    """Return the ratios (X, K) of `skipping.watch_trunk`, of each branch of guidance."""
    found = []

    def watching(pack: Pack) -> Kept:
        run, ratios_K = watch_trunk(_count(sampling), trunk_zeros(config.model, pack), pack.segments_BL)
        found.append(ratios_K)
        return Kept(run)

    denoiser = lambda conditions, eps_BLP: denoiser_of(config, sampling, params, conditions, eps_BLP, watching)  # noqa: E731
    _solve(config, sampling, seed, conditions, None, denoiser)
    return jnp.stack([ratios_K[...] for ratios_K in found])


def trunk_ratios(
    model: TrainedDenoiser, requests: Sequence[Request], sampling: SamplingConfig, seed: int
) -> np.ndarray:
    """Sample requests in one call; return the ratios (X, K) that `skipping.choose_skipped` reads.

    They are those of the requests that fit in PACKS_AT_ONCE packs.
    """
    check(has_trunk(model.config.model), f"model.name is {model.config.model.name!r}; it has no blocks to skip")
    check_skipping(sampling)
    layout, split = lay_out(model, requests), parts("batch", model.mesh)
    rows = layout.rows[:PACKS_AT_ONCE]
    rows += rows[-1:] * (-len(rows) % split)
    conditions = place(model.mesh, layout, rows, requests)
    sampling = dataclasses.replace(sampling, guidance=dataclasses.replace(sampling.guidance, scale=1.0))
    return np.asarray(_trunk_ratios(model.config, sampling, model.params, np.uint32(seed), conditions))


def _count(sampling: SamplingConfig) -> int:
    return count_steps(sampling.steps, sampling.spacing)


def _solve(
    config: DenoiserRun,
    sampling: SamplingConfig,
    seed: jax.Array,
    conditions: Conditions,
    source: Conditions | None,
    denoiser: Callable[[Conditions, jax.Array], Denoise],
    cut: Cut | None = None,
) -> jax.Array:
    """Solve as `solve_packs`; denoiser: makes one of conditions and noise, see `denoiser_of`."""
    conditions = _with_low_noise(config, sampling, seed, conditions)
    pack, model = conditions.positive, config.model
    clip_ids_BL = per_slot(pack.clip_ids_BS, slot_of(pack.segments_BL))
    noise = lambda key: token_noise(key, clip_ids_BL, pack.index_BL, model.patch_values)  # noqa: E731
    eps_BLP = noise(step_key(seed, 0, Purpose.SAMPLE))
    problem = Problem(
        denoiser(conditions, eps_BLP),
        config.diffusion.prediction,
        process_named(config.diffusion.process),
        pack.rows_BL,
        lambda step: noise(step_key(seed, step, Purpose.SOLVER)),
        "learned" if model.learned_variance else sampling.solver.variance,
        cut,
    )
    given = conditions.given
    if source is not None and given is not None:
        before = dataclasses.replace(problem, denoise=denoiser(source, eps_BLP))
        times_KBR = grid_times(sampling, config.diffusion.times, problem.process, row_tokens(pack))
        before, after = (clip_x0(each, sampling.clip_x0) for each in (before, problem))
        return flow_edit(before, after, given.x0_BLP, limit_times(given, times_KBR))
    return sample(sampling, config.diffusion.times, problem, eps_BLP, row_tokens(pack), given)


def _with_low_noise(
    config: DenoiserRun, sampling: SamplingConfig, seed: jax.Array, conditions: Conditions
) -> Conditions:
    """Bring the low resolution that the packs have, if any, to the noise level of `sampling`."""

    def noisy(pack: Pack) -> Pack:
        times_BS = jnp.full_like(pack.clip_ids_BS, sampling.low_noise, jnp.float32)
        key = step_key(seed, 0, Purpose.LOW_NOISE)
        return with_low_noise(process_named(config.diffusion.process), pack, key, times_BS)

    positive, negative = conditions.positive, conditions.negative
    return conditions._replace(positive=noisy(positive), negative=negative and noisy(negative))


def denoiser_of(
    config: DenoiserRun,
    sampling: SamplingConfig,
    params: dict,
    conditions: Conditions,
    eps_BLP: jax.Array,
    kept_of: Callable[[Pack], Kept] = lambda pack: Kept(),
) -> Denoise:
    """Return denoise(x, t) with captions encoded once, guided away from the negative packs if there are any.

    eps_BLP: the noise that history guidance puts in the place of given tokens. kept_of: makes what each branch of
    guidance keeps from call to call.
    """
    process = process_named(config.diffusion.process)

    def conditioned(pack: Pack) -> tuple[Denoise, DenoiseFrom]:
        """Return a branch of guidance, and the same without an estimate that it keeps."""
        kept = kept_of(pack)
        bare = bound(pack, kept.run_trunk)
        if not reads_estimate(config.model):
            return bare, bare
        ref = jax.new_ref(no_estimate(config.model, pack)) if kept.estimate is None else kept.estimate
        return remembering(Estimate(process, config.diffusion.prediction, pack.rows_BL), bare, ref), bare

    def bound(pack: Pack, run_trunk: RunTrunk | None) -> DenoiseFrom:
        known, rings_BS = encode_condition(params, config.model, pack), conditions.rings_BS
        if rings_BS is None:
            return network(params, config, pack, known, run_trunk)
        times_KBR = grid_times(sampling, config.diffusion.times, process, row_tokens(pack))

        def denoise(x_BLP: jax.Array, t_BR: jax.Array, previous_BLP: jax.Array | None = None, /) -> jax.Array:
            rolled = _rolled(pack, rings_BS, times_KBR, t_BR)
            return network(params, config, rolled, known)(x_BLP, t_BR, previous_BLP)

        return denoise

    pack = conditions.positive
    (positive, bare), given, guidance = conditioned(pack), conditions.given, sampling.guidance
    negative = None if conditions.negative is None else conditioned(conditions.negative)[0]
    layout = TokenLayout(pack.segments_BL, pack.rows_BL, config.model.latent_channels)
    if given is not None and guidance.history != 1.0:
        # An estimate that was made with the history knows it.
        without = without_history(process, bare, given, eps_BLP, pack.rows_BL, guidance.history_level)
        models = HistoryModels(positive, without, negative)
        return guided_by_history(guidance, models, conditions.scale_BS, history_tokens(given, pack.rows_BL), layout)
    if negative is None:
        return positive
    return guided(guidance, positive, negative, conditions.scale_BS, layout)


def _rolled(pack: Pack, rings_BS: jax.Array, times_KBR: jax.Array, t_BR: jax.Array) -> Pack:
    """Move the frames of rings along their time axis, by another number of frames at every step of the grid.

    So no place of a ring is the seam for long (Mobius, 2502.20307). The stride is near half of the ring and, where it
    can be, has no divisor in common with it. Clips that are no rings keep their coordinates.
    """
    rows = t_BR.shape[1] // rings_BS.shape[1]
    steps_BS = jnp.sum(times_KBR > t_BR[None] + 1e-7, axis=0)[:, ::rows]  # the first row has the highest ceiling
    shift_BS = steps_BS * _stride(rings_BS)
    slots_BL = slot_of(pack.segments_BL)
    ring_BL, shift_BL = per_slot(rings_BS, slots_BL), per_slot(shift_BS, slots_BL)
    time_BL = pack.coords_BL3[..., 0]
    rolled_BL = 1 + (time_BL - 1 + shift_BL) % jnp.maximum(ring_BL, 1)  # the frames of a ring begin at 1
    time_BL = jnp.where(ring_BL > 0, rolled_BL, time_BL)
    return dataclasses.replace(pack, coords_BL3=pack.coords_BL3.at[..., 0].set(time_BL))


def _stride(rings_BS: jax.Array) -> jax.Array:
    """Return the number nearest below half of each ring that is prime to it: k/2 - 1 or k/2 - 2 if even, else k//2."""
    half = rings_BS // 2
    even = jnp.where(half % 2 == 0, half - 1, half - 2)
    return jnp.maximum(jnp.where(rings_BS % 2 == 0, even, half), 1)
