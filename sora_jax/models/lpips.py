"""Compute the perceptual distance LPIPS (1801.03924) with VGG16 or AlexNet, from a local file of weights.

The weights are not distributed with this package. Three lines of PyTorch write the file, once:

    import lpips, safetensors.torch
    tensors = lpips.LPIPS(net="vgg").state_dict()  # or "alex"
    safetensors.torch.save_file({name: x.clone() for name, x in tensors.items()}, "lpips.safetensors")
"""

import os
import re
import zipfile
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.config import check
from sora_jax.errors import UserError
from sora_jax.files import as_path, local_copy
from sora_jax.models.perceptual import choose_frames, whole_frames
from sora_jax.nn.images import to_clips, to_images

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of the input; official code, version 0.1
SMALLEST = 64  # pixels; the distance was fitted to judgements of patches of 64 x 64
CONV = re.compile(r"(?:features|net\.slice\d+)\.(\d+)\.(weight|bias)")  # of torchvision, or of the lpips package
KINDS = ("weight", "bias")
LIN = re.compile(r"(?:lin|lins\.)(\d+)\.model\.\d+\.weight")


class Architecture(NamedTuple):
    """Describe a network of convolutions, ReLUs and max pooling, whose levels end with the features to compare."""

    convs: tuple[tuple[int, ...], ...]  # numbers of the convolutions in torchvision's `features`, by level
    pools: tuple[int, ...]  # window of the max pooling of stride 2 before each level; 0: none
    first: tuple[int, int]  # (stride, padding) of the first convolution; all others keep the size


ARCHITECTURES = {  # by the number of convolutions
    13: Architecture(((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)), (0, 2, 2, 2, 2), (1, 1)),  # VGG16
    5: Architecture(((0,), (3,), (6,), (8,), (10,)), (0, 3, 3, 0, 0), (4, 2)),  # AlexNet
}


def read_lpips(path: str | os.PathLike) -> dict:
    """Read the parameters of `lpips` from a .safetensors or .npz file.

    The file holds the convolutions, named as in torchvision (`features.N.weight`, `features.N.bias`) or in the lpips
    package (`net.sliceK.N.weight`), and the weights of channels of the lpips package (`linK.model.1.weight`). Other
    tensors are ignored. The number of convolutions tells VGG16 from AlexNet; widths are those of the tensors.

    Returns:
        {"convs": [level][conv] of {"weight": (height, width, inputs, outputs), "bias"}, "lins": [level] of (D,)},
        float32.

    Raises:
        UserError: the file cannot be read, or a tensor is missing or has a wrong shape.
    """
    name = f"LPIPS file is {os.fspath(path)!r}"
    tensors = _read(path, name)
    convs = {(int(m[1]), m[2]): x for key, x in tensors.items() if (m := CONV.fullmatch(key))}
    lins = {int(m[1]): x for key, x in tensors.items() if (m := LIN.fullmatch(key))}
    count = len({number for number, kind in convs if kind == "weight"})
    check(
        count in ARCHITECTURES,
        f"{name}; it must hold the 13 convolutions of VGG16 or the 5 of AlexNet (features.N.weight), and holds {count}",
    )
    levels = ARCHITECTURES[count].convs
    wanted = {(number, kind): f"features.{number}.{kind}" for level in levels for number in level for kind in KINDS}
    missing = [text for key, text in wanted.items() if key not in convs]
    missing += [f"lin{level}.model.1.weight" for level in range(len(levels)) if level not in lins]
    check(not missing, f"{name}; it must hold {missing and missing[0]}")
    params = {
        "convs": [[_conv_params(*(convs[number, kind] for kind in KINDS)) for number in level] for level in levels],
        "lins": [np.asarray(lins[level], np.float32).reshape(-1) for level in range(len(levels))],
    }
    _check_widths(params, name)
    return params


def _read(path: str | os.PathLike, name: str) -> Mapping[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    file = as_path(path)
    check(file.suffix in (".safetensors", ".npz"), f"{name}; it must end in .safetensors or .npz")
    try:
        if file.suffix == ".safetensors":
            return load_file(local_copy(file))
        with np.load(local_copy(file)) as arrays:
            return dict(arrays)
    except (SafetensorError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{name}; it cannot be read: {error}") from error


def _conv_params(weight: np.ndarray, bias: np.ndarray) -> dict:
    """Convert a convolution of PyTorch, (outputs, inputs, height, width)."""
    return {"weight": np.asarray(weight, np.float32).transpose(2, 3, 1, 0), "bias": np.asarray(bias, np.float32)}


def _check_widths(params: dict, name: str) -> None:
    """Raise UserError unless each layer has as many inputs as the one before has outputs."""
    width = 3
    for number, (level, lin) in enumerate(zip(params["convs"], params["lins"], strict=True)):
        for conv in level:
            inputs, outputs = conv["weight"].shape[2:]
            check(
                inputs == width and conv["bias"].shape == (outputs,),
                f"{name}; a convolution of level {number} has {inputs} inputs; it must have {width}, "
                f"and {outputs} biases",
            )
            width = outputs
        check(lin.shape == (width,), f"{name}; lin{number} has {lin.size} weights; it must have {width}")


def lpips(
    params: dict,
    a_BTHWC: jax.Array,
    b_BTHWC: jax.Array,
    frames: int | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Return the LPIPS (B,) of each clip: the mean over its frames (1801.03924, equation 1, official code).

    Features of each level are scaled to length 1 over channels; their squared differences are weighted by channel,
    summed over channels and levels and averaged over positions.

    Args:
        params: from `read_lpips`.
        a_BTHWC: clips in [-1, 1].
        b_BTHWC: the clips to compare them with.
        frames: how many frames of each clip are compared, drawn with `key`; None: all.
        key: of the choice of frames.

    Raises:
        UserError: the frames are smaller than 64 x 64.
    """
    height, width = a_BTHWC.shape[2:4]
    check(
        min(height, width) >= SMALLEST,
        f"frames are {height} x {width} pixels; for LPIPS they must be at least {SMALLEST} x {SMALLEST}",
    )
    pair = [whole_frames(a_BTHWC), whole_frames(b_BTHWC)]
    if frames is not None:
        if key is None:
            raise ValueError("a choice of frames needs a key")
        pair = choose_frames(key, frames, *pair)
    features = [_features(params, to_images(x)) for x in pair]
    first, *others = (_level_distance(*three) for three in zip(params["lins"], *features, strict=True))
    return to_clips(sum(others, first), (len(a_BTHWC), pair[0].shape[1])).mean((1, 2, 3, 4))


def _level_distance(lin: jax.Array, a_IHWD: jax.Array, b_IHWD: jax.Array) -> jax.Array:
    """Return the weighted squared difference (I, 1, 1, 1) of the features of one level."""
    squared = jnp.square(_unit(a_IHWD) - _unit(b_IHWD))
    return (squared * jax.lax.broadcast_to_rank(jnp.asarray(lin), 4)).sum(-1, keepdims=True).mean((1, 2), keepdims=True)


def _unit(x_IHWD: jax.Array) -> jax.Array:
    """Scale to length 1 over channels. A position whose features are all 0 stays 0, with a finite gradient."""
    return x_IHWD * jax.lax.rsqrt(jnp.square(x_IHWD).sum(-1, keepdims=True) + 1e-10)


def _features(params: dict, x_IHWC: jax.Array) -> list[jax.Array]:
    """Return the features of each level, after its last ReLU."""
    architecture = ARCHITECTURES[sum(map(len, params["convs"]))]
    shift, scale = (jnp.asarray(value).reshape(1, 1, 1, 3) for value in (SHIFT, SCALE))
    x = (x_IHWC - shift) / scale
    found = []
    for number, (pool, level) in enumerate(zip(architecture.pools, params["convs"], strict=True)):
        x = _max_pool(x, pool) if pool else x
        for place, conv in enumerate(level):
            same = 1, len(conv["weight"]) // 2
            x = jax.nn.relu(_conv(conv, x, *(same if number or place else architecture.first)))
        found.append(x)
    return found


def _conv(params: dict, x_IHWC: jax.Array, stride: int, padding: int) -> jax.Array:
    """Convolve with `padding` zeros on every side."""
    weight, pads = jnp.asarray(params["weight"]), ((padding, padding),) * 2
    numbers = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x_IHWC, weight, (stride, stride), pads, dimension_numbers=numbers)
    return y + jax.lax.broadcast_to_rank(jnp.asarray(params["bias"]), 4)


def _max_pool(x_IHWC: jax.Array, size: int) -> jax.Array:
    """Return the maximum of windows of `size`, at a stride of 2, that lie inside the image."""
    return jax.lax.reduce_window(x_IHWC, -jnp.inf, jax.lax.max, (1, size, size, 1), (1, 2, 2, 1), "VALID")
