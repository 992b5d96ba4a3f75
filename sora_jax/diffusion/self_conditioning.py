"""Self-conditioning: a network reads its last estimate of the clean tokens beside the noisy ones (2208.04202).

In training the estimate is of a first pass at the same noise level, without gradient; in sampling it is of the step
before (`generate.estimates`). Where there is none, in a part of training and at the first step, the network reads
zeros.
"""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from sora_jax.diffusion.prediction import Denoise, to_x0_and_eps
from sora_jax.diffusion.process import Process
from sora_jax.diffusion.times import per_token
from sora_jax.shapes import RowsBL, TimesBR, TokensBLP


@runtime_checkable
class DenoiseFrom(Protocol):
    """Predict as `Denoise` does, and read an estimate of the clean tokens; None: there is none."""

    def __call__(self, x_BLP: TokensBLP, t_BR: TimesBR, previous_BLP: TokensBLP | None = None, /) -> TokensBLP: ...


class Estimate:
    """Convert what a network predicts into the clean tokens, in float32, whatever it predicts."""

    def __init__(self, process: Process, prediction_type: str, rows_BL: RowsBL):
        self._process, self._prediction_type, self._rows_BL = process, prediction_type, rows_BL

    def __call__(self, y_BLP: Array, x_BLP: TokensBLP, t_BR: TimesBR) -> TokensBLP:
        """Return x_0; y_BLP: the output of the network at x_BLP and t_BR, with variance values or without."""
        t_BL1 = per_token(t_BR, self._rows_BL)[:, :, None]
        y_BLP = y_BLP[..., : x_BLP.shape[-1]].astype(jnp.float32)
        return to_x0_and_eps(self._process, self._prediction_type, y_BLP, x_BLP, t_BL1)[0]


def in_two_passes(
    estimate: Estimate, first: DenoiseFrom, second: DenoiseFrom, chosen_BL1: Bool[Array, "B L 1"]
) -> Denoise:
    """Make the denoise function of training: `second` reads the estimate of `first` where chosen, zeros elsewhere.

    first: the network without gradients to its parameters.
    """

    def denoise(x_BLP: TokensBLP, t_BR: TimesBR) -> Array:
        x0_BLP = jax.lax.stop_gradient(estimate(first(x_BLP, t_BR), x_BLP, t_BR))
        return second(x_BLP, t_BR, jnp.where(chosen_BL1, x0_BLP, 0.0))

    return denoise
