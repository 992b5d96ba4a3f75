"""Parameters for a benchmark: drawn by NumPy, so that nothing has to be compiled for them."""

import jax
import numpy as np

from sora_jax.models.transformer import TransformerConfig, denoiser_specs
from sora_jax.nn.params import abstract
from sora_jax.parallel.rules import partition


def random_params(model: TransformerConfig) -> dict:
    """Gaussian parameters in which nothing is zero: with its own initial ones the model's output would be."""
    draws = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.05 * draws.standard_normal(x.shape, np.float32), abstract(denoiser_specs(model)))


def place(tree):
    """Host arrays, whole on every device of the mesh that is set."""
    return jax.tree.map(lambda x: jax.device_put(x, partition()), tree)
