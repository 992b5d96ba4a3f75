"""CRATE as a classifier of images (2306.01129): the stem of a ViT, CRATE's blocks, a head on the class token.

Images of several sizes share a pack; each slot has a class token of its own, behind all patches of the pack.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from sora_jax.config import check
from sora_jax.data.packing.packs import token_counts
from sora_jax.models.checks import check_network
from sora_jax.models.crate_blocks import Ista, Where, block, block_specs, check_ista, norm, norm_specs
from sora_jax.nn.attention import How
from sora_jax.nn.layers import compute_dtype, dense, dense_specs, embed, embedding_specs
from sora_jax.nn.pack import Pack
from sora_jax.nn.params import ParamSpec, normal, stack
from sora_jax.nn.remat import REMAT
from sora_jax.parallel.rules import reshard

AXES = ("batch", "length", "width")


@dataclasses.dataclass(frozen=True)
class CrateClassifierConfig:
    """Configure the white-box classifier; the defaults are CRATE-Tiny's."""

    depth: int = 12  # number of blocks
    width: int = 384  # D, channels of a token
    heads: int = 6  # N, subspaces; each has width / heads dimensions
    patch: int = 16  # side of a token in pixels
    image: tuple[int, int] = (224, 224)  # (height, width) in pixels of the largest images, which positions are kept for
    classes: int = 1000  # number of classes
    ista_step: float = 0.1  # eta, length of the step towards a sparse code
    ista_threshold: float = 0.1  # lambda, weight of the code's l1 norm
    attention: str = "auto"  # what computes attention: auto, dense, blockwise, splash (TPU), cudnn (GPU)
    remat: str = "full"  # activations that are recomputed in the backward pass: none, dots, attention, full
    dtype: str = "auto"  # of the computation: float32, bfloat16; auto is bfloat16 on accelerators
    name: Literal["crate"] = "crate"  # tells this network from others in files

    def __post_init__(self):
        check_network(self)
        check(self.patch > 0, f"model.patch is {self.patch}; it must be positive")
        check(
            self.width % self.heads == 0,
            f"model.width is {self.width}; it must be a multiple of model.heads = {self.heads}",
        )
        check(
            all(side > 0 and side % self.patch == 0 for side in self.image),
            f"model.image is {self.image}; both sides must be positive multiples of model.patch = {self.patch}",
        )
        check(self.classes > 1, f"model.classes is {self.classes}; it must be at least 2")
        check_ista(self.ista)

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def ista(self) -> Ista:
        return Ista(self.ista_step, self.ista_threshold)

    @property
    def grid(self) -> tuple[int, int]:
        """Return the rows and columns of tokens in the largest image."""
        return self.image[0] // self.patch, self.image[1] // self.patch

    @property
    def patch_values(self) -> int:
        """Return the number P of values in a token."""
        return 3 * self.patch**2


def classifier_specs(config: CrateClassifierConfig) -> dict:
    """Declare all parameters; the first position is the class token's."""
    width, values = config.width, config.patch_values
    return {
        "patch_norm": norm_specs(values),
        "patch": dense_specs(values, width, (None, "embed")),
        "token_norm": norm_specs(width),
        "class_token": ParamSpec((width,), ("embed",), normal(1.0)),
        "positions": embedding_specs(1 + math.prod(config.grid), width, std=1.0),
        "blocks": stack(block_specs(width, config.heads), config.depth),
        "head_norm": norm_specs(width),
        "head": dense_specs(width, config.classes, ("embed", None)),
    }


def enter(params: dict, config: CrateClassifierConfig, pack: Pack, x_BLP: jax.Array) -> tuple[jax.Array, Where]:
    """Return what the first block reads, (B, L + S, D): patches, then class tokens; and who attends to whom."""
    dtype = compute_dtype(config.dtype)
    patches_BLD = dense(params["patch"], norm(params["patch_norm"], x_BLP.astype(dtype)), AXES)
    patches_BLD = norm(params["token_norm"], patches_BLD)
    rows_BL, columns_BL = (pack.coords_BL3[..., axis].astype(jnp.int32) for axis in (1, 2))
    places_BL = 1 + rows_BL * config.grid[1] + columns_BL
    table = params["positions"].astype(dtype)
    patches_BLD += embed(table, places_BL, AXES)
    own_D = reshard(params["class_token"].astype(dtype), "width")[None, None]
    classes_BSD = own_D + embed(table, jnp.zeros_like(pack.clip_ids_BS, jnp.int32), AXES)
    slots_BS = jnp.where(pack.clip_ids_BS > 0, jnp.arange(1, pack.slots + 1, dtype=jnp.int32)[None], 0)
    segments_BX = jnp.concatenate([reshard(x, "batch", "length") for x in (pack.segments_BL, slots_BS)], axis=1)
    x_BXD = jnp.concatenate([patches_BLD, classes_BSD], axis=1)
    return x_BXD, Where(segments_BX, how=How(config.attention))


def classify(params: dict, config: CrateClassifierConfig, pack: Pack, x_BLP: jax.Array) -> jax.Array:
    """Compute the logits (B, S, classes) float32 of the image in each slot of a pack, from pixels in [-1, 1]."""
    x_BXD, where = enter(params, config, pack, x_BLP)
    layer = lambda x_BXD, p: (block(p, x_BXD, where, config.ista), None)  # noqa: E731
    if config.remat != "none":
        layer = jax.checkpoint(layer, policy=REMAT[config.remat], prevent_cse=False)  # a scan is barrier enough
    x_BXD, _ = jax.lax.scan(layer, x_BXD, params["blocks"])
    with jax.named_scope("head"):
        x_BSD = norm(params["head_norm"], x_BXD[:, x_BLP.shape[1] :])
        return dense(params["head"], x_BSD, ("batch", None, None)).astype(jnp.float32)


def forward_flops(config: CrateClassifierConfig, batch: dict) -> float:
    """Return the FLOPs (two per multiply-add) of one forward pass over the images of a host batch."""
    lengths = token_counts(batch)
    whole = (lengths + (lengths > 0)).astype(float)  # with the class token
    width, images = config.width, (lengths > 0).sum()
    products = lengths.sum() * config.patch_values * width + images * width * config.classes
    blocks = 4 * width**2 * whole.sum() + 2 * width * (whole**2).sum()
    return float(2 * (products + config.depth * blocks))
