"""Apply dense layers, norms, MLPs and embeddings; each `*_specs` stands above the function that uses it."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.nn.lora import add_adapter
from sora_jax.nn.params import Initializer, ParamSpec, normal, ones, xavier, zeros
from sora_jax.parallel.rules import one_device, out_sharding, reshard


def compute_dtype(name: str) -> jnp.dtype:
    """Return the dtype of activations; "auto" is bfloat16 on accelerators and float32 on CPUs."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def dense_specs(
    inputs: int,
    outputs: int,
    axes: tuple[str | None, str | None] = ("embed", "hidden"),
    init: Initializer | None = None,
    bias: bool = True,
) -> dict:
    """Declare a weight (inputs, outputs) with logical `axes`, Xavier unless `init` is given, and a zero bias."""
    specs = {"weight": ParamSpec((inputs, outputs), axes, init or xavier())}
    return specs | ({"bias": ParamSpec((outputs,), axes[1:], zeros)} if bias else {})


def dense(params: dict, x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Multiply by a weight and add a bias: x (..., inputs) -> (..., outputs), in the dtype of x.

    `axes` are the logical axes of the result.
    """
    weight = params["weight"].astype(x.dtype)
    if one_device():
        # Flatten the tokens to one axis: with two, XLA transposes a copy of x for the weight's gradient. On a mesh the
        # two axes may be split over different mesh axes, and merging them would move data.
        rows = jnp.reshape(x, (-1, x.shape[-1]), out_sharding=out_sharding(axes[0], None))
        y = jnp.matmul(rows, weight, out_sharding=out_sharding(axes[0], axes[-1]))
        y = jnp.reshape(y, (*x.shape[:-1], -1), out_sharding=out_sharding(*axes))
    else:
        y = jnp.einsum("...i,io->...o", x, weight, out_sharding=out_sharding(*axes))
    y = add_adapter(params, x, y, ("...i,ir->...r", "...r,ro->...o"), axes, x.ndim - 1)
    if "bias" not in params:
        return y
    bias = reshard(params["bias"].astype(x.dtype), axes[-1])
    return y + jax.lax.broadcast_to_rank(bias, y.ndim)


def layer_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """Normalise the last axis to mean 0 and variance 1, in float32, without learned parameters (1607.06450)."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - x32.mean(-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + eps)).astype(x.dtype)


def rms_norm_specs(width: int, axes: tuple[str | None] = ("head",)) -> ParamSpec:
    """Declare a scale for each channel, 1 at the start."""
    return ParamSpec((width,), axes, ones)


def rms_norm(scale: jax.Array, x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """Divide x by its root mean square along the last axis, times `scale`, in float32 (Zhang and Sennrich 2019)."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.broadcast_to_rank(scale, x.ndim)
    return (x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + eps) * scale).astype(x.dtype)


def qkv_proj_specs(inputs: int, parts: int, heads: int, head_width: int, joint: bool = False) -> dict:
    """Declare `parts` projections onto attention heads (3 for q, k, v; 2 for k, v), computed as one product.

    The initialiser is Xavier uniform, with the fans of each projection or, if `joint`, of one matrix of all (DiT).
    """
    xavier_of = functools.partial(jax.nn.initializers.variance_scaling, 1.0, "fan_avg", "uniform", 0)
    init = xavier_of((-3, -2, -1)) if joint else xavier_of((-2, -1), batch_axis=(1,))
    axes = ("embed", None, "heads", "head")
    return {
        "weight": ParamSpec((inputs, parts, heads, head_width), axes, init),
        "bias": ParamSpec((parts, heads, head_width), axes[1:], zeros),
    }


def qkv_proj(params: dict, x_BLD: jax.Array) -> list[jax.Array]:
    """Project onto attention heads: (B, L, D) -> one (B, L, N, K) for each part."""
    axes = ("batch", "length", None, "heads", None)
    weight = params["weight"].astype(x_BLD.dtype)
    y = jnp.einsum("bld,dcnk->blcnk", x_BLD, weight, out_sharding=out_sharding(*axes))
    y = add_adapter(params, x_BLD, y, ("bld,dr->blr", "blr,rcnk->blcnk"), axes, 2)
    if "bias" in params:
        y += jax.lax.broadcast_to_rank(params["bias"].astype(x_BLD.dtype), 5)
    # Not y[:, :, i]: the gradient of a split is one concatenation.
    return [jnp.squeeze(part, 2) for part in jnp.split(y, y.shape[2], axis=2)]


def out_proj_specs(heads: int, head_width: int, outputs: int, init: Initializer | None = None) -> dict:
    """Declare the projection from attention heads to the width, Xavier uniform unless `init` is given."""
    init = init or jax.nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", (-3, -2), -1)
    weight = ParamSpec((heads, head_width, outputs), ("heads", "head", "embed"), init)
    return {"weight": weight, "bias": ParamSpec((outputs,), ("embed",), zeros)}


def out_proj(params: dict, x_BLNK: jax.Array) -> jax.Array:
    """Project attention heads to the width: (B, L, N, K) -> (B, L, D)."""
    weight = params["weight"].astype(x_BLNK.dtype)
    bias = reshard(params["bias"].astype(x_BLNK.dtype), "width")
    axes = ("batch", "length", "width")
    y = jnp.einsum("blnk,nkd->bld", x_BLNK, weight, out_sharding=out_sharding(*axes))
    y = add_adapter(params, x_BLNK, y, ("blnk,nkr->blr", "blr,rd->bld"), axes, 2)
    return y + jax.lax.broadcast_to_rank(bias, 3)


def mlp_specs(width: int, hidden: int) -> dict:
    """Declare two dense layers, width -> hidden -> width."""
    return {
        "up": dense_specs(width, hidden, ("embed", "hidden")),
        "down": dense_specs(hidden, width, ("hidden", "embed")),
    }


def mlp(params: dict, x_BLD: jax.Array) -> jax.Array:
    """Apply a dense layer, GELU (tanh approximation) and a dense layer: (B, L, D) -> (B, L, D)."""
    h_BLF = jax.nn.gelu(dense(params["up"], x_BLD, ("batch", "length", "hidden")), approximate=True)
    return dense(params["down"], h_BLF, ("batch", "length", "width"))


def embedding_specs(rows: int, width: int, std: float = 0.02) -> ParamSpec:
    """Declare a table with one row for each id."""
    return ParamSpec((rows, width), ("vocabulary", "embed"), normal(std))


def embed(table: jax.Array, ids: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Look up the rows of `table` at integer `ids`; `axes` are the logical axes of the result."""
    # Gather the FSDP-sharded table first: the batch uses the same mesh axis, so the lookup could not be sharded over
    # both.
    whole = reshard(table, None, None)
    return whole.at[ids].get(out_sharding=out_sharding(*axes))


def time_features(n: jax.Array, width: int, max_period: float = 10_000.0) -> jax.Array:
    """Embed times n in [0, 1000], in thousandths, by sinusoids: (...,) -> (..., width), cosines first.

    This is DiT's timestep embedding (2212.09748, official code), continuous in n: frequency i is
    max_period^(-2i/width).
    """
    # Angles reach 1000 radians, where the sine of a float32 has lost four digits, and a compiler may round the product
    # differently in another program. So count in turns, and drop whole turns while the product is exact: whole n (10
    # bits) times the first 12 bits of the frequency fit in the 24 bits of a float32. The remainder is a small angle.
    half = width // 2
    turns = np.exp(-math.log(max_period) * np.arange(half) / half) / (2 * math.pi)
    mantissa, exponent = np.frexp(turns)
    coarse = np.ldexp(np.round(mantissa * 2**12), exponent - 12)
    n = n[..., None].astype(jnp.float32)
    # Constants with leading axes of size 1, as `jax_numpy_rank_promotion="raise"` asks for.
    turns, coarse = (x.reshape((1,) * (n.ndim - 1) + (half,)) for x in (turns, coarse))
    whole = jnp.round(n)
    exact = whole * coarse.astype(np.float32)
    rest = whole * (turns - coarse).astype(np.float32) + (n - whole) * turns.astype(np.float32)
    angles = 2 * math.pi * (exact - jnp.floor(exact) + rest)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
