"""Coding rate and sparsity of tokens, the quantities of CRATE's objective (2306.01129, equations 3 to 8).

Tokens are columns here, Z (d, N), as in the paper; subspaces U (K, d, p) have bases as columns. A rate is in nats.
"""

import jax
import jax.numpy as jnp


def coding_rate(Z: jax.Array, eps: float) -> jax.Array:
    """Compute R(Z) = 1/2 logdet(I + d / (N eps^2) Z Z^T), what it takes to code all tokens to precision eps."""
    d, n = Z.shape
    small = Z @ Z.T if d < n else Z.T @ Z  # both have the same determinant
    return 0.5 * jnp.linalg.slogdet(jnp.eye(len(small)) + d / (n * eps**2) * small)[1]


def subspace_rate(Z: jax.Array, U: jax.Array, eps: float) -> jax.Array:
    """Compute R_c(Z | U), the sum over subspaces of the rate of the tokens' coordinates in each, of p dimensions."""
    return jax.vmap(lambda basis: coding_rate(basis.T @ Z, eps))(U).sum()


def subspace_rate_gradient(Z: jax.Array, U: jax.Array, eps: float) -> jax.Array:
    """Compute the gradient of R_c: with a = p / (N eps^2), the sum of a U_k U_k^T Z (I + a (U_k^T Z)^T U_k^T Z)^-1."""
    n, alpha = Z.shape[1], U.shape[-1] / (Z.shape[1] * eps**2)

    def one(basis):
        inside = basis.T @ Z
        return basis @ jnp.linalg.solve(jnp.eye(n) + alpha * inside.T @ inside, inside.T).T

    return alpha * jax.vmap(one)(U).sum(0)


def nonzero_share(Z: jax.Array) -> jax.Array:
    """Return the share of entries that are not 0."""
    return jnp.mean(Z != 0)


def subspaces_of(mssa: dict) -> jax.Array:
    """Return the subspaces (K, d, p) of a layer: orthonormal bases of what its projection's heads span.

    The projection is not orthonormal once trained, and R_c of a longer basis is larger: bases make layers comparable.
    """
    heads = jnp.moveaxis(mssa["subspaces"]["weight"][:, 0], 1, 0)  # (d, K, p) -> (K, d, p)
    return jnp.linalg.qr(heads)[0]
