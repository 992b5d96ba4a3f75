"""The video autoencoder: sizes, causality by gradient, images as clips, mesh, loss."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate
import scipy.stats

from sora_jax.diffusion.keys import Purpose
from sora_jax.errors import UserError
from sora_jax.models.autoencoder import AutoencoderConfig, autoencoder_specs, decode, encode, latent_grid
from sora_jax.models.first_stage import kl_to_standard_normal, psnr, sample_posterior
from sora_jax.nn.params import abstract, count, init, shardings
from sora_jax.parallel.mesh import MeshConfig, make_mesh, place_batch
from sora_jax.parallel.rules import partition
from sora_jax.plan.hlo import COLLECTIVES
from sora_jax.train.reconstruction import reconstruction_loss

SMALL = dict(width=8, latent_channels=4, encoder_blocks=1, decoder_blocks=1, dtype="float32")
FACTORISED = ((3, 1, 1), (1, 3, 3))
CONFIGS = {  # half of the compression by levels, and all of it by the first fold
    "levels": AutoencoderConfig(time_factor=4, space_factor=4, patch=(2, 2), multipliers=(1, 2), **SMALL),
    "patch": AutoencoderConfig(
        time_factor=4, space_factor=4, patch=(4, 4), multipliers=(1,), kernels=FACTORISED, **SMALL
    ),
}
FIELD = AutoencoderConfig()  # 4x8x8, 16 channels, base width 128


@functools.cache
def random_params(config):
    """Random weights of the usual size, in every residual branch too (which start at zero)."""
    rng = np.random.default_rng(0)

    def draw(spec):
        fan_in = np.prod(spec.shape[:-1])
        return jnp.asarray(rng.standard_normal(spec.shape) / np.sqrt(fan_in), jnp.float32)

    return jax.tree.map(draw, abstract(autoencoder_specs(config)))


def clips(batch, frames, height=16, width=12, seed=0):
    """Soft discs that move over grey, values in [-1, 1]."""
    rng = np.random.default_rng(seed)
    start, step = rng.uniform(4, 10, (2, batch, 1, 1, 1)), rng.uniform(-1, 1, (2, batch, 1, 1, 1))
    time, y, x = np.arange(frames)[:, None, None], np.arange(height)[:, None], np.arange(width)
    distance = np.hypot(y - start[0] - step[0] * time, x - start[1] - step[1] * time)
    alpha = np.clip(4 - distance, 0, 1)[..., None]
    colour = rng.uniform(-1, 1, (batch, 1, 1, 1, 3))
    return jnp.asarray(alpha * colour + (1 - alpha) * rng.uniform(-0.5, 0.5), jnp.float32)


def jit_encode(config):
    return jax.jit(lambda params, video: encode(params, config, video))


def jit_decode(config):
    return jax.jit(lambda params, z: decode(params, config, z))


def last_nonzero_frame(gradient):
    return int(np.flatnonzero(np.abs(gradient).max(axis=(0, 2, 3, 4))).max())


@pytest.mark.parametrize("frames", [1, 5, 9])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_shapes(config, frames):
    params = abstract(autoencoder_specs(config))
    video = jax.ShapeDtypeStruct((2, frames, 16, 12, 3), jnp.float32)
    mean, logvar = jax.eval_shape(lambda p, v: encode(p, config, v), params, video)
    assert mean.shape == logvar.shape == (2, *latent_grid(config, frames, 16, 12), 4)
    assert mean.shape[1:4] == ((frames - 1) // 4 + 1, 4, 3)
    decoded = jax.eval_shape(lambda p, z: decode(p, config, z), params, mean)
    assert decoded.shape == video.shape and decoded.dtype == jnp.float32


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_latent_depends_on_no_later_frame(config):
    params, video = random_params(config), clips(1, 9)
    gradient = jax.jit(jax.grad(lambda v, t: encode(params, config, v)[0][:, t].sum()))
    assert [last_nonzero_frame(gradient(video, t)) for t in range(3)] == [0, 4, 8]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_frame_depends_on_no_later_latent(config):
    params = random_params(config)
    z = jax.random.normal(jax.random.key(1), (1, 3, 4, 3, 4))
    gradient = jax.jit(jax.grad(lambda z, frame: decode(params, config, z)[:, frame].sum()))
    assert [last_nonzero_frame(gradient(z, frame)) for frame in range(9)] == [0, 1, 1, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_an_image_is_the_first_frame_of_a_clip(config):
    params, video = random_params(config), clips(2, 9)
    (clip_mean, clip_logvar), (mean, logvar) = (jit_encode(config)(params, v) for v in (video, video[:, :1]))
    np.testing.assert_allclose(mean, clip_mean[:, :1], atol=1e-6)
    np.testing.assert_allclose(logvar, clip_logvar[:, :1], atol=1e-6)
    decoded, image = jit_decode(config)(params, clip_mean), jit_decode(config)(params, clip_mean[:, :1])
    np.testing.assert_allclose(image, decoded[:, :1], atol=1e-6)


def test_a_shift_by_the_space_factor_shifts_the_latent():
    config = CONFIGS["patch"]
    video = jax.random.normal(jax.random.key(0), (1, 5, 40, 40, 3))
    both = jnp.concatenate([video, jnp.roll(video, 4, axis=3)])
    mean, moved = jnp.split(jit_encode(config)(random_params(config), both)[0], 2)
    inside = np.s_[:, :, 4:-4, 4:-4]  # beyond the reach of the zeros around the picture
    np.testing.assert_allclose(moved[inside], jnp.roll(mean, 1, axis=3)[inside], atol=1e-5)
    assert np.abs(moved[inside] - mean[inside]).max() > 1e-2


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_padded_clip_has_the_latent_it_has_alone(config):
    """Pad two clips of different sizes to one shape, junk around them, later frames of junk behind them."""
    params, padded = random_params(config), np.random.default_rng(1).uniform(-1, 1, (2, 9, 16, 12, 3)).astype("f4")
    sizes = np.array([[8, 12], [12, 4]], np.int32)
    run = jax.jit(functools.partial(encode, params, config))
    mean, logvar = run(padded, sizes)
    for number, (frames, height, width) in enumerate(((9, 8, 12), (5, 12, 4))):
        own = padded[number : number + 1, :frames, :height, :width]
        t, h, w = latent_grid(config, frames, height, width)
        for whole, part in zip((mean, logvar), run(own), strict=True):
            np.testing.assert_allclose(whole[number : number + 1, :t, :h, :w], part, atol=2e-5)
    assert not np.allclose(mean, run(padded, np.full_like(sizes, 12))[0], atol=1e-2)  # the sizes do matter


def test_padded_clips_are_masked_by_rows_of_every_device():
    config, mesh = CONFIGS["levels"], make_mesh(MeshConfig(data=2, sequence=4))
    params, video, sizes = random_params(config), np.asarray(clips(2, 5)), np.array([[8, 12], [12, 4]], np.int32)
    wanted = jax.jit(functools.partial(encode, params, config))(video, sizes)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(autoencoder_specs(config), mesh)), *place_batch((video, sizes), mesh)
        found = jax.jit(lambda p, v, s: encode(p, config, v, s))(*placed)
    chex.assert_trees_all_close(found, wanted, atol=2e-5)


@pytest.mark.parametrize(
    "size, message",
    [
        ((8, 16, 16), r"frames is 8; it must be 1 \+ a multiple of 4, such as 5 or 9"),
        ((0, 16, 16), "frames is 0; .* such as 1$"),
        ((5, 18, 16), "height is 18; it must be a positive multiple of 8, such as 16 or 24"),
        ((5, 16, 7), "width is 7; it must be a positive multiple of 8, such as 8$"),
    ],
)
def test_wrong_sizes_name_the_nearest(size, message):
    with pytest.raises(UserError, match=message):
        latent_grid(FIELD, *size)
    with pytest.raises(UserError, match=message):
        encode({}, FIELD, jnp.zeros((1, *size, 3)))


@pytest.mark.parametrize(
    "options, name",
    [
        (dict(time_factor=3), "time_factor is 3.* 1, 2, 4, 8"),
        (dict(space_factor=16), "space_factor is 16.* 1, 2, 4, 8"),
        (dict(patch=(0, 1)), "patch"),
        (dict(multipliers=()), "multipliers"),
        (dict(kernels=((3, 2, 3),)), "kernels"),
        (dict(kl_weight=-1.0), "kl_weight"),
        (dict(latent_channels=0), "latent_channels"),
        (dict(dtype="float8"), "dtype"),
    ],
)
def test_wrong_configs_name_the_option(options, name):
    with pytest.raises(UserError, match=f"model.{name}"):
        AutoencoderConfig(**options)


def test_decode_names_wrong_channels():
    with pytest.raises(UserError, match="7 channels"):
        decode({}, FIELD, jnp.zeros((1, 1, 2, 2, 7)))


def conv_values(inputs, outputs, volume=27):
    return volume * inputs * outputs + outputs


def block_values(width):
    return 2 * (conv_values(width, width) + width)


def test_parameter_count_of_the_4x8x8x16_autoencoder():
    widths = [128, 256, 512, 512]
    encoder = conv_values(3, 128) + sum(2 * block_values(w) for w in widths)
    encoder += conv_values(4 * 128, 256, 1) + conv_values(8 * 256, 512, 1) + conv_values(8 * 512, 512, 1)
    encoder += 512 + conv_values(512, 32)
    decoder = conv_values(16, 512) + sum(3 * block_values(w) for w in widths)
    decoder += conv_values(512, 8 * 512, 1) + conv_values(512, 8 * 256, 1) + conv_values(256, 4 * 128, 1)
    decoder += 128 + conv_values(128, 3)
    assert count(autoencoder_specs(FIELD)) == encoder + decoder


def test_narrow_4x8x8x16_autoencoder_runs():
    config = AutoencoderConfig(width=4, encoder_blocks=1, decoder_blocks=1, remat=True)
    video = clips(1, 5, 16, 24)

    def run(params, video):
        mean, _ = encode(params, config, video)
        return mean, decode(params, config, mean)

    mean, decoded = jax.jit(run)(random_params(config), video)
    assert mean.shape == (1, 2, 2, 3, 16) and decoded.shape == video.shape
    assert np.isfinite(mean).all() and np.isfinite(decoded).all()


def loss_and_gradient(config, params, video):
    def loss(p):
        return reconstruction_loss(p, config, video, jax.random.key(3)).model

    return jax.value_and_grad(loss)(params)


@functools.cache
def on_rows_of_clips():
    """The training step's loss and gradient, compiled for two clips on four devices each, and what it makes."""
    config, mesh = CONFIGS["levels"], make_mesh(MeshConfig(data=2, sequence=4))
    with jax.set_mesh(mesh):
        params = jax.device_put(random_params(config), shardings(autoencoder_specs(config), mesh))
        arguments = params, place_batch(np.asarray(clips(4, 5)), mesh)
        program = jax.jit(functools.partial(loss_and_gradient, config)).lower(*arguments).compile()
        return program.as_text(), program(*arguments)


def test_rows_of_clips_on_several_devices_are_clips_on_one():
    """To 1e-5 of the largest entry of each parameter's gradient: float error of sums in another order."""
    config = CONFIGS["levels"]
    wanted = jax.jit(functools.partial(loss_and_gradient, config))(random_params(config), clips(4, 5))
    for found, one in zip(*map(jax.tree.leaves, (on_rows_of_clips()[1], wanted)), strict=True):
        np.testing.assert_allclose(found, one, rtol=0, atol=1e-5 * np.abs(one).max())


def test_devices_send_the_rows_at_their_edges_and_no_more():
    """No activation is gathered; only one row of a device's two clips is sent at once, and only weights are summed."""
    text, _ = on_rows_of_clips()
    made = {kind: re.findall(rf"= (.*) {kind}(?:-start)?\(", text) for kind in COLLECTIVES}
    assert {kind for kind in COLLECTIVES if made[kind]} == {"collective-permute", "all-reduce"}
    shapes = {kind: re.findall(r"\w\[([\d,]*)\]", " ".join(lines)) for kind, lines in made.items()}
    shapes = {kind: [[int(n) for n in shape.split(",") if n] for shape in all_] for kind, all_ in shapes.items()}
    assert len(shapes["collective-permute"]) >= 20
    assert {(x[0], x[2]) for x in shapes["collective-permute"]} == {(2, 1)}
    largest = max(x.size for x in jax.tree.leaves(random_params(CONFIGS["levels"])))
    assert max(map(np.prod, shapes["all-reduce"])) <= largest


def test_latents_stay_split_by_clip_and_row_through_all_levels():
    """Under an Explicit mesh the layout is part of the type: tracing is enough."""
    config, mesh = CONFIGS["levels"], make_mesh(MeshConfig(data=2, sequence=4))
    with jax.set_mesh(mesh):
        params = jax.device_put(random_params(config), shardings(autoencoder_specs(config), mesh))
        latents = jax.eval_shape(lambda p, v: encode(p, config, v)[0], params, place_batch(clips(8, 5), mesh))
    assert latents.sharding.spec == partition("batch", "time", "height", "breadth", "channels")


def test_remat_changes_no_number():
    config = CONFIGS["patch"]
    remat = dataclasses.replace(config, remat=True)

    video = clips(1, 5)
    both = jax.jit(lambda p: [loss_and_gradient(c, p, video) for c in (config, remat)])(random_params(config))
    chex.assert_trees_all_close(*both, rtol=1e-4, atol=1e-6)


def test_overfitting_one_clip_raises_psnr():
    config = dataclasses.replace(CONFIGS["patch"], width=32, l2_weight=1.0, kl_weight=1e-4)
    params, video = init(autoencoder_specs(config), jax.random.key(0)), clips(1, 5)
    optimizer = optax.adam(5e-3)

    @jax.jit
    def step(params, state, number):
        key = jax.random.fold_in(jax.random.key(0), number)

        def loss(p):
            found = reconstruction_loss(p, config, video, key)
            return found.model, found.metrics

        gradient, metrics = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, metrics["psnr"]

    state, history = optimizer.init(params), []
    for number in range(30):
        params, state, value = step(params, state, number)
        history.append(float(value))
    assert history[-1] > history[0] + 6.0


def test_loss_is_the_weighted_sum_of_its_parts():
    config = dataclasses.replace(CONFIGS["patch"], l1_weight=0.5, l2_weight=2.0, kl_weight=0.1)
    params, video, key = random_params(config), clips(2, 5), jax.random.key(0)
    loss, _, metrics = jax.jit(lambda p, v: reconstruction_loss(p, config, v, key))(params, video)
    mean, logvar = jit_encode(config)(params, video)
    keys = [jax.random.fold_in(jax.random.fold_in(key, Purpose.NOISE), row) for row in range(2)]
    error = np.asarray(jit_decode(config)(params, sample_posterior(jnp.stack(keys), mean, logvar)) - video)
    kl = kl_to_standard_normal(mean, logvar).mean()
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-4)
    expected = 0.5 * np.abs(error).mean() + 2.0 * np.square(error).mean() + 0.1 * kl
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def scipy_kl(mean, logvar):
    """The integral of q log(q / p) by quadrature."""
    q, p = scipy.stats.norm(mean, np.exp(0.5 * logvar)), scipy.stats.norm()
    low, high = q.interval(1 - 1e-12)
    return scipy.integrate.quad(lambda x: q.pdf(x) * (q.logpdf(x) - p.logpdf(x)), low, high)[0]


@pytest.mark.parametrize("mean, logvar", [(0.0, 0.0), (1.5, -2.0), (-0.3, 1.0), (2.0, -5.0)])
def test_kl_equals_its_integral(mean, logvar):
    value = kl_to_standard_normal(jnp.float32(mean), jnp.float32(logvar))
    np.testing.assert_allclose(value, scipy_kl(mean, logvar), rtol=1e-4, atol=1e-6)


def test_posterior_samples_have_its_mean_and_deviation():
    mean, logvar = jnp.full((1, 1, 200, 200, 1), 0.7), jnp.full((1, 1, 200, 200, 1), -1.0)
    z = np.asarray(sample_posterior(jax.random.key(0), mean, logvar))
    error = np.exp(-0.5) / np.sqrt(z.size)
    assert abs(z.mean() - 0.7) < 5 * error and abs(z.std() - np.exp(-0.5)) < 5 * error


def test_psnr_of_a_known_error_is_per_clip():
    reference = jnp.zeros((3, 1, 4, 4, 3))
    offset = jnp.asarray([0.02, 0.2, 0.0])[:, None, None, None, None]
    np.testing.assert_allclose(psnr(reference + offset, reference), [40.0, 20.0, 100.0], atol=1e-3)
