"""Comparisons of arrays that several test files make. Errors are relative to the largest value compared."""

import jax
import numpy as np


def relative_error(found, wanted) -> float:
    """Return the largest difference of two arrays of one shape over the largest wanted value."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def assert_near(found, wanted, tolerance: float = 2e-5, least: float = 1e-3, share: float = 0.0) -> None:
    """Compare two trees array by array, each to `tolerance` of its largest wanted value.

    Arrays smaller than `least`, or than `share` of the largest value of all arrays, are compared as if they were that
    large: their values are what rounding leaves.
    """
    pairs = list(zip(*map(jax.tree.leaves, jax.device_get((found, wanted))), strict=True))
    largest = max(np.abs(one).max() for _, one in pairs)
    for other, one in pairs:
        scale = max(np.abs(one).max(), least, share * largest)
        np.testing.assert_allclose(other, one, rtol=0, atol=tolerance * scale)


def assert_far(found, other, by: float = 1e-2) -> None:
    """Check that two arrays differ by more than `by` on average."""
    assert np.abs(np.asarray(found) - np.asarray(other)).mean() > by
