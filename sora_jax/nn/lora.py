"""Low-rank adapters of linear layers (LoRA, Hu et al. 2106.09685): y = x W + scale (x A) B, with A and B alone trained.

An adapted layer holds three more arrays beside its weight: `lora_a` (inputs, rank), `lora_b` (rank, outputs), zero at
the start, and `lora_scale`, a constant. The layers of `nn.layers` add the second term wherever they find them.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.nn.params import ParamSpec, input_axes, zeros
from sora_jax.parallel.rules import out_sharding

ADAPTER = DOWN, UP, SCALE = "lora_a", "lora_b", "lora_scale"


def adapter_specs(weight: ParamSpec, rank: int) -> dict[str, ParamSpec]:
    """Declare A and B of a weight, stacked as the weight is: Kaiming uniform, as PEFT has it, and zero."""
    inputs, outputs = input_axes(weight)
    layers = min(inputs)  # axes before the first one of inputs are of stacked layers
    sizes = lambda axes: tuple(weight.shape[i] for i in axes)  # noqa: E731
    names = lambda axes: tuple(weight.axes[i] for i in axes)  # noqa: E731
    stacked = tuple(range(layers))
    # Between -1 / sqrt(fan in) and 1 / sqrt(fan in).
    uniform = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", tuple(inputs), -1, stacked)
    down = ParamSpec((*sizes(stacked), *sizes(inputs), rank), (*names(stacked), *names(inputs), None), uniform)
    up = ParamSpec((*sizes(stacked), rank, *sizes(outputs)), (*names(stacked), None, *names(outputs)), zeros)
    return {DOWN: down, UP: up}


def scale_spec(weight: ParamSpec, scale: float) -> ParamSpec:
    """Declare the constant that an adapter's term is multiplied by, one for each of stacked layers."""
    layers = min(input_axes(weight)[0])
    return ParamSpec(weight.shape[:layers], weight.axes[:layers], jax.nn.initializers.constant(scale))


def add_adapter(
    params: dict, x: jax.Array, y: jax.Array, products: tuple[str, str], axes: Sequence[str | None], kept: int
) -> jax.Array:
    """Return y, and where the layer has an adapter y + scale (x A) B.

    products: x A and (x A) B as einsum equations. axes: the logical axes of y; the first `kept` are also those of x A.
    """
    if DOWN not in params:
        return y
    low_sharding = out_sharding(*axes[:kept], None)
    low = jnp.einsum(products[0], x, params[DOWN].astype(x.dtype), out_sharding=low_sharding)
    high = jnp.einsum(products[1], low, params[UP].astype(x.dtype), out_sharding=out_sharding(*axes))
    return y + params[SCALE].astype(x.dtype) * high


def merge_adapters(params: dict) -> dict:
    """Return parameters without adapters, each added to its weight: W + scale A B, in float32, on the host."""
    merged = {
        name: merge_adapters(value) if isinstance(value, dict) else value
        for name, value in params.items()
        if name not in (DOWN, UP, SCALE)
    }
    if DOWN in params:
        merged["weight"] = np.asarray(merged["weight"]) + adapter_product(params)
    return merged


def adapter_product(params: dict) -> np.ndarray:
    """Return scale A B of an adapted layer, in the shape of its weight."""
    a, b, scale = (np.asarray(params[name], np.float32) for name in (DOWN, UP, SCALE))
    rank = a.shape[-1]
    product = a.reshape(*scale.shape, -1, rank) @ b.reshape(*scale.shape, rank, -1)
    return (scale[..., None, None] * product).reshape(np.shape(params["weight"]))
