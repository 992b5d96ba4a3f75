"""Encode images to Gaussian latents and back by the autoencoder of latent diffusion (2112.10752, appendix G).

The frames of a clip are independent images: nothing is compressed or mixed in time. With 4 latent channels this is the
autoencoder of Stable Diffusion and DiT, with 16 and without `quant` that of SD3 (2403.03206).

A mesh splits the batch of images. Each image is whole on one device, because group norms and the attention in the
middle depend on all of it; images that are too large for a device are processed in tiles (`models.tiling`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from sora_jax.config import check, choose
from sora_jax.models.autoencoder import LOGVAR_RANGE
from sora_jax.nn.images import (
    IMAGES,
    attend_in_images,
    conv2d,
    conv2d_specs,
    group_norm,
    group_norm_specs,
    to_clips,
    to_images,
    upsample_conv2d,
)
from sora_jax.nn.layers import compute_dtype, dense, dense_specs
from sora_jax.nn.past import Past


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """Sizes and loss of the image autoencoder. The loss is that of `AutoencoderConfig`.

    Each level has half the height and width of the one before.
    """

    latent_channels: int = 4  # C, channels of a latent
    widths: tuple[int, ...] = (128, 256, 512, 512)  # channels of each level, finest first
    blocks: int = 2  # residual blocks of each level of the encoder; the decoder has one more
    groups: int = 32  # of the group normalisation; divides all widths
    quant: bool = True  # convolutions of kernel size 1 after the encoder and before the decoder
    l1_weight: float = 1.0  # of the mean absolute error in the loss
    l2_weight: float = 0.0  # of the mean squared error in the loss
    kl_weight: float = 1e-6  # of the KL divergence of the posterior from a standard normal in the loss
    remat: bool = False  # recompute blocks in the backward pass, to save memory
    dtype: str = "auto"  # of activations: "float32", "bfloat16" or "auto" (`nn.layers.compute_dtype`)

    name: Literal["kl"] = "kl"  # tells this autoencoder from others in files

    def __post_init__(self):
        for name in ("latent_channels", "blocks", "groups"):
            value = getattr(self, name)
            check(value > 0, f"model.{name} is {value}; it must be positive")
        for name in ("l1_weight", "l2_weight", "kl_weight"):
            value = getattr(self, name)
            check(value >= 0, f"model.{name} is {value}; it must be 0 or more")
        check(
            bool(self.widths) and all(width > 0 and width % self.groups == 0 for width in self.widths),
            f"model.widths is {self.widths}; each must be a multiple of model.groups = {self.groups}",
        )
        choose("model.dtype", self.dtype, {"auto": 0, "float32": 0, "bfloat16": 0})

    @property
    def time_factor(self) -> int:
        """Return the frames to a latent frame: time is not compressed."""
        return 1

    @property
    def space_factor(self) -> int:
        """Return the pixels to a latent position, in height and in width."""
        return 2 ** (len(self.widths) - 1)


def latent_fields(config: KLConfig) -> tuple[str, ...]:
    """Return the names of the fields that change a latent of given weights and pixels, for its fingerprint.

    A field that is added later joins only where it departs from what the network did before, so that fingerprints of
    older autoencoders stay as they are.
    """
    return "latent_channels", "widths", "blocks", "groups", "quant"


def latent_grid(config: KLConfig, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Return the size (t, h, w) of a clip's latent: t = frames, height = f h, width = f w.

    Raises:
        UserError: the clip has another size; the sentence names the nearest.
    """
    check(frames > 0, f"frames is {frames}; it must be positive")
    factor = config.space_factor
    for name, size in (("height", height), ("width", width)):
        below = size - size % factor
        nearest = f"{below} or {below + factor}" if below else str(factor)
        check(size == below > 0, f"{name} is {size}; it must be a positive multiple of {factor}, such as {nearest}")
    return frames, height // factor, width // factor


def receptive_field(config: KLConfig, direction: str) -> tuple[int, float]:
    """Return (0, inf): a frame depends on no other, and each of its positions on all of them."""
    return 0, math.inf


def autoencoder_specs(config: KLConfig) -> dict:
    """Declare all parameters: {"encoder", "decoder"}, and {"quant", "post_quant"} if `config.quant`."""
    latent = config.latent_channels
    quant = {"quant": conv2d_specs(2 * latent, 2 * latent, 1), "post_quant": conv2d_specs(latent, latent, 1)}
    return {"encoder": encoder_specs(config), "decoder": decoder_specs(config)} | (quant if config.quant else {})


def encoder_specs(config: KLConfig) -> dict:
    """Declare the parameters of `encode`."""
    widths = config.widths
    return {
        "stem": conv2d_specs(3, widths[0]),
        "levels": [level_specs(*pair, config.blocks) for pair in zip((widths[0], *widths), widths)],
        "downs": [conv2d_specs(width, width) for width in widths[:-1]],
        "middle": middle_specs(widths[-1]),
        "norm": group_norm_specs(widths[-1]),
        "head": conv2d_specs(widths[-1], 2 * config.latent_channels),
    }


def encode(
    params: dict, config: KLConfig, video_BTHWC: jax.Array, sizes_B2: jax.Array | None = None, past: Past | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return mean and log variance of the posterior, float32, each (B, T, h, w, C).

    Args:
        params: the tree that `autoencoder_specs` declares.
        config: that of the autoencoder.
        video_BTHWC: (B, T, H, W, 3) in [-1, 1]; H = f h, W = f w.
        sizes_B2: height and width of each clip in the top left corner of its frames. Pixels outside reach neither
            convolutions nor norms nor attention: the latent of a clip's own part is that of the clip alone.
        past: not read, because frames are independent: a chunk is encoded as a clip.

    Raises:
        UserError: the video has another size.
    """
    latent_grid(config, *video_BTHWC.shape[1:4])
    p = params["encoder"]
    clips, frames, height, width, _ = video_BTHWC.shape
    padded = height, width
    sizes_I2 = None if sizes_B2 is None else to_images(sizes_B2[:, None].repeat(frames, 1))
    x = to_images(video_BTHWC.astype(compute_dtype(config.dtype)))
    mask = _mask(sizes_I2, padded, x)
    x = conv2d(p["stem"], x, mask)
    for number, blocks in enumerate(p["levels"]):
        if number:
            x = conv2d(p["downs"][number - 1], x, mask, stride=2)
            mask = _mask(sizes_I2, padded, x)
        x = _level(blocks, config, x, mask)
    x = _middle(p["middle"], config, x, mask)
    x = conv2d(p["head"], jax.nn.silu(group_norm(p["norm"], x, config.groups, mask)), mask)
    x = conv2d(params["quant"], x) if config.quant else x
    mean, logvar = jnp.split(to_clips(x, (clips, frames)).astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(logvar, *LOGVAR_RANGE)


def decoder_specs(config: KLConfig) -> dict:
    """Declare the parameters of `decode`."""
    widths = config.widths[::-1]
    return {
        "stem": conv2d_specs(config.latent_channels, widths[0]),
        "middle": middle_specs(widths[0]),
        "levels": [level_specs(*pair, config.blocks + 1) for pair in zip((widths[0], *widths), widths)],
        "ups": [conv2d_specs(width, width) for width in widths[:-1]],
        "norm": group_norm_specs(widths[-1]),
        "head": conv2d_specs(widths[-1], 3),
    }


def decode(
    params: dict, config: KLConfig, z_BthwC: jax.Array, sizes_B2: jax.Array | None = None, past: Past | None = None
) -> jax.Array:
    """Decode latents: (B, T, h, w, C) -> (B, T, f h, f w, 3) float32, about [-1, 1], not clipped.

    `sizes_B2` are height and width, in pixels, of each clip in the top left corner of its frames: see `encode`.
    """
    clips, frames, height, width, channels = z_BthwC.shape
    check(
        channels == config.latent_channels,
        f"latents have {channels} channels; this autoencoder decodes {config.latent_channels}",
    )
    p = params["decoder"]
    padded = height * config.space_factor, width * config.space_factor
    sizes_I2 = None if sizes_B2 is None else to_images(sizes_B2[:, None].repeat(frames, 1))
    x = to_images(z_BthwC.astype(compute_dtype(config.dtype)))
    mask = _mask(sizes_I2, padded, x)
    x = conv2d(params["post_quant"], x) if config.quant else x
    x = _middle(p["middle"], config, conv2d(p["stem"], x, mask), mask)
    for number, blocks in enumerate(p["levels"]):
        if number:
            x = upsample_conv2d(p["ups"][number - 1], x, mask)
            mask = _mask(sizes_I2, padded, x)
        x = _level(blocks, config, x, mask)
    x = conv2d(p["head"], jax.nn.silu(group_norm(p["norm"], x, config.groups, mask)), mask)
    return to_clips(x, (clips, frames)).astype(jnp.float32)


def level_specs(inputs: int, outputs: int, blocks: int) -> list[dict]:
    """Declare residual blocks, the first of which changes the width."""
    return [block_specs(inputs if i == 0 else outputs, outputs) for i in range(blocks)]


def _level(blocks: list[dict], config: KLConfig, x_IHWD: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    run: Callable = functools.partial(block, groups=config.groups)
    run = jax.checkpoint(run) if config.remat else run
    for p in blocks:
        x_IHWD = run(p, x_IHWD, mask)
    return x_IHWD


def block_specs(inputs: int, outputs: int) -> dict:
    """Declare a residual block, with a convolution of kernel size 1 as its shortcut if the width changes."""
    specs = {
        "norm1": group_norm_specs(inputs),
        "conv1": conv2d_specs(inputs, outputs),
        "norm2": group_norm_specs(outputs),
        "conv2": conv2d_specs(outputs, outputs),
    }
    return specs if inputs == outputs else specs | {"shortcut": conv2d_specs(inputs, outputs, 1)}


def block(p: dict, x_IHWD: jax.Array, mask: jax.Array | None = None, *, groups: int) -> jax.Array:
    """Add to x, projected to the new width if that changes, twice norm, SiLU, convolution."""
    y = conv2d(p["conv1"], jax.nn.silu(group_norm(p["norm1"], x_IHWD, groups, mask)), mask)
    y = conv2d(p["conv2"], jax.nn.silu(group_norm(p["norm2"], y, groups, mask)), mask)
    return (conv2d(p["shortcut"], x_IHWD) if "shortcut" in p else x_IHWD) + y


def middle_specs(width: int) -> dict:
    """Declare the middle of encoder and decoder: block, attention, block. Checkpoints name its projection `merge`."""
    projections = {name: dense_specs(width, width, ("conv_in", "conv_out")) for name in ("q", "k", "v", "merge")}
    attention = {"norm": group_norm_specs(width), **projections}
    return {"first": block_specs(width, width), "attention": attention, "second": block_specs(width, width)}


def _middle(p: dict, config: KLConfig, x_IHWD: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Apply a block, attention of one head among all positions of an image, and a block."""
    x_IHWD = _level([p["first"]], config, x_IHWD, mask)
    with jax.named_scope("attention"):
        y = group_norm(p["attention"]["norm"], x_IHWD, config.groups, mask)
        q, k, v = (dense(p["attention"][name], y, IMAGES) for name in ("q", "k", "v"))
        x_IHWD += dense(p["attention"]["merge"], attend_in_images(q, k, v, mask), IMAGES)
    return _level([p["second"]], config, x_IHWD, mask)


def _mask(sizes_I2: jax.Array | None, padded: tuple[int, int], x_IHWD: jax.Array) -> jax.Array | None:
    """Return the mask (I, H, W, 1) of the images in x; their sizes are in pixels of the `padded` (height, width)."""
    if sizes_I2 is None:
        return None
    rows, columns = (
        (jnp.arange(side) * whole)[None] < sizes_I2[:, axis, None] * side
        for axis, (side, whole) in enumerate(zip(x_IHWD.shape[1:3], padded, strict=True))
    )
    return (rows[:, :, None] & columns[:, None, :])[..., None]
