"""Dense, norms, MLP and embeddings as functions; each `*_specs` stands above the function that uses it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.nn.params import ParamSpec, normal, ones, xavier, zeros
from sora_jax.parallel.rules import one_device, out_sharding, reshard


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype of activations; "auto" is bfloat16 on accelerators and float32 on CPUs."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def dense_specs(inputs: int, outputs: int, axes=("embed", "hidden"), init=None, bias: bool = True) -> dict:
    """Weight (inputs, outputs) with logical `axes`, Xavier unless `init` is given, and a zero bias."""
    specs = {"weight": ParamSpec((inputs, outputs), axes, init or xavier())}
    return specs | ({"bias": ParamSpec((outputs,), axes[1:], zeros)} if bias else {})


def dense(params: dict, x: jax.Array, axes: tuple) -> jax.Array:
    """x (..., inputs) -> (..., outputs) in the dtype of x; `axes` are the logical axes of the result."""
    weight = params["weight"].astype(x.dtype)
    if one_device():
        # Tokens as the rows of one matrix: XLA transposes a copy for the weight's gradient where they have two axes.
        rows = jnp.reshape(x, (-1, x.shape[-1]), out_sharding=out_sharding(axes[0], None))
        y = jnp.matmul(rows, weight, out_sharding=out_sharding(axes[0], axes[-1]))
        y = jnp.reshape(y, (*x.shape[:-1], -1), out_sharding=out_sharding(*axes))
    else:
        y = jnp.einsum("...i,io->...o", x, weight, out_sharding=out_sharding(*axes))
    if "bias" not in params:
        return y
    return y + reshard(params["bias"].astype(x.dtype), axes[-1])


def layer_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """Zero mean and unit variance over the last axis, without learned parameters, in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - x32.mean(-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + eps)).astype(x.dtype)


def rms_norm_specs(width: int, axes=("head",)) -> ParamSpec:
    """One gain per channel, 1 at the start."""
    return ParamSpec((width,), axes, ones)


def rms_norm(scale: jax.Array, x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """x over its root mean square along the last axis, times `gain`, in float32 (Zhang and Sennrich 2019)."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + eps) * scale).astype(x.dtype)


def qkv_proj_specs(inputs: int, parts: int, heads: int, head_width: int, joint: bool = False) -> dict:
    """Weights of `parts` projections onto attention heads (3 for q, k, v; 2 for k, v), done as one product.

    Xavier uniform: each projection counts as a layer of its own, or with `joint` all of them as one matrix (DiT's).
    """
    xavier_of = functools.partial(jax.nn.initializers.variance_scaling, 1.0, "fan_avg", "uniform", 0)
    init = xavier_of((-3, -2, -1)) if joint else xavier_of((-2, -1), batch_axis=(1,))
    axes = ("embed", None, "heads", "head")
    return {
        "weight": ParamSpec((inputs, parts, heads, head_width), axes, init),
        "bias": ParamSpec((parts, heads, head_width), axes[1:], zeros),
    }


def qkv_proj(params: dict, x_BLD: jax.Array) -> list[jax.Array]:
    """(B, L, D) -> one (B, L, N, K) per part."""
    sharding = out_sharding("batch", "length", None, "heads", None)
    weight, bias = params["weight"].astype(x_BLD.dtype), params["bias"].astype(x_BLD.dtype)
    y = jnp.einsum("bld,dcnk->blcnk", x_BLD, weight, out_sharding=sharding) + bias
    return [jnp.squeeze(part, 2) for part in jnp.split(y, y.shape[2], axis=2)]  # its gradient is one concatenation


def out_proj_specs(heads: int, head_width: int, outputs: int, init=None) -> dict:
    """Weight of the projection from heads back to the width."""
    init = init or jax.nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", (-3, -2), -1)
    weight = ParamSpec((heads, head_width, outputs), ("heads", "head", "embed"), init)
    return {"weight": weight, "bias": ParamSpec((outputs,), ("embed",), zeros)}


def out_proj(params: dict, x_BLNK: jax.Array) -> jax.Array:
    """(B, L, N, K) -> (B, L, D)."""
    weight, bias = params["weight"].astype(x_BLNK.dtype), params["bias"].astype(x_BLNK.dtype)
    sharding = out_sharding("batch", "length", "width")
    return jnp.einsum("blnk,nkd->bld", x_BLNK, weight, out_sharding=sharding) + reshard(bias, "width")


def mlp_specs(width: int, hidden: int) -> dict:
    """Two dense layers, width -> hidden -> width."""
    return {
        "up": dense_specs(width, hidden, ("embed", "hidden")),
        "down": dense_specs(hidden, width, ("hidden", "embed")),
    }


def mlp(params: dict, x_BLD: jax.Array) -> jax.Array:
    """Dense, GELU in its tanh form, dense: (B, L, D) -> (B, L, D)."""
    h_BLF = jax.nn.gelu(dense(params["up"], x_BLD, ("batch", "length", "hidden")), approximate=True)
    return dense(params["down"], h_BLF, ("batch", "length", "width"))


def embedding_specs(rows: int, width: int, std: float = 0.02) -> ParamSpec:
    """A table with one row per id."""
    return ParamSpec((rows, width), ("vocabulary", "embed"), normal(std))


def embed(table: jax.Array, ids: jax.Array, axes: tuple) -> jax.Array:
    """Rows of `table` at integer `ids`; `axes` are the logical axes of the result."""
    whole = reshard(table, None, None)  # rows that are cut over fsdp could not be dealt to a batch that is cut so, too
    return whole.at[ids].get(out_sharding=out_sharding(*axes))


def time_features(n: jax.Array, width: int, max_period: float = 10_000.0) -> jax.Array:
    """Sinusoids of a time n in [0, 1000], counted in thousandths: (...,) -> (..., width), cosines first.

    DiT's timestep embedding (2212.09748, official code), continuous in n: frequency i is max_period^(-2i/width).
    Angles go up to 1000, where float32 has lost four digits of their sines, and a compiler may round them otherwise in
    another program: they are taken in turns, whose whole part is dropped while the product of the whole part of n with
    the first 12 bits of the frequency is still exact. What is left over is small.
    """
    half = width // 2
    turns = np.exp(-math.log(max_period) * np.arange(half) / half) / (2 * math.pi)
    mantissa, exponent = np.frexp(turns)
    coarse = np.ldexp(np.round(mantissa * 2**12), exponent - 12)
    n = n[..., None].astype(jnp.float32)
    whole = jnp.round(n)
    exact = whole * coarse.astype(np.float32)
    rest = whole * (turns - coarse).astype(np.float32) + (n - whole) * turns.astype(np.float32)
    angles = 2 * math.pi * (exact - jnp.floor(exact) + rest)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
