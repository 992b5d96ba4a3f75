"""Encode clips to Gaussian latents and back by a causal video autoencoder (1312.6114; MAGVIT-v2 2310.05737).

An image is a clip of one frame and has the same latent as the first frame of a clip. A latent frame depends on no later
frame, and a decoded frame on no later latent. Blocks of frames are folded into channels before causal convolutions, so
that the frames of a block see each other (group-causal convolution, IV-VAE, 2411.06449).
"""

import dataclasses
import math
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.config import check, choose
from sora_jax.models.autoencoder_layers import (
    Pass,
    attention,
    attention_specs,
    block_specs,
    linear_specs,
    pointwise,
    shortcut,
    with_shortcut,
    zero_conv_specs,
)
from sora_jax.models.codes import CodesConfig, channels
from sora_jax.nn.conv import causal_conv3d_specs, depth_to_space, space_to_depth
from sora_jax.nn.layers import compute_dtype, rms_norm_specs
from sora_jax.nn.past import Past

POINT = (1, 1, 1)
LOGVAR_RANGE = (-30.0, 20.0)  # keeps exp(logvar) finite, as in latent diffusion (2112.10752, official code)
LINEAR_LOGVAR = -5.0  # log variance of the posterior where a run starts from a linear codec


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Compression, sizes and loss of the causal video autoencoder.

    Level i has `width * multipliers[i]` channels. The compression that `patch` leaves is done by factors of 2 between
    levels: in space from the first level on, in time up to the last. The loss is `l1_weight` L1 + `l2_weight` L2 +
    `kl_weight` KL, each a mean over its elements, and the terms of `train.reconstruction.LossConfig`.
    """

    time_factor: int = 4  # frames to a latent frame
    space_factor: int = 8  # pixels to a latent position, in height and in width
    latent_channels: int = 16  # C, channels of a latent
    patch: tuple[int, int] = (1, 1)  # (time, space) compression by space to depth before the first convolution
    width: int = 128  # channels that `multipliers` multiply
    multipliers: tuple[int, ...] = (1, 2, 4, 4)  # of `width`, one for each level, finest first
    encoder_blocks: int = 2  # residual blocks of each level of the encoder
    decoder_blocks: int = 3  # residual blocks of each level of the decoder
    kernels: tuple[tuple[int, int, int], ...] = ((3, 3, 3), (3, 3, 3))
    """(time, height, width) of each convolution of a residual block; the first and last layers use the first"""
    l1_weight: float = 1.0  # of the mean absolute error in the loss
    l2_weight: float = 0.0  # of the mean squared error in the loss
    kl_weight: float = 1e-6  # of the KL divergence of the posterior from a standard normal in the loss
    remat: bool = False  # recompute blocks in the backward pass, to save memory
    dtype: str = "auto"  # of activations: "float32", "bfloat16" or "auto" (`nn.layers.compute_dtype`)
    name: Literal["causal"] = "causal"  # tells this autoencoder from others in files
    decoder_width: int = 0  # channels that `multipliers` multiply in the decoder; 0: `width`
    shortcuts: bool = False  # identity paths without parameters over changes of resolution and width (DC-AE 2410.10733)
    linear: bool = False  # a linear path from pixels to latents and back, which a run fits to its data at the start
    norm: Literal["rms", "frame"] = "rms"  # over the channels of a position, or over a whole frame (group norm)
    attention: bool = False  # inside each frame at the coarsest level, with one head
    codes: CodesConfig = CodesConfig()  # discrete latents in place of Gaussian ones

    def __post_init__(self):
        for name in ("latent_channels", "width", "encoder_blocks", "decoder_blocks", "multipliers", "patch"):
            value = getattr(self, name)
            check(_positive(value), f"model.{name} is {value}; it must be positive")
        for name in ("l1_weight", "l2_weight", "kl_weight", "decoder_width"):
            value = getattr(self, name)
            check(value >= 0, f"model.{name} is {value}; it must be 0 or more")
        check(
            bool(self.kernels) and all(_positive(k) and k[1] % 2 and k[2] % 2 for k in self.kernels),
            f"model.kernels is {self.kernels}; it must hold (time, height, width) of each, height and width odd",
        )
        for axis, factor, patch in zip(("time", "space"), self.factors, self.patch, strict=True):
            allowed = [patch * 2**n for n in range(len(self.multipliers))]
            check(
                factor in allowed,
                f"model.{axis}_factor is {factor}; with a {axis} patch of {patch} and "
                f"{len(allowed)} multipliers it must be one of {', '.join(map(str, allowed))}",
            )
        choose("model.dtype", self.dtype, {"auto": 0, "float32": 0, "bfloat16": 0})
        channels(self.codes, self.latent_channels)
        values = 3 * math.prod(self.block)
        check(
            not self.linear or self.latent_channels <= values,
            f"model.latent_channels is {self.latent_channels}; with model.linear it must be at most {values}, the "
            "values of a block",
        )
        if self.shortcuts:
            self._check_shortcuts()

    def _check_shortcuts(self) -> None:
        """Raise a UserError unless the wider side of every shortcut is a multiple of the narrower one."""
        for side, widths in (("encoder", self.widths), ("decoder", self.decoder_widths)):
            steps = zip(self.steps, widths, widths[1:], strict=False)
            pairs = [(math.prod(step) * fine, coarse) for step, fine, coarse in steps]
            bottleneck = [] if self.linear else [(widths[-1], self.latent_channels)]  # the linear path is one
            for one, other in [*pairs, *bottleneck]:
                check(
                    max(one, other) % min(one, other) == 0,
                    f"model.shortcuts is True; one of the {side} joins {one} and {other} channels; one must be "
                    "a multiple of the other: change model.width, model.multipliers or model.latent_channels",
                )

    @property
    def factors(self) -> tuple[int, int]:
        """Return the compression in (time, space)."""
        return self.time_factor, self.space_factor

    @property
    def block(self) -> tuple[int, int, int]:
        """Return the block (time, height, width) of pixels that a latent position stands for."""
        return self.time_factor, self.space_factor, self.space_factor

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the channels of each level of the encoder, finest first."""
        return tuple(self.width * m for m in self.multipliers)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Return the channels of each level of the decoder, finest first."""
        return tuple((self.decoder_width or self.width) * m for m in self.multipliers)

    @property
    def first_block(self) -> tuple[int, int, int]:
        """Return the block (time, height, width) of the space to depth before the first convolution."""
        time, space = self.patch
        return time, space, space

    @property
    def steps(self) -> tuple[tuple[int, int, int], ...]:
        """Return the downsampling (time, height, width) between one level and the next, finest first."""
        count = len(self.multipliers) - 1
        in_time, in_space = (round(math.log2(f / p)) for f, p in zip(self.factors, self.patch, strict=True))
        space = [2 if i < in_space else 1 for i in range(count)]
        time = [2 if i >= count - in_time else 1 for i in range(count)]
        return tuple((t, s, s) for t, s in zip(time, space, strict=True))


def _positive(value: int | tuple[int, ...]) -> bool:
    values = value if isinstance(value, tuple) else (value,)
    return bool(values) and min(values) > 0


def latent_fields(config: AutoencoderConfig) -> tuple[str, ...]:
    """Return the names of the fields that change a latent of given weights and pixels, for its fingerprint.

    A field that was added later joins only where it departs from what the network did before, so that fingerprints of
    older autoencoders stay as they are.
    """
    first = ("time_factor", "space_factor", "latent_channels", "patch", "width", "multipliers", "encoder_blocks")
    default = AutoencoderConfig()
    later = ("shortcuts", "linear", "norm", "attention")
    changed = [name for name in later if getattr(config, name) != getattr(default, name)]
    discrete = ["codes.name", "codes.levels"] if config.codes.name != "none" else []
    return (*first, "kernels", *changed, *discrete)


def latent_grid(config: AutoencoderConfig, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Return the size (t, h, w) of a clip's latent: frames = 1 + f_t (t - 1), height = f_s h, width = f_s w.

    Raises:
        UserError: the clip has another size; the sentence names the nearest.
    """
    time, space = config.factors
    check_size("frames", frames, time, 1)
    check_size("height", height, space, 0)
    check_size("width", width, space, 0)
    return 1 + (frames - 1) // time, height // space, width // space


def check_size(name: str, size: int, factor: int, rest: int) -> None:
    """Raise a UserError, with the nearest allowed size, unless the size is `rest` + a multiple of the factor."""
    smallest = rest or factor
    below = max(size - (size - rest) % factor, smallest)
    nearest = str(below) if size < smallest else f"{below} or {below + factor}"
    rule = f"1 + a multiple of {factor}" if rest else f"a positive multiple of {factor}"
    check(size >= smallest and size == below, f"{name} is {size}; it must be {rule}, such as {nearest}")


def receptive_field(config: AutoencoderConfig, direction: str) -> tuple[int, float]:
    """Return the radius of the receptive field of "encode" or "decode": (backward in time, both ways in space).

    It is the distance, in latent positions, of the farthest input that one output depends on. Time gets one extra
    latent because a clip's first latent covers a single frame.
    """
    blocks = {"encode": config.encoder_blocks, "decode": config.decoder_blocks}[direction]
    pixels = np.cumprod([config.first_block, *config.steps], axis=0)[:, :2]  # (time, space) of a position of each level
    radius = np.array([(time - 1, max(space) // 2) for time, *space in config.kernels])  # of each convolution
    total = (pixels * blocks * radius.sum(0)).sum(0) + (pixels[0] + pixels[-1]) * radius[0]
    time, space = (-(-total // config.factors)).tolist()
    return time + 1, math.inf if config.attention or config.norm == "frame" else space


def autoencoder_specs(config: AutoencoderConfig) -> dict:
    """Declare all parameters: {"encoder", "decoder"}."""
    return {"encoder": encoder_specs(config), "decoder": decoder_specs(config)}


def encoder_specs(config: AutoencoderConfig) -> dict:
    """Declare the parameters of `encode`."""
    widths = config.widths
    kernel = config.kernels[0]
    head = causal_conv3d_specs(widths[-1], 2 * config.latent_channels, kernel)
    specs = {
        "stem": causal_conv3d_specs(3 * math.prod(config.first_block), widths[0], kernel),
        "levels": [[block_specs(width, config.kernels) for _ in range(config.encoder_blocks)] for width in widths],
        "downs": [
            causal_conv3d_specs(math.prod(step) * fine, coarse, POINT)
            for step, fine, coarse in zip(config.steps, widths, widths[1:], strict=False)
        ],
        "norm": rms_norm_specs(widths[-1], ("channels",)),
        "head": head,
    }
    if config.attention:
        specs["attention"] = attention_specs(widths[-1])
    if config.linear:
        specs["linear"] = linear_specs(3 * math.prod(config.block), config.latent_channels, center=0)
        specs["head"] = zero_conv_specs(head, partial(_linear_head_bias, config.latent_channels))
    return specs


def _linear_head_bias(channels: int, key: jax.Array, shape: tuple, dtype: jnp.dtype, **_: Any) -> jax.Array:
    return jnp.concatenate([jnp.zeros(channels, dtype), jnp.full(shape[0] - channels, LINEAR_LOGVAR, dtype)])


def encode(
    params: dict,
    config: AutoencoderConfig,
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
        past: the frames before, where the video is a chunk of a clip: T = f_t t, and a clip that begins has its first
            frame f_t times.

    Raises:
        UserError: the video has another size.
    """
    frames, height, width = video_BTHWC.shape[1:4]
    latent_grid(config, frames if past is None else frames - config.time_factor + 1, height, width)
    p = params["encoder"]
    this = Pass(sizes_B2, (height, width), past, config.norm == "frame", config.remat)
    video = this.inside(video_BTHWC.astype(compute_dtype(config.dtype)))
    x = this.conv(p["stem"], space_to_depth(video, config.first_block, past))
    x = this.blocks(p["levels"][0], x)
    for step, down, blocks in zip(config.steps, p["downs"], p["levels"][1:], strict=True):
        x = space_to_depth(x, step, past)
        down = with_shortcut(down, math.prod(step), down=True) if config.shortcuts else down
        x = this.blocks(blocks, this.conv(down, x))
    x = attention(this, p["attention"], x) if config.attention else x
    y = this.conv(p["head"], jax.nn.silu(this.norm(p["norm"], x))).astype(jnp.float32)
    mean, logvar = jnp.split(y, 2, axis=-1)
    if config.linear:
        matrix, center = p["linear"]["matrix"], p["linear"]["center"]
        mean = mean + pointwise(matrix, -center @ matrix, space_to_depth(video, config.block, past)).astype(jnp.float32)
    elif config.shortcuts:
        mean = mean + shortcut(x, config.latent_channels).astype(jnp.float32)
    return mean, jnp.clip(logvar, *LOGVAR_RANGE)


def decoder_specs(config: AutoencoderConfig) -> dict:
    """Declare the parameters of `decode`."""
    widths = config.decoder_widths[::-1]
    kernel = config.kernels[0]
    head = causal_conv3d_specs(widths[-1], 3 * math.prod(config.first_block), kernel)
    specs = {
        "stem": causal_conv3d_specs(config.latent_channels, widths[0], kernel),
        "levels": [[block_specs(width, config.kernels) for _ in range(config.decoder_blocks)] for width in widths],
        "ups": [
            causal_conv3d_specs(coarse, math.prod(step) * fine, POINT)
            for step, coarse, fine in zip(config.steps[::-1], widths, widths[1:], strict=False)
        ],
        "norm": rms_norm_specs(widths[-1], ("channels",)),
        "head": head,
    }
    if config.attention:
        specs["attention"] = attention_specs(widths[0])
    if config.linear:
        specs["linear"] = linear_specs(config.latent_channels, 3 * math.prod(config.block), center=1)
        specs["head"] = zero_conv_specs(head)
    return specs


def decode(
    params: dict,
    config: AutoencoderConfig,
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
    channels = z_BthwC.shape[-1]
    check(
        channels == config.latent_channels,
        f"latents have {channels} channels; this autoencoder decodes {config.latent_channels}",
    )
    p = params["decoder"]
    padded = z_BthwC.shape[2] * config.space_factor, z_BthwC.shape[3] * config.space_factor
    this = Pass(sizes_B2, padded, past, config.norm == "frame", config.remat)
    z = this.inside(z_BthwC.astype(compute_dtype(config.dtype)))
    x = this.conv(p["stem"], z)
    if config.shortcuts and not config.linear:
        x = x + shortcut(z, x.shape[-1])
    x = attention(this, p["attention"], x) if config.attention else x
    x = this.blocks(p["levels"][0], x)
    group = 1  # frames of a latent
    for step, up, blocks in zip(config.steps[::-1], p["ups"], p["levels"][1:], strict=True):
        up = with_shortcut(up, math.prod(step), down=False) if config.shortcuts else up
        x = this.blocks(blocks, depth_to_space(this.conv(up, x), step, past, group))
        group *= step[0]
    x = this.conv(p["head"], jax.nn.silu(this.norm(p["norm"], x)))
    video = depth_to_space(x, config.first_block, past, group)
    if config.linear:
        video = video + depth_to_space(pointwise(p["linear"]["matrix"], p["linear"]["center"], z), config.block, past)
    return video.astype(jnp.float32)


def start_from_linear(params: dict, weight_PC: np.ndarray, center_P: np.ndarray, scale_C: np.ndarray) -> dict:
    """Return the parameters with their linear paths those of a linear codec, such as PCA.

    Args:
        params: of an autoencoder with `config.linear`.
        weight_PC: orthonormal directions of blocks of P pixel values.
        center_P: mean of the blocks.
        scale_C: standard deviation of the blocks along each direction; latents are divided by it.
    """
    matrices = {"encoder": weight_PC / scale_C, "decoder": (weight_PC * scale_C).T}
    linear = {
        side: {"matrix": jnp.asarray(matrix, jnp.float32), "center": jnp.asarray(center_P, jnp.float32)}
        for side, matrix in matrices.items()
    }
    return params | {side: params[side] | {"linear": linear[side]} for side in linear}
