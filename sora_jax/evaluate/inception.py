"""Compute FID's features with the Inception-v3 of 2015 (1512.00567), as the ADM suite does, from a local file.

The suite (Dhariwal and Nichol, 2105.05233) runs TensorFlow's graph `classify_image_graph_def.pb`, which nothing but
TensorFlow reads. The file here is the same network in PyTorch: `pt_inception-2015-12-05-6726825d.pth` of the package
pytorch-fid, or its tensors as .safetensors. Weights that torchvision trained give other numbers and are refused.
"""

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.config import check
from sora_jax.convert.tensors import read_tensors
from sora_jax.errors import UserError
from sora_jax.evaluate.embed import average_pool, conv_relu, fold_norm, max_pool, resize
from sora_jax.evaluate.frechet import Gaussian
from sora_jax.files import as_path, local_copy
from sora_jax.parallel.rules import out_sharding

SIDE = 299  # pixels of an image
CLASSES = 1008  # of the network of 2015; torchvision's has 1000
SPATIAL = 7  # channels of sFID's features
SPATIAL_AT = "Mixed_6d"  # TensorFlow's mixed_6, whose first branch they are of
# Each block is a list of branches, each branch a chain of convolutions of the state dict, of pools, and of pairs "a|b",
# whose outputs are joined. A "/" behind a name halves the picture.
STEM = "Conv2d_1a_3x3/ Conv2d_2a_3x3= Conv2d_2b_3x3 max/ Conv2d_3b_1x1 Conv2d_4a_3x3= max/"
A = "branch1x1", "branch5x5_1 branch5x5_2", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3", "mean branch_pool"
B = "branch3x3/", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3/", "max/"
C = (
    "branch1x1",
    "branch7x7_1 branch7x7_2 branch7x7_3",
    "branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5",
    "mean branch_pool",
)
D = "branch3x3_1 branch3x3_2/", "branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4/", "max/"
E = (
    "branch1x1",
    "branch3x3_1 branch3x3_2a|branch3x3_2b",
    "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a|branch3x3dbl_3b",
)
BLOCKS: dict[str, Sequence[str]] = {
    **{f"Mixed_5{letter}": A for letter in "bcd"},
    "Mixed_6a": B,
    **{f"Mixed_6{letter}": C for letter in "bcde"},
    "Mixed_7a": D,
    "Mixed_7b": (*E, "mean branch_pool"),
    "Mixed_7c": (*E, "max branch_pool"),  # no mistake here: the graph of 2015 has the maximum in its last block
}


def inception(params: dict, x_IHWC: jax.Array) -> dict[str, jax.Array]:
    """Return the features of images of 299 x 299 pixels in [-1, 1].

    Returns:
        pool (I, 2048), of FID; spatial (I, 2023), of sFID: 7 channels of a grid of 17 x 17; probabilities (I, 1008).
    """
    x, features = _chain(params, "", STEM, x_IHWC), {}
    for block, branches in BLOCKS.items():
        found = [_chain(params, f"{block}.", branch, x) for branch in branches]
        if block == SPATIAL_AT:
            part = found[0][..., :SPATIAL]
            features["spatial"] = jnp.reshape(part, (len(x), -1), out_sharding=out_sharding("batch", None))
        x = jnp.concatenate(found, axis=-1)
    features["pool"] = x.mean((1, 2))
    # Without the bias of the layer, which the suite leaves out.
    logits = jnp.einsum("id,dk->ik", features["pool"], params["fc"])
    return features | {"probabilities": jax.nn.softmax(logits)}


def _chain(params: dict, prefix: str, steps: str, x: jax.Array) -> jax.Array:
    for step in steps.split():
        name, stride = step.rstrip("/="), 2 if step.endswith("/") else 1
        padding = "VALID" if step.endswith(("/", "=")) else "SAME"
        if name == "mean":
            x = average_pool(x, (3, 3))
        elif name == "max":
            x = max_pool(x, (3, 3), (stride, stride), padding)
        else:
            x = jnp.concatenate(
                [conv_relu(params[f"{prefix}{part}"], x, stride, padding) for part in name.split("|")], axis=-1
            )
    return x


@jax.jit
def fid_features(params: dict, images_IHWC: jax.Array) -> dict[str, jax.Array]:
    """Return the features of uint8 images, resized and scaled as TensorFlow's graph does."""
    return inception(params, (resize(images_IHWC, (SIDE, SIDE), "bilinear-tf1") - 128) / 128)


def _convolutions() -> list[str]:
    """List the names of all convolutions."""
    chains = [("", STEM), *((f"{block}.", branch) for block, branches in BLOCKS.items() for branch in branches)]
    words = [(prefix, part.rstrip("/=")) for prefix, chain in chains for part in chain.replace("|", " ").split()]
    return [prefix + name for prefix, name in words if name not in ("mean", "max")]


def read_inception(path: str | os.PathLike | None, option: str = "--fid.inception") -> dict:
    """Read the parameters of `inception`; a .pth file needs torch.

    Returns:
        {name: {"weight": (y, x, inputs, outputs), "bias"}, "fc": (2048, 1008)}, batch normalisation folded in.

    Raises:
        UserError: the file cannot be read, or is not of the Inception of 2015.
    """
    path = inception_file(path, option)
    try:
        tensors = read_tensors(path)
    except UserError as error:
        raise UserError(str(error).replace("--weights", option)) from error
    said = f"{option} is {str(path)!r}"
    missing = [name for name in _convolutions() if f"{name}.conv.weight" not in tensors]
    check(not missing, f"{said}; it must hold the tensors of Inception-v3, and {missing and missing[0]} is missing")
    found = tensors.get("fc.weight", np.zeros((0, 0))).shape
    check(
        found == (CLASSES, 2048),
        f"{said}; fc.weight must be ({CLASSES}, 2048), of the network of 2015, and is {found}: distances of other "
        "weights are no FID",
    )
    return {name: _unit(tensors, name) for name in _convolutions()} | {"fc": tensors["fc.weight"].T}


def inception_file(path: str | os.PathLike | None, option: str = "--fid.inception") -> Path:
    """Return the file of weights; UserError if none is given or there is none."""
    if path is None:
        raise UserError(f"{option} is not given; FID needs a file of Inception's weights")
    check(Path(path).is_file(), f"{option} is {os.fspath(path)!r}; there is no such file")
    return Path(path)


def _unit(tensors: dict[str, np.ndarray], name: str) -> dict:
    mean, variance, bias, scale = (
        tensors[f"{name}.bn.{kind}"] for kind in ("running_mean", "running_var", "bias", "weight")
    )
    return fold_norm(tensors[f"{name}.conv.weight"].transpose(2, 3, 1, 0), mean, variance, bias, scale)


def read_reference(path: str | os.PathLike, option: str = "--fid.reference") -> dict[str, Gaussian]:
    """Read statistics of real images from an .npz of the ADM suite: "pool", and "spatial" where it has them.

    Raises:
        UserError: the file cannot be read, or has no `mu` and `sigma`.
    """
    said = f"{option} is {os.fspath(path)!r}"
    try:
        with np.load(local_copy(as_path(path))) as file:
            found = {
                name: np.asarray(file[name], np.float64) for name in ("mu", "sigma", "mu_s", "sigma_s") if name in file
            }
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{said}; it cannot be read: {error}") from error
    check({"mu", "sigma"} <= set(found), f"{said}; it must hold the arrays mu and sigma, as files of the ADM suite do")
    pairs = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
    return {name: Gaussian(found[m], found[s]) for name, (m, s) in pairs.items() if m in found and s in found}
