"""Metrics of predicted frames against closed forms and the definitions of OpenSTL written as loops."""

import math

import numpy as np
import pytest

from sora_jax.evaluate.metrics import MOST_PSNR
from sora_jax.evaluate.prediction_metrics import average_predictions, prediction_quality, sample_quality


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).random(shape)


def test_a_constant_error_has_closed_forms():
    true = 0.5 * noise(0, 4, 16, 24, 1)
    found = prediction_quality(true + 0.25, true)
    pixels = 16 * 24
    assert found.mse == pytest.approx(pixels * 0.25**2)
    assert found.mae == pytest.approx(pixels * 0.25)
    assert found.psnr == pytest.approx(-20 * math.log10(0.25))
    assert found.mse_by_frame == pytest.approx([found.mse] * 4)


def test_a_clip_without_error():
    true = noise(1, 3, 16, 16, 1)
    found = prediction_quality(true, true)
    assert (found.mse, found.mae, found.psnr) == (0, 0, MOST_PSNR)
    assert found.ssim == pytest.approx(1)


def test_values_out_of_range_count_for_mse_alone():
    true = np.ones((2, 16, 16, 1))
    found = prediction_quality(true + 0.5, true)
    assert found.mse == pytest.approx(64) and found.mae == pytest.approx(128)
    assert (found.psnr, found.ssim) == (MOST_PSNR, pytest.approx(1))


def test_ssim_and_psnr_by_their_definitions():
    """The structural similarity of scikit-image 0.19 with floats: windows of 7, sample covariance, a range of 2."""
    predicted, true = noise(2, 2, 9, 8, 1), noise(3, 2, 9, 8, 1)
    c1, c2 = 0.02**2, 0.06**2
    ssims, psnrs = [], []
    for x, y in zip(predicted[..., 0], true[..., 0], strict=True):
        psnrs.append(10 * math.log10(1 / np.mean((x - y) ** 2)))
        values = []
        for top in range(3):
            for left in range(2):
                a, b = (z[top : top + 7, left : left + 7].ravel() for z in (x, y))
                (var_a, both), (_, var_b) = np.cov(a, b)
                luminance = (2 * a.mean() * b.mean() + c1) / (a.mean() ** 2 + b.mean() ** 2 + c1)
                values.append(luminance * (2 * both + c2) / (var_a + var_b + c2))
        ssims.append(np.mean(values))
    found = prediction_quality(predicted, true)
    assert found.psnr == pytest.approx(np.mean(psnrs))
    assert found.ssim == pytest.approx(np.mean(ssims), rel=1e-6)


def test_means_give_every_clip_the_same_weight():
    clips = [(noise(n, 3, 8, 8, 1), noise(n + 9, 3, 8, 8, 1)) for n in range(3)]
    alone = [prediction_quality(*clip) for clip in clips]
    whole = average_predictions(alone)
    assert whole.clips == 3
    for name in ("mse", "mae", "ssim", "psnr"):
        assert getattr(whole, name) == pytest.approx(np.mean([getattr(quality, name) for quality in alone]))
    nested = average_predictions([average_predictions(alone[:2]), alone[2]])
    assert nested.mse == pytest.approx(whole.mse)
    np.testing.assert_allclose(nested.mse_by_frame, whole.mse_by_frame)
    errors = [np.square(predicted - true).sum((1, 2, 3)) for predicted, true in clips]
    np.testing.assert_allclose(whole.mse_by_frame, np.mean(errors, axis=0))


def test_samples_by_their_definitions_and_in_expectation():
    """Perfect samples are independent of the true clip and distributed as it is."""
    rng, size = np.random.default_rng(5), (400, 4, 2, 5, 6, 1)
    mean = rng.random((400, 1, *size[2:]))
    everything = mean + 0.3 * rng.standard_normal((400, 5, *size[2:]))
    samples, true = everything[:, 1:], everything[:, 0]
    found, one = sample_quality(samples, true), 30 * 0.3**2
    assert (found.clips, found.samples) == (400, 4)
    assert found.mse == pytest.approx(2 * one, rel=0.03)
    assert found.variance == pytest.approx(one, rel=0.03)
    assert found.mean_mse == pytest.approx(1.25 * one, rel=0.03)
    best = [min(np.mean([np.sum((s[t] - c[t]) ** 2) for t in range(2)]) for s in own) for own, c in zip(samples, true)]
    assert found.best_mse == pytest.approx(np.mean(best))
