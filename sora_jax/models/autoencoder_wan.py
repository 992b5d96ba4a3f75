"""Encode clips to Gaussian latents and back by the causal video autoencoder of Wan (2503.20314, section 4.1).

It differs from `models.autoencoder` so that published weights fit: before a clip there are zeros, not copies of its
first frame; the first frame skips all changes of the frame rate; and one attention of a single head looks at each frame
of the coarsest level. With `shortcuts` and a `patch` of 2 it is the autoencoder of Wan 2.2 (5B).
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from sora_jax.config import check, choose
from sora_jax.models.autoencoder import LOGVAR_RANGE, check_size
from sora_jax.models.autoencoder_wan_layers import (
    CUBE,
    POINT,
    Step,
    WanPass,
    copies,
    down_specs,
    downsample,
    group_mean,
    level_specs,
    middle,
    middle_specs,
    up_specs,
    upsample,
)
from sora_jax.nn.conv import causal_conv3d, causal_conv3d_specs, depth_to_space, space_to_depth
from sora_jax.nn.layers import compute_dtype, rms_norm_specs
from sora_jax.nn.past import Past

Level = tuple[int, int, Step]  # channels before, channels after, and the change of resolution behind the level


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Sizes and loss of Wan's autoencoder. The loss is that of `AutoencoderConfig`.

    Level i has `width * multipliers[i]` channels, and half the height and width of the level before.
    """

    latent_channels: int = 16  # C, channels of a latent
    width: int = 96  # channels that `multipliers` multiply in the encoder
    decoder_width: int = 96  # channels that `multipliers` multiply in the decoder
    multipliers: tuple[int, ...] = (1, 2, 4, 4)  # of the widths, one for each level, finest first
    blocks: int = 2  # residual blocks of each level of the encoder; the decoder has one more
    temporal_downsample: tuple[bool, ...] = (False, True, True)  # halve the frame rate behind each level but the last
    patch: int = 1  # side of the squares of pixels that are moved into channels before the first convolution
    shortcuts: bool = False  # identity paths without parameters around each level (Wan 2.2)
    l1_weight: float = 1.0  # of the mean absolute error in the loss
    l2_weight: float = 0.0  # of the mean squared error in the loss
    kl_weight: float = 1e-6  # of the KL divergence of the posterior from a standard normal in the loss
    remat: bool = False  # recompute blocks in the backward pass, to save memory
    dtype: str = "auto"  # of activations: "float32", "bfloat16" or "auto" (`nn.layers.compute_dtype`)

    name: Literal["wan"] = "wan"  # tells this autoencoder from others in files

    def __post_init__(self):
        for name in ("latent_channels", "width", "decoder_width", "blocks", "patch"):
            value = getattr(self, name)
            check(value > 0, f"model.{name} is {value}; it must be positive")
        for name in ("l1_weight", "l2_weight", "kl_weight"):
            value = getattr(self, name)
            check(value >= 0, f"model.{name} is {value}; it must be 0 or more")
        check(
            bool(self.multipliers) and min(self.multipliers) > 0,
            f"model.multipliers is {self.multipliers}; it must hold a positive number for each level",
        )
        check(
            len(self.temporal_downsample) == len(self.multipliers) - 1,
            f"model.temporal_downsample is {self.temporal_downsample}; it must have {len(self.multipliers) - 1} "
            f"entries, one less than model.multipliers",
        )
        choose("model.dtype", self.dtype, {"auto": 0, "float32": 0, "bfloat16": 0})
        check(
            self.shortcuts or self.decoder_width % 2 == 0,
            f"model.decoder_width is {self.decoder_width}; without model.shortcuts it must be even",
        )
        for wide, narrow in self._joined:
            check(
                wide % narrow == 0,
                f"model.shortcuts is True; one of them joins {wide} and {narrow} channels; the first must be a "
                "multiple of the second: change model.multipliers",
            )

    @property
    def _joined(self) -> list[tuple[int, int]]:
        """Return the channels on both sides of each shortcut, the finer side's gathered to the coarser resolution."""
        pairs = [(fine * math.prod(step), coarse) for fine, coarse, step in self.encoder_levels]
        pairs += [(fine * math.prod(step), coarse) for coarse, fine, step in self.decoder_levels[:-1]]
        return pairs if self.shortcuts else []

    @property
    def steps(self) -> tuple[Step, ...]:
        """Return the downsampling (time, height, width) behind each level, finest first; none behind the last."""
        return *((2 if time else 1, 2, 2) for time in self.temporal_downsample), POINT

    @property
    def encoder_levels(self) -> list[Level]:
        """Return the levels of the encoder, finest first."""
        widths = [self.width * m for m in (1, *self.multipliers)]
        return list(zip(widths, widths[1:], self.steps, strict=False))

    @property
    def decoder_levels(self) -> list[Level]:
        """Return the levels of the decoder, coarsest first. Without shortcuts, upsampling halves the channels."""
        widths = [self.decoder_width * m for m in (self.multipliers[-1], *self.multipliers[::-1])]
        share = 1 if self.shortcuts else 2
        inputs = [widths[0], *(width // share for width in widths[1:])]
        return list(zip(inputs, widths[1:], (*self.steps[-2::-1], POINT), strict=False))

    @property
    def time_factor(self) -> int:
        """Return the frames to a latent frame."""
        return 2 ** sum(self.temporal_downsample)

    @property
    def space_factor(self) -> int:
        """Return the pixels to a latent position, in height and in width."""
        return self.patch * 2 ** (len(self.multipliers) - 1)


def latent_fields(config: WanConfig) -> tuple[str, ...]:
    """Return the names of the fields that change a latent of given weights and pixels, for its fingerprint.

    A field that is added later joins only where it departs from what the network did before, so that fingerprints of
    older autoencoders stay as they are.
    """
    return "latent_channels", "width", "multipliers", "blocks", "temporal_downsample", "patch", "shortcuts"


def latent_grid(config: WanConfig, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Return the size (t, h, w) of a clip's latent: frames = 1 + f_t (t - 1), height = f_s h, width = f_s w.

    Raises:
        UserError: the clip has another size; the sentence names the nearest.
    """
    time, space = config.time_factor, config.space_factor
    check_size("frames", frames, time, 1)
    check_size("height", height, space, 0)
    check_size("width", width, space, 0)
    return 1 + (frames - 1) // time, height // space, width // space


def receptive_field(config: WanConfig, direction: str) -> tuple[int, float]:
    """Return the radius of the receptive field of "encode" or "decode": (backward in time, both ways in space).

    It is the distance, in latent positions, of the farthest input that one output depends on. Space is infinite: all
    positions of a frame attend to each other. Time gets one extra latent, because a clip's first is a single frame.
    """
    # In frames: each convolution of a block, the stem and the head reach two positions back, as does the one in time of
    # an upsampling, before it doubles the rate; that of a downsampling reaches one back.
    total, rate = 2, 1
    if direction == "encode":
        for _, _, (time, *_) in config.encoder_levels:
            total += 4 * config.blocks * rate + (rate if time == 2 else 0)
            rate *= time
    else:
        for _, _, (time, *_) in config.decoder_levels[::-1]:
            rate *= time
            total += 4 * (config.blocks + 1) * rate + (2 * rate if time == 2 else 0)
    total += (2 * 2 + 1) * 2 * rate  # two blocks of the middle, and the head or stem beside it
    return -(-total // config.time_factor) + 1, math.inf


def autoencoder_specs(config: WanConfig) -> dict:
    """Declare all parameters: {"encoder", "decoder", "quant", "post_quant"}."""
    latent = config.latent_channels
    return {
        "encoder": encoder_specs(config),
        "decoder": decoder_specs(config),
        "quant": causal_conv3d_specs(2 * latent, 2 * latent, POINT),
        "post_quant": causal_conv3d_specs(latent, latent, POINT),
    }


def encoder_specs(config: WanConfig) -> dict:
    """Declare the parameters of `encode`."""
    levels = config.encoder_levels
    width = levels[-1][1]
    return {
        "stem": causal_conv3d_specs(3 * config.patch**2, levels[0][0], CUBE),
        "levels": [level_specs(inputs, outputs, config.blocks) for inputs, outputs, _ in levels],
        "downs": [down_specs(outputs, step) for _, outputs, step in levels[:-1]],
        "middle": middle_specs(width),
        "norm": rms_norm_specs(width, ("channels",)),
        "head": causal_conv3d_specs(width, 2 * config.latent_channels, CUBE),
    }


def encode(
    params: dict,
    config: WanConfig,
    video_BTHWC: jax.Array,
    sizes_B2: jax.Array | None = None,
    past: Past | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return mean and log variance of the posterior, float32, each (B, t, h, w, C).

    Args:
        params: the tree that `autoencoder_specs` declares.
        config: that of the autoencoder.
        video_BTHWC: (B, T, H, W, 3) in [-1, 1]; T = 1 + f_t (t - 1), H = f_s h, W = f_s w.
        sizes_B2: height and width of each clip in the top left corner of its frames, so that clips of several sizes
            share one compiled program. The latent of a clip's own part is that of the clip alone.
        past: the frames before, where the video is a chunk of a clip: T = f_t t, and the first frame of a clip that
            begins is the last of its first f_t. The others are not read.

    Raises:
        UserError: the video has another size.
    """
    frames, height, width = video_BTHWC.shape[1:4]
    latents, _, _ = latent_grid(config, frames if past is None else frames - config.time_factor + 1, height, width)
    p = params["encoder"]
    this = WanPass(sizes_B2, (height, width), past, remat=config.remat, latents=latents)
    x = space_to_depth(video_BTHWC.astype(compute_dtype(config.dtype)), (1, config.patch, config.patch))
    x = this.conv(p["stem"], x)
    for number, (blocks, (_, outputs, step)) in enumerate(zip(p["levels"], config.encoder_levels, strict=True)):
        y = this.blocks(blocks, x)
        y = y if step == POINT else downsample(this, p["downs"][number], y)
        x = y + group_mean(this, x, step, outputs) if config.shortcuts else y
    x = middle(this, p["middle"], x)
    x = causal_conv3d(params["quant"], this.conv(p["head"], jax.nn.silu(this.norm(p["norm"], x))))
    mean, logvar = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(logvar, *LOGVAR_RANGE)


def decoder_specs(config: WanConfig) -> dict:
    """Declare the parameters of `decode`."""
    levels = config.decoder_levels
    width = levels[-1][1]
    return {
        "stem": causal_conv3d_specs(config.latent_channels, levels[0][0], CUBE),
        "middle": middle_specs(levels[0][0]),
        "levels": [level_specs(inputs, outputs, config.blocks + 1) for inputs, outputs, _ in levels],
        "ups": [
            up_specs(outputs, coarser[0], step) for (_, outputs, step), coarser in zip(levels, levels[1:], strict=False)
        ],
        "norm": rms_norm_specs(width, ("channels",)),
        "head": causal_conv3d_specs(width, 3 * config.patch**2, CUBE),
    }


def decode(
    params: dict,
    config: WanConfig,
    z_BthwC: jax.Array,
    sizes_B2: jax.Array | None = None,
    past: Past | None = None,
) -> jax.Array:
    """Decode latents: (B, t, h, w, C) -> (B, 1 + f_t (t - 1), f_s h, f_s w, 3) float32, about [-1, 1], not clipped.

    Args:
        params: the tree that `autoencoder_specs` declares.
        config: that of the autoencoder.
        z_BthwC: latents, not normalised.
        sizes_B2: height and width, in pixels, of each clip in the top left corner of its frames: see `encode`.
        past: the latents before, where these are a chunk of a clip: f_t t frames are returned, and of the first f_t of
            a clip that begins only the last belongs to it.

    Raises:
        UserError: the latents have another number of channels.
    """
    latents, height, width, channels = z_BthwC.shape[1:]
    check(
        channels == config.latent_channels,
        f"latents have {channels} channels; this autoencoder decodes {config.latent_channels}",
    )
    p = params["decoder"]
    padded = height * config.space_factor, width * config.space_factor
    this = WanPass(sizes_B2, padded, past, remat=config.remat, latents=latents)
    x = causal_conv3d(params["post_quant"], z_BthwC.astype(compute_dtype(config.dtype)))
    x = middle(this, p["middle"], this.conv(p["stem"], x))
    for number, (blocks, (_, outputs, step)) in enumerate(zip(p["levels"], config.decoder_levels, strict=True)):
        y = this.blocks(blocks, x)
        if step == POINT:
            x = y
        else:
            y = upsample(this, p["ups"][number], y)
            x = y + copies(this, x, step, outputs) if config.shortcuts else y
    x = this.conv(p["head"], jax.nn.silu(this.norm(p["norm"], x)))
    return depth_to_space(x, (1, config.patch, config.patch)).astype(jnp.float32)
