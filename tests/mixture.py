"""Mixtures of Gaussians as data: everything that a diffusion model learns is known in closed form.

Every token is an independent draw of a mixture with shares p_m, means mu_m and covariances S_m = A_m D_m^2 A_m^T,
A_m orthonormal and D_m diagonal. Under x_t = a x_0 + b eps each component stays Gaussian,

    x_t | m ~ N(a mu_m, C_m),    C_m = a^2 S_m + b^2 I                                   (1)
    E[x_0 | x_t, m] = mu_m + a S_m C_m^-1 (x_t - a mu_m)                                 (2)
    E[eps | x_t, m] = b C_m^-1 (x_t - a mu_m)                                            (3)

and the perfect model is the mean of (2) and (3) over the probabilities of m given x_t. Solvers, likelihoods and
losses are measured against it.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Key

from sora_jax.diffusion.prediction import Denoise, from_x0_and_eps
from sora_jax.diffusion.process import Process
from sora_jax.diffusion.times import per_token
from sora_jax.shapes import RowsBL, TimesBR, TokensBLP


@dataclass(frozen=True)
class Mixture:
    """Hold a mixture of M Gaussians in P dimensions, as NumPy arrays."""

    shares: np.ndarray  # (M,)
    means: np.ndarray  # (M, P)
    axes: np.ndarray  # A (M, P, P), axes in columns
    deviations: np.ndarray  # D (M, P), standard deviations along the axes


def petals(components: int = 5, radius: float = 1.25, along: float = 0.35, across: float = 0.12) -> Mixture:
    """Make a mixture of tilted, unequal components around a circle in the plane, of about unit variance."""
    angles = 2 * np.pi * np.arange(components) / components
    outward = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    sideward = np.stack([-outward[:, 1], outward[:, 0]], axis=1)
    shares = 1.0 + np.arange(components) / components
    deviations = np.tile([along, across], (components, 1))
    return Mixture(shares / shares.sum(), radius * outward, np.stack([outward, sideward], axis=2), deviations)


def posterior_means(
    mixture: Mixture, a: ArrayLike, b: ArrayLike, x: Float[Array, "*n P"]
) -> tuple[Float[Array, "*n P"], Float[Array, "*n P"]]:
    """Return E[x_0 | x_t = x] and E[eps | x_t = x]; a and b are scalars or (*n, 1), not both 0."""
    axes = jnp.asarray(mixture.axes, x.dtype)
    along, variances = _standing(mixture, a, b, x)
    weights = jax.nn.softmax(_log_joint(mixture, along, variances), axis=-1)
    scaled = along / variances
    pulled = _last(a, x) * _like(mixture.deviations**2, x) * scaled
    clean = _like(mixture.means, x) + jnp.einsum("mpq,...mq->...mp", axes, pulled)
    noise = jnp.einsum("mpq,...mq->...mp", axes, _last(b, x) * scaled)
    return jnp.einsum("...m,...mp->...p", weights, clean), jnp.einsum("...m,...mp->...p", weights, noise)


def log_density(
    mixture: Mixture, x: Float[Array, "*n P"], a: ArrayLike = 1.0, b: ArrayLike = 0.0
) -> Float[Array, "*n"]:
    """Return log p of x_t = a x_0 + b eps at x, in nats; of the data by default."""
    return jax.nn.logsumexp(_log_joint(mixture, *_standing(mixture, a, b, x)), axis=-1)


def denoiser(mixture: Mixture, process: Process, prediction_type: str, rows_BL: RowsBL) -> Denoise:
    """Make the perfect model of the mixture: the expectation of the prediction given x_t."""

    def denoise(x_BLP: TokensBLP, t_BR: TimesBR) -> TokensBLP:
        t_BL1 = per_token(t_BR, rows_BL)[:, :, None]
        means = posterior_means(mixture, process.a(t_BL1), process.b(t_BL1), x_BLP)
        return from_x0_and_eps(process, prediction_type, *means, t_BL1)

    return denoise


def draw_data(mixture: Mixture, key: Key[Array, ""], count: int) -> Float[Array, "count P"]:
    """Draw `count` independent exact samples of the data."""
    choice_key, normal_key = jax.random.split(key)
    choice = jax.random.choice(choice_key, len(mixture.shares), (count,), p=jnp.asarray(mixture.shares))
    along = jax.random.normal(normal_key, (count, mixture.means.shape[1])) * jnp.asarray(mixture.deviations)[choice]
    return jnp.asarray(mixture.means)[choice] + jnp.einsum("npq,nq->np", jnp.asarray(mixture.axes)[choice], along)


def _standing(mixture: Mixture, a: ArrayLike, b: ArrayLike, x: Array) -> tuple[Array, Array]:
    """Return x - a mu_m along every component's axes, and the variances of x_t along them; (*n, M, P)."""
    a, b = _last(a, x), _last(b, x)
    offset = x[..., None, :] - a * _like(mixture.means, x)
    variances = jnp.square(a) * _like(mixture.deviations**2, x) + jnp.square(b)
    return jnp.einsum("mpq,...mp->...mq", jnp.asarray(mixture.axes, x.dtype), offset), variances


def _log_joint(mixture: Mixture, along: Array, variances: Array) -> Array:
    """Return the logarithm of the share of m times its density at x; (*n, M)."""
    square = jnp.sum(jnp.square(along) / variances + jnp.log(2 * math.pi * variances), axis=-1)
    return _like(np.log(mixture.shares), square) - 0.5 * square


def _like(values: np.ndarray, x: Array) -> Array:
    """Reshape values (M,) or (M, P) to the rank of (*n, M) or (*n, M, P), in the dtype of x (*n, P)."""
    return jnp.asarray(values.reshape((1,) * (x.ndim - 1) + values.shape), x.dtype)


def _last(value: ArrayLike, x: Array) -> Array:
    """Reshape a scalar or (*n, 1) to (1 or *n, 1, 1), in the dtype and rank of (*n, M, P)."""
    value = jnp.asarray(value, x.dtype)
    return value[..., None] if value.ndim else value.reshape((1,) * (x.ndim + 1))
