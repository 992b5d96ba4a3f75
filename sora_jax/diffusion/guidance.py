"""Classifier-free guidance (Ho and Salimans 2207.12598), with a scale for every clip of a pack.

    out = u_uncond + w (u_cond - u_uncond)                                               (1)

It is the same for every type of prediction, since conversions are linear. (The paper's own scale is w - 1.) For a
negative prompt, condition `unconditional` on it. With two conditions, text and given frames, each has its scale (Brooks
et al. 2211.09800, equation 3):

    out = u_none + w_frames (u_frames - u_none) + w_text (u_both - u_frames)             (2)

With a history, the given frames of a clip, its scale adds the difference that the history makes (Diffusion Forcing
Transformer, 2502.06764; `history.without_history`):

    out = u + (w_text - 1) (u - u_negative) + (w_history - 1) (u - u_without)            (5)

All three predictions but u_negative have the caption. So a text scale of 1 needs no negative caption, and then history
scales of 1 and 0 are the model with and without its history; a history scale of 1 is (1).

Scales may depend on time: 1 outside an interval of times (Kynkaanniemi et al. 2404.07724), or growing from 1 at
pure noise to w at the data, t = 0, by a power-cosine schedule (Gao et al. 2303.14389):

    w(t) = 1 + (w - 1) (1 - cos(pi (1 - t)^power)) / 2                                   (3)

Guidance makes predictions larger; they may be rescaled to the standard deviation of the conditional one, clip by clip,
and mixed (Lin et al. 2305.08891, equations 15 and 16):

    out <- (1 - rescale) out + rescale out std(u_cond) / std(out)                        (4)

Where only some channels are guided, (4) is measured over these and applied to these alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sora_jax.config import check
from sora_jax.diffusion.prediction import Denoise
from sora_jax.diffusion.times import per_token
from sora_jax.shapes import PerClipBS, PerTokenBL1, RowsBL, SegmentsBL, TimesBR, TokensBLP


@dataclass(frozen=True)
class GuidanceConfig:
    """Configure classifier-free guidance: equations (1), (3), (4) and (5)."""

    scale: float = 1.0  # guidance scale w of equation (1); 1: no guidance
    channels: int = 0  # guide the first so many latent channels alone, as DiT's code does 3 of 4; 0: all
    rescale: float = 0.0  # share of the rescaling of equation (4), to the deviation of the conditional prediction
    start: float = 0.0  # first time at which clips are guided
    end: float = 1.0  # last time at which clips are guided
    power: float = 0.0  # of the schedule of equation (3), which is weak at noise; 0: the same scale at all times
    history: float = 1.0  # guidance scale by given frames, w_history of equation (5); 1: no guidance by them
    history_level: float = 1.0  # noise level of the given frames that guidance leads away from; 1: pure noise

    def __post_init__(self):
        check(abs(self.scale) < float("inf"), f"guidance.scale is {self.scale}; it must be a finite number")
        check(self.channels >= 0, f"guidance.channels is {self.channels}; it must be 0 (all) or more")
        check(0 <= self.rescale <= 1, f"guidance.rescale is {self.rescale}; it must be from 0 to 1")
        check(0 <= self.end <= 1, f"guidance.end is {self.end}; it must be from 0 to 1")
        check(
            0 <= self.start <= self.end,
            f"guidance.start is {self.start}; it must be from 0 to guidance.end = {self.end}",
        )
        check(0 <= self.power < float("inf"), f"guidance.power is {self.power}; it must be 0 (off) or more, and finite")
        finite = 0 <= self.history < float("inf")
        check(finite, f"--history-guidance is {self.history}; it must be 0 or more, and finite")
        level, without = self.history_level, self.history == 1
        check(0 < level <= 1, f"--history-level is {level}; it must be above 0, to 1")
        check(not without or level == 1, f"--history-level is {level}; it needs a --history-guidance other than 1")


class TokenLayout(NamedTuple):
    """Locate the tokens of packs: their clips, their noise-level rows, and the latent channels of their values."""

    segments_BL: SegmentsBL
    rows_BL: RowsBL
    channels: int  # of the latent, the fastest axis of a token's values


class TwoConditions(NamedTuple):
    """Hold denoise functions for two conditions, text and frames: given both, frames alone, and neither."""

    both: Denoise
    frames: Denoise
    neither: Denoise


class TwoScales(NamedTuple):
    """Hold the guidance scales of two conditions, a number for each clip."""

    text_BS: PerClipBS
    frames_BS: PerClipBS


class HistoryModels(NamedTuple):
    """Hold denoise functions: with history, without, and, where clips are guided by text, with negative captions."""

    history: Denoise
    without: Denoise
    negative: Denoise | None


# Predictions and times -> the guided prediction, and where it is exactly the first of the predictions.
Combine = Callable[[Sequence[TokensBLP], PerTokenBL1], tuple[TokensBLP, Bool[Array, "B L 1"]]]


def guided(
    config: GuidanceConfig, conditional: Denoise, unconditional: Denoise, scale_BS: PerClipBS, layout: TokenLayout
) -> Denoise:
    """Make a denoise function that guides every clip by the scale of its slot: equations (1), (3) and (4), float32.

    scale_BS is used, not config.scale. Variance values stay the conditional ones. A clip of scale 1 gets exactly the
    conditional prediction.
    """

    def combine(outputs: Sequence[TokensBLP], t_BL1: PerTokenBL1) -> tuple[TokensBLP, Bool[Array, "B L 1"]]:
        w_BL1 = _scale_at(config, scale_BS, layout.segments_BL, t_BL1)
        # Equation (1) as a weighted mean, the form that rounding leaves exact at 0 and 1.
        return w_BL1 * outputs[0] + (1.0 - w_BL1) * outputs[1], w_BL1 == 1.0

    return _guided(config, (conditional, unconditional), combine, layout, scale_BS.shape[1])


def guided_by_two(config: GuidanceConfig, models: TwoConditions, scales: TwoScales, layout: TokenLayout) -> Denoise:
    """Make a denoise function that guides by two conditions: equation (2), then (3) and (4) as in `guided`.

    With frames scale 1 it is `guided` by `both` and `frames`; with equal scales, by `both` and `neither`.
    """

    def combine(outputs: Sequence[TokensBLP], t_BL1: PerTokenBL1) -> tuple[TokensBLP, Bool[Array, "B L 1"]]:
        text_BL1, frames_BL1 = (_scale_at(config, scale_BS, layout.segments_BL, t_BL1) for scale_BS in scales)
        out_BLP = text_BL1 * outputs[0] + (frames_BL1 - text_BL1) * outputs[1] + (1.0 - frames_BL1) * outputs[2]
        return out_BLP, (text_BL1 == 1.0) & (frames_BL1 == 1.0)

    return _guided(config, models, combine, layout, scales.text_BS.shape[1])


def guided_by_history(
    config: GuidanceConfig,
    models: HistoryModels,
    scale_BS: PerClipBS,
    history_BL1: Bool[Array, "B L 1"],
    layout: TokenLayout,
) -> Denoise:
    """Make a denoise function that guides by text and by config.history: equation (5), then (3) and (4) as in `guided`.

    scale_BS: of the text. history_BL1: the tokens of the history, for which u_without means nothing.
    """

    def combine(outputs: Sequence[TokensBLP], t_BL1: PerTokenBL1) -> tuple[TokensBLP, Bool[Array, "B L 1"]]:
        history_BS = jnp.full_like(scale_BS, config.history)
        w_BL1 = jnp.where(history_BL1, 1.0, _scale_at(config, history_BS, layout.segments_BL, t_BL1))
        out_BLP, same_BL1 = w_BL1 * outputs[0] + (1.0 - w_BL1) * outputs[1], w_BL1 == 1.0
        if len(outputs) == 2:
            return out_BLP, same_BL1
        text_BL1 = _scale_at(config, scale_BS, layout.segments_BL, t_BL1)
        return out_BLP + (text_BL1 - 1.0) * (outputs[0] - outputs[2]), same_BL1 & (text_BL1 == 1.0)

    chosen = [model for model in models if model is not None]
    return _guided(config, chosen, combine, layout, scale_BS.shape[1])


def rescaled(
    out_BLP: TokensBLP,
    conditional_BLP: TokensBLP,
    share: float,
    members_BLS: Float[Array, "B L S"],
    values_P: Bool[np.ndarray, " P"],
) -> TokensBLP:
    """Scale every value by the factor of its clip: equation (4).

    The standard deviations are taken over the values of a token that values_P chooses, at least one, in the tokens of
    the clip for which members_BLS is 1.
    """
    ratio_BS = _clip_std(conditional_BLP, members_BLS, values_P) / _clip_std(out_BLP, members_BLS, values_P)
    factor_BL1 = jnp.sum(members_BLS * (1.0 + share * (ratio_BS - 1.0))[:, None, :], axis=2)[:, :, None]
    return jnp.where(factor_BL1 > 0, factor_BL1 * out_BLP, out_BLP)


def _guided(
    config: GuidanceConfig, models: Sequence[Denoise], combine: Combine, layout: TokenLayout, slots: int
) -> Denoise:
    """Make a denoise function that combines the predictions of several, then rescales and selects channels."""

    def denoise(x_BLP: TokensBLP, t_BR: TimesBR) -> Float[Array, "B L out"]:
        t_BL1 = per_token(t_BR, layout.rows_BL)[:, :, None]
        first, *others = models
        output = first(x_BLP, t_BR).astype(jnp.float32)
        evaluate = lambda: [model(x_BLP, t_BR).astype(jnp.float32) for model in others]  # noqa: E731
        if config.start > 0 or config.end < 1:
            # At other times every scale is 1, and what the other models say does not count.
            inside_BL1 = (t_BL1 > 0) & (t_BL1 >= config.start) & (t_BL1 <= config.end)
            outputs = [output, *jax.lax.cond(jnp.any(inside_BL1), evaluate, lambda: [output] * len(others))]
        else:
            outputs = [output, *evaluate()]
        predictions = [output[:, :, : x_BLP.shape[2]] for output in outputs]
        out_BLP, same_BL1 = combine(predictions, t_BL1)
        guided_P = _first_channels(config.channels, layout.channels, x_BLP.shape[2])
        if config.rescale:
            # Predictions at tokens that are given, at time 0, mean nothing: leave them out of the statistics.
            members_BLS = _members(jnp.where(t_BL1[:, :, 0] > 0, layout.segments_BL, 0), slots)
            out_BLP = rescaled(out_BLP, predictions[0], config.rescale, members_BLS, guided_P)
        out_BLP = jnp.where(same_BL1 | ~guided_P[None, None, :], predictions[0], out_BLP)
        return jnp.concatenate([out_BLP, outputs[0][:, :, x_BLP.shape[2] :]], axis=2)

    return denoise


def _scale_at(config: GuidanceConfig, scale_BS: PerClipBS, segments_BL: SegmentsBL, t_BL1: PerTokenBL1) -> PerTokenBL1:
    """Return the scale of every token: its clip's, at its time."""
    scale_BL1 = per_token(scale_BS, jnp.maximum(segments_BL - 1, 0))[:, :, None]
    if config.power:
        scale_BL1 = 1.0 + (scale_BL1 - 1.0) * 0.5 * (1.0 - jnp.cos(jnp.pi * (1.0 - t_BL1) ** config.power))
    return jnp.where((t_BL1 >= config.start) & (t_BL1 <= config.end), scale_BL1, 1.0)


def _first_channels(first: int, channels: int, values: int) -> np.ndarray:
    """Mark the values (P,) of a token that are guided; all where `first` is 0."""
    return np.arange(values) % channels < (first or channels)


def _members(segments_BL: Array, slots: int) -> Array:
    """Return 1 where token l belongs to the clip of slot s, float32; padding belongs to none."""
    slots_11S = jnp.arange(1, slots + 1, dtype=segments_BL.dtype)[None, None, :]
    return (segments_BL[:, :, None] == slots_11S).astype(jnp.float32)


def _clip_std(values_BLP: Array, members_BLS: Array, chosen_P: np.ndarray) -> Array:
    """Return the standard deviation (B, S) over the chosen values of every clip; 1 where it is 0."""
    count_BS = jnp.maximum(jnp.sum(members_BLS, axis=1) * float(chosen_P.sum()), 1.0)
    mean_BS = _clip_sums(values_BLP, members_BLS, chosen_P) / count_BS
    mean_BL = jnp.sum(mean_BS[:, None, :] * members_BLS, axis=2)
    variance_BS = _clip_sums(jnp.square(values_BLP - mean_BL[:, :, None]), members_BLS, chosen_P) / count_BS
    return jnp.where(variance_BS > 0, jnp.sqrt(jnp.where(variance_BS > 0, variance_BS, 1.0)), 1.0)


def _clip_sums(values_BLP: Array, members_BLS: Array, chosen_P: np.ndarray) -> Array:
    chosen_BLP = jnp.where(chosen_P[None, None, :], values_BLP, 0.0)
    return jnp.sum(jnp.sum(chosen_BLP, axis=2)[:, :, None] * members_BLS, axis=1)
