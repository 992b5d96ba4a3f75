"""Compare two sets of clips by their features: Frechet distance and its interval, Inception score, precision, recall.

Features are rows of (n, D), one for each clip or frame. Everything here is float64 on the host, and no distance
depends on the order of the rows or on how they were batched, beyond rounding.
"""

import dataclasses
import functools
import operator

import numpy as np

from sora_jax.config import check

GROUPS = 20  # of clips, of which the jackknife leaves out one at a time
CONFIDENCE = 0.95  # of intervals
NEIGHBOURS = 3  # of precision and recall
ROWS = 1024  # that are compared at once with all rows of the other set, to bound memory
SPLIT = 5000  # images of one Inception score, of which the mean is reported (ADM suite)


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Hold the mean and the covariance of features."""

    mean_D: np.ndarray
    cov_DD: np.ndarray

    def gaussian(self) -> "Gaussian":
        """Return it itself, as a `Sample` returns the Gaussian that it fits."""
        return self


@dataclasses.dataclass(frozen=True)
class Moments:
    """Hold what a Gaussian is fitted from; `+` adds features and `-` takes them away again.

    The pairwise update is exact: Chan, Golub and LeVeque 1983, equations 2.1. Sums of squares about zero, as other
    suites keep them, lose as many digits as the mean is larger than the deviation.
    """

    count: int
    mean_D: np.ndarray
    scatter_DD: np.ndarray  # sum of the outer products of the deviations from the mean

    @classmethod
    def of(cls, features_nD: np.ndarray) -> "Moments":
        """Measure features (n, D), n > 0."""
        x = np.asarray(features_nD, np.float64)
        mean = x.mean(0)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    def __add__(self, other: "Moments") -> "Moments":
        return self._with(other, 1)

    def __sub__(self, other: "Moments") -> "Moments":
        return self._with(other, -1)

    def _with(self, other: "Moments", sign: int) -> "Moments":
        count, offset = self.count + sign * other.count, other.mean_D - self.mean_D
        scatter = self.scatter_DD + sign * other.scatter_DD
        scatter += np.outer(offset, offset) * (sign * self.count * other.count / count)
        return Moments(count, self.mean_D + offset * (sign * other.count / count), scatter)

    def gaussian(self, ddof: int = 1) -> Gaussian:
        """Fit a Gaussian; the covariance is divided by count - ddof."""
        return Gaussian(self.mean_D, self.scatter_DD / (self.count - ddof))


@dataclasses.dataclass(frozen=True)
class Sample:
    """Hold the features of a set of clips.

    clips_n: the number of the clip that each row is of, from 0. Rows of one clip depend on each other: the jackknife
    takes clips, not rows.
    """

    features_nD: np.ndarray
    clips_n: np.ndarray

    @property
    def clips(self) -> int:
        """Return the number of clips."""
        return int(self.clips_n.max()) + 1

    def gaussian(self, ddof: int = 1) -> Gaussian:
        """Fit a Gaussian; the covariance is divided by rows - ddof."""
        return Moments.of(self.features_nD).gaussian(ddof)

    def parts(self, groups: int) -> list[Moments]:
        """Measure `groups` disjoint random groups of clips, of equal size up to one."""
        # Not every n-th clip: of clips in the order of their sizes groups would have the same ones, and be too alike.
        group_n = (np.random.default_rng(0).permutation(self.clips) % groups)[self.clips_n]
        return [Moments.of(self.features_nD[group_n == group]) for group in range(groups)]


@dataclasses.dataclass(frozen=True)
class Distance:
    """Report a Frechet distance and how certain it is."""

    value: float  # of these clips; other samples of as many clips give other values
    low: float  # lower end of its 95 % interval; NaN with fewer than GROUPS clips
    high: float
    infinite: float  # jackknife estimate for infinitely many clips of both sets; NaN likewise


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Return the squared Frechet distance of two Gaussians, |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    Dowson and Landau 1982. Covariances may be singular, as those of fewer clips than features are.
    """
    # The product is taken inside of the smaller range of the two: its matrix is then regular. Eigenvalues that are
    # rounded zeros would have roots of 1e-8, two thousand of which are no longer nothing.
    first, second = _factor(a.cov_DD), _factor(b.cov_DD)
    return _distance(first, a, b) if first.shape[1] <= second.shape[1] else _distance(second, b, a)


def _factor(cov_DD: np.ndarray) -> np.ndarray:
    """Return F of (D, rank) with F F^T = cov."""
    values, vectors = np.linalg.eigh(cov_DD)
    kept = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return vectors[:, kept] * np.sqrt(values[kept])


def _distance(factor_Dr: np.ndarray, a: Gaussian, b: Gaussian) -> float:
    """Return the distance of two Gaussians, the first with a covariance of this factor."""
    # tr (S1 S2)^(1/2) = tr (F^T S2 F)^(1/2): the matrices F F^T S2 and F^T S2 F have the same nonzero eigenvalues.
    roots = np.sqrt(np.maximum(np.linalg.eigvalsh(factor_Dr.T @ b.cov_DD @ factor_Dr), 0.0))
    offset = a.mean_D - b.mean_D
    return float(offset @ offset + np.trace(a.cov_DD) + np.trace(b.cov_DD) - 2 * roots.sum())


def measure_distance(real: Sample | Gaussian, generated: Sample, ddof: int = 1) -> Distance:
    """Return the Frechet distance of two samples with its uncertainty, by a jackknife over groups of clips.

    Each of GROUPS groups of clips of one set is left out in turn: the spread of the distances gives the variance that
    this set causes, and their mean the bias, which is proportional to 1 / clips (Efron and Stein 1981; Chong and
    Forsyth, 1911.07023, extrapolate the same bias by a line). Both sets add up, as if they were independent. A
    bootstrap would not do: a resample holds some clips twice, which is like fewer clips, so that the bias comes in once
    more and percentiles lie above the value.

    A `Gaussian` in place of the real clips is taken as exact.
    """
    fitted = [side for side in (real, generated) if isinstance(side, Sample)]
    groups = GROUPS if min(side.clips for side in fitted) >= GROUPS else 1
    parts = [side.parts(groups) for side in fitted]
    totals = [functools.reduce(operator.add, some) for some in parts]
    *_, made = fits = [total.gaussian(ddof) for total in totals]
    others = [made, fits[0]] if isinstance(real, Sample) else [real]
    value = frechet_distance(others[-1], made)
    if groups == 1:
        return Distance(value, *(float("nan"),) * 3)
    bias, variance = 0.0, 0.0
    for some, total, other in zip(parts, totals, others, strict=True):
        factor = _factor(other.cov_DD)
        left = np.array([_distance(factor, other, (total - part).gaussian(ddof)) for part in some])
        bias += (groups - 1) * (left.mean() - value)
        variance += (groups - 1) / groups * np.square(left - left.mean()).sum()
    width = _quantile(groups - 1) * np.sqrt(variance)
    return Distance(value, value - width, value + width, value - bias)


def _quantile(freedom: int) -> float:
    from scipy import stats

    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))


def inception_score(probabilities_nK: np.ndarray, split: int = SPLIT) -> float:
    """Return exp(mean KL divergence of the images' class probabilities from their mean), a mean over splits.

    Salimans et al. 1606.03498; splits of 5000 images in order, as in the ADM suite.
    """
    p = np.asarray(probabilities_nK, np.float64)
    parts = [p[start : start + split] for start in range(0, len(p), split)]
    return float(np.mean([np.exp(_divergence(part, part.mean(0)).mean()) for part in parts]))


def _divergence(p_nK: np.ndarray, q_K: np.ndarray) -> np.ndarray:
    from scipy import special

    return special.rel_entr(p_nK, q_K).sum(1)


def precision_recall(real_nD: np.ndarray, generated_nD: np.ndarray, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Return improved precision and recall (Kynkaanniemi et al. 1904.06991, equations 1 and 2).

    Precision is the share of generated features that lie within the distance of some real feature to its k-th nearest
    real neighbour; recall is the same with the sets exchanged.

    Raises:
        UserError: a set has no k neighbours.
    """
    least = min(len(real_nD), len(generated_nD))
    check(least > k, f"precision and recall compare {least} clips; they need more than {k} real and generated ones")
    # Centred, so that the differences below cancel few digits.
    centre = np.asarray(real_nD, np.float64).mean(0)
    real, made = (np.asarray(x, np.float64) - centre for x in (real_nD, generated_nD))
    return _covered(made, real, k), _covered(real, made, k)


def _covered(points_nD: np.ndarray, balls_mD: np.ndarray, k: int) -> float:
    """Return the share of points inside of one of the balls, each of which reaches its k-th neighbour."""
    starts = range(0, len(balls_mD), ROWS)
    radii = [np.partition(_squares(balls_mD[i : i + ROWS], balls_mD), k, axis=1)[:, k] for i in starts]
    inside = np.zeros(len(points_nD), bool)
    for start, radius in zip(starts, radii):
        inside |= (_squares(points_nD, balls_mD[start : start + ROWS]) <= radius).any(1)
    return float(inside.mean())


def _squares(a_nD: np.ndarray, b_mD: np.ndarray) -> np.ndarray:
    """Return squared distances (n, m)."""
    return np.square(a_nD).sum(1)[:, None] - 2 * a_nD @ b_mD.T + np.square(b_mD).sum(1)
