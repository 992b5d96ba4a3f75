"""Convolve videos causally, and move blocks of pixels into channels and back.

Videos are (B, T, H, W, C). A frame depends on no later frame: the clip is padded with copies of its first frame, so
that an image is a clip of one frame, and a still clip has the same output at every time (CogVideoX, 2408.06072).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from sora_jax.nn.params import Initializer, ParamSpec, lecun, zeros
from sora_jax.nn.past import Past, clip_axes, spread
from sora_jax.parallel.rules import RULES, on_mesh, out_sharding, partition, parts, reshard

Padding = tuple[tuple[int, int], tuple[int, int]]  # zeros (above, below), (left, right)


def repeat_first(x_BTHWC: jax.Array, copies: int) -> jax.Array:
    """Pad a clip in time with copies of its first frame: (B, T, H, W, C) -> (B, copies + T, H, W, C)."""
    return jnp.concatenate([x_BTHWC[:, :1]] * copies + [x_BTHWC], axis=1)


def causal_conv3d_specs(
    inputs: int, outputs: int, kernel: tuple[int, int, int], init: Initializer | None = None
) -> dict:
    """Declare a weight (kernel t, y, x, inputs, outputs), LeCun normal unless `init` is given, and a zero bias."""
    axes = ("kernel", "kernel", "kernel", "conv_in", "conv_out")
    return {
        "weight": ParamSpec((*kernel, inputs, outputs), axes, init or lecun()),
        "bias": ParamSpec((outputs,), ("conv_out",), zeros),
    }


def causal_conv3d(params: dict, x_BTHWC: jax.Array, past: Past | None = None, zeros: bool = False) -> jax.Array:
    """Convolve with stride 1 and the same output size: (B, T, H, W, inputs) -> (B, T, H, W, outputs), dtype of x.

    The padding is zeros in space and, in time, copies of the first frame (MAGVIT-v2, 2310.05737, section 3.2) or, if
    `zeros`, zeros as well; of a chunk of a clip, the frames before it. On a mesh every device convolves its own clips
    and rows, after a halo exchange with its neighbours.
    """
    copies = params["weight"].shape[0] - 1
    with jax.named_scope("causal_conv3d"):
        if past is not None:
            x_BTHWC, copies = past.extend(x_BTHWC, copies, zeros), 0
        elif zeros:
            unread = max(0, copies + 1 - x_BTHWC.shape[1])  # taps that see nothing but zeros, such as those of an image
            params = params | {"weight": params["weight"][unread:]}
            x_BTHWC, copies = jnp.pad(x_BTHWC, [(0, 0), (copies - unread, 0), (0, 0), (0, 0), (0, 0)]), 0
        if not on_mesh():
            return _padded_conv3d(params, x_BTHWC, _same(params["weight"].shape[1]), copies)
        return _on_each_device(params, spread(x_BTHWC), copies)


def _on_each_device(params: dict, x_BTHWC: jax.Array, copies: int) -> jax.Array:
    """Convolve a clip that is laid out by `spread`."""
    axes = clip_axes(x_BTHWC.shape[2])
    rows = _same(params["weight"].shape[1])
    split = tuple(mesh_axis for name in axes if name for mesh_axis in RULES[name])

    def local(params: dict, x: jax.Array) -> jax.Array:
        # The transpose of this cast is the sum of the weights' gradient over devices. It must stand outside of
        # `platform_dependent`: in its branches several of these collectives could run at the same time.
        params = jax.lax.pcast(params, split, to="varying")
        if parts("height") == 1 or axes[2] is None:
            return _padded_conv3d(params, x, rows, copies)
        return _padded_conv3d(params, halo_exchange(x, *rows), (0, 0), copies)

    whole = jax.tree.map(lambda _: PartitionSpec(), params)
    return jax.shard_map(local, in_specs=(whole, partition(*axes)), out_specs=partition(*axes))(params, x_BTHWC)


def halo_exchange(x_BTHWC: jax.Array, above: int, below: int) -> jax.Array:
    """Extend a device's rows by those of its neighbours, zeros beyond the edge of the clip; inside `jax.shard_map`."""
    before = _halo_rows(x_BTHWC, above, 1)
    after = _halo_rows(x_BTHWC, below, -1)
    return jnp.concatenate([*before[::-1], x_BTHWC, *after], axis=2)


def _halo_rows(x_BTHWC: jax.Array, count: int, step: int) -> list[jax.Array]:
    """Receive `count` rows from the devices above (step 1) or below (step -1), those of the nearest device first."""
    own = x_BTHWC.shape[2]
    devices = parts("height")
    received = []
    for hop in range(-(-count // own)):  # a device may hold fewer rows than the halo has: then ask the next one, too
        rows = min(own, count - hop * own)
        sent = x_BTHWC[:, :, -rows:] if step > 0 else x_BTHWC[:, :, :rows]
        pairs = [(i, i + step * (hop + 1)) for i in range(devices) if 0 <= i + step * (hop + 1) < devices]
        received.append(jax.lax.ppermute(sent, RULES["height"], pairs))  # zeros where nobody sends: the clip's edge
    return received


def _padded_conv3d(params: dict, x_BTHWC: jax.Array, rows: tuple[int, int], copies: int) -> jax.Array:
    """Convolve with `rows` (above, below) of zeros in height, `copies` of the first frame, and zeros in width."""
    weight = params["weight"].astype(x_BTHWC.dtype)
    bias = params["bias"].astype(x_BTHWC.dtype)
    padding = rows, _same(weight.shape[2])
    padded = repeat_first(x_BTHWC, copies)
    y = jax.lax.platform_dependent(
        padded,
        weight,
        cpu=functools.partial(_sum_over_taps, padding=padding),
        default=functools.partial(_convolution, padding=padding),
    )
    return y + jax.lax.broadcast_to_rank(bias, y.ndim)


def _convolution(padded: jax.Array, weight: jax.Array, padding: Padding) -> jax.Array:
    """Convolve by one 3-D convolution, without padding in time."""
    return jax.lax.conv_general_dilated(
        padded,
        weight,
        window_strides=(1, 1, 1),
        padding=((0, 0), *padding),
        dimension_numbers=("NTHWC", "THWIO", "NTHWC"),
    )


def _sum_over_taps(padded: jax.Array, weight: jax.Array, padding: Padding) -> jax.Array:
    """Convolve by a sum of 2-D convolutions: on CPUs two to three times as fast as XLA's 3-D convolution."""
    taps = weight.shape[0]
    frames = padded.shape[1] - taps + 1
    first, *others = (_frames_conv2d(padded[:, k : k + frames], weight[k], padding) for k in range(taps))
    return sum(others, first)


def _frames_conv2d(x_BTHWC: jax.Array, weight: jax.Array, padding: Padding) -> jax.Array:
    """Convolve every frame with one 2-D kernel; a kernel of one pixel is a matrix product."""
    height, breadth = weight.shape[:2]
    if height == breadth == 1:
        return jnp.einsum("bthwi,io->bthwo", x_BTHWC, weight[0, 0])
    images = x_BTHWC.reshape(-1, *x_BTHWC.shape[2:])
    images = jax.lax.conv_general_dilated(images, weight, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return images.reshape(*x_BTHWC.shape[:2], *images.shape[1:])


def _same(size: int) -> tuple[int, int]:
    """Return the padding before and after that keeps the size of an axis."""
    return (size - 1) // 2, size // 2


def space_to_depth(x_BTHWC: jax.Array, block: tuple[int, int, int], past: Past | None = None) -> jax.Array:
    """Move blocks of pixels (pt, ph, pw) into channels: (B, 1 + pt (t - 1), ph h, pw w, C) -> (B, t, h, w, pt ph pw C).

    The channels run block time, height, width, then C. Copies of the first frame fill the first block; a chunk of a
    clip (`past`) has pt t frames, with these copies in it. The inverse is `depth_to_space`. Space to depth: Shi et al.
    1609.05158; causal in time as in Cosmos, 2501.03575.
    """
    pt, ph, pw = block
    # The mesh splits blocks, not rows of pixels: a block that lay on two devices would have to be moved.
    batch, time, height, breadth, channels = axes = clip_axes(x_BTHWC.shape[2] // ph)
    x = repeat_first(reshard(x_BTHWC, *axes), pt - 1 if past is None else 0)
    B, T, H, W, C = x.shape
    apart = batch, time, None, height, None, breadth, None, channels
    x = _reshape(x, (B, T // pt, pt, H // ph, ph, W // pw, pw, C), apart)
    x = jnp.transpose(x, (0, 1, 3, 5, 2, 4, 6, 7))
    return _reshape(x, (B, T // pt, H // ph, W // pw, pt * ph * pw * C), axes)


def depth_to_space(
    x_BthwC: jax.Array, block: tuple[int, int, int], past: Past | None = None, group: int = 1
) -> jax.Array:
    """Invert `space_to_depth`: (B, t, h, w, pt ph pw C) -> (B, 1 + pt (t - 1), ph h, pw w, C).

    Only the last frame of the first block is returned: the others are copies that `space_to_depth` added. Of a chunk of
    a clip (`past`), whose latents have `group` frames in x, all pt t frames are returned, and those of a clip's first
    latent are copies of its last.
    """
    pt, ph, pw = block
    batch, time, height, breadth, channels = axes = clip_axes(x_BthwC.shape[2])
    B, t, h, w, C = x_BthwC.shape
    apart = batch, time, height, breadth, None, None, None, channels
    x = _reshape(reshard(x_BthwC, *axes), (B, t, h, w, pt, ph, pw, C // (pt * ph * pw)), apart)
    x = jnp.transpose(x, (0, 1, 4, 2, 5, 3, 6, 7))
    x = _reshape(x, (B, t * pt, h * ph, w * pw, C // (pt * ph * pw)), axes)
    return spread(x[:, pt - 1 :] if past is None else past.repeat_last_of_first_group(x, pt * group))


def _reshape(x: jax.Array, shape: tuple[int, ...], axes: Sequence[str | None]) -> jax.Array:
    """Reshape `x`; `axes` are the logical axes of the result, which JAX cannot infer where a split axis is merged."""
    return jnp.reshape(x, shape, out_sharding=out_sharding(*axes))
