"""Layers over images (I, H, W, D): 2-D convolution, group normalisation, nearest-neighbour enlargement.

Images of many sizes may share one canvas: a mask (I, H, W, 1) says which pixels belong to each. What lies outside is
then as if it were not there, so that an image has the same result on every canvas. A mesh shares out images, whole.
"""

import jax
import jax.numpy as jnp

from sora_jax.nn.params import ParamSpec, lecun, ones, zeros
from sora_jax.parallel.rules import out_sharding

IMAGES = ("batch", "picture", "picture", "channels")


def conv2d_specs(inputs: int, outputs: int, size: int = 3) -> dict:
    """Weight (size, size, inputs, outputs), LeCun normal, and a zero bias."""
    axes = ("kernel", "kernel", "conv_in", "conv_out")
    return {
        "weight": ParamSpec((size, size, inputs, outputs), axes, lecun((0, 1, 2), 3)),
        "bias": ParamSpec((outputs,), ("conv_out",), zeros),
    }


def conv2d(params: dict, x_IHWD: jax.Array, mask: jax.Array | None = None, stride: int = 1) -> jax.Array:
    """(I, H, W, inputs) -> (I, H / stride, W / stride, outputs) in the dtype of x, with zeros beyond the edge.

    An odd kernel with stride 1 has the same number of zeros on every side; with stride 2 and a kernel of 3 there is
    one row below and one column on the right (the downsampling of 2112.10752, official code).
    """
    weight, bias = params["weight"].astype(x_IHWD.dtype), params["bias"].astype(x_IHWD.dtype)
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
    """A gain of 1 and a bias of 0 for each channel."""
    return {"gain": ParamSpec((width,), ("channels",), ones), "bias": ParamSpec((width,), ("channels",), zeros)}


def group_norm(
    params: dict, x_IHWD: jax.Array, groups: int, mask: jax.Array | None = None, eps: float = 1e-6
) -> jax.Array:
    """Zero mean and unit variance over pixels and channels of each of `groups`, in float32 (1803.08494)."""
    x32 = x_IHWD.astype(jnp.float32)
    x32 = x32 - _group_mean(x32, groups, mask)
    x32 = x32 * jax.lax.rsqrt(_group_mean(jnp.square(x32), groups, mask) + eps)
    return (x32 * params["gain"] + params["bias"]).astype(x_IHWD.dtype)


def _group_mean(x_IHWD: jax.Array, groups: int, mask: jax.Array | None) -> jax.Array:
    """The mean over the pixels of the mask and the channels of a group, at each channel: (I, 1, 1, D)."""
    images, *_, width = x_IHWD.shape
    if mask is None:
        mean_ID = x_IHWD.mean((1, 2))
    else:
        mean_ID = jnp.where(mask, x_IHWD, 0).sum((1, 2)) / mask.sum((1, 2))
    mean_IGD = jnp.reshape(mean_ID, (images, groups, width // groups), out_sharding=out_sharding("batch", None, None))
    mean_IGD = jnp.broadcast_to(mean_IGD.mean(-1, keepdims=True), mean_IGD.shape)
    return jnp.reshape(mean_IGD, (images, 1, 1, width), out_sharding=out_sharding(*IMAGES))


def upsample_nearest(x_IHWD: jax.Array) -> jax.Array:
    """Every pixel four times: (I, H, W, D) -> (I, 2 H, 2 W, D)."""
    images, height, width, channels = x_IHWD.shape
    x = jnp.broadcast_to(x_IHWD[:, :, None, :, None], (images, height, 2, width, 2, channels))
    return jnp.reshape(x, (images, 2 * height, 2 * width, channels), out_sharding=out_sharding(*IMAGES))
