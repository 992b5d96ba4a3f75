"""Apply the layers of the causal video autoencoder: residual blocks, norms, attention in frames, and shortcuts.

None of them reaches a later frame. Clips of several sizes may be padded to one shape: what is outside of a clip has no
influence, and a convolution sees zeros there, as beyond the edge of a frame.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.nn.conv import causal_conv3d, causal_conv3d_specs
from sora_jax.nn.images import IMAGES, attend_in_images, to_clips, to_images
from sora_jax.nn.layers import dense, dense_specs, rms_norm, rms_norm_specs
from sora_jax.nn.params import ParamSpec, lecun, zeros
from sora_jax.nn.past import Past, spread

Kernel = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Pass:
    """Hold what all layers of one pass share.

    sizes_B2: height and width of each clip in the top left corner of its frames, in pixels; None: all of the frames.
    padded: height and width of the frames, in pixels.
    past: the frames before a chunk; None: the clip is whole.
    frame_norm: normalise whole frames in place of the channels of each position.
    remat: recompute blocks in the backward pass.
    """

    sizes_B2: jax.Array | None
    padded: tuple[int, int]
    past: Past | None
    frame_norm: bool = False
    remat: bool = False

    def conv(self, p: dict, x_BTHWC: jax.Array) -> jax.Array:
        """Convolve. Zeros outside of a clip are what a convolution sees beyond the edge of the clip alone."""
        return self.inside(causal_conv3d(p, x_BTHWC, self.past))

    def inside(self, x_BTHWC: jax.Array) -> jax.Array:
        """Set x to zero outside of the clips' own sizes."""
        mask = self.mask(x_BTHWC)
        return x_BTHWC if mask is None else jnp.where(mask, x_BTHWC, 0)

    def mask(self, x_BTHWC: jax.Array) -> jax.Array | None:
        """Return the mask (B, 1, H, W, 1) of the clips' own positions at the resolution of x."""
        if self.sizes_B2 is None:
            return None
        rows, columns = (
            (jnp.arange(side) * whole)[None] < self.sizes_B2[:, axis, None] * side
            for axis, (side, whole) in enumerate(zip(x_BTHWC.shape[2:4], self.padded, strict=True))
        )
        return spread(rows[:, None, :, None, None] & columns[:, None, None, :, None])

    def norm(self, scale: jax.Array, x_BTHWC: jax.Array) -> jax.Array:
        """Normalise; never over time, so the network stays causal."""
        if self.frame_norm:
            return self.inside(_frame_norm(scale, x_BTHWC, self.mask(x_BTHWC)))
        return rms_norm(scale, x_BTHWC)

    def blocks(self, parts: list, x_BTHWC: jax.Array) -> jax.Array:
        """Apply residual blocks."""
        run: Callable = partial(block, self)
        # A cache is collected while a block is traced, which `jax.checkpoint` would do apart.
        run = jax.checkpoint(run) if self.remat and self.past is None else run
        for p in parts:
            x_BTHWC = run(p, x_BTHWC)
        return x_BTHWC


def _frame_norm(scale: jax.Array, x_BTHWC: jax.Array, mask: jax.Array | None, eps: float = 1e-6) -> jax.Array:
    """Normalise each frame to mean 0 and variance 1 over positions and channels, in float32 (1803.08494, one group)."""
    x32 = x_BTHWC.astype(jnp.float32)
    if mask is None:
        mean = lambda x: x.mean((2, 3, 4), keepdims=True)  # noqa: E731
    else:
        count = mask.sum((2, 3, 4), keepdims=True) * x_BTHWC.shape[-1]
        mean = lambda x: jnp.where(mask, x, 0).sum((2, 3, 4), keepdims=True) / count  # noqa: E731
    x32 = x32 - mean(x32)
    x32 = x32 * jax.lax.rsqrt(mean(jnp.square(x32)) + eps)
    return (x32 * jax.lax.broadcast_to_rank(scale, x32.ndim)).astype(x_BTHWC.dtype)


def zero_conv_specs(specs: dict, bias: Callable = zeros) -> dict:
    """Return the specs of a convolution whose weight is zero at the start."""
    return {name: dataclasses.replace(s, init=zeros if name == "weight" else bias) for name, s in specs.items()}


def block_specs(width: int, kernels: tuple[Kernel, ...]) -> list[dict]:
    """Declare a residual block of constant width, whose last convolution is zero at the start."""
    inits = [None] * (len(kernels) - 1) + [zeros]
    convs = [causal_conv3d_specs(width, width, *part) for part in zip(kernels, inits, strict=True)]
    return [{"norm": rms_norm_specs(width, ("channels",)), "conv": conv} for conv in convs]


def block(this: Pass, p: list[dict], x_BTHWC: jax.Array) -> jax.Array:
    """Add to x a chain of norm, SiLU, convolution."""
    y = x_BTHWC
    for part in p:
        y = this.conv(part["conv"], jax.nn.silu(this.norm(part["norm"], y)))
    return x_BTHWC + y


def attention_specs(width: int) -> dict:
    """Declare attention with one head of full width, whose output is zero at the start."""
    axes = ("conv_in", "conv_out")
    projections = {name: dense_specs(width, width, axes) for name in ("q", "k", "v")}
    return {
        "norm": rms_norm_specs(width, ("channels",)),
        **projections,
        "out": dense_specs(width, width, axes, init=zeros),
    }


def attention(this: Pass, p: dict, x_BTHWC: jax.Array) -> jax.Array:
    """Add to x attention among all positions of a frame."""
    with jax.named_scope("attention"):
        y, mask = to_images(this.norm(p["norm"], x_BTHWC)), this.mask(x_BTHWC)
        if mask is not None:
            mask = to_images(jnp.broadcast_to(mask, (*x_BTHWC.shape[:4], 1)))
        q, k, v = (dense(p[name], y, IMAGES) for name in ("q", "k", "v"))
        y = dense(p["out"], attend_in_images(q, k, v, mask), IMAGES)
        return x_BTHWC + this.inside(spread(to_clips(y, (x_BTHWC.shape[0], x_BTHWC.shape[1]))))


def shortcut_matrix(inputs: int, outputs: int, block: int = 1, down: bool = True) -> np.ndarray:
    """Return the matrix (inputs, outputs) of a shortcut: means of groups of channels or, to more channels, copies.

    The inputs (`down`) or the outputs are channels of `block` positions, position first (as `space_to_depth` makes
    them); groups are then of one channel's positions first, and of neighbouring channels after that.
    """
    count = max(inputs, outputs)
    rows, columns = np.arange(inputs), np.arange(outputs)
    by_channel = np.arange(inputs if down else outputs).reshape(block, -1).T.ravel()
    rows, columns = (by_channel, columns) if down else (rows, by_channel)
    matrix, pair = np.zeros((inputs, outputs), np.float32), np.arange(count)
    matrix[rows[pair * inputs // count], columns[pair * outputs // count]] = min(outputs / inputs, 1.0)
    return matrix


def shortcut(x_BTHWC: jax.Array, channels: int) -> jax.Array:
    """Return means of groups of channels, or copies of channels: (B, T, H, W, C) -> (B, T, H, W, channels)."""
    return pointwise(jnp.asarray(shortcut_matrix(x_BTHWC.shape[-1], channels)), jnp.zeros(channels), x_BTHWC)


def linear_specs(inputs: int, outputs: int, center: int) -> dict:
    """Declare a linear path: a matrix, and the center of what is on its side 0 (inputs) or 1 (outputs).

    The names keep it from weight decay and from optimizers of weights: it starts where it should be.
    """
    axes = ("conv_in", "conv_out")
    return {
        "matrix": ParamSpec((inputs, outputs), axes, lecun()),
        "center": ParamSpec(((inputs, outputs)[center],), axes[center : center + 1], zeros),
    }


def pointwise(matrix: jax.Array, bias: jax.Array, x_BTHWC: jax.Array) -> jax.Array:
    """Multiply the channels of every position by a matrix and add a bias, in the dtype of x."""
    return causal_conv3d({"weight": matrix[None, None, None], "bias": bias}, x_BTHWC)


def with_shortcut(p: dict, block: int, down: bool) -> dict:
    """Add a shortcut to a convolution of kernel size 1: the sum of the two is one product."""
    inputs, outputs = p["weight"].shape[-2:]
    matrix = shortcut_matrix(inputs, outputs, block, down)
    return p | {"weight": p["weight"] + jnp.asarray(matrix)[None, None, None]}
