"""History: the given tokens of a clip, and the prediction without them, which guidance leads away from.

History guidance is that of the Diffusion Forcing Transformer (2502.06764): the model is asked again with the history
replaced by pure noise, or by what is left of it at a high noise level ("fractional"); see `guidance.guided_by_history`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool

from sora_jax.diffusion.given import Given
from sora_jax.diffusion.prediction import Denoise
from sora_jax.diffusion.process import Process, corrupt, initial
from sora_jax.diffusion.times import per_token
from sora_jax.shapes import RowsBL, TimesBR, TokensBLP

HISTORY_LEVEL = 0.02  # noise level of generated history, which has errors that data have not; given tokens have 0


def history_rows(given: Given) -> Bool[Array, "B R"]:
    """Return True in the rows of given tokens: their ceiling is 0, or at most that of generated history."""
    return (given.ceiling_BR <= HISTORY_LEVEL) & (given.rescales_BR == 0)


def history_tokens(given: Given, rows_BL: RowsBL) -> Bool[Array, "B L 1"]:
    """Return True at the tokens of `history_rows`."""
    return per_token(history_rows(given).astype(jnp.float32), rows_BL)[:, :, None] > 0


def without_history(
    process: Process, denoise: Denoise, given: Given, eps_BLP: TokensBLP, rows_BL: RowsBL, level: float = 1.0
) -> Denoise:
    """Make a denoise function that sees the history at a noise level: with the noise eps_BLP, at 1 nothing but that."""
    rows_BR, history_BL1 = history_rows(given), history_tokens(given, rows_BL)

    def hidden(x_BLP: TokensBLP, t_BR: TimesBR) -> Array:
        t_BR = jnp.where(rows_BR, level, t_BR)
        t_BL1 = per_token(t_BR, rows_BL)[:, :, None]
        pure = level == 1.0
        noisy_BLP = initial(process, eps_BLP, t_BL1) if pure else corrupt(process, given.x0_BLP, eps_BLP, t_BL1)
        return denoise(jnp.where(history_BL1, noisy_BLP, x_BLP), t_BR)

    return hidden
