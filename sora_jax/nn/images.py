"""Apply layers to images (I, H, W, D): 2-D convolution, also after upsampling, group normalisation, attention.

Images of several sizes may be padded to one shape: a mask (I, H, W, 1) marks the pixels that belong to each. Pixels
outside of it have no influence, so that the result of an image is the same in every padded shape. A mesh splits the
batch of images; each image is whole on one device.
"""

import jax
import jax.numpy as jnp

from sora_jax.nn.params import ParamSpec, lecun, ones, zeros
from sora_jax.parallel.rules import out_sharding, reshard

IMAGES = ("batch", "picture", "picture", "channels")
QUERIES_AT_ONCE = 1024  # of the attention in the middle: bounds the memory of its scores for large images
MASKED = -1e30  # score of a masked position: not -inf, as a row of only such scores would have the softmax NaN


def conv2d_specs(inputs: int, outputs: int, size: int = 3) -> dict:
    """Declare a weight (size, size, inputs, outputs), LeCun normal, and a zero bias."""
    axes = ("kernel", "kernel", "conv_in", "conv_out")
    return {
        "weight": ParamSpec((size, size, inputs, outputs), axes, lecun((0, 1, 2), 3)),
        "bias": ParamSpec((outputs,), ("conv_out",), zeros),
    }


def conv2d(params: dict, x_IHWD: jax.Array, mask: jax.Array | None = None, stride: int = 1) -> jax.Array:
    """Convolve with zero padding: (I, H, W, inputs) -> (I, H / stride, W / stride, outputs), in the dtype of x.

    An odd kernel with stride 1 is padded equally on every side; a kernel of 3 with stride 2 by one row below and one
    column on the right (the downsampling of 2112.10752, official code).
    """
    weight = params["weight"].astype(x_IHWD.dtype)
    bias = jax.lax.broadcast_to_rank(params["bias"].astype(x_IHWD.dtype), 4)
    size = weight.shape[0]
    if size == stride == 1:
        axes = out_sharding(*IMAGES)
        return jnp.einsum("ihwd,do->ihwo", x_IHWD, weight[0, 0], out_sharding=axes) + bias
    before = (size - stride) // 2
    pads = ((before, size - stride - before),) * 2
    inside = x_IHWD if mask is None else jnp.where(mask, x_IHWD, 0)
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(inside, weight, (stride, stride), pads, dimension_numbers=numbers) + bias


def group_norm_specs(width: int) -> dict:
    """Declare a scale of 1 (`gain`, as checkpoints name it) and a bias of 0 for each channel."""
    return {"gain": ParamSpec((width,), ("channels",), ones), "bias": ParamSpec((width,), ("channels",), zeros)}


def group_norm(
    params: dict, x_IHWD: jax.Array, groups: int, mask: jax.Array | None = None, eps: float = 1e-6
) -> jax.Array:
    """Normalise the pixels of each of `groups` groups of channels to mean 0, variance 1, in float32 (1803.08494)."""
    x32 = x_IHWD.astype(jnp.float32)
    x32 = x32 - _group_mean(x32, groups, mask)
    x32 = x32 * jax.lax.rsqrt(_group_mean(jnp.square(x32), groups, mask) + eps)
    scale, bias = (jax.lax.broadcast_to_rank(params[name], 4) for name in ("gain", "bias"))
    return (x32 * scale + bias).astype(x_IHWD.dtype)


def _group_mean(x_IHWD: jax.Array, groups: int, mask: jax.Array | None) -> jax.Array:
    """Return each channel's mean over the masked pixels and the channels of its group: (I, 1, 1, D)."""
    images, *_, width = x_IHWD.shape
    if mask is None:
        mean_ID = x_IHWD.mean((1, 2))
    else:
        mean_ID = jnp.where(mask, x_IHWD, 0).sum((1, 2)) / mask.sum((1, 2))
    mean_IGD = jnp.reshape(mean_ID, (images, groups, width // groups), out_sharding=out_sharding("batch", None, None))
    mean_IGD = jnp.broadcast_to(mean_IGD.mean(-1, keepdims=True), mean_IGD.shape)
    return jnp.reshape(mean_IGD, (images, 1, 1, width), out_sharding=out_sharding(*IMAGES))


def upsample_conv2d(params: dict, x_IHWD: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Repeat every pixel in a block of 2 x 2, then convolve by a kernel of 3: (I, H, W, D) -> (I, 2 H, 2 W, outputs).

    Taps that read the same pixel of x are added up first: each of the four pixels of a block then takes a kernel of
    2 x 2, 4 products in place of 9. `mask` is that of x.
    """
    images, height, width, _ = x_IHWD.shape
    inside = x_IHWD if mask is None else jnp.where(mask, x_IHWD, 0)
    rows = [jnp.stack([_quarter(params["weight"], inside, row, column) for column in (0, 1)], 3) for row in (0, 1)]
    y = jnp.stack(rows, axis=2)  # (I, H, 2, W, 2, outputs)
    y = jnp.reshape(y, (images, 2 * height, 2 * width, y.shape[-1]), out_sharding=out_sharding(*IMAGES))
    return y + jax.lax.broadcast_to_rank(params["bias"].astype(y.dtype), 4)


def _quarter(weight: jax.Array, x_IHWD: jax.Array, row: int, column: int) -> jax.Array:
    """Return one of the four pixels of each block, that at (row, column): (I, H, W, outputs)."""
    kernel = _merge_taps(_merge_taps(weight, 0, row), 1, column).astype(x_IHWD.dtype)
    pads = (1 - row, row), (1 - column, column)
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x_IHWD, kernel, (1, 1), pads, dimension_numbers=numbers)


def _merge_taps(weight: jax.Array, axis: int, half: int) -> jax.Array:
    """Add up those of three taps along `axis` by which one half of a doubled pixel reads the same neighbour."""
    before, own, after = jnp.split(weight, 3, axis)
    return jnp.concatenate([own + before, after] if half else [before, own + after], axis)


def attend_in_images(q_IHWD: jax.Array, k_IHWD: jax.Array, v_IHWD: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Attend inside each image with one head of full width, where `mask` (I, H, W, 1) is True: all (I, H, W, D).

    The queries are taken in chunks of rows, so that the memory of the scores is bounded.
    """
    images, height, width, channels = q_IHWD.shape
    rows = next(n for n in range(height, 0, -1) if height % n == 0 and (n == 1 or n * width <= QUERIES_AT_ONCE))
    bias = None if mask is None else jnp.where(mask[:, None, None, :, :, 0], 0.0, MASKED)

    @jax.checkpoint  # the scores of all chunks together are what the chunks avoid: recompute them in the backward pass
    def attend_chunk(q_IrWD: jax.Array) -> jax.Array:
        scores = jnp.einsum("irwd,ihud->irwhu", q_IrWD, k_IHWD, preferred_element_type=jnp.float32) * channels**-0.5
        weights = jax.nn.softmax(scores if bias is None else scores + bias, axis=(-2, -1)).astype(v_IHWD.dtype)
        return jnp.einsum("irwhu,ihud->irwd", weights, v_IHWD)

    if rows == height:
        return attend_chunk(q_IHWD)
    apart = (images, height // rows, rows, width, channels)
    parts = jnp.reshape(q_IHWD, apart, out_sharding=out_sharding(IMAGES[0], None, *IMAGES[1:]))
    out = jnp.moveaxis(jax.lax.map(attend_chunk, jnp.moveaxis(parts, 1, 0)), 0, 1)
    return jnp.reshape(out, q_IHWD.shape, out_sharding=out_sharding(*IMAGES))


def to_images(x: jax.Array) -> jax.Array:
    """Merge clips and frames: (B, T, ...) -> (B T, ...). On a mesh each image is then whole on one device."""
    x = reshard(x, "batch", *(None,) * (x.ndim - 1))
    shape = (x.shape[0] * x.shape[1], *x.shape[2:])
    return jnp.reshape(x, shape, out_sharding=out_sharding("batch", *(None,) * (len(shape) - 1)))


def to_clips(x_IHWD: jax.Array, clips: tuple[int, int]) -> jax.Array:
    """Split clips and frames, `clips` of (B, T): (B T, H, W, D) -> (B, T, H, W, D)."""
    return jnp.reshape(x_IHWD, (*clips, *x_IHWD.shape[1:]), out_sharding=out_sharding("batch", "time", *IMAGES[1:]))
