"""Make the parameters and the state for a benchmark, drawn by NumPy, so that nothing has to be compiled for them."""

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.models.transformer import TransformerConfig, denoiser_specs
from sora_jax.nn.params import abstract
from sora_jax.parallel.rules import partition
from sora_jax.train.state import MODEL, Optimizer, TrainState


def random_params(model: TransformerConfig) -> dict:
    """Return Gaussian parameters in which nothing is zero: with its own initial ones the model's output would be."""
    draws = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.05 * draws.standard_normal(x.shape, np.float32), abstract(denoiser_specs(model)))


def place(tree):
    """Place host arrays, whole on every device of the mesh that is set."""
    return jax.tree.map(lambda x: jax.device_put(x, partition()), tree)


def first_state(params: dict, optimizer: Optimizer) -> TrainState:
    """Return the state before the first step of a run that trains these parameters as its only group."""
    ema = tuple(jax.tree.map(jnp.copy, params) for _ in optimizer.decays)  # copies: the step donates its state
    opt_state = jax.jit(optimizer.transformation.init)(params)
    return TrainState(jnp.zeros((), jnp.int32), {MODEL: params}, {MODEL: ema}, {MODEL: opt_state})
