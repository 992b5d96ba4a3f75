"""The blocks of CRATE (2306.01129) and of CRATE-MAE's decoder (2404.02446), as pure functions over packs.

A block is one step of an algorithm that makes tokens compact and sparse:

half       the step that it takes                                                     as it is computed here
compress   a gradient step that lowers the coding rate R_c of tokens in subspaces     x + MSSA(LN(x))
sparsify   a proximal step towards a non-negative sparse code in the dictionary D     ISTA(LN(x)), without a residual

The parametrisation is that of the official code: one projection without bias serves as queries, keys and values, the
output projection has a bias and weights of its own, both norms have scales and biases. A block has 3 D^2 + 5 D numbers.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax

from sora_jax.config import check
from sora_jax.nn.attention import How, Place, Places, attention
from sora_jax.nn.layers import dense, dense_specs, layer_norm, out_proj, out_proj_specs, qkv_proj
from sora_jax.nn.lora import DOWN, UP
from sora_jax.nn.params import Initializer, ParamSpec, ones, zeros
from sora_jax.nn.positions import rotate
from sora_jax.parallel.rules import reshard


class Where(NamedTuple):
    """Say which tokens attend to each other, and how that is computed.

    angles_BLK: of rotary positions, None for none.
    """

    segments_BL: jax.Array
    angles_BLK: jax.Array | None = None
    how: How = How()


class Ista(NamedTuple):
    """Hold eta, the length of a step, and lambda, the weight of the code's l1 norm."""

    step: float = 0.1
    threshold: float = 0.1


def check_ista(how: Ista) -> None:
    """Raise UserError if the constants in a model's config allow no step."""
    step, threshold = how
    check(0 < step < math.inf, f"model.ista_step is {step}; it must be positive and finite")
    check(0 <= threshold < math.inf, f"model.ista_threshold is {threshold}; it must be 0 or more, and finite")


class Modulation(NamedTuple):
    """Hold what a block's two halves add to their norms' biases and scales, and to the length of the first step."""

    shift1: jax.Array | float = 0.0
    scale1: jax.Array | float = 0.0
    step1: jax.Array | float = 0.0
    shift2: jax.Array | float = 0.0
    scale2: jax.Array | float = 0.0


NEUTRAL = Modulation()


def norm_specs(width: int) -> dict:
    """Declare the scale and the bias of a layer norm."""
    return {"scale": ParamSpec((width,), ("embed",), ones), "bias": ParamSpec((width,), ("embed",), zeros)}


def norm(p: dict, x: jax.Array, shift: jax.Array | float = 0.0, scale: jax.Array | float = 0.0) -> jax.Array:
    """Normalise tokens (B, L, D) with learned scale and bias, to which modulation adds."""
    own_scale, own_bias = (reshard(p[name].astype(x.dtype), "width")[None, None] for name in ("scale", "bias"))
    return layer_norm(x) * (own_scale + scale) + (own_bias + shift)


def linear(in_axis: int | Sequence[int] = -2, out_axis: int | Sequence[int] = -1) -> Initializer:
    """Return PyTorch's initialiser of linear layers, uniform with variance 1 / (3 fan in)."""
    return jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis, out_axis)


def mssa_specs(width: int, heads: int) -> dict:
    """Declare the projection onto subspaces, one a head, and the output projection."""
    head_width = width // heads
    # With Xavier's initial values, whose variance is thrice that, the score of a token with itself is sqrt(head width)
    # at the start, and tokens hardly mix.
    subspaces = ParamSpec((width, 1, heads, head_width), ("embed", None, "heads", "head"), linear(0, (-3, -2, -1)))
    return {
        "subspaces": {"weight": subspaces},
        "merge": out_proj_specs(heads, head_width, width, linear((-3, -2), -1)),
    }


def mssa(p: dict, x_BLD: jax.Array, where: Where) -> jax.Array:
    """Apply multi-head subspace self-attention, (B, L, D) -> same: softmax(w w^T / sqrt(p)) w in each subspace, merged.

    w = x U_k are a token's coordinates in subspace k, of p dimensions: queries, keys and values in one. With rotary
    positions the basis of a subspace turns with a token's place, for values, too, so the step stays one towards
    subspaces: w is rotated, and the result is rotated back.
    """
    (w_BLNK,) = qkv_proj(p["subspaces"], x_BLD)
    angles_BLK = where.angles_BLK
    if angles_BLK is not None:
        w_BLNK = rotate(w_BLNK, angles_BLK)
    place = Place(where.segments_BL)
    out_BLNK = attention(w_BLNK, w_BLNK, w_BLNK, Places(place, place), how=where.how)
    if angles_BLK is not None:
        out_BLNK = rotate(out_BLNK, -angles_BLK)
    return out_proj(p["merge"], out_BLNK)


def dictionary_specs(width: int) -> dict:
    """Declare D: (width, width), Kaiming uniform (1502.01852)."""
    kaiming = jax.nn.initializers.variance_scaling(2.0, "fan_in", "uniform", -1, -2)
    return dense_specs(width, width, ("embed", "hidden"), kaiming, bias=False)


def ista(p: dict, x: jax.Array, how: Ista = Ista()) -> jax.Array:
    """Take one step of ISTA towards the non-negative sparse code of x in D, from x itself: (B, L, D) -> same.

    For a token z that is relu(z + eta D^T (z - D z) - eta lambda); there is no residual.
    """
    axes = ("batch", "length", "width")
    rest = x - dense(_transposed(p), x, axes)  # tokens are rows: x D^T is D z
    return jax.nn.relu(x + how.step * dense(p, rest, axes) - how.step * how.threshold)


def _transposed(p: dict) -> dict:
    """Transpose the weight of a dense layer without bias, with its adapter."""
    swapped = {DOWN: UP, UP: DOWN}
    return {swapped.get(name, name): x.T for name, x in p.items()}


def block_specs(width: int, heads: int) -> dict:
    """Declare a block."""
    return {
        "norm1": norm_specs(width),
        "mssa": mssa_specs(width, heads),
        "norm2": norm_specs(width),
        "dictionary": dictionary_specs(width),
    }


def compress(p: dict, x_BLD: jax.Array, where: Where, modulation: Modulation = NEUTRAL) -> jax.Array:
    """Apply the first half of a block: x + MSSA(LN(x))."""
    with jax.named_scope("mssa"):
        step = mssa(p["mssa"], norm(p["norm1"], x_BLD, modulation.shift1, modulation.scale1), where)
        return x_BLD + (1 + modulation.step1) * step


def sparsify(p: dict, x_BLD: jax.Array, how: Ista = Ista(), modulation: Modulation = NEUTRAL) -> jax.Array:
    """Apply the second half of a block: ISTA(LN(x))."""
    with jax.named_scope("ista"):
        return ista(p["dictionary"], norm(p["norm2"], x_BLD, modulation.shift2, modulation.scale2), how)


def block(p: dict, x_BLD: jax.Array, where: Where, how: Ista = Ista()) -> jax.Array:
    """Apply a block: (B, L, D) -> same."""
    return sparsify(p, compress(p, x_BLD, where), how)


def decoder_block_specs(width: int, heads: int) -> dict:
    """Declare a block of CRATE-MAE's decoder, as many numbers as a block of the encoder has."""
    return {
        "norm1": norm_specs(width),
        "synthesis": dense_specs(width, width, ("embed", "hidden"), linear(), bias=False),
        "norm2": norm_specs(width),
        "mssa": mssa_specs(width, heads),
    }


def decoder_block(p: dict, y_BLD: jax.Array, where: Where) -> jax.Array:
    """Undo a block, backwards in time: V = E LN(Y), then V - MSSA(LN(V)), (B, L, D) -> same (2404.02446)."""
    with jax.named_scope("mssa"):
        v_BLD = dense(p["synthesis"], norm(p["norm1"], y_BLD), ("batch", "length", "width"))
        return v_BLD - mssa(p["mssa"], norm(p["norm2"], v_BLD), where)
