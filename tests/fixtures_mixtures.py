"""Problems whose solution is known: mixtures of Gaussians under every process, in float32 or float64."""

import jax.numpy as jnp
import numpy as np
from mixture import Mixture, denoiser

from sora_jax.diffusion.process import process_named
from sora_jax.diffusion.solvers import Problem

PLANE = Mixture(
    shares=np.array([0.3, 0.7]),
    means=np.array([[-1.2, 0.4], [0.8, -0.3]]),
    axes=np.array([[[0.8, -0.6], [0.6, 0.8]], [[1.0, 0.0], [0.0, 1.0]]]),
    deviations=np.array([[0.6, 0.4], [0.5, 0.7]]),
)


def gaussian(mean=0.0, deviation=1.0, width=1) -> Mixture:
    """One round Gaussian."""
    return Mixture(np.ones(1), np.full((1, width), mean), np.eye(width)[None], np.full((1, width), deviation))


def one_row(length, packs=1):
    return jnp.zeros((packs, length), jnp.int32)


def perfect(process, prediction_type, rows_BL, mixture=PLANE, **fields) -> Problem:
    """The perfect model of the mixture as a problem."""
    process = process_named(process) if isinstance(process, str) else process
    return Problem(denoiser(mixture, process, prediction_type, rows_BL), prediction_type, process, rows_BL, **fields)


def grid(*columns):
    """Times (K, 1, R) float32, one column per row."""
    return jnp.asarray(np.stack(columns, axis=1), jnp.float32)[:, None, :]


def down(steps, start=1.0, end=0.0):
    return np.linspace(start, end, steps + 1)
