"""Given tokens of a sampler: what is known of a clip stays, the rest is denoised around it.

Every noise-level row has a ceiling, the highest noise level that it ever has:

    ceiling 0: given, unchanged to the bit;    1: made from noise;    between: an edit of that strength      (1)

A row begins at its ceiling s, with a(s) x_0 + b(s) eps, and its times are those of the grid, but at most s (as in
LTX-Video, 2501.00103). Where a clip has one ceiling for all its tokens, its times are s times those of the grid, so
that no step is wasted.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sora_jax.diffusion.process import Process, corrupt, initial
from sora_jax.diffusion.times import per_token
from sora_jax.shapes import RowsBL, TimesBR, TimesKBR, TokensBLP


class Given(NamedTuple):
    """Hold what a sampler is given: known tokens (0 where unknown), and of each row its ceiling of equation (1).

    rescales_BR: 1 in the rows of clips that have one ceiling for all tokens, else 0.
    """

    x0_BLP: TokensBLP
    ceiling_BR: TimesBR
    rescales_BR: TimesBR


def limit_times(given: Given, times_KBR: TimesKBR) -> TimesKBR:
    """Limit the times of the rows to their ceilings."""

    def limit(times_BR: TimesBR) -> TimesBR:
        clipped_BR = jnp.minimum(times_BR, given.ceiling_BR)
        return jnp.where(given.rescales_BR > 0, given.ceiling_BR * times_BR, clipped_BR)

    return jax.vmap(limit)(times_KBR)


def start(process: Process, given: Given, eps_BLP: TokensBLP, times_BR: TimesBR, rows_BL: RowsBL) -> TokensBLP:
    """Return what a sampler starts from: noise, data, or both, by the ceiling of each token's row."""
    ceiling_BL1 = per_token(given.ceiling_BR, rows_BL)[:, :, None]
    t_BL1 = per_token(times_BR, rows_BL)[:, :, None]
    between_BLP = corrupt(process, given.x0_BLP, eps_BLP, t_BL1)
    made_BLP = jnp.where(ceiling_BL1 >= 1.0, initial(process, eps_BLP, t_BL1), between_BLP)
    return jnp.where(ceiling_BL1 <= 0.0, given.x0_BLP, made_BLP)
