"""Model FLOPs of the autoencoder, counted in its trace.

Only what the model needs is counted; recomputation is work, but not model FLOPs.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, jaxprs_in_params
from jax.sharding import AbstractMesh

from sora_jax.models.first_stage import FirstStageConfig, autoencoder_specs, decode, encode, latent_grid
from sora_jax.nn.params import abstract

NO_MESH = AbstractMesh((), ())


def autoencoder_train_flops(config: FirstStageConfig, frames: int, height: int, width: int) -> float:
    """Return the FLOPs of one forward and backward pass over one clip: three times those of the products in it."""
    video = jax.ShapeDtypeStruct((1, frames, height, width, 3), jnp.float32)
    grid = latent_grid(config, frames, height, width)
    latent = jax.ShapeDtypeStruct((1, *grid, config.latent_channels), jnp.float32)
    params = abstract(autoencoder_specs(config))
    passes = (lambda p, x: encode(p, config, x)[0], video), (lambda p, z: decode(p, config, z), latent)
    with jax.sharding.use_abstract_mesh(NO_MESH):  # what is traced is then of the whole clip
        return 3 * sum(product_flops(jax.make_jaxpr(function)(params, x).jaxpr) for function, x in passes)


def product_flops(jaxpr: Jaxpr) -> int:
    """Count the FLOPs of all matrix products and convolutions in a traced function; of branches, the largest counts."""
    total = 0
    for equation in jaxpr.eqns:
        inner = [product_flops(getattr(sub, "jaxpr", sub)) for sub in jaxprs_in_params(equation.params)]
        out = math.prod(_shape(equation.outvars[0]))
        if equation.primitive.name == "dot_general":
            left, (contracted, _) = _shape(equation.invars[0]), equation.params["dimension_numbers"][0]
            total += 2 * out * math.prod(left[axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel, outputs = _shape(equation.invars[1]), equation.params["dimension_numbers"].rhs_spec[0]
            total += 2 * out * math.prod(kernel) // kernel[outputs]
        elif equation.primitive.name == "cond":
            total += max(inner)
        else:
            total += equation.params.get("length", 1) * sum(inner)
    return total


def _shape(variable: Any) -> tuple[int, ...]:
    """Return the shape of a variable of a trace; JAX's type for its abstract value declares none."""
    return variable.aval.shape
