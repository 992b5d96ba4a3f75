"""Run clips through a frozen network: resize frames as published suites do, batch over a mesh, apply its layers."""

import functools
import operator
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sora_jax.config import choose
from sora_jax.nn.images import to_clips, to_images
from sora_jax.parallel.mesh import place_batch
from sora_jax.parallel.rules import on_mesh, parts
from sora_jax.shapes import PyTree

# Linear interpolation between (pixel centres, filtered where it shrinks). Centres at half pixels are those of PyTorch
# (align_corners=False) and TensorFlow 2, neither of which filters by default; centres at corners those of TensorFlow 1.
RESIZES = {"bilinear": (0.5, False), "bilinear-tf1": (0.0, False), "bilinear-antialias": (0.5, True)}


def resize(frames: jax.Array, size: tuple[int, int], kind: str) -> jax.Array:
    """Resize (..., H, W, C) to float32 (..., height, width, C) by a kind of `RESIZES`."""
    rows, columns = (_weights(old, new, kind) for old, new in zip(frames.shape[-3:-1], size))
    return jnp.einsum("...hwc,Hh,Ww->...HWc", frames.astype(jnp.float32), rows, columns)


@functools.cache
def _weights(old: int, new: int, kind: str) -> np.ndarray:
    """Return the matrix (new, old) of linear interpolation along an axis."""
    centre, filtered = choose("resize", kind, RESIZES)
    ratio = old / new
    place = np.clip((np.arange(new) + centre) * ratio - centre, 0, old - 1)[:, None]
    weights = np.maximum(1 - np.abs(place - np.arange(old)) / (max(ratio, 1) if filtered else 1), 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def embed(function: Callable[..., PyTree], params: PyTree, clips: Iterable[np.ndarray], batch: int) -> Iterator[PyTree]:
    """Apply a jitted `function(params, clips)` to batches of equal clips; yield its result for each clip, in order.

    A mesh that is set splits the batch. The last batch of a size is filled up by its last clip, so that each size
    compiles once. Products are in float32 throughout: by default TPUs and GPUs round their factors to 8 or 11 bits,
    and distances would depend on the device.
    """
    batch = -(-batch // parts("batch")) * parts("batch")
    mesh = jax.sharding.get_mesh() if on_mesh() else None
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()) if mesh else None)
    for held in _equal(clips, batch):
        filled = np.stack(held + held[-1:] * (batch - len(held)))
        with jax.default_matmul_precision("highest"):
            found = jax.device_get(function(params, place_batch(filled, mesh) if mesh else filled))
        for place, _ in enumerate(held):  # not what the filler gives
            yield jax.tree.map(operator.itemgetter(place), found)


def _equal(clips: Iterable[np.ndarray], most: int) -> Iterator[list[np.ndarray]]:
    """Yield runs of clips of one shape, each of at most so many."""
    held: list[np.ndarray] = []
    for clip in clips:
        if held and (clip.shape != held[0].shape or len(held) == most):
            yield held
            held = []
        held.append(clip)
    if held:
        yield held


def conv_relu(params: dict, x: jax.Array, stride: int = 1, padding: str = "SAME") -> jax.Array:
    """Convolve images (B, H, W, C) or videos (B, T, H, W, C), add a bias and apply ReLU."""
    return jax.nn.relu(conv(params, x, stride, padding))


def conv(params: dict, x: jax.Array, stride: int = 1, padding: str = "SAME") -> jax.Array:
    """Convolve images (B, H, W, C) or videos (B, T, H, W, C) and add a bias; padding as in TensorFlow."""
    usual = functools.partial(_convolve, stride=stride, padding=padding)
    if x.ndim == 4:
        y = usual(x, params["weight"])
    else:
        by_frames = functools.partial(_sum_over_taps, stride=stride)
        y = jax.lax.platform_dependent(x, params["weight"], cpu=by_frames, default=usual)
    return y + jax.lax.broadcast_to_rank(params["bias"], y.ndim)


def _convolve(x: jax.Array, weight: jax.Array, stride: int, padding: str) -> jax.Array:
    axes = "THW"[-(x.ndim - 2) :]
    numbers = f"N{axes}C", f"{axes}IO", f"N{axes}C"
    return jax.lax.conv_general_dilated(x, weight, (stride,) * len(axes), padding, dimension_numbers=numbers)


def _sum_over_taps(x_BTHWC: jax.Array, weight: jax.Array, stride: int) -> jax.Array:
    """Convolve videos, padded to keep the size, by a sum of 2-D convolutions: on CPUs in half the time."""
    taps, frames = len(weight), x_BTHWC.shape[1]
    last = (-(-frames // stride) - 1) * stride  # frame at which the last window begins
    pad = max(last + taps - frames, 0)
    x = jnp.pad(x_BTHWC, [(0, 0), (pad // 2, pad - pad // 2), *[(0, 0)] * 3])
    parts = (jax.lax.slice_in_dim(x, k, k + last + 1, stride, axis=1) for k in range(taps))
    found = [_convolve(to_images(part), weight[k], stride, "SAME") for k, part in enumerate(parts)]
    return to_clips(sum(found[1:], found[0]), (len(x), last // stride + 1))


def max_pool(x: jax.Array, window: tuple[int, ...], strides: tuple[int, ...], padding: str = "SAME") -> jax.Array:
    """Return the maximum of windows of x (B, ..., C); padding counts as -inf."""
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, *window, 1), (1, *strides, 1), padding)


def average_pool(x: jax.Array, window: tuple[int, ...], padding: str = "SAME") -> jax.Array:
    """Return the mean of windows of x (B, ..., C) at a stride of 1, over the positions that are no padding."""
    size, strides = (1, *window, 1), (1,) * x.ndim
    total = jax.lax.reduce_window(x, 0.0, jax.lax.add, size, strides, padding)
    ones = jnp.ones((1, *x.shape[1:-1], 1))
    return total / jax.lax.reduce_window(ones, 0.0, jax.lax.add, size, strides, padding)


def fold_norm(
    weight: np.ndarray, mean: np.ndarray, variance: np.ndarray, bias: np.ndarray, scale: np.ndarray | float = 1.0
) -> dict:
    """Fold batch normalisation (eps 0.001) into the convolution (..., outputs) before it, which has no bias."""
    gain = scale / np.sqrt(np.asarray(variance, np.float64) + 1e-3)
    return {"weight": (weight * gain).astype(np.float32), "bias": (bias - mean * gain).astype(np.float32)}
