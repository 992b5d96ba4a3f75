"""The metric `likelihood`: bits per dimension of held-out latents, given their captions."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.config import check
from sora_jax.diffusion.keys import Purpose, step_key, token_noise
from sora_jax.diffusion.likelihood import ClipTokens, Likelihood, LikelihoodConfig, ascending_times, log_likelihood
from sora_jax.diffusion.process import process_named
from sora_jax.diffusion.solvers import Problem
from sora_jax.evaluate.evaluation import Evaluation, counted, measuring
from sora_jax.evaluate.metric import Found, Line, Metric
from sora_jax.models.denoiser import encode_condition
from sora_jax.nn.pack import Pack, per_slot, slot_of
from sora_jax.parallel import distributed
from sora_jax.train.denoiser import DenoiserRun, network
from sora_jax.train.held_out import HeldOutBatch, HeldOutClips


@dataclasses.dataclass(frozen=True)
class LikelihoodOptions(LikelihoodConfig):
    """Configure the integration of the probability-flow ODE."""

    steps: int = 32  # of the solver from data to noise, even in angle
    # Random signs of Hutchinson's estimate, one derivative of the model each; 0: the exact divergence, which costs as
    # many derivatives as the longest clip has values.
    probes: int = 1
    first: float = 1e-3  # noise level that the latents are taken to have

    def __post_init__(self):
        super().__post_init__()
        check(self.steps > 0, f"likelihood.steps is {self.steps}; it must be at least 1")
        check(0 < self.first < 1, f"likelihood.first is {self.first}; it must be above 0 and below 1")


def clip_bits(
    config: DenoiserRun,
    options: LikelihoodOptions,
    params: dict,
    clips: HeldOutClips,
    seed: int = 0,
    batches: Iterable[HeldOutBatch] | None = None,
) -> np.ndarray:
    """Return the bits per dimension of each clip (n,), of its normalised latent given its caption; under a mesh.

    Probes are keyed by (seed, clip id), so what a clip is packed with changes its value by float error at most.
    batches: those of `clips.batches()`, for a caller that counts them.
    """
    bits_n = np.zeros(len(clips))
    times_K = ascending_times(process_named(config.diffusion.process), options.steps, options.first).astype(np.float32)
    for batch in clips.batches() if batches is None else batches:
        found = _likelihoods(config, options, params, batch.place(), times_K, np.uint32(seed))
        batch.scatter(distributed.on_host(found.bits_per_dimension()), bits_n)
    return bits_n


@functools.partial(jax.jit, static_argnums=(0, 1))
def _likelihoods(
    config: DenoiserRun, options: LikelihoodOptions, params: dict, pack: Pack, times_K: jax.Array, seed: jax.Array
) -> Likelihood:
    assert pack.tokens_BLP is not None
    ids_BL, width = per_slot(pack.clip_ids_BS, slot_of(pack.segments_BL)), pack.tokens_BLP.shape[-1]
    noise = lambda probe: token_noise(step_key(seed, probe, Purpose.PROBE), ids_BL, pack.index_BL, width)  # noqa: E731
    problem = Problem(
        network(params, config, pack, encode_condition(params, config.model, pack)),
        config.diffusion.prediction,
        process_named(config.diffusion.process),
        pack.rows_BL,
        noise,
    )
    times_KBR = jax.vmap(lambda t: jnp.full_like(pack.row_slots_BR, t, jnp.float32))(times_K)
    clips = ClipTokens(pack.segments_BL, pack.index_BL, pack.slots)
    return log_likelihood(options, problem, pack.tokens_BLP.astype(jnp.float32), times_KBR, clips)


def summarise(bits_n: np.ndarray) -> dict[str, float | None]:
    """Return the mean over clips, and its standard error, which has the spread of clips and of probes in it."""
    error = float(bits_n.std(ddof=1) / np.sqrt(len(bits_n))) if len(bits_n) > 1 else None
    return {"bits_per_dimension": float(bits_n.mean()), "standard_error": error, "clips": len(bits_n)}


def _check(evaluation: Evaluation, options: LikelihoodOptions) -> None:
    evaluation.check_latents()


def _measure(evaluation: Evaluation, options: LikelihoodOptions) -> Found:
    clips, model = evaluation.latent_clips, evaluation.model
    with jax.set_mesh(model.mesh):
        batches = clips.batches()
        with measuring(len(batches), "batch") as bar:
            shown = counted(batches, bar)
            bits_n = clip_bits(model.config, options, model.params, clips, evaluation.options.seed, shown)
    values: dict[str, Any] = summarise(bits_n) | dataclasses.asdict(options)
    values["by_size"] = {key: summarise(bits_n[own]) for key, own in clips.groups()["by_size"].items()}
    signs = f"{options.probes} probe{'s' * (options.probes > 1)} of each clip" if options.probes else "exact divergence"
    solver = f"{options.steps} steps of {options.method} from noise level {options.first:g}, {signs}"
    lines = [_line("bits per dimension", values)]
    lines += [_line(f"size {key}", each) for key, each in values["by_size"].items()]
    return Found({"model": {"likelihood": values}}, lines, about=f"{evaluation.about_latents()}; {solver}")


def _line(label: str, values: Mapping[str, Any]) -> Line:
    error = "" if values["standard_error"] is None else f" ± {values['standard_error']:.4f}"
    return Line("likelihood", label, {"model": f"{values['bits_per_dimension']:.4f}{error}"})


LIKELIHOOD = Metric(_check, _measure, LikelihoodOptions())
