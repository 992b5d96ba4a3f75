"""Encode clips to Gaussian latents and back by a causal video autoencoder (1312.6114; MAGVIT-v2 2310.05737).

An image is a clip of one frame and has the same latent as the first frame of a clip. A latent frame depends on no later
frame, and a decoded frame on no later latent.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.config import check, choose
from sora_jax.nn.conv import causal_conv3d, causal_conv3d_specs, depth_to_space, space_to_depth, spread
from sora_jax.nn.layers import compute_dtype, rms_norm, rms_norm_specs
from sora_jax.nn.params import zeros

POINT = (1, 1, 1)
LOGVAR_RANGE = (-30.0, 20.0)  # keeps exp(logvar) finite, as in latent diffusion (2112.10752, official code)


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Compression, sizes and loss of the causal video autoencoder.

    Level i has `width * multipliers[i]` channels. The compression that `patch` leaves is done by factors of 2 between
    levels: in space from the first level on, in time up to the last. The loss is `l1_weight` L1 + `l2_weight` L2 +
    `kl_weight` KL, each a mean over its elements.
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

    def __post_init__(self):
        for name in ("latent_channels", "width", "encoder_blocks", "decoder_blocks", "multipliers", "patch"):
            value = getattr(self, name)
            check(_positive(value), f"model.{name} is {value}; it must be positive")
        for name in ("l1_weight", "l2_weight", "kl_weight"):
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

    @property
    def factors(self) -> tuple[int, int]:
        """Return the compression in (time, space)."""
        return self.time_factor, self.space_factor

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the channels of each level, finest first."""
        return tuple(self.width * m for m in self.multipliers)

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

    A field that is added later joins only where it departs from what the network did before, so that fingerprints of
    older autoencoders stay as they are.
    """
    return (
        "time_factor",
        "space_factor",
        "latent_channels",
        "patch",
        "width",
        "multipliers",
        "encoder_blocks",
        "kernels",
    )


def latent_grid(config: AutoencoderConfig, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Return the size (t, h, w) of a clip's latent: frames = 1 + f_t (t - 1), height = f_s h, width = f_s w.

    Raises:
        UserError: the clip has another size; the sentence names the nearest.
    """
    time, space = config.factors
    _check_size("frames", frames, time, 1)
    _check_size("height", height, space, 0)
    _check_size("width", width, space, 0)
    return 1 + (frames - 1) // time, height // space, width // space


def _check_size(name: str, size: int, factor: int, rest: int) -> None:
    smallest = rest or factor
    below = max(size - (size - rest) % factor, smallest)
    nearest = str(below) if size < smallest else f"{below} or {below + factor}"
    rule = f"1 + a multiple of {factor}" if rest else f"a positive multiple of {factor}"
    check(size >= smallest and size == below, f"{name} is {size}; it must be {rule}, such as {nearest}")


def receptive_field(config: AutoencoderConfig, direction: str) -> tuple[int, int]:
    """Return the radius of the receptive field of "encode" or "decode": (backward in time, both ways in space).

    It is the distance, in latent positions, of the farthest input that one output depends on. Time gets one extra
    latent because a clip's first latent covers a single frame.
    """
    blocks = {"encode": config.encoder_blocks, "decode": config.decoder_blocks}[direction]
    pixels = np.cumprod([config.first_block, *config.steps], axis=0)[:, :2]  # (time, space) of a position of each level
    radius = np.array([(time - 1, max(space) // 2) for time, *space in config.kernels])  # of each convolution
    total = (pixels * blocks * radius.sum(0)).sum(0) + (pixels[0] + pixels[-1]) * radius[0]
    time, space = (-(-total // config.factors)).tolist()
    return time + 1, space


def autoencoder_specs(config: AutoencoderConfig) -> dict:
    """Declare all parameters: {"encoder", "decoder"}."""
    return {"encoder": encoder_specs(config), "decoder": decoder_specs(config)}


def encoder_specs(config: AutoencoderConfig) -> dict:
    """Declare the parameters of `encode`."""
    widths = config.widths
    kernel = config.kernels[0]
    return {
        "stem": causal_conv3d_specs(3 * math.prod(config.first_block), widths[0], kernel),
        "levels": [[block_specs(config, width) for _ in range(config.encoder_blocks)] for width in widths],
        "downs": [
            causal_conv3d_specs(math.prod(step) * fine, coarse, POINT)
            for step, fine, coarse in zip(config.steps, widths, widths[1:], strict=False)
        ],
        "norm": rms_norm_specs(widths[-1], ("channels",)),
        "head": causal_conv3d_specs(widths[-1], 2 * config.latent_channels, kernel),
    }


def encode(
    params: dict, config: AutoencoderConfig, video_BTHWC: jax.Array, sizes_B2: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return mean and log variance of the posterior, float32, each (B, t, h, w, C).

    Args:
        params: the tree that `autoencoder_specs` declares.
        config: that of the autoencoder.
        video_BTHWC: (B, T, H, W, 3) in [-1, 1]; T = 1 + f_t (t - 1), H = f_s h, W = f_s w.
        sizes_B2: height and width of each clip in the top left corner of its frames, so that clips of several sizes
            share one compiled program. The latent of a clip's own part is that of the clip alone.

    Raises:
        UserError: the video has another size.
    """
    latent_grid(config, *video_BTHWC.shape[1:4])
    p = params["encoder"]
    _, _, height, width, _ = video_BTHWC.shape
    # Zeros outside of a clip after every convolution are what a convolution sees beyond the edge of the clip alone.
    inside = functools.partial(_inside, sizes_B2, (height, width))
    x = inside(space_to_depth(video_BTHWC.astype(compute_dtype(config.dtype)), config.first_block))
    x = _blocks(p["levels"][0], config, inside(causal_conv3d(p["stem"], x)), inside)
    for step, down, blocks in zip(config.steps, p["downs"], p["levels"][1:], strict=True):
        x = _blocks(blocks, config, inside(causal_conv3d(down, space_to_depth(x, step))), inside)
    x = causal_conv3d(p["head"], jax.nn.silu(rms_norm(p["norm"], x)))
    mean, logvar = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(logvar, *LOGVAR_RANGE)


def _inside(sizes_B2: jax.Array | None, padded: tuple[int, int], x_BTHWC: jax.Array) -> jax.Array:
    """Set x to zero outside of the clips' own sizes, which are in pixels of frames of the `padded` (height, width)."""
    if sizes_B2 is None:
        return x_BTHWC
    rows, columns = (
        (jnp.arange(side) * whole)[None] < sizes_B2[:, axis, None] * side
        for axis, (side, whole) in enumerate(zip(x_BTHWC.shape[2:4], padded, strict=True))
    )
    mask = rows[:, None, :, None, None] & columns[:, None, None, :, None]
    return jnp.where(spread(mask), x_BTHWC, 0)


def decoder_specs(config: AutoencoderConfig) -> dict:
    """Declare the parameters of `decode`."""
    widths = config.widths[::-1]
    kernel = config.kernels[0]
    return {
        "stem": causal_conv3d_specs(config.latent_channels, widths[0], kernel),
        "levels": [[block_specs(config, width) for _ in range(config.decoder_blocks)] for width in widths],
        "ups": [
            causal_conv3d_specs(coarse, math.prod(step) * fine, POINT)
            for step, coarse, fine in zip(config.steps[::-1], widths, widths[1:], strict=False)
        ],
        "norm": rms_norm_specs(widths[-1], ("channels",)),
        "head": causal_conv3d_specs(widths[-1], 3 * math.prod(config.first_block), kernel),
    }


def decode(params: dict, config: AutoencoderConfig, z_BthwC: jax.Array) -> jax.Array:
    """Decode latents: (B, t, h, w, C) -> (B, 1 + f_t (t - 1), f_s h, f_s w, 3) float32, about [-1, 1], not clipped."""
    channels = z_BthwC.shape[-1]
    check(
        channels == config.latent_channels,
        f"latents have {channels} channels; this autoencoder decodes {config.latent_channels}",
    )
    p = params["decoder"]
    x = causal_conv3d(p["stem"], z_BthwC.astype(compute_dtype(config.dtype)))
    x = _blocks(p["levels"][0], config, x)
    for step, up, blocks in zip(config.steps[::-1], p["ups"], p["levels"][1:], strict=True):
        x = _blocks(blocks, config, depth_to_space(causal_conv3d(up, x), step))
    x = causal_conv3d(p["head"], jax.nn.silu(rms_norm(p["norm"], x)))
    return depth_to_space(x, config.first_block).astype(jnp.float32)


def block_specs(config: AutoencoderConfig, width: int) -> list[dict]:
    """Declare a residual block of constant width, whose last convolution is zero at the start."""
    inits = [None] * (len(config.kernels) - 1) + [zeros]
    convs = [causal_conv3d_specs(width, width, *part) for part in zip(config.kernels, inits, strict=True)]
    return [{"norm": rms_norm_specs(width, ("channels",)), "conv": conv} for conv in convs]


def block(p: list[dict], x_BTHWC: jax.Array, inside: Callable[[jax.Array], jax.Array] = lambda y: y) -> jax.Array:
    """Add to x a chain of norm, SiLU, convolution; the norm is over the channels of one position, so it is causal.

    `inside` is applied to the output of each convolution.
    """
    y = x_BTHWC
    for part in p:
        y = inside(causal_conv3d(part["conv"], jax.nn.silu(rms_norm(part["norm"], y))))
    return x_BTHWC + y


def _blocks(
    parts: list, config: AutoencoderConfig, x_BTHWC: jax.Array, inside: Callable[[jax.Array], jax.Array] = lambda y: y
) -> jax.Array:
    run: Callable = functools.partial(block, inside=inside)
    run = jax.checkpoint(run) if config.remat else run
    for p in parts:
        x_BTHWC = run(p, x_BTHWC)
    return x_BTHWC
