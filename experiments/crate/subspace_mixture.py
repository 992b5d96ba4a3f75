"""A mixture of Gaussians on subspaces at right angles, with noise, and its denoisers in closed form.

A token is x = z + sigma w with w ~ N(0, I), and z = U_k a with a ~ N(0, I) in one of K subspaces U_k (d, p), each as
likely (2306.01129, section 2.3). Tokens are rows here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mixture(NamedTuple):
    """Hold orthonormal bases (K, d, p) and the size of the noise."""

    U: jax.Array
    sigma: float


def make_mixture(key: jax.Array, subspaces: int, width: int, inside: int, sigma: float) -> Mixture:
    """Draw random subspaces at right angles to each other."""
    basis = jnp.linalg.qr(jax.random.normal(key, (width, subspaces * inside)))[0]
    return Mixture(jnp.moveaxis(basis.reshape(width, subspaces, inside), 1, 0), sigma)


def draw(mixture: Mixture, key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Draw clean and noisy tokens, (*shape, d) each."""
    K, d, p = mixture.U.shape
    of, inside, noise = jax.random.split(key, 3)
    chosen = mixture.U[jax.random.randint(of, shape, 0, K)]
    z = jnp.einsum("...dp,...p->...d", chosen, jax.random.normal(inside, (*shape, p)))
    return z, z + mixture.sigma * jax.random.normal(noise, (*shape, d))


def posterior_mean(mixture: Mixture, x: jax.Array) -> jax.Array:
    """Compute E[z | x], exactly: no denoiser has a smaller mean square error."""
    variance = mixture.sigma**2
    return _weighted(mixture, x, 0.5 * (1 / variance - 1 / (1 + variance))) / (1 + variance)


def small_noise_form(mixture: Mixture, x: jax.Array) -> jax.Array:
    """Compute its form for small noise, which MSSA resembles: energies |U_k^T x|^2 / (2 sigma^2) weigh projections."""
    return _weighted(mixture, x, 0.5 / mixture.sigma**2)


def _weighted(mixture: Mixture, x: jax.Array, temperature: float) -> jax.Array:
    inside = jnp.einsum("...d,kdp->...kp", x, mixture.U)
    weights = jax.nn.softmax(temperature * jnp.square(inside).sum(-1), axis=-1)
    return jnp.einsum("...k,...kp,kdp->...d", weights, inside, mixture.U)


def project(mixture: Mixture, x: jax.Array) -> jax.Array:
    """Apply MSSA with the true subspaces and N = 1, kappa = 1, eps = sqrt(p / N): add up all projections."""
    return jnp.einsum("...d,kdp,kep->...e", x, mixture.U, mixture.U)
