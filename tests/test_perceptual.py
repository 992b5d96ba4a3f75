"""Loss terms of pixels: the Haar transform, bands, pyramids, random features, SSIM, and all of them on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from sora_jax.errors import UserError
from sora_jax.models.perceptual import (
    FORMS,
    average_pool,
    bands_loss,
    choose_frames,
    haar,
    haar_bands,
    pyramid_l1,
    random_features_loss,
    random_shift,
)
from sora_jax.parallel.mesh import MeshConfig, make_mesh, place_batch

STILL = jnp.zeros(2, jnp.int32)


def random(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def energy(bands):
    return sum(float(np.square(np.asarray(band, np.float64)).sum()) for level in bands for band in level.values())


def test_a_constant_clip_has_a_low_band_alone():
    bands = haar(jnp.full((1, 2, 4, 4, 3), 0.3))
    assert list(bands) == ["LLL", "LLH", "LHL", "LHH", "HLL", "HLH", "HHL", "HHH"]
    np.testing.assert_allclose(bands.pop("LLL"), 2**1.5 * 0.3, rtol=1e-6)
    assert all(band.shape == (1, 1, 2, 2, 3) and not np.any(band) for band in bands.values())


def test_haar_of_a_ramp():
    ramp = jnp.arange(8.0)
    for axis, shape in (("T", (1, 8, 1, 1, 1)), ("H", (1, 1, 8, 1, 1)), ("W", (1, 1, 1, 8, 1))):
        bands = haar(ramp.reshape(shape), axis)
        np.testing.assert_allclose(bands["L"].ravel(), [0.7071, 3.5355, 6.3640, 9.1924], atol=1e-4)
        np.testing.assert_allclose(bands["H"].ravel(), [-0.7071] * 4, atol=1e-4)


def test_letters_name_the_axes_in_order():
    """A pattern that alternates along one axis is in the band that is high there alone."""
    for place, axis in enumerate("THW"):
        shape = [1, 4, 4, 4, 1]
        pattern = np.broadcast_to(np.moveaxis(np.resize([1.0, -1.0], (4, 1, 1)), 0, place)[None, ..., None], shape)
        filled = [name for name, band in haar(jnp.asarray(pattern)).items() if np.abs(band).max() > 1e-6]
        assert filled == ["".join("H" if letter == axis else "L" for letter in "THW")]


@pytest.mark.parametrize("temporal", [True, False])
def test_the_transform_keeps_energy_and_number_of_values(temporal):
    video = random(2, 4, 8, 12, 3)
    bands = haar_bands(jnp.asarray(video), 2, temporal)
    assert sum(band.size for level in bands for band in level.values()) == video.size
    np.testing.assert_allclose(energy(bands), np.square(video.astype(np.float64)).sum(), rtol=1e-6)


def test_only_the_last_level_keeps_its_low_band():
    fine, coarse = haar_bands(jnp.asarray(random(1, 2, 8, 8, 1)), 2)
    assert "LLL" not in fine and len(fine) == 7
    assert list(coarse) == ["LL", "LH", "HL", "HH"]  # a single frame is left: 2-D from there on


def test_one_frame_has_the_bands_of_an_image():
    image = jnp.asarray(random(1, 1, 4, 4, 3))
    for temporal in (True, False):
        assert sorted(haar_bands(image, 1, temporal)[0]) == ["HH", "HL", "LH", "LL"]


def test_an_odd_size_is_extended_by_its_edge():
    video = random(1, 5, 3, 7, 2)
    extended = np.pad(video, ((0, 0), (1, 0), (0, 1), (0, 1), (0, 0)), mode="edge")
    for one, other in zip(*(haar(jnp.asarray(x)).values() for x in (video, extended)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_squared_bands_with_low_are_the_mean_squared_error():
    a, b = random(2, 4, 8, 8, 3), random(2, 4, 8, 8, 3, seed=1)
    found = bands_loss(a, b, 2, "squared", jnp.asarray([1, 2]), low=True)
    np.testing.assert_allclose(found, np.square(a - b).mean(), rtol=1e-5)


def test_forms_of_one_known_coefficient():
    """An error that alternates by e along the width is a coefficient of sqrt(2) sqrt(2) e in a quarter of the bands."""
    error = np.broadcast_to(np.resize([0.1, -0.1], 8)[None, None, None, :, None], (1, 1, 8, 8, 1)).astype(np.float32)
    wanted = {"l1": 0.2, "squared": 0.04, "charbonnier": np.hypot(0.2, 0.1) - 0.1}
    for form, value in wanted.items():
        found = bands_loss(error, np.zeros_like(error), 1, form, STILL)
        np.testing.assert_allclose(found, value / 3, rtol=1e-5)  # in one of the three high bands


@pytest.mark.parametrize("form", FORMS)
def test_bands_of_equal_clips_have_no_loss_and_no_gradient(form):
    video = jnp.asarray(random(1, 3, 8, 8, 3))
    loss, gradient = jax.value_and_grad(lambda x: bands_loss(x, video, 2, form, STILL))(video)
    assert loss == 0 and not np.any(gradient)


def test_a_constant_error_is_in_the_low_band_alone():
    video = random(1, 5, 8, 8, 3)
    assert bands_loss(video + 0.5, video, 2, "squared", STILL) < 1e-12
    assert bands_loss(video + 0.5, video, 2, "squared", STILL, low=True) > 0.01


def test_a_shift_by_a_block_changes_nothing_and_one_by_a_pixel_does():
    """The transform of 2 levels is invariant to shifts by 4 pixels."""
    a, b = random(1, 2, 8, 8, 1), random(1, 2, 8, 8, 1, seed=1)
    loss = jax.jit(lambda shift: bands_loss(a, b, 2, "l1", shift))
    np.testing.assert_allclose(loss(jnp.asarray([4, 4])), loss(STILL), rtol=1e-6)
    rolled = [np.roll(x, (1, 2), (2, 3)) for x in (a, b)]
    np.testing.assert_allclose(loss(jnp.asarray([1, 2])), bands_loss(*rolled, 2, "l1", STILL), rtol=1e-6)
    assert abs(loss(jnp.asarray([1, 2])) - loss(STILL)) > 1e-3


def test_random_shifts_take_all_values():
    shifts = np.asarray([random_shift(jax.random.key(seed), 2) for seed in range(60)])
    assert shifts.shape == (60, 2) and all(set(column) == {0, 1, 2, 3} for column in shifts.T)


def test_wrong_options_are_named():
    video = jnp.zeros((1, 1, 4, 4, 3))
    with pytest.raises(UserError, match="form is 'l3'; allowed: 'squared', 'charbonnier', 'l1'"):
        bands_loss(video, video, 1, "l3", STILL)
    with pytest.raises(UserError, match="levels is 0"):
        haar_bands(video, 0)
    with pytest.raises(UserError, match="levels is 0"):
        pyramid_l1(video, video, 0)
    with pytest.raises(UserError, match="frames is 0"):
        choose_frames(jax.random.key(0), 0, video)


def test_pyramid_equals_means_of_blocks():
    a, b = random(2, 3, 8, 12, 3), random(2, 3, 8, 12, 3, seed=1)
    wanted = [
        np.abs((a - b).reshape(2, 3, 8 // s, s, 12 // s, s, 3).mean((3, 5))).mean()  # averages of averages are averages
        for s in (2, 4)
    ]
    np.testing.assert_allclose(pyramid_l1(a, b, 2), np.mean(wanted), rtol=1e-5)


def test_average_pool_repeats_the_last_row_and_column_of_odd_frames():
    image = random(1, 3, 5, 2)
    extended = np.pad(image, ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")
    wanted = extended.reshape(1, 2, 2, 3, 2, 2).mean((2, 4))
    np.testing.assert_allclose(average_pool(jnp.asarray(image)), wanted, atol=1e-6)


def test_frames_are_drawn_without_repetition_for_each_clip():
    video = jnp.broadcast_to(jnp.arange(6.0)[None, :, None, None, None], (16, 6, 1, 1, 1))
    first, second = choose_frames(jax.random.key(0), 3, video, video + 10)
    rows = np.asarray(first[..., 0, 0, 0])
    assert first.shape == (16, 3, 1, 1, 1) and all(len(set(row)) == 3 for row in rows)
    assert len({tuple(sorted(row)) for row in rows}) > 5 and set(rows.ravel()) == set(range(6))
    np.testing.assert_array_equal(second, first + 10)
    (whole,) = choose_frames(jax.random.key(0), 6, video)
    np.testing.assert_array_equal(whole, video)


def test_gradients_reach_the_chosen_frames_alone():
    video = jnp.asarray(random(2, 5, 8, 8, 3))
    gradient = jax.grad(lambda x: random_features_loss(jax.random.key(1), x, video, 2, (4, 4)))(video + 0.1)
    reached = np.abs(gradient).max((2, 3, 4)) > 0
    assert reached.sum(1).tolist() == [2, 2]


def random_features_by_hand(weights, x, y):
    """The relative distance of one level, by correlation of single channels."""
    distances = []
    for one, other in zip(x, y):
        for out in range(weights.shape[-1]):
            a, b = (
                sum(scipy.ndimage.correlate(z[..., c], weights[..., c, out], mode="constant") for c in range(3))
                for z in (one, other)
            )
            a, b = (np.maximum(z, 0.2 * z) for z in (a, b))
            distances.append(np.abs(a - b).mean() / (np.abs(b).mean() + 0.1))
    return np.mean(distances)


def test_one_level_of_random_features_by_hand():
    a, b, key = random(2, 1, 6, 7, 3), random(2, 1, 6, 7, 3, seed=1), jax.random.key(3)
    level_key = jax.random.fold_in(jax.random.split(key)[1], 0)
    weights = np.asarray(jax.random.normal(level_key, (3, 3, 3, 5))) * np.sqrt(2 / 27)
    wanted = random_features_by_hand(weights, a[:, 0], b[:, 0])
    np.testing.assert_allclose(random_features_loss(key, a, b, 1, (5,)), wanted, rtol=1e-5)


def test_random_features_see_blur_and_are_drawn_anew():
    video = random(1, 3, 16, 16, 3)
    blurred = scipy.ndimage.gaussian_filter(video, (0, 0, 1, 1, 0))
    loss = jax.jit(lambda key, x: random_features_loss(key, x, video, 3))
    values = np.asarray([loss(jax.random.key(seed), blurred) for seed in range(4)])
    assert loss(jax.random.key(0), video) == 0
    assert len(set(values.tolist())) == 4 and values.min() > 0.2 and values.std() < 0.1 * values.mean()


def terms(decoded, video):
    key = jax.random.key(5)

    def total(decoded):
        parts = [
            bands_loss(decoded, video, 2, "squared", random_shift(key, 2)),
            bands_loss(decoded, video, 1, "charbonnier", STILL, temporal=False, low=True),
            pyramid_l1(decoded, video, 2),
            random_features_loss(key, decoded, video, 2, (4, 6)),
        ]
        return sum(parts), parts

    (_, parts), gradient = jax.value_and_grad(total, has_aux=True)(decoded)
    return parts, gradient


def test_terms_and_gradients_on_a_mesh_are_those_of_one_device():
    """Clips are split over two groups of devices, and rows over the four of each, as the decoder leaves them."""
    video, decoded = random(4, 5, 16, 12, 3), random(4, 5, 16, 12, 3, seed=1)
    wanted = jax.jit(terms)(decoded, video)
    mesh = make_mesh(MeshConfig(data=2, sequence=4))
    with jax.set_mesh(mesh):
        rows = jax.reshard(place_batch(decoded, mesh), jax.P(("slice", "data", "fsdp"), None, "sequence"))
        found = jax.jit(terms)(rows, place_batch(video, mesh))
        assert found[1].sharding.spec[2] == "sequence"
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-6)
