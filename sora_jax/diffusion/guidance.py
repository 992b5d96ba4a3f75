"""Classifier-free guidance (Ho and Salimans 2207.12598), with a scale for every clip of a pack.

    out = u_uncond + w (u_cond - u_uncond)                                               (1)

The same in every kind of prediction, since conversions are linear. (The paper's own scale is w - 1.) A negative
prompt is nothing new: it is what `unconditional` is conditioned on. With two conditions, text and given frames, each
has its scale (Brooks et al. 2211.09800, equation 3):

    out = u_none + w_frames (u_frames - u_none) + w_text (u_both - u_frames)             (2)

Scales may depend on time: 1 outside an interval of times (Kynkaanniemi et al. 2404.07724), or growing from 1 at
pure noise to w at the data, t = 0, by a power of the cosine (Gao et al. 2303.14389):

    w(t) = 1 + (w - 1) (1 - cos(pi (1 - t)^power)) / 2                                   (3)

Guidance makes predictions larger; they may be scaled back to the spread of the conditional one, clip by clip, and
mixed (Lin et al. 2305.08891, equations 15 and 16):

    out <- (1 - rescale) out + rescale out std(u_cond) / std(out)                        (4)

Where only some channels are guided, (4) is measured over these and applied to these alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sora_jax.diffusion.prediction import Denoise
from sora_jax.diffusion.times import per_token
from sora_jax.errors import UserError
from sora_jax.shapes import SegmentsBL, TimesBR, TokensBLP

ScaleBS = Float[Array, "B S"]


@dataclass(frozen=True)
class GuidanceConfig:
    """Scale (1 = none) and what is done with it: see the equations above.

    channels: only the first so many latent channels are guided, the others stay conditional; 0 = all. (The code of
        DiT guides 3 of 4.)
    rescale: the share in equation (4).
    start, end: the interval of times in which clips are guided, ends included.
    power: of equation (3); 0 = the same scale at all times.
    """

    scale: float = 1.0
    channels: int = 0
    rescale: float = 0.0
    start: float = 0.0
    end: float = 1.0
    power: float = 0.0

    def __post_init__(self):
        if not abs(self.scale) < float("inf"):
            raise UserError(f"guidance.scale must be a finite number, not {self.scale}.")
        if self.channels < 0:
            raise UserError(f"guidance.channels must be 0 (all) or more, not {self.channels}.")
        if not 0 <= self.rescale <= 1:
            raise UserError(f"guidance.rescale must be from 0 to 1, not {self.rescale}.")
        if not 0 <= self.start <= self.end <= 1:
            raise UserError(f"guidance.start, end must be 0 <= start <= end <= 1, not {self.start}, {self.end}.")
        if not 0 <= self.power < float("inf"):
            raise UserError(f"guidance.power must be 0 (off) or more, not {self.power}.")


def guided(
    config: GuidanceConfig,
    conditional: Denoise,
    unconditional: Denoise,
    scale_BS: ScaleBS,
    segments_BL: SegmentsBL,
    rows_BL: Int[Array, "B L"],
    channels: int,
) -> Denoise:
    """A denoise function that guides every clip by the scale of its slot: equations (1), (3) and (4), float32.

    scale_BS is used, not config.scale. `channels` counts the channels of the latent, the fastest axis of a token.
    rows_BL points every token at its noise-level row. Variance values stay the conditional ones. A clip of scale 1
    gets exactly the conditional prediction.
    """

    def combine(outputs: Sequence[TokensBLP], t_BL1: Array) -> tuple[TokensBLP, Array]:
        w_BL1 = _scale_at(config, scale_BS, segments_BL, t_BL1)
        # Equation (1) as a weighted mean, the form that rounding leaves exact at 0 and 1.
        return w_BL1 * outputs[0] + (1.0 - w_BL1) * outputs[1], w_BL1 == 1.0

    return _guided(config, (conditional, unconditional), combine, segments_BL, rows_BL, channels, scale_BS.shape[1])


def guided_by_two(
    config: GuidanceConfig,
    both: Denoise,
    frames: Denoise,
    neither: Denoise,
    text_scale_BS: ScaleBS,
    frames_scale_BS: ScaleBS,
    segments_BL: SegmentsBL,
    rows_BL: Int[Array, "B L"],
    channels: int,
) -> Denoise:
    """As `guided`, by equation (2): given both conditions, frames alone, and neither.

    With frames_scale 1 it is `guided(both, frames)`; with equal scales, `guided(both, neither)`.
    """

    def combine(outputs: Sequence[TokensBLP], t_BL1: Array) -> tuple[TokensBLP, Array]:
        text_BL1 = _scale_at(config, text_scale_BS, segments_BL, t_BL1)
        frames_BL1 = _scale_at(config, frames_scale_BS, segments_BL, t_BL1)
        out_BLP = text_BL1 * outputs[0] + (frames_BL1 - text_BL1) * outputs[1] + (1.0 - frames_BL1) * outputs[2]
        return out_BLP, (text_BL1 == 1.0) & (frames_BL1 == 1.0)

    slots = text_scale_BS.shape[1]
    return _guided(config, (both, frames, neither), combine, segments_BL, rows_BL, channels, slots)


def rescaled(
    out_BLP: TokensBLP,
    conditional_BLP: TokensBLP,
    share: float,
    members_BLS: Float[Array, "B L S"],
    values_P: Bool[np.ndarray, " P"],
) -> TokensBLP:
    """Equation (4), every value scaled by the factor of its clip.

    The standard deviations are taken over the values of a token that values_P chooses, at least one, in the tokens of
    the clip for which members_BLS is 1.
    """
    ratio_BS = _spread(conditional_BLP, members_BLS, values_P) / _spread(out_BLP, members_BLS, values_P)
    factor_BL1 = jnp.sum(members_BLS * (1.0 + share * (ratio_BS - 1.0))[:, None, :], axis=2)[:, :, None]
    return jnp.where(factor_BL1 > 0, factor_BL1 * out_BLP, out_BLP)


def _guided(
    config: GuidanceConfig,
    functions: Sequence[Denoise],
    combine: Callable[[Sequence[Array], Array], tuple[Array, Array]],
    segments_BL: Array,
    rows_BL: Array,
    channels: int,
    slots: int,
) -> Denoise:
    """What both rules share: `combine` takes predictions and times to the guided prediction and where it is none."""

    def denoise(x_BLP: TokensBLP, t_BR: TimesBR) -> Float[Array, "B L out"]:
        t_BL1 = per_token(t_BR, rows_BL)[:, :, None]
        outputs = [function(x_BLP, t_BR).astype(jnp.float32) for function in functions]
        predictions = [output[:, :, : x_BLP.shape[2]] for output in outputs]
        out_BLP, same_BL1 = combine(predictions, t_BL1)
        guided_P = _first_channels(config.channels, channels, x_BLP.shape[2])
        if config.rescale:
            # Tokens that are given, at time 0, have predictions without a meaning.
            members_BLS = _members(jnp.where(t_BL1[:, :, 0] > 0, segments_BL, 0), slots)
            out_BLP = rescaled(out_BLP, predictions[0], config.rescale, members_BLS, guided_P)
        out_BLP = jnp.where(same_BL1 | ~guided_P[None, None, :], predictions[0], out_BLP)
        return jnp.concatenate([out_BLP, outputs[0][:, :, x_BLP.shape[2] :]], axis=2)

    return denoise


def _scale_at(config: GuidanceConfig, scale_BS: Array, segments_BL: Array, t_BL1: Array) -> Array:
    """The scale of every token: that of its clip, at its time."""
    scale_BL1 = per_token(scale_BS, jnp.maximum(segments_BL - 1, 0))[:, :, None]
    if config.power:
        scale_BL1 = 1.0 + (scale_BL1 - 1.0) * 0.5 * (1.0 - jnp.cos(jnp.pi * (1.0 - t_BL1) ** config.power))
    return jnp.where((t_BL1 >= config.start) & (t_BL1 <= config.end), scale_BL1, 1.0)


def _first_channels(first: int, channels: int, values: int) -> np.ndarray:
    """Which values (P,) of a token are guided; all where `first` is 0."""
    return np.arange(values) % channels < (first or channels)


def _members(segments_BL: Array, slots: int) -> Array:
    """1 where token l belongs to the clip of slot s, float32; padding belongs to none."""
    slots_11S = jnp.arange(1, slots + 1, dtype=segments_BL.dtype)[None, None, :]
    return (segments_BL[:, :, None] == slots_11S).astype(jnp.float32)


def _spread(values_BLP: Array, members_BLS: Array, chosen_P: np.ndarray) -> Array:
    """The standard deviation over the chosen values of every clip; 1 where there is none, (B, S)."""
    count_BS = jnp.maximum(jnp.sum(members_BLS, axis=1) * float(chosen_P.sum()), 1.0)
    mean_BS = _clip_sums(values_BLP, members_BLS, chosen_P) / count_BS
    mean_BL = jnp.sum(mean_BS[:, None, :] * members_BLS, axis=2)
    variance_BS = _clip_sums(jnp.square(values_BLP - mean_BL[:, :, None]), members_BLS, chosen_P) / count_BS
    return jnp.where(variance_BS > 0, jnp.sqrt(jnp.where(variance_BS > 0, variance_BS, 1.0)), 1.0)


def _clip_sums(values_BLP: Array, members_BLS: Array, chosen_P: np.ndarray) -> Array:
    chosen_BLP = jnp.where(chosen_P[None, None, :], values_BLP, 0.0)
    return jnp.sum(jnp.sum(chosen_BLP, axis=2)[:, :, None] * members_BLS, axis=1)
