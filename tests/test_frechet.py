"""Frechet distances against closed forms and other algorithms, their intervals, precision, recall, Inception score."""

import numpy as np
import pytest
from scipy import linalg

from sora_jax.errors import UserError
from sora_jax.evaluate import frechet
from sora_jax.evaluate.frechet import (
    GROUPS,
    Gaussian,
    Moments,
    Sample,
    frechet_distance,
    inception_score,
    measure_distance,
    precision_recall,
)


def features(rows, columns, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, columns)) @ rng.standard_normal((columns, columns)) + offset


def gaussian(rows=50, columns=6, seed=0, offset=0.0):
    return Moments.of(features(rows, columns, seed, offset)).gaussian()


def sample(x):
    return Sample(x, np.arange(len(x)))


@pytest.mark.parametrize("sizes", [(50,), (1, 49), (17, 1, 20, 12), (1,) * 50])
def test_moments_are_the_same_however_the_rows_are_split_and_ordered(sizes):
    # the mean is a thousand deviations: sums of squares about zero would lose six digits
    x = np.random.default_rng(1).permutation(features(50, 4, offset=3000.0))
    parts = [Moments.of(part) for part in np.split(x, np.cumsum(sizes)[:-1])]
    found = sum(parts[1:], parts[0]).gaussian()
    np.testing.assert_allclose(found.mean_D, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.cov_DD, np.cov(x, rowvar=False), rtol=1e-10)


def test_moments_take_rows_away_again():
    a, b = features(30, 3), features(20, 3, seed=1, offset=5)
    found, wanted = Moments.of(np.concatenate([a, b])) - Moments.of(b), Moments.of(a)
    assert found.count == 30
    np.testing.assert_allclose(found.mean_D, wanted.mean_D, rtol=1e-12)
    np.testing.assert_allclose(found.scatter_DD, wanted.scatter_DD, rtol=1e-10)


def test_distance_of_gaussians_with_the_same_axes():
    """(m1 - m2)^2 + (s1 - s2)^2 along each axis, in any coordinates."""
    turn = linalg.qr(features(5, 5))[0]
    means, deviations = np.random.default_rng(2).uniform(0, 3, (2, 2, 5))
    a, b = (Gaussian(turn @ m, turn @ np.diag(s**2) @ turn.T) for m, s in zip(means, deviations, strict=True))
    wanted = np.square(means[0] - means[1]).sum() + np.square(deviations[0] - deviations[1]).sum()
    np.testing.assert_allclose(frechet_distance(a, b), wanted, rtol=1e-12)


def test_distance_of_two_dimensional_gaussians():
    """The trace of the root of a 2 x 2 matrix M is sqrt(tr M + 2 sqrt(det M))."""
    a, b = gaussian(columns=2), gaussian(columns=2, seed=1)
    product = a.cov_DD @ b.cov_DD
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    wanted = np.square(a.mean_D - b.mean_D).sum() + np.trace(a.cov_DD + b.cov_DD) - 2 * root
    np.testing.assert_allclose(frechet_distance(a, b), wanted, rtol=1e-12)


def test_distance_is_that_of_the_usual_algorithm_and_symmetric():
    a, b = gaussian(columns=20), gaussian(columns=20, seed=1)
    wanted = np.square(a.mean_D - b.mean_D).sum() + np.trace(a.cov_DD + b.cov_DD)
    wanted -= 2 * np.trace(linalg.sqrtm(a.cov_DD @ b.cov_DD)).real
    np.testing.assert_allclose([frechet_distance(a, b), frechet_distance(b, a)], wanted, rtol=1e-10)


@pytest.mark.parametrize("rows", [(8, 8), (8, 30), (30, 8)])
def test_distance_of_fewer_clips_than_features(rows):
    """The trace of the root is the sum of the singular values of the clips' inner products."""
    x, y = (features(n, 60, seed=0) + seed for n, seed in zip(rows, (0, 1), strict=True))
    a, b = (Moments.of(z).gaussian() for z in (x, y))
    products = (x - x.mean(0)) @ (y - y.mean(0)).T / np.sqrt((len(x) - 1) * (len(y) - 1))
    wanted = np.square(a.mean_D - b.mean_D).sum() + np.trace(a.cov_DD + b.cov_DD)
    wanted -= 2 * np.linalg.svd(products, compute_uv=False).sum()
    np.testing.assert_allclose(frechet_distance(a, b), wanted, rtol=1e-10)


@pytest.mark.parametrize("rows", [200, 12])  # more than features, and fewer
def test_distance_of_equal_statistics_is_zero(rows):
    a = gaussian(rows, 40)
    assert abs(frechet_distance(a, a)) < 1e-9 * np.trace(a.cov_DD)


def truth(shift, deviations):
    return shift**2 + np.square(deviations - 1).sum()


def test_interval_holds_the_value_and_the_limit_of_infinitely_many_clips():
    """Of 60 pairs of samples, with a distance that is known."""
    width, rows, shift, rng = 12, 60, 1.0, np.random.default_rng(3)
    deviations = np.linspace(0.5, 1.5, width)
    found = []
    for _ in range(60):
        x, y = rng.standard_normal((2, rows, width))
        found.append(measure_distance(sample(x), sample(y * deviations + np.eye(width)[0] * shift)))
    values, limits, halves = np.array([(d.value, d.infinite, d.high - d.value) for d in found]).T
    true, mean = truth(shift, deviations), values.mean()
    assert mean - true > 0.5  # the bias of sixty clips
    assert abs(limits.mean() - true) < 0.1 * (mean - true)
    for estimates, aim in ((values, mean), (limits, true)):
        assert np.mean(np.abs(estimates - aim) <= halves) >= 0.88
    assert halves.mean() < 3 * values.std()


def test_frames_of_one_clip_are_no_further_clips():
    """Every frame twice: nothing is learnt by it."""
    x, y = features(3 * GROUPS, 3), features(3 * GROUPS, 3, seed=1)
    once, twice = (
        measure_distance(*(Sample(z.repeat(n, 0), np.arange(len(z)).repeat(n)) for z in (x, y)), ddof=0) for n in (1, 2)
    )
    np.testing.assert_allclose(list(vars(once).values()), list(vars(twice).values()), rtol=1e-9)


def test_the_order_of_clips_does_not_narrow_the_interval():
    """Clips come ordered by size, on which features depend."""
    rng = np.random.default_rng(5)
    x, y = (rng.standard_normal((200, 3)) + np.arange(200)[:, None] / 40 for _ in range(2))
    widths = []
    for seed in range(20):
        order = rng.permutation(200) if seed else np.arange(200)
        found = measure_distance(sample(x[order]), sample(y[order] + 1))
        widths.append(found.high - found.low)
    assert widths[0] > 0.7 * np.mean(widths)


def test_statistics_of_others_count_as_exact():
    x, y = features(3 * GROUPS, 3), features(3 * GROUPS, 3, seed=1)
    both, one = measure_distance(sample(x), sample(y)), measure_distance(Moments.of(x).gaussian(), sample(y))
    assert one.value == pytest.approx(both.value, rel=1e-12)
    assert 0 < one.high - one.value < both.high - both.value


def test_a_few_clips_have_no_interval():
    found = measure_distance(sample(features(GROUPS - 1, 2)), sample(features(50, 2)))
    assert found.value > 0 and np.isnan([found.low, found.high, found.infinite]).all()


def test_inception_score():
    assert inception_score(np.full((10, 4), 0.25)) == pytest.approx(1)
    assert inception_score(np.eye(4)[[0, 1, 2, 3] * 5]) == pytest.approx(4)  # certain of each image, all classes alike
    halves = np.eye(4)[[0, 1] * 5 + [2, 2] * 5]
    assert inception_score(halves, split=10) == pytest.approx((2 + 1) / 2)


def brute_force(real, made, k):
    """The definition, point by point."""

    def covered(points, balls):
        radii = [sorted(np.linalg.norm(balls - ball, axis=1))[k] for ball in balls]
        return np.mean([any(np.linalg.norm(balls - p, axis=1) <= radii) for p in points])

    return covered(made, real), covered(real, made)


@pytest.mark.parametrize("block", [7, 1024])
def test_precision_and_recall_are_those_of_the_definition(monkeypatch, block):
    monkeypatch.setattr(frechet, "ROWS", block)
    real, made = features(40, 3), features(30, 3, seed=0) * 0.6 + 0.5
    found = precision_recall(real, made, k=2)
    assert found == pytest.approx(brute_force(real, made, 2), abs=1e-12)
    assert 0 < found[1] < 1


def test_precision_and_recall_of_sets_that_are_the_same_apart_or_part_of_each_other():
    x = features(40, 3, offset=1e4)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 1e3) == (0, 0)
    two = np.concatenate([x, x + 1e3])
    assert precision_recall(two, x) == (1, 0.5)


def test_precision_needs_neighbours():
    with pytest.raises(UserError, match="compare 3 clips; they need more than 3"):
        precision_recall(features(3, 2), features(9, 2))
