"""Check intervals of a Frechet distance where the distance is known: jackknife, and bootstrap beside it.

    python experiments/frechet/interval.py

Two Gaussians: variances fall as 1 / i; the mean of the second is 1 away and its variances are 1.3 times as large. From
each so many "clips" are drawn, 40 times.
"""

import argparse

import numpy as np

from sora_jax.evaluate.frechet import Moments, Sample, frechet_distance, measure_distance

CASES = ((16, 50), (64, 100), (64, 500), (400, 256), (400, 1000))  # features and clips
RESAMPLES = 100


def draw(rng: np.random.Generator, features: int, clips: int) -> list[np.ndarray]:
    """Draw both sets."""
    deviations = np.arange(1, features + 1) ** -0.5
    x, y = rng.standard_normal((2, clips, features)) * deviations
    return [x, 1.3**0.5 * y + np.eye(features)[0]]


def known(features: int) -> float:
    """Return the distance of the Gaussians themselves."""
    return 1 + (1.3**0.5 - 1) ** 2 * (1 / np.arange(1, features + 1)).sum()


def distance(x: np.ndarray, y: np.ndarray) -> float:
    return frechet_distance(Moments.of(x).gaussian(), Moments.of(y).gaussian())


def bootstrap(rng: np.random.Generator, sets: list[np.ndarray]) -> np.ndarray:
    """Return the percentiles of distances of resampled clips."""
    values = [distance(*(x[rng.integers(0, len(x), len(x))] for x in sets)) for _ in range(RESAMPLES)]
    return np.percentile(values, (2.5, 97.5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=40)
    options = parser.parse_args()
    print("features clips |  true  mean value | jackknife: width, holds mean; limit, holds true | bootstrap holds mean")
    for features, clips in CASES:
        rng, found, ends = np.random.default_rng(0), [], []
        for _ in range(options.repeat):
            sets = draw(rng, features, clips)
            found.append(measure_distance(*(Sample(x, np.arange(clips)) for x in sets)))
            if features < 400:
                ends.append(bootstrap(rng, sets))
        value, low, high, limit = np.array([(d.value, d.low, d.high, d.infinite) for d in found]).T
        mean, true, half = value.mean(), known(features), (high - low) / 2
        holds = np.mean(np.abs(value - mean) <= half), np.mean(np.abs(limit - true) <= half)
        resampled = f"{np.mean([a <= mean <= b for a, b in ends]):.0%}" if ends else "-"
        print(
            f"{features:8} {clips:5} | {true:5.3f} {mean:10.3f} | {half.mean():16.3f} {holds[0]:11.0%}; "
            f"{limit.mean():5.3f} {holds[1]:10.0%} | {resampled:>20}",
            flush=True,
        )


if __name__ == "__main__":
    main()
