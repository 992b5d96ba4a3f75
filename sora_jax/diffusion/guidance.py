"""Classifier-free guidance (Ho and Salimans 2207.12598), with a scale for every clip of a pack.

    out = u_uncond + w (u_cond - u_uncond)                                               (1)

The same in every kind of prediction, since conversions are linear. (The paper's own scale is w - 1.)
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from sora_jax.diffusion.prediction import Denoise
from sora_jax.diffusion.times import per_token
from sora_jax.shapes import SegmentsBL, TimesBR, TokensBLP


def guide(conditional: TokensBLP, unconditional: TokensBLP, scale_BL1: Float[Array, "B L 1"]) -> TokensBLP:
    """Equation (1), float32: scale 1 is exactly the conditional, scale 0 exactly the unconditional."""
    # Equation (1) as a weighted mean, the form that rounding leaves exact at both scales.
    return scale_BL1 * conditional.astype(jnp.float32) + (1.0 - scale_BL1) * unconditional.astype(jnp.float32)


def guided(
    conditional: Denoise, unconditional: Denoise, scale_BS: Float[Array, "B S"], segments_BL: SegmentsBL
) -> Denoise:
    """A denoise function that calls both and guides every clip by the scale of its slot."""
    scale_BL1 = per_token(scale_BS, jnp.maximum(segments_BL - 1, 0))[:, :, None]

    def denoise(x_BLP: TokensBLP, t_BR: TimesBR) -> TokensBLP:
        return guide(conditional(x_BLP, t_BR), unconditional(x_BLP, t_BR), scale_BL1)

    return denoise
