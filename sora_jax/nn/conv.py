"""Causal 3-D convolution, and folding of small blocks of a video into channels and back.

Videos are (B, T, H, W, C). A frame depends on no later frame: before the first frame stand copies of it, so
that an image is a clip of one frame, and a still clip looks the same at every time (CogVideoX, 2408.06072).
"""

import jax
import jax.numpy as jnp

from sora_jax.nn.params import ParamSpec, lecun, zeros
from sora_jax.parallel.rules import out_sharding


def repeat_first(x_BTHWC: jax.Array, copies: int) -> jax.Array:
    """The clip with `copies` copies of its first frame before it: (B, copies + T, H, W, C)."""
    return jnp.concatenate([x_BTHWC[:, :1]] * copies + [x_BTHWC], axis=1)


def causal_conv3d_specs(inputs: int, outputs: int, kernel: tuple[int, int, int], init=None) -> dict:
    """Weight (kernel t, y, x, inputs, outputs), LeCun normal unless `init` is given, and a zero bias."""
    axes = ("kernel", "kernel", "kernel", "conv_in", "conv_out")
    return {
        "weight": ParamSpec((*kernel, inputs, outputs), axes, init or lecun()),
        "bias": ParamSpec((outputs,), ("conv_out",), zeros),
    }


def causal_conv3d(params: dict, x_BTHWC: jax.Array) -> jax.Array:
    """Stride 1, same size: in time repeats of the first frame stand in front, in space zeros around.

    (B, T, H, W, inputs) -> (B, T, H, W, outputs) in the dtype of x. MAGVIT-v2, 2310.05737, section 3.2.
    """
    weight = params["weight"].astype(x_BTHWC.dtype)
    padded = repeat_first(x_BTHWC, weight.shape[0] - 1)
    with jax.named_scope("causal_conv3d"):
        y = jax.lax.platform_dependent(padded, weight, cpu=_sum_over_taps, default=_convolution)
    return y + params["bias"].astype(x_BTHWC.dtype)


def _convolution(padded, weight) -> jax.Array:
    """One 3-D convolution, valid in time."""
    _, height, breadth = weight.shape[:3]
    return jax.lax.conv_general_dilated(
        padded,
        weight,
        window_strides=(1, 1, 1),
        padding=((0, 0), _same(height), _same(breadth)),
        dimension_numbers=("NTHWC", "THWIO", "NTHWC"),
    )


def _sum_over_taps(padded, weight) -> jax.Array:
    """The same as a sum of 2-D convolutions: on CPUs two to three times as fast as XLA's 3-D convolution."""
    taps = weight.shape[0]
    frames = padded.shape[1] - taps + 1
    return sum(_frames_conv2d(padded[:, k : k + frames], weight[k]) for k in range(taps))


def _frames_conv2d(x_BTHWC, weight) -> jax.Array:
    """Every frame convolved with one 2-D kernel; a kernel of one pixel is a matrix product."""
    height, breadth, inputs, outputs = weight.shape
    if height == breadth == 1:
        axes = out_sharding("batch", "time", "height", "breadth", "channels")
        return jnp.einsum("bthwi,io->bthwo", x_BTHWC, weight[0, 0], out_sharding=axes)
    images = x_BTHWC.reshape(-1, *x_BTHWC.shape[2:])
    images = jax.lax.conv_general_dilated(
        images, weight, (1, 1), (_same(height), _same(breadth)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return _reshape(images, (*x_BTHWC.shape[:-1], outputs))


def _same(size: int) -> tuple[int, int]:
    return (size - 1) // 2, size // 2


def fold(x_BTHWC: jax.Array, block: tuple[int, int, int]) -> jax.Array:
    """Blocks of (time, height, width) into channels, block axes before C; repeats of frame 0 stand in front.

    (B, 1 + pt (t - 1), ph h, pw w, C) -> (B, t, h, w, pt ph pw C): the first frame fills its own block alone.
    Inverse: `unfold`. Space to depth, Shi et al. 1609.05158; causal in time as in Cosmos, 2501.03575.
    """
    pt, ph, pw = block
    x = repeat_first(x_BTHWC, pt - 1)
    B, T, H, W, C = x.shape
    x = _reshape(x, (B, T // pt, pt, H // ph, ph, W // pw, pw, C))
    x = jnp.transpose(x, (0, 1, 3, 5, 2, 4, 6, 7))
    return _reshape(x, (B, T // pt, H // ph, W // pw, pt * ph * pw * C))


def unfold(x_BthwC: jax.Array, block: tuple[int, int, int]) -> jax.Array:
    """Inverse of `fold`: (B, t, h, w, pt ph pw C) -> (B, 1 + pt (t - 1), ph h, pw w, C).

    Of the first block only the last frame is kept, the one that `fold` did not add.
    """
    pt, ph, pw = block
    B, t, h, w, C = x_BthwC.shape
    x = _reshape(x_BthwC, (B, t, h, w, pt, ph, pw, C // (pt * ph * pw)))
    x = jnp.transpose(x, (0, 1, 4, 2, 5, 3, 6, 7))
    x = _reshape(x, (B, t * pt, h * ph, w * pw, C // (pt * ph * pw)))
    return x[:, pt - 1 :]


def _reshape(x, shape) -> jax.Array:
    """A reshape that leaves the batch split and everything else whole."""
    return jnp.reshape(x, shape, out_sharding=out_sharding("batch", *(None,) * (len(shape) - 1)))
