"""The discriminator: what its scores depend on, both forms of the loss, LeCam, R1, its gradients, and a mesh."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.errors import UserError
from sora_jax.models.discriminator import (
    DiscriminatorConfig,
    adaptive_weight,
    conv3d,
    discriminator,
    discriminator_loss,
    discriminator_specs,
    generator_loss,
    lecam_penalty,
)
from sora_jax.nn.params import abstract, init, shardings
from sora_jax.parallel.mesh import MeshConfig, make_mesh, place_batch

SMALL = DiscriminatorConfig(width=4, levels=2, dtype="float32")
PAIR = dataclasses.replace(SMALL, form="pair")
FULL = dataclasses.replace(SMALL, lecam_weight=0.3, r1_weight=2.0)
LECAM = (jnp.float32(0.2), jnp.float32(-0.1))
KEY = jax.random.key(7)


def random(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


@functools.cache
def random_params(config):
    """Weights of the usual size, and biases that are not zero."""
    rng = np.random.default_rng(0)

    def draw(spec):
        return np.asarray(rng.standard_normal(spec.shape) / np.sqrt(max(1, np.prod(spec.shape[:-1]))), np.float32)

    return jax.tree.map(draw, abstract(discriminator_specs(config)))


def constant_params(config, value):
    """Parameters whose scores are `value` for every clip."""
    params = jax.tree.map(np.zeros_like, random_params(config))
    for network in params.values():
        network["head"]["bias"] += value
    return params


@functools.cache
def jit_loss(config):
    return jax.jit(functools.partial(discriminator_loss, config=config))


def loss_of(config, params, video, decoded, key=KEY, lecam=LECAM):
    return jit_loss(config)(params, video_BTHWC=video, decoded_BTHWC=decoded, key=key, lecam=lecam)


def shapes(config, size):
    video = jax.ShapeDtypeStruct((2, *size, 6 if config.form == "pair" else 3), jnp.float32)
    outputs = jax.eval_shape(lambda p, v: discriminator(p, config, v), abstract(discriminator_specs(config)), video)
    return [(scores.shape, [x.shape for x in features]) for scores, features in outputs]


@pytest.mark.parametrize("config", [SMALL, PAIR], ids=["hinge", "pair"])
def test_shapes(config):
    frames, clips = shapes(config, (5, 8, 12))
    assert frames == ((2, 5, 2, 3), [(2, 5, 4, 6, 4), (2, 5, 2, 3, 8)])
    assert clips == ((2, 3, 2, 3), [(2, 5, 4, 6, 4), (2, 3, 2, 3, 8)])
    assert [scores for scores, _ in shapes(config, (1, 8, 8))] == [(2, 1, 2, 2)] * 2
    assert [scores for scores, _ in shapes(dataclasses.replace(config, networks="3d"), (1, 8, 8))] == [(2, 1, 2, 2)]


def test_widths_double_up_to_eight_times():
    assert DiscriminatorConfig(width=3, levels=6).widths == (3, 6, 12, 24, 24, 24)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(width=0), "width is 0"),
        (dict(levels=0), "levels is 0"),
        (dict(r1_weight=-1.0), "r1_weight is -1.0"),
        (dict(form="wgan"), "form is 'wgan'; allowed: 'hinge', 'pair'"),
        (dict(networks="4d"), "networks is '4d'"),
        (dict(norm="batch"), "norm is 'batch'"),
        (dict(dtype="float8"), "dtype is 'float8'"),
        (dict(form="pair", lecam_weight=0.1), "lecam_weight is 0.1; it must be 0 where"),
    ],
)
def test_wrong_configs_name_the_option(options, message):
    with pytest.raises(UserError, match=f"discriminator.{message}"):
        DiscriminatorConfig(**options)


def test_frames_that_are_too_small_are_named():
    with pytest.raises(UserError, match="frames are 8 x 3 pixels; with discriminator.levels = 2 .* at least 4 x 4"):
        discriminator({}, SMALL, jnp.zeros((1, 1, 8, 3, 3)))


@pytest.mark.parametrize("kernel, strides", [((3, 3, 3), (1, 2)), ((3, 3, 3), (2, 2)), ((1, 4, 4), (1, 2))])
def test_convolution_equals_that_of_jax(kernel, strides):
    weight, bias = random(*kernel, 2, 5), random(5, seed=1)
    x = random(2, 5, 7, 6, 2, seed=2)
    time = (kernel[0] - 1) // 2
    padded = np.pad(x, ((0, 0), (time, time), (0, 0), (0, 0), (0, 0)), mode="edge")
    wanted = jax.lax.conv_general_dilated(
        padded,
        weight,
        (strides[0], strides[1], strides[1]),
        ((0, 0), (1, 1), (1, 1)),
        dimension_numbers=("NTHWC", "THWIO", "NTHWC"),
    )
    np.testing.assert_allclose(
        conv3d({"weight": weight, "bias": bias}, x, strides), np.asarray(wanted) + bias, atol=2e-5
    )


def test_a_score_depends_on_its_clip_alone_and_in_2d_on_its_frame():
    @jax.jit
    def gradients(video):
        scores = lambda v: [s[1, 1].sum() for s, _ in discriminator(random_params(SMALL), SMALL, v)]  # noqa: E731
        return jax.jacrev(scores)(video)

    frames, clips = (np.abs(x).max((2, 3, 4)) > 0 for x in gradients(random(2, 5, 8, 8, 3)))
    assert frames.tolist() == [[False] * 5, [False, True, False, False, False]]
    assert clips.tolist() == [[False] * 5, [True] * 5]


def test_a_still_clip_has_the_scores_of_its_frame():
    image = random(2, 1, 8, 8, 3)
    run = jax.jit(lambda v: [scores for scores, _ in discriminator(random_params(SMALL), SMALL, v)])
    for one, still in zip(run(image), run(np.repeat(image, 4, axis=1)), strict=True):
        np.testing.assert_allclose(still, np.repeat(one, still.shape[1], axis=1), atol=1e-5)


def test_all_channels_of_a_frame_are_normalised_together():
    """Undo the leaky ReLU of the second level: mean 0 and variance 1 in a frame, but not in half of its channels."""
    params = jax.tree.map(np.copy, random_params(SMALL))
    for network in params.values():
        network["levels"][1]["norm"] = {"gain": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}
    for _, features in discriminator(params, SMALL, random(2, 3, 16, 16, 3)):
        x = np.where(features[1] < 0, features[1] / 0.2, features[1])
        np.testing.assert_allclose(x.mean((2, 3, 4)), 0, atol=1e-5)
        np.testing.assert_allclose(x.var((2, 3, 4)), 1, rtol=1e-3)
        halves = x.reshape(*x.shape[:-1], 2, 4).mean((2, 3, 5))
        assert np.abs(halves).min() > 0.01


def test_without_norms_there_are_none():
    plain = discriminator_specs(dataclasses.replace(SMALL, norm="none"))
    assert [set(level) for network in plain.values() for level in network["levels"]] == [{"conv"}] * 4
    assert [set(level) for level in discriminator_specs(SMALL)["3d"]["levels"]] == [{"conv"}, {"conv", "norm"}]


def test_hinge_loss_of_constant_scores():
    video, decoded = random(2, 3, 8, 8, 3), random(2, 3, 8, 8, 3, seed=1)
    for value in (-2.0, -0.25, 0.0, 0.5, 3.0):
        loss, metrics = loss_of(SMALL, constant_params(SMALL, value), video, decoded)
        np.testing.assert_allclose(loss, max(0, 1 - value) + max(0, 1 + value), rtol=1e-6)
        assert metrics["real"] == metrics["fake"] == value
        assert metrics["accuracy"] == (0.5 if value else 0.0)


def test_hinge_loss_equals_its_formula():
    params, video, decoded = random_params(SMALL), random(2, 3, 8, 8, 3), random(2, 3, 8, 8, 3, seed=1)
    real, fake = ([np.asarray(s) for s, _ in discriminator(params, SMALL, x)] for x in (video, decoded))
    wanted = np.mean([np.maximum(1 - x, 0).mean() + np.maximum(1 + y, 0).mean() for x, y in zip(real, fake)])
    loss, metrics = loss_of(SMALL, params, video, decoded)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    right = [np.mean([(x > 0).mean(), (y < 0).mean()]) for x, y in zip(real, fake)]
    np.testing.assert_allclose(metrics["accuracy"], np.mean(right), rtol=1e-6)


def test_lecam_of_constant_scores():
    """Zero when both running means equal the outputs, else the square of how far scores lie beyond the other's mean."""
    config = dataclasses.replace(SMALL, lecam_weight=0.5)
    params, video = constant_params(config, 0.4), random(1, 1, 8, 8, 3)
    plain, _ = loss_of(SMALL, params, video, video)
    for real, fake in [(0.4, 0.4), (0.3, 0.9), (0.9, 0.3), (0.6, 0.1)]:
        wanted = max(0, 0.4 - fake) ** 2 + max(0, real - 0.4) ** 2
        loss, metrics = loss_of(config, params, video, video, lecam=(jnp.float32(real), jnp.float32(fake)))
        np.testing.assert_allclose(metrics["lecam"], wanted, atol=1e-6)
        np.testing.assert_allclose(loss, plain + 0.5 * wanted, rtol=1e-6)


def test_lecam_is_a_mean_of_squares():
    real, fake = jnp.asarray([1.0, -1.0, 3.0]), jnp.asarray([0.0, -2.0])
    np.testing.assert_allclose(lecam_penalty(real, fake, (0.5, 0.0)), (1 + 9) / 3 + (0.25 + 6.25) / 2, rtol=1e-6)


def test_r1_of_a_linear_discriminator():
    """With large biases leaky ReLUs are linear, and a head of its centre alone sums the patches of one convolution."""
    config = dataclasses.replace(SMALL, levels=1, networks="2d", r1_weight=3.0)
    params = jax.tree.map(np.zeros_like, random_params(config))
    weight, head = random(4, 4, 3, 4), random(4, seed=1)
    (level,) = params["2d"]["levels"]
    level["conv"]["weight"], level["conv"]["bias"] = weight[None], np.full(4, 100.0, np.float32)
    params["2d"]["head"]["weight"] = np.zeros((1, 3, 3, 4, 1), np.float32)
    params["2d"]["head"]["weight"][0, 1, 1, :, 0] = head
    gradient = np.zeros((2, 8 + 2, 6 + 2, 3))  # of the mean over 2 frames and 4 x 3 patches, with the padding
    for row in range(4):
        for column in range(3):
            gradient[:, 2 * row : 2 * row + 4, 2 * column : 2 * column + 4] += (weight @ head) / 24
    wanted = np.square(gradient[:, 1:-1, 1:-1]).sum()
    loss, metrics = loss_of(config, params, random(3, 2, 8, 6, 3), random(3, 2, 8, 6, 3, seed=1))
    plain, _ = loss_of(
        dataclasses.replace(config, r1_weight=0.0), params, *(random(3, 2, 8, 6, 3, seed=s) for s in (0, 1))
    )
    np.testing.assert_allclose(metrics["r1"], wanted, rtol=1e-5)
    np.testing.assert_allclose(loss - plain, 1.5 * wanted, atol=1e-4)


@pytest.mark.parametrize("config", [FULL, dataclasses.replace(PAIR, r1_weight=2.0)], ids=["hinge", "pair"])
def test_gradient_equals_finite_differences(config):
    """Compare the entry of the second level with the largest gradient, in both networks."""
    params, video, decoded = random_params(config), random(2, 2, 8, 8, 3), random(2, 2, 8, 8, 3, seed=1)
    gradient = jax.jit(jax.grad(lambda p: discriminator_loss(p, config, video, decoded, KEY, LECAM)[0]))(params)
    for name in ("2d", "3d"):
        slope = np.asarray(gradient[name]["levels"][1]["conv"]["weight"])
        place = np.unravel_index(np.abs(slope).argmax(), slope.shape)

        def moved(step, name=name, place=place):
            changed = jax.tree.map(lambda x: x, params)
            conv = changed[name]["levels"][1]["conv"]
            conv["weight"] = jnp.asarray(conv["weight"]).at[place].add(step)
            return float(loss_of(config, changed, video, decoded)[0])

        difference = (moved(2e-3) - moved(-2e-3)) / 4e-3
        np.testing.assert_allclose(difference, slope[place], rtol=0.02)


def test_gradients_of_the_discriminator_loss_stop_at_both_clips():
    video, decoded = random(1, 2, 8, 8, 3), random(1, 2, 8, 8, 3, seed=1)
    loss = lambda *clips: discriminator_loss(random_params(FULL), FULL, *clips, KEY, LECAM)[0]  # noqa: E731
    assert not any(np.any(x) for x in jax.jit(jax.grad(loss, (0, 1)))(video, decoded))


def signs_of(count):
    """Keys for which the real clip of a batch of one comes first, and second."""
    keys = list(jax.random.split(jax.random.key(0), (count, 1)))  # one for each clip
    first = [bool(jax.random.bernoulli(key[0])) for key in keys]
    return keys[first.index(True)], keys[first.index(False)]


def test_pair_loss_is_the_cross_entropy_of_which_comes_first():
    params, (video, decoded) = random_params(PAIR), (random(1, 2, 8, 8, 3, seed=s) for s in (0, 1))
    first, second = signs_of(20)
    for key, both, sign in ((first, (video, decoded), 1), (second, (decoded, video), -1)):
        scores = [np.asarray(s) for s, _ in discriminator(params, PAIR, np.concatenate(both, -1))]
        chance = [1 / (1 + np.exp(-sign * s)) for s in scores]  # of the right answer
        loss, metrics = loss_of(PAIR, params, video, decoded, key)
        np.testing.assert_allclose(loss, np.mean([-np.log(p).mean() for p in chance]), rtol=1e-5)
        np.testing.assert_allclose(metrics["real"], np.mean([sign * s.mean() for s in scores]), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(metrics["fake"], -metrics["real"])
        np.testing.assert_allclose(metrics["accuracy"], np.mean([(p > 0.5).mean() for p in chance]))
        adversarial, _ = generator_loss(params, PAIR, video, decoded, key)
        np.testing.assert_allclose(adversarial, np.mean([-np.log(1 - p).mean() for p in chance]), rtol=1e-5)


def test_a_discriminator_that_ignores_its_input_pays_log_2_in_a_large_batch():
    """Its best loss where it always says "first": the order is a fair coin of each clip."""
    video = np.zeros((400, 1, 4, 4, 3), np.float32)
    _, metrics = loss_of(PAIR, constant_params(PAIR, 1.0), video, video)
    loss, _ = loss_of(PAIR, constant_params(PAIR, 0.0), video, video)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-5)
    assert abs(metrics["accuracy"] - 0.5) < 0.1


def test_hinge_generator_loss_and_feature_matching_equal_their_formulas():
    params, (video, decoded) = random_params(SMALL), (random(2, 3, 8, 8, 3, seed=s) for s in (0, 1))
    outputs = [discriminator(params, SMALL, x) for x in (video, decoded)]
    adversarial, matching = generator_loss(params, SMALL, video, decoded, KEY)
    np.testing.assert_allclose(adversarial, np.mean([-scores.mean() for scores, _ in outputs[1]]), rtol=1e-4)
    real, fake = ([np.asarray(x) for _, features in output for x in features] for output in outputs)
    wanted = np.mean([np.abs(x - y).mean() / np.abs(x).mean() for x, y in zip(real, fake)])
    np.testing.assert_allclose(matching, wanted, rtol=1e-4)


@pytest.mark.parametrize("config", [SMALL, PAIR], ids=["hinge", "pair"])
def test_generator_gradients_reach_the_decoded_clip_alone(config):
    params, (video, decoded) = random_params(config), (random(1, 2, 8, 8, 3, seed=s) for s in (0, 1))

    def total(params, video, decoded):
        return sum(generator_loss(params, config, video, decoded, KEY))

    to_params, to_video, to_decoded = jax.jit(jax.grad(total, (0, 1, 2)))(params, video, decoded)
    assert not any(np.any(x) for x in jax.tree.leaves((to_params, to_video)))
    assert np.abs(to_decoded).max() > 0
    _, matching = generator_loss(params, config, video, video, KEY)
    assert matching == 0


def test_adaptive_weight_equals_a_ratio_by_hand():
    reconstruction = {"weight": jnp.asarray([[3.0, 0.0], [0.0, 4.0]]), "bias": jnp.asarray([12.0])}  # norm 13
    adversarial = jnp.asarray([0.3, 0.4])  # norm 0.5
    np.testing.assert_allclose(adaptive_weight(reconstruction, adversarial, 100.0), 13 / 0.5001, rtol=1e-6)
    assert adaptive_weight(reconstruction, adversarial, 10.0) == 10
    assert adaptive_weight(reconstruction, jnp.zeros(2), 1e6) == 13 / 1e-4
    slope = jax.grad(lambda x: adaptive_weight(x, adversarial, 100.0))(jnp.asarray([1.0, 2.0]))
    assert not np.any(slope)


def test_adaptive_weight_of_a_network_of_two_layers():
    """y = w2 w1 x with x = 1: of |y - 5| and -y the gradients by w2 are -w1 and -w1, of 3 y^2 it is 6 w1^2 w2."""
    w1, w2 = 2.0, 0.5
    recon, linear, square = (
        jax.grad(lambda w, f=f: f(w * w1))(w2) for f in (lambda y: jnp.abs(y - 5), lambda y: -y, lambda y: 3 * y**2)
    )
    np.testing.assert_allclose(adaptive_weight(recon, linear, 10.0), 2 / 2.0001, rtol=1e-6)
    np.testing.assert_allclose(adaptive_weight(recon, square, 10.0), 2 / 12.0001, rtol=1e-6)


@pytest.mark.parametrize("config", [SMALL, PAIR], ids=["hinge", "pair"])
def test_training_tells_clips_from_blurred_ones(config):
    """From its own initial values; the order of pairs changes at every step."""
    video = random(16, 2, 8, 8, 3)
    decoded = 0.5 * (video + np.roll(video, 1, 3))
    params = init(discriminator_specs(config), jax.random.key(0))
    loss = lambda p, key: discriminator_loss(p, config, video, decoded, key, LECAM)  # noqa: E731

    @jax.jit
    def step(params, key):
        gradient, metrics = jax.grad(loss, has_aux=True)(params, key)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), metrics["accuracy"]

    history = []
    for number in range(60):
        params, accuracy = step(params, jax.random.key(number))
        history.append(float(accuracy))
    assert np.mean(history[:5]) < 0.6 and np.mean(history[-5:]) > 0.75


@pytest.mark.parametrize("config", [FULL, dataclasses.replace(PAIR, r1_weight=2.0)], ids=["hinge", "pair"])
def test_losses_and_gradients_on_a_mesh_are_those_of_one_device(config):
    def both(params, video, decoded):
        value = jax.value_and_grad(lambda p: discriminator_loss(p, config, video, decoded, KEY, LECAM)[0])(params)
        return value, jax.grad(lambda y: sum(generator_loss(params, config, video, y, KEY)))(decoded)

    params, (video, decoded) = random_params(config), (random(4, 3, 8, 8, 3, seed=s) for s in (0, 1))
    wanted = jax.jit(both)(params, video, decoded)
    mesh = make_mesh(MeshConfig(data=2, sequence=4))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(discriminator_specs(config), mesh))
        rows = jax.reshard(place_batch(decoded, mesh), jax.P(("slice", "data", "fsdp"), None, "sequence"))
        found = jax.jit(both)(placed, place_batch(video, mesh), rows)
    chex.assert_trees_all_close(found, wanted, rtol=1e-4, atol=1e-5)
