"""Keep, from step to step of a solve, the estimate of the clean tokens that a network reads (self-conditioning)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sora_jax.diffusion.prediction import Denoise
from sora_jax.diffusion.self_conditioning import DenoiseFrom, Estimate
from sora_jax.models.denoiser import DenoiserConfig, RunTrunk
from sora_jax.nn.pack import Pack
from sora_jax.parallel.rules import laid_out_as, reshard


class Kept(NamedTuple):
    """Hold what a branch of guidance keeps from call to call: what runs the trunk, and an estimate of clean tokens.

    None: the trunk just runs; the network reads no estimate.
    """

    run_trunk: RunTrunk | None = None
    estimate: jax.Ref | None = None


def no_estimate(config: DenoiserConfig, pack: Pack) -> jax.Array:
    """Return zeros for the estimate (B, L, P) of clean tokens that there is not yet."""
    zeros_BLP = jnp.zeros((*pack.segments_BL.shape, config.patch_values), jnp.float32)
    return reshard(zeros_BLP, "batch", None, None)


def remembering(estimate: Estimate, denoise: DenoiseFrom, kept: jax.Ref) -> Denoise:
    """Make the denoise function of sampling: it reads what its last call estimated, from `kept` (B, L, P).

    kept: zeros before the first call. A solver calls the model as a function of tokens and times, and need not know of
    this state.
    """

    def step(x_BLP: jax.Array, t_BR: jax.Array) -> jax.Array:
        previous_BLP = kept[...]
        y_BLP = denoise(x_BLP, t_BR, previous_BLP)
        kept[...] = laid_out_as(estimate(y_BLP, x_BLP, t_BR), previous_BLP)
        return y_BLP

    return step
