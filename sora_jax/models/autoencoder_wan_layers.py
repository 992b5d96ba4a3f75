"""Apply the layers of Wan's autoencoder (2503.20314): blocks, attention, resampling in space and time, and shortcuts.

They are causal. A clip is taken whole, or in chunks of whole groups of frames, those of a latent (`nn.past`). The first
group of a clip is a single frame: a clip that is whole has no others, and those that fill up a chunk are zero wherever
a convolution sees them, as is everything before a clip.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp

from sora_jax.models.autoencoder_layers import Pass
from sora_jax.nn.conv import causal_conv3d, causal_conv3d_specs, depth_to_space, space_to_depth
from sora_jax.nn.images import IMAGES, attend_in_images, conv2d, conv2d_specs, to_clips, to_images, upsample_conv2d
from sora_jax.nn.layers import dense, dense_specs, rms_norm, rms_norm_specs
from sora_jax.nn.params import zeros
from sora_jax.nn.past import clip_axes, spread
from sora_jax.parallel.rules import out_sharding

Step = tuple[int, int, int]  # change of resolution (time, height, width) between one level and the next

POINT, CUBE, LINE = (1, 1, 1), (3, 3, 3), (3, 1, 1)  # kernels (time, height, width)
EPS = 1e-12  # of the norms, which divide by the length of a vector: it only keeps zeros at zero


@dataclasses.dataclass(frozen=True)
class WanPass(Pass):
    """Hold what all layers of one pass share.

    latents: those of the clip or chunk, in time.
    """

    latents: int = 1

    def group(self, x_BTHWC: jax.Array) -> int:
        """Return the frames of the first latent at the rate of x: one if the clip is whole."""
        return 1 if self.past is None else x_BTHWC.shape[1] // self.latents

    def first(self, beginning: jax.Array, going_on: jax.Array) -> jax.Array:
        """Select by clip: `beginning` for those that begin, else `going_on`."""
        return beginning if self.past is None else self.past.where_first(beginning, going_on)

    def inside(self, x_BTHWC: jax.Array) -> jax.Array:
        """Set x to zero outside of the clips, in space and before they begin."""
        return self.from_frame(super().inside(x_BTHWC), self.group(x_BTHWC) - 1)

    def from_frame(self, x_BTHWC: jax.Array, start: int) -> jax.Array:
        """Set the first `start` frames of clips that begin to zero."""
        if start == 0:
            return x_BTHWC
        return self.first(jnp.concatenate([jnp.zeros_like(x_BTHWC[:, :start]), x_BTHWC[:, start:]], axis=1), x_BTHWC)

    def conv(self, p: dict, x_BTHWC: jax.Array) -> jax.Array:
        """Convolve causally, with zeros outside of the clips."""
        return causal_conv3d(p, self.inside(x_BTHWC), self.past, zeros=True)

    def conv2d(self, p: dict, x_BTHWC: jax.Array, stride: int = 1, upsample: bool = False) -> jax.Array:
        """Convolve each frame, after nearest-neighbour upsampling if `upsample`."""
        images = to_images(self.inside(x_BTHWC))
        images = upsample_conv2d(p, images) if upsample else conv2d(p, images, stride=stride)
        return _frames_of(images, x_BTHWC)

    def norm(self, scale: jax.Array, x_BTHWC: jax.Array) -> jax.Array:
        """Normalise the channels of each position."""
        return rms_norm(scale, x_BTHWC, EPS)

    def blocks(self, parts: list, x_BTHWC: jax.Array) -> jax.Array:
        """Apply residual blocks."""
        # A cache is collected while a block is traced, which `jax.checkpoint` would do apart.
        run = jax.checkpoint(partial(block, self)) if self.remat and self.past is None else partial(block, self)
        for p in parts:
            x_BTHWC = run(p, x_BTHWC)
        return x_BTHWC


def _frames_of(images: jax.Array, x_BTHWC: jax.Array) -> jax.Array:
    """Return the images as frames of the clips of x."""
    clips, frames, *_ = x_BTHWC.shape
    return spread(to_clips(images, (clips, frames)))


def level_specs(inputs: int, outputs: int, blocks: int) -> list[dict]:
    """Declare residual blocks, the first of which changes the width."""
    return [block_specs(inputs if i == 0 else outputs, outputs) for i in range(blocks)]


def block_specs(inputs: int, outputs: int) -> dict:
    """Declare a residual block, with a convolution of kernel size 1 as its shortcut if the width changes."""
    specs = {
        "norm1": rms_norm_specs(inputs, ("channels",)),
        "conv1": causal_conv3d_specs(inputs, outputs, CUBE),
        "norm2": rms_norm_specs(outputs, ("channels",)),
        "conv2": causal_conv3d_specs(outputs, outputs, CUBE),
    }
    return specs if inputs == outputs else specs | {"shortcut": causal_conv3d_specs(inputs, outputs, POINT)}


def block(this: WanPass, p: dict, x_BTHWC: jax.Array) -> jax.Array:
    """Add to x, projected to the new width if that changes, twice norm, SiLU, convolution."""
    y = this.conv(p["conv1"], jax.nn.silu(this.norm(p["norm1"], x_BTHWC)))
    y = this.conv(p["conv2"], jax.nn.silu(this.norm(p["norm2"], y)))
    return y + (causal_conv3d(p["shortcut"], x_BTHWC) if "shortcut" in p else spread(x_BTHWC))


def middle_specs(width: int) -> dict:
    """Declare the middle of encoder and decoder: block, attention, block."""
    axes = ("conv_in", "conv_out")
    attention = {
        "norm": rms_norm_specs(width, ("channels",)),
        "qkv": dense_specs(width, 3 * width, axes),
        "out": dense_specs(width, width, axes, init=zeros),
    }
    return {"first": block_specs(width, width), "attention": attention, "second": block_specs(width, width)}


def middle(this: WanPass, p: dict, x_BTHWC: jax.Array) -> jax.Array:
    """Apply a block, attention of one head among all positions of a frame, and a block."""
    x_BTHWC = this.blocks([p["first"]], x_BTHWC)
    with jax.named_scope("attention"):
        mask = this.mask(x_BTHWC)
        if mask is not None:
            mask = to_images(jnp.broadcast_to(mask, (*x_BTHWC.shape[:4], 1)))
        images = to_images(this.norm(p["attention"]["norm"], x_BTHWC))
        q, k, v = jnp.split(dense(p["attention"]["qkv"], images, IMAGES), 3, axis=-1)
        y = dense(p["attention"]["out"], attend_in_images(q, k, v, mask), IMAGES)
        x_BTHWC += _frames_of(y, x_BTHWC)
    return this.blocks([p["second"]], x_BTHWC)


def down_specs(width: int, step: Step) -> dict:
    """Declare a convolution in space and, if the step halves the frame rate, one in time."""
    specs = {"space": conv2d_specs(width, width)}
    return specs | ({"time": causal_conv3d_specs(width, width, LINE)} if step[0] == 2 else {})


def downsample(this: WanPass, p: dict, x_BTHWC: jax.Array) -> jax.Array:
    """Halve height and width and, with weights for time, the frame rate; a clip's first frame has no part in that."""
    x = this.conv2d(p["space"], x_BTHWC, stride=2)
    if "time" not in p:
        return x
    extended = x if this.past is None else this.past.extend(x, 1, zeros=True)
    count = (extended.shape[1] - 1) // 2
    if count == 0:  # an image
        return x
    # A convolution with stride 2 as a product: the three frames of each window side by side.
    windows = jnp.concatenate([extended[:, k : k + 2 * count - 1 : 2] for k in range(LINE[0])], axis=-1)
    weight = jnp.reshape(p["time"]["weight"], (*POINT, windows.shape[-1], -1))
    y = causal_conv3d(p["time"] | {"weight": weight}, windows)
    if this.past is None:
        return jnp.concatenate([x[:, :1], y], axis=1)
    group = this.group(x)
    return this.first(jnp.concatenate([x[:, 1:group:2], y[:, group // 2 :]], axis=1), y)


def up_specs(width: int, outputs: int, step: Step) -> dict:
    """Declare a convolution in space and, if the step doubles the frame rate, one in time."""
    specs = {"space": conv2d_specs(width, outputs)}
    return specs | ({"time": causal_conv3d_specs(width, 2 * width, LINE)} if step[0] == 2 else {})


def upsample(this: WanPass, p: dict, x_BTHWC: jax.Array) -> jax.Array:
    """Double height and width and, with weights for time, the frame rate; a clip's first frame has no part in that."""
    if "time" in p:
        x_BTHWC = _double_rate(this, p["time"], x_BTHWC)
    return this.conv2d(p["space"], x_BTHWC, upsample=True)


def _double_rate(this: WanPass, p: dict, x_BTHWC: jax.Array) -> jax.Array:
    """Make two frames of each by a convolution in time, to which a clip's first frame is zero."""
    group = this.group(x_BTHWC)
    y = depth_to_space(this.conv(p, this.from_frame(x_BTHWC, group)), (2, 1, 1), this.past)
    head = jnp.repeat(spread(x_BTHWC[:, :group]), 2, axis=1)
    head = head[:, 1:] if this.past is None else head
    return this.first(jnp.concatenate([head, y[:, head.shape[1] :]], axis=1), y)


def group_mean(this: WanPass, x_BTHWC: jax.Array, step: Step, channels: int) -> jax.Array:
    """Move blocks of `step` into channels, and average groups of neighbouring ones: the shortcut down."""
    x = space_to_depth(this.inside(x_BTHWC), (1, *step[1:]))
    if this.past is None:  # the first group has a single frame: zeros before it
        x = jnp.pad(x, [(0, 0), (step[0] - 1, 0), (0, 0), (0, 0), (0, 0)])
    x = jnp.concatenate([x[:, k :: step[0]] for k in range(step[0])], axis=-1)
    return _by_channel(x, math.prod(step), (channels, -1)).mean(-1)


def copies(this: WanPass, x_BTHWC: jax.Array, step: Step, channels: int) -> jax.Array:
    """Repeat channels, and move them into blocks of `step`: the shortcut up, the transpose of `group_mean`."""
    x = jnp.repeat(x_BTHWC, channels * math.prod(step) // x_BTHWC.shape[-1], axis=-1)
    x = _by_channel(x, channels, (math.prod(step) * channels,))
    return depth_to_space(x, step, this.past)


def _by_channel(x_BTHWC: jax.Array, rows: int, shape: tuple[int, ...]) -> jax.Array:
    """Transpose the channels of each position as a matrix of so many rows, and return them in another shape."""
    axes = clip_axes(x_BTHWC.shape[2])[:-1]

    def reshape(x: jax.Array, tail: tuple[int, ...]) -> jax.Array:
        return jnp.reshape(x, (*x_BTHWC.shape[:4], *tail), out_sharding=out_sharding(*axes, *(None,) * len(tail)))

    return reshape(jnp.swapaxes(reshape(x_BTHWC, (rows, -1)), -1, -2), shape)
