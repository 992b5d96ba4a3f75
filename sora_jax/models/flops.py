"""Model FLOPs: of a packed batch from the parameter specs and the clip lengths, of the autoencoder from its trace.

Only what the model needs is counted: products with weights by the tokens that use them, attention by the squares
of clip lengths. Padding, recomputation and attention across clips are work, but not model FLOPs.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractMesh

from sora_jax.models.first_stage import FirstStageConfig, autoencoder_specs, decode, encode, latent_grid
from sora_jax.models.transformer import TransformerConfig, transformer_specs
from sora_jax.nn.params import ParamSpec, abstract

NO_MESH = AbstractMesh((), ())


def train_flops(config: TransformerConfig, batch: dict) -> float:
    """FLOPs of one forward and backward pass over a host batch: three times those of the forward pass."""
    return 3 * forward_flops(config, batch)


def forward_flops(config: TransformerConfig, batch: dict, text_encoder: bool = True) -> float:
    """FLOPs (two per multiply-add) of one forward pass over the clips of a host batch.

    text_encoder: captions are encoded in this pass; a sampler does that once for all its passes.
    """
    lengths = batch["grids_BS3"].astype(np.int64).prod(-1)
    rows_BR = np.take_along_axis(lengths > 0, batch["row_slots_BR"], axis=1)
    rows_BS = np.stack([(rows_BR & (batch["row_slots_BR"] == slot)).sum(1) for slot in range(lengths.shape[1])], 1)
    context = 2 * rows_BS if config.conditioning == "in_context" else 0 * rows_BS
    text_lengths = _text_lengths(batch, lengths.shape[1]) if config.text else 0 * lengths
    uses = {
        "ends": lengths.sum(),
        "token": (lengths + context).sum(),
        "text": text_lengths.sum() * text_encoder,
        "caption": text_lengths.sum(),
        "row": rows_BR.sum(),
        "pair": 2 * rows_BR.sum(),
        "clip": (lengths > 0).sum(),
    }
    products = sum(2 * size * uses[user] for user, size in _weights(config))
    pairs = ((lengths + context) ** 2).sum() + (lengths * text_lengths).sum()
    if config.conditioning == "cross_attention":
        pairs += 2 * lengths.sum()  # a token reads the noise level and the label of its own row
    attention = 4 * config.depth * config.width * pairs
    if config.text and text_encoder:
        attention += 4 * config.text.depth * config.text.width * (text_lengths**2).sum()
    return float(products + attention)


def _weights(config: TransformerConfig) -> list[tuple[str, int]]:
    """(what it is applied to, size) of every weight that takes part in a product."""
    found = []

    def visit(path, spec):
        names = [str(getattr(entry, "key", entry)) for entry in path]
        if names[-1] == "weight":
            found.append((_user(names), math.prod(spec.shape)))

    specs = transformer_specs(config)
    jax.tree_util.tree_map_with_path(visit, specs, is_leaf=lambda x: isinstance(x, ParamSpec))
    return found


def _user(names: list[str]) -> str:
    if names[0] == "text":
        return "text"
    if "cross_kv" in names:
        return "caption"
    if "pooled" in names:
        return "clip"
    if "pair_kv" in names:
        return "pair"
    if {"patch", "head"} & set(names):
        return "ends"
    return "row" if {"modulation", "time_in", "time_out"} & set(names) else "token"


def _text_lengths(batch: dict, slots: int) -> np.ndarray:
    segments = batch["text_segments_BM"]
    return np.stack([(segments == slot).sum(-1) for slot in range(1, slots + 1)], axis=-1).astype(np.int64)


def autoencoder_train_flops(config: FirstStageConfig, frames: int, height: int, width: int) -> float:
    """FLOPs of one forward and backward pass over one clip: three times the products of encoder and decoder."""
    video = jax.ShapeDtypeStruct((1, frames, height, width, 3), jnp.float32)
    grid = latent_grid(config, frames, height, width)
    latent = jax.ShapeDtypeStruct((1, *grid, config.latent_channels), jnp.float32)
    params = abstract(autoencoder_specs(config))
    passes = (lambda p, x: encode(p, config, x)[0], video), (lambda p, z: decode(p, config, z), latent)
    with jax.sharding.use_abstract_mesh(NO_MESH):  # what is traced is then of the whole clip
        return 3 * sum(product_flops(jax.make_jaxpr(function)(params, x).jaxpr) for function, x in passes)


def product_flops(jaxpr) -> int:
    """FLOPs of all matrix products and convolutions in a traced function; of branches, the largest counts."""
    total = 0
    for equation in jaxpr.eqns:
        inner = [product_flops(getattr(sub, "jaxpr", sub)) for sub in jaxprs_in_params(equation.params)]
        out = math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "dot_general":
            left, (contracted, _), _ = equation.invars[0].aval.shape, *equation.params["dimension_numbers"]
            total += 2 * out * math.prod(left[axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel, outputs = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec[0]
            total += 2 * out * math.prod(kernel) // kernel[outputs]
        elif equation.primitive.name == "cond":
            total += max(inner)
        else:
            total += equation.params.get("length", 1) * sum(inner)
    return total
