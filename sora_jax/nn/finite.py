"""Find arrays with values that are NaN or infinite."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def not_finite(tree: Any) -> list[str]:
    """Return the paths of the arrays of a tree that are not finite; one program looks at all of them, in place."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    finite = np.asarray(_finite([leaf for _, leaf in leaves]))
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return [path for path, whole in zip(paths, finite, strict=True) if not whole]


@jax.jit
def _finite(arrays: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in arrays])


def named(paths: list[str]) -> str:
    """Name the first of some arrays, and say how many there are."""
    return paths[0] if len(paths) == 1 else f"{paths[0]} (the first of {len(paths)} arrays)"
