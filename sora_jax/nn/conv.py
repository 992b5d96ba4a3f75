"""Causal 3-D convolution, and folding of small blocks of a video into channels and back.

Videos are (B, T, H, W, C). A frame depends on no later frame: before the first frame stand copies of it, so
that an image is a clip of one frame, and a still clip looks the same at every time (CogVideoX, 2408.06072).
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from sora_jax.nn.params import ParamSpec, lecun, zeros
from sora_jax.parallel.rules import RULES, on_mesh, out_sharding, partition, parts, reshard


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

    (B, T, H, W, inputs) -> (B, T, H, W, outputs) in the dtype of x. MAGVIT-v2, 2310.05737, section 3.2. On a mesh
    every device convolves the clips and rows that it holds, after its neighbours have sent the rows at their edges.
    """
    with jax.named_scope("causal_conv3d"):
        if not on_mesh():
            return _padded_conv3d(params, x_BTHWC, _same(params["weight"].shape[1]))
        return _on_each_device(params, spread(x_BTHWC))


def _on_each_device(params: dict, x_BTHWC: jax.Array) -> jax.Array:
    """The convolution of a clip as `spread` lays it out."""
    axes, rows = clip_axes(x_BTHWC.shape[2]), _same(params["weight"].shape[1])
    split = tuple(mesh_axis for name in axes if name for mesh_axis in RULES[name])

    def local(params, x):
        # Their gradient is summed over devices here, not in the branch of a platform, where sums could run at once.
        params = jax.lax.pcast(params, split, to="varying")
        if parts("height") == 1 or axes[2] is None:
            return _padded_conv3d(params, x, rows)
        return _padded_conv3d(params, halo_exchange(x, *rows), (0, 0))

    whole = jax.tree.map(lambda _: PartitionSpec(), params)
    return jax.shard_map(local, in_specs=(whole, partition(*axes)), out_specs=partition(*axes))(params, x_BTHWC)


def halo_exchange(x_BTHWC: jax.Array, above: int, below: int) -> jax.Array:
    """A device's rows between those of its neighbours, zeros beyond the edge of the clip; inside `jax.shard_map`."""
    before, after = _edges(x_BTHWC, above, 1), _edges(x_BTHWC, below, -1)
    return jnp.concatenate([*before[::-1], x_BTHWC, *after], axis=2)


def _edges(x_BTHWC: jax.Array, count: int, step: int) -> list[jax.Array]:
    """`count` rows on one side of a device's own, nearest first: from as many devices as it takes to find them."""
    own, devices, found = x_BTHWC.shape[2], parts("height"), []
    for hop in range(-(-count // own)):
        rows = min(own, count - hop * own)
        edge = x_BTHWC[:, :, -rows:] if step > 0 else x_BTHWC[:, :, :rows]
        places = [(i, i + step * (hop + 1)) for i in range(devices) if 0 <= i + step * (hop + 1) < devices]
        found.append(jax.lax.ppermute(edge, RULES["height"], places))  # zeros where nobody sends
    return found


def _padded_conv3d(params: dict, x_BTHWC: jax.Array, rows: tuple[int, int]) -> jax.Array:
    """With `rows` of zeros above and below, and as many columns as the kernel asks for."""
    weight, bias = (params[name].astype(x_BTHWC.dtype) for name in ("weight", "bias"))
    padding = rows, _same(weight.shape[2])
    padded = repeat_first(x_BTHWC, weight.shape[0] - 1)
    ways = {"cpu": _sum_over_taps, "default": _convolution}
    ways = {name: functools.partial(way, padding=padding) for name, way in ways.items()}
    return jax.lax.platform_dependent(padded, weight, **ways) + bias


def _convolution(padded, weight, padding) -> jax.Array:
    """One 3-D convolution, valid in time."""
    return jax.lax.conv_general_dilated(
        padded,
        weight,
        window_strides=(1, 1, 1),
        padding=((0, 0), *padding),
        dimension_numbers=("NTHWC", "THWIO", "NTHWC"),
    )


def _sum_over_taps(padded, weight, padding) -> jax.Array:
    """The same as a sum of 2-D convolutions: on CPUs two to three times as fast as XLA's 3-D convolution."""
    taps = weight.shape[0]
    frames = padded.shape[1] - taps + 1
    return sum(_frames_conv2d(padded[:, k : k + frames], weight[k], padding) for k in range(taps))


def _frames_conv2d(x_BTHWC, weight, padding) -> jax.Array:
    """Every frame convolved with one 2-D kernel; a kernel of one pixel is a matrix product."""
    height, breadth = weight.shape[:2]
    if height == breadth == 1:
        return jnp.einsum("bthwi,io->bthwo", x_BTHWC, weight[0, 0])
    images = x_BTHWC.reshape(-1, *x_BTHWC.shape[2:])
    images = jax.lax.conv_general_dilated(images, weight, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return images.reshape(*x_BTHWC.shape[:2], *images.shape[1:])


def _same(size: int) -> tuple[int, int]:
    return (size - 1) // 2, size // 2


def clip_axes(rows: int) -> tuple[str | None, ...]:
    """The logical axes of clips of so many rows: whole in height where the mesh cannot share the rows out evenly."""
    return "batch", "time", None if rows % parts("height") else "height", "breadth", "channels"


def spread(x_BTHWC: jax.Array) -> jax.Array:
    """Clips laid out by their `clip_axes`; unchanged where no mesh is set."""
    return reshard(x_BTHWC, *clip_axes(x_BTHWC.shape[2]))


def space_to_depth(x_BTHWC: jax.Array, block: tuple[int, int, int]) -> jax.Array:
    """Blocks of (time, height, width) into channels, block axes before C; repeats of frame 0 stand in front.

    (B, 1 + pt (t - 1), ph h, pw w, C) -> (B, t, h, w, pt ph pw C): the first frame fills its own block alone.
    Inverse: `depth_to_space`. Space to depth, Shi et al. 1609.05158; causal in time as in Cosmos, 2501.03575.
    """
    pt, ph, pw = block
    batch, time, height, breadth, channels = axes = clip_axes(x_BTHWC.shape[2] // ph)
    x = repeat_first(reshard(x_BTHWC, *axes), pt - 1)
    B, T, H, W, C = x.shape
    apart = batch, time, None, height, None, breadth, None, channels
    x = _reshape(x, (B, T // pt, pt, H // ph, ph, W // pw, pw, C), apart)
    x = jnp.transpose(x, (0, 1, 3, 5, 2, 4, 6, 7))
    return _reshape(x, (B, T // pt, H // ph, W // pw, pt * ph * pw * C), axes)


def depth_to_space(x_BthwC: jax.Array, block: tuple[int, int, int]) -> jax.Array:
    """Inverse of `space_to_depth`: (B, t, h, w, pt ph pw C) -> (B, 1 + pt (t - 1), ph h, pw w, C).

    Of the first block only the last frame is kept, the one that `space_to_depth` did not add.
    """
    pt, ph, pw = block
    batch, time, height, breadth, channels = axes = clip_axes(x_BthwC.shape[2])
    B, t, h, w, C = x_BthwC.shape
    apart = batch, time, height, breadth, None, None, None, channels
    x = _reshape(reshard(x_BthwC, *axes), (B, t, h, w, pt, ph, pw, C // (pt * ph * pw)), apart)
    x = jnp.transpose(x, (0, 1, 4, 2, 5, 3, 6, 7))
    x = _reshape(x, (B, t * pt, h * ph, w * pw, C // (pt * ph * pw)), axes)
    return spread(x[:, pt - 1 :])


def _reshape(x, shape, axes) -> jax.Array:
    """A reshape with the logical axes of its result."""
    return jnp.reshape(x, shape, out_sharding=out_sharding(*axes))
