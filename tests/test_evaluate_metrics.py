"""The numbers of `sora-jax evaluate`: clips against reconstructions, latents, spectra, and linear codecs."""

import dataclasses
import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from sora_jax.errors import UserError
from sora_jax.evaluate.metrics import (
    MOST_PSNR,
    average,
    average_by_size,
    flicker,
    latent_statistics,
    psnr,
    quality,
    ssim,
    table,
)
from sora_jax.evaluate.spectrum import bands, block_spectrum, compare_spectra, high_share, zigzag
from sora_jax.nn.conv import depth_to_space, space_to_depth
from sora_jax.train import linear_codec
from sora_jax.train.linear_codec import blocks_to_clip, clip_to_blocks, fit_linear_codec
from sora_jax.train.reconstruction import resolution_of_loss


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def constant(level: int, *shape: int) -> np.ndarray:
    return np.full(shape, level, np.uint8)


def test_psnr_of_a_constant_error_and_of_equal_clips():
    clip = noise(0, 3, 8, 8, 3) // 2
    for error in (1, 7, 100):
        assert psnr(clip, clip + np.uint8(error)) == pytest.approx(20 * math.log10(255 / error))
        assert psnr(clip + np.uint8(error), clip) == psnr(clip, clip + np.uint8(error))  # nothing wraps around
    assert psnr(clip, clip) == MOST_PSNR


def test_ssim_of_constant_frames_compares_their_brightness_alone():
    a, b, c1 = 50.0, 90.0, (0.01 * 255) ** 2
    found = ssim(constant(50, 2, 9, 12, 3), constant(90, 2, 9, 12, 3))
    np.testing.assert_allclose(found, (2 * a * b + c1) / (a * a + b * b + c1), rtol=1e-6)


@pytest.mark.parametrize("height, width, window", [(9, 8, 7), (5, 6, 5), (2, 4, 1)])
def test_ssim_by_its_definition_in_each_window(height, width, window):
    x, y = noise(3, 2, height, width, 3), noise(4, 2, height, width, 3)
    y[1] = x[1] // 2 + y[1] // 4
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

    def likeness(t, top, left, channel):
        a, b = (z[t, top : top + window, left : left + window, channel].ravel().astype(float) for z in (x, y))
        (var_a, both), (_, var_b) = np.cov(a, b) if window > 1 else np.zeros((2, 2))
        luminance = (2 * a.mean() * b.mean() + c1) / (a.mean() ** 2 + b.mean() ** 2 + c1)
        return luminance * (2 * both + c2) / (var_a + var_b + c2)

    places = list(itertools.product(range(height - window + 1), range(width - window + 1), range(3)))
    wanted = [np.mean([likeness(t, *place) for place in places]) for t in range(2)]
    np.testing.assert_allclose(ssim(x, y), wanted, rtol=1e-6)
    np.testing.assert_allclose(ssim(x, x), 1, rtol=1e-12)


def test_flicker_sees_changes_alone():
    clip = noise(5, 1, 4, 4, 3).repeat(6, axis=0) // 2
    assert flicker(clip, clip + np.uint8(9)) == (0, 0)  # wrong, but still
    trembling = clip.copy()
    trembling[1::2] += 10
    assert flicker(clip, trembling) == (10, 10)
    assert flicker(trembling, trembling) == (0, None)  # it has no still pixel
    half = clip.copy()
    half[1::2, :, 2:] += 10  # the right half moves, and is decoded as if it were still; the left trembles
    other = clip.copy()
    other[1::2, :, :2] += 4
    assert flicker(half, other) == ((10 + 4) / 2, 4)
    assert flicker(clip[:1], clip[:1]) == (None, None)


def test_first_frame_and_rest_are_measured_apart():
    clip = noise(6, 5, 8, 8, 3) // 2
    decoded = clip + np.uint8(10)
    decoded[0] = clip[0] + 1
    found = quality(clip, decoded)
    assert found.psnr_first == pytest.approx(20 * math.log10(255))
    assert found.psnr_rest == pytest.approx(20 * math.log10(25.5))
    assert found.psnr == pytest.approx(10 * math.log10(255**2 / ((1 + 4 * 100) / 5)))
    assert found.ssim == pytest.approx((found.ssim_first + 4 * found.ssim_rest) / 5)
    image = quality(clip[:1], decoded[:1])
    assert image.psnr == image.psnr_first and image.psnr_rest is image.ssim_rest is image.flicker is None


def test_means_are_over_the_clips_that_have_a_value():
    clip = noise(7, 5, 8, 8, 3) // 2
    good, bad = quality(clip, clip + np.uint8(1)), quality(clip[:1], clip[:1] + np.uint8(10))
    both = average([good, bad])
    assert both.clips == 2 and both.psnr == pytest.approx(20 * math.log10(255) - 10)
    assert both.psnr_rest == good.psnr_rest and average([bad]).psnr_rest is None


def test_rare_sizes_are_put_together():
    clip = noise(8, 1, 8, 8, 3) // 2
    qualities = [quality(clip, clip + np.uint8(error)) for error in (1, 2, 4, 8, 16)]
    sizes = [(1, 8, 8), (5, 8, 8), (5, 8, 8), (9, 8, 8), (9, 8, 16)]
    found = average_by_size(qualities, sizes, most=2)
    assert list(found) == ["5x8x8", "1x8x8", "others"] and [q.clips for q in found.values()] == [2, 1, 2]
    assert found["5x8x8"] == average(qualities[1:3]) and found["others"] == average(qualities[3:])
    assert list(average_by_size(qualities, sizes)) == ["5x8x8", "1x8x8", "9x8x8", "9x8x16"]


def test_the_table_has_a_dash_for_what_is_not_there():
    image = dataclasses.replace(quality(*[noise(9, 1, 8, 8, 3)] * 2), psnr=12.345)
    header, row, _ = table({"1x8x8": (image, dataclasses.replace(image, psnr=1.0))})
    cells = dict(zip(["size", *header.split()], row.split(), strict=True))
    assert (cells["size"], cells["clips"], cells["PSNR"], cells["bound"]) == ("1x8x8", "1", "12.35", "1.00")
    assert cells["flicker"] == cells["rest"] == cells["still"] == "-"


def test_statistics_of_a_known_posterior():
    rng = np.random.default_rng(0)
    mean = np.stack([rng.standard_normal(40_000) * 2 + 5, rng.uniform(-1, 1, 40_000), np.ones(40_000)], 1)
    logvar = np.broadcast_to(np.log([0.25, 1.0, 1.0]), mean.shape)
    found = latent_statistics(mean.astype(np.float32), logvar.astype(np.float32))
    wanted = [0.5 * (4 + 25 + 0.25 - 1 - math.log(0.25)), 0.5 / 3, 0.5]
    np.testing.assert_allclose(found.kl_by_channel, wanted, rtol=0.03)
    assert found.kl == pytest.approx(np.mean(found.kl_by_channel))
    np.testing.assert_allclose(found.std, [2, math.sqrt(1 / 3), 0], rtol=0.03)
    np.testing.assert_allclose(found.posterior_std, [0.5, 1, 1], rtol=1e-5)
    assert found.dead == [2] and found.kurtosis[2] is None
    np.testing.assert_allclose(found.kurtosis[:2], [3, 1.8], rtol=0.03)


@pytest.mark.parametrize("l1, l2, kl, values", [(0.0, 4.0, 1e-3, 48), (1.0, 4.0, 1e-3, 48), (1.0, 0.0, 1e-4, 12)])
def test_the_resolution_of_the_loss_is_where_detail_pays_for_its_nats(l1, l2, kl, values):
    def loss(log_std):  # of a Gaussian error, and what it takes to say the detail down to it
        std = math.exp(log_std)
        return l1 * math.sqrt(2 / math.pi) * std + l2 * std**2 - kl * values * log_std

    best = minimize_scalar(loss, bounds=(-15, 3), method="bounded", options={"xatol": 1e-7}).x
    assert resolution_of_loss(l1, l2, kl, values) == pytest.approx(20 * math.log10(2 / math.exp(best)), abs=1e-3)


def test_the_resolution_of_known_losses():
    assert resolution_of_loss(0.0, 4.0, 1e-3, 48) == pytest.approx(10 * math.log10(4 / 0.006))  # kl ratio / (2 l2)
    assert resolution_of_loss(1.0, 4.0, 0.0, 48) is None and resolution_of_loss(0.0, 0.0, 1e-3, 48) is None


def test_zigzag_goes_from_low_to_high_as_in_jpeg():
    assert zigzag(8)[:7].tolist() == [[0, 0], [0, 1], [1, 0], [2, 0], [1, 1], [0, 2], [0, 3]]
    assert zigzag(8)[-2:].tolist() == [[7, 6], [7, 7]]
    assert sorted(map(tuple, zigzag(5))) == [(row, column) for row in range(5) for column in range(5)]


@pytest.mark.parametrize("power, low, high", [(0, 0.49, 0.51), (2, 0.0, 0.05)])
@pytest.mark.parametrize("block", [5, 8])
def test_the_high_share_of_noise_whose_amplitude_falls_with_frequency(power, low, high, block):
    white = np.random.default_rng(0).standard_normal((20, 40, 40, 4))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(40), np.fft.fftfreq(40), indexing="ij"))
    frequency[0, 0] = np.inf if power else 1
    field = np.fft.ifft2(np.fft.fft2(white, axes=(1, 2)) / frequency[..., None] ** power, axes=(1, 2)).real
    assert low <= high_share(block_spectrum([field, field[:3]], block)) <= high


def test_a_wave_is_all_in_its_own_coefficient():
    row, column = 2, 5
    waves = [np.cos(np.pi * (np.arange(8) + 0.5) * k / 8) for k in (row, column)]
    picture = np.tile(np.outer(*waves), (2, 3))[None, :, :, None]
    shares = block_spectrum([picture + 7.0], 8)  # the mean does not count
    assert shares[zigzag(8).tolist().index([row, column])] == pytest.approx(1)
    steps = np.kron([[1.0, 2.0], [3.0, 5.0]], np.ones((8, 8)))[None, :, :, None]
    assert block_spectrum([steps], 8)[0] == pytest.approx(1)  # differences between blocks are the first coefficient
    assert not block_spectrum([np.full((1, 8, 8, 1), 3.0)], 8).any()


def test_spectra_are_of_the_largest_block_that_fits_the_latents():
    images = [noise(0, 1, 48, 48, 3)]
    latents = [np.random.default_rng(1).standard_normal((1, 6, 9, 2)), np.ones((1, 4, 8, 2))]
    found = compare_spectra(latents, images)
    assert found.block == 4 and len(found.latents) == len(found.images) == 16
    assert found.high_share_images == pytest.approx(0.5, abs=0.05)
    assert compare_spectra([np.ones((2, 1, 8, 3))], images) is None
    assert bands(found.images, 4) == pytest.approx(np.reshape(found.images, (4, 4)).sum(1))


BLOCK = (2, 4, 2)


def smooth(seed: int, *shape: int) -> np.ndarray:
    """Noise with little detail, so that some components matter more than others."""
    coarse = np.random.default_rng(seed).uniform(60, 190, (shape[0], shape[1] // 4, shape[2] // 4, 3))
    fine = np.random.default_rng(seed + 100).uniform(-20, 20, shape)
    return (coarse.repeat(4, axis=1).repeat(4, axis=2) + fine).astype(np.uint8)


def test_blocks_are_folded_as_by_the_network():
    clip = noise(0, 5, 8, 6, 3)
    video = jnp.asarray(clip, jnp.float32)[None] / 127.5 - 1
    wanted = np.asarray(space_to_depth(video, BLOCK))[0]
    np.testing.assert_allclose(clip_to_blocks(clip, BLOCK), wanted, atol=1e-6)
    np.testing.assert_allclose(blocks_to_clip(wanted, BLOCK), np.asarray(depth_to_space(wanted[None], BLOCK))[0])
    np.testing.assert_allclose(blocks_to_clip(clip_to_blocks(clip, BLOCK), BLOCK), video[0], atol=1e-6)
    with pytest.raises(UserError, match="a clip has 4x8x6 pixels; blocks of 2x4x2 need 1 \\+ 2k frames"):
        clip_to_blocks(clip[:4], BLOCK)


def test_a_codec_is_the_principal_components_of_blocks():
    clips = [smooth(0, 5, 16, 16, 3), smooth(1, 3, 8, 16, 3)]
    codec = fit_linear_codec(iter(clips), BLOCK, 5)
    blocks = np.concatenate([clip_to_blocks(clip, BLOCK).reshape(-1, 48) for clip in clips]).astype(np.float64)
    _, singular, directions = np.linalg.svd(blocks - blocks.mean(0), full_matrices=False)
    np.testing.assert_allclose(codec.mean_P, blocks.mean(0), atol=1e-6)
    np.testing.assert_allclose(codec.std_C, singular[:5] / math.sqrt(len(blocks)), rtol=1e-4)
    np.testing.assert_allclose(np.abs(directions[:5] @ codec.components_PC), np.eye(5), atol=1e-3)
    assert (np.take_along_axis(codec.components_PC, np.abs(codec.components_PC).argmax(0)[None], 0) > 0).all()
    latents = np.concatenate([codec.encode(clip).reshape(-1, 5) for clip in clips])
    np.testing.assert_allclose(latents.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(np.cov(latents.T, bias=True), np.eye(5), atol=1e-3)


def test_more_channels_keep_more_and_all_of_them_everything():
    train, test = [smooth(seed, 5, 16, 16, 3) for seed in range(3)], smooth(9, 5, 16, 16, 3)
    errors = []
    for channels in (1, 4, 16, 48):
        codec = fit_linear_codec(train, BLOCK, channels)
        assert codec.encode(test).shape == (3, 4, 8, channels)
        errors.append(np.abs(codec.decode(codec.encode(test)) - (test / 127.5 - 1)).max())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-5
    flat = fit_linear_codec([constant(100, 3, 8, 8, 3)], BLOCK, 4)  # nothing varies: still finite, and exact
    np.testing.assert_allclose(flat.decode(flat.encode(constant(100, 3, 8, 8, 3))), 100 / 127.5 - 1, atol=1e-5)


def test_large_blocks_are_fitted_on_a_sample(monkeypatch):
    clips = [smooth(seed, 5, 16, 16, 3) for seed in range(2)]  # 192 blocks of 48 values
    exact = fit_linear_codec(clips, BLOCK, 3)
    monkeypatch.setattr(linear_codec, "MOST_VALUES", 47)
    monkeypatch.setattr(linear_codec, "_check_count", lambda count, channels: None)
    sampled = [fit_linear_codec(clips, BLOCK, 3, seed=seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(sampled[0].components_PC, sampled[1].components_PC)
    assert not np.array_equal(sampled[0].mean_P, sampled[2].mean_P)
    np.testing.assert_allclose(sampled[0].components_PC.T @ sampled[0].components_PC, np.eye(3), atol=1e-5)
    assert np.linalg.svd(exact.components_PC.T @ sampled[0].components_PC)[1].min() > 0.9  # nearly the same space
    few = [clips[0][:3, :8, :8]]  # 16 blocks: all of them are held, and the fit is exact
    monkeypatch.undo()
    exact = fit_linear_codec(few, BLOCK, 3)
    monkeypatch.setattr(linear_codec, "MOST_VALUES", 47)
    held = fit_linear_codec(few, BLOCK, 3)
    for name in ("mean_P", "components_PC", "std_C"):
        np.testing.assert_allclose(getattr(held, name), getattr(exact, name), rtol=1e-3, atol=1e-4)


def test_no_more_blocks_are_read_than_asked_for():
    read = []

    def clips():
        for seed in range(10):
            read.append(seed)
            yield smooth(seed, 1, 8, 8, 3)

    fit_linear_codec(clips(), BLOCK, 2, most_blocks=20)  # 8 blocks a clip
    assert read == [0, 1, 2]


def test_a_codec_needs_as_many_blocks_and_values_as_channels():
    with pytest.raises(UserError, match="channels is 49; a block of .* has 48 values, so it must be from 1 to 48"):
        fit_linear_codec([smooth(0, 1, 8, 8, 3)], BLOCK, 49)
    with pytest.raises(UserError, match="the clips have 8 blocks; a linear codec of 9 channels needs as many"):
        fit_linear_codec([smooth(0, 1, 8, 8, 3)], BLOCK, 9)
