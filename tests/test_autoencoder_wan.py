"""Wan's autoencoder: parity with diffusers, streams, causality by gradient, padded clips, mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_near, relative_error
from fixtures_models import Golden, write_folder
from peers.tensors import uniform

from sora_jax.convert.vae import read_vae
from sora_jax.errors import UserError
from sora_jax.models.autoencoder_wan import (
    WanConfig,
    autoencoder_specs,
    decode,
    encode,
    latent_grid,
    receptive_field,
)
from sora_jax.models.first_stage import kl_to_standard_normal, sample_posterior
from sora_jax.nn.params import abstract, count, shardings
from sora_jax.nn.past import Past
from sora_jax.parallel.mesh import MeshConfig, make_mesh, place_batch

NEAR = 2e-5
SIZES = dict(latent_channels=2, width=4, decoder_width=4, blocks=1, dtype="float32")
CONFIGS = {
    "2.1": WanConfig(multipliers=(1, 2, 2), temporal_downsample=(True, True), **SIZES),
    "2.2": WanConfig(multipliers=(1, 1), temporal_downsample=(True,), patch=2, shortcuts=True, **SIZES),
}
BOTH = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
RELEASES = {"wan21": WanConfig(), "wan22": WanConfig(48, 160, 256, patch=2, shortcuts=True)}


@pytest.fixture
def params_of(randomised):
    return lambda config: randomised(autoencoder_specs(config))


def clips(batch, frames, height, width, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (batch, frames, height, width, 3)), jnp.float32)


@functools.cache
def jitted(function, config):
    return jax.jit(lambda params, *inputs: function(params, config, *inputs))


@functools.cache
def streamed(function, config):
    """Compile one chunk: (params, chunk, which clips begin, cache, sizes) -> (result, the next cache)."""

    def run(params, x, first_B, cache, sizes_B2=None):
        past = Past(first_B, cache)
        return function(params, config, x, sizes_B2, past), past.next

    return jax.jit(run)


def in_chunks(function, config, params, x, frames, begins_at=(0,), sizes=None):
    """Process x in chunks of so many frames or latents by one program; each clip begins with the chunk named."""
    chunks = [x[:, i : i + frames] for i in range(0, x.shape[1], frames)]
    run, begins_at = streamed(function, config), np.array(begins_at)
    shapes = jax.eval_shape(run, params, chunks[0], begins_at == 0, None, sizes)[1]
    cache = jax.tree.map(lambda x: jnp.full(x.shape, 1e3, x.dtype), shapes)  # of another clip
    results = []
    for number, chunk in enumerate(chunks):
        result, cache = run(params, chunk, begins_at == number, cache, sizes)
        results.append(result)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), *results)


def with_filler(config, video, value=7.0):
    """Put the frames before a clip that fill up its first group; they must not be read."""
    filler = jnp.full_like(video[:, : config.time_factor - 1], value)
    return jnp.concatenate([filler, video[:, : video.shape[1]]], axis=1)


# ----------------------------------------------------------------------------------------------------- parity


@pytest.fixture(scope="module", params=RELEASES)
def release(request, tmp_path_factory):
    """(golden, autoencoder read from a folder of diffusers, video, latents)"""
    golden = Golden(request.param)
    folder = write_folder(tmp_path_factory.mktemp(request.param), golden, "AutoencoderKLWan", golden.weights)
    found = read_vae(folder)
    config = dataclasses.replace(found.config, dtype="float32", remat=False)
    height, width = golden["decoded"].shape[-2:]
    video = np.moveaxis(uniform("video", (1, 3, 13, height, width)) / 2, 1, -1)
    return golden, dataclasses.replace(found, config=config), video, np.moveaxis(golden["latent"], 1, -1)


@pytest.mark.parametrize("frames", [1, 5, 9, 13])
def test_it_is_the_autoencoder_of_diffusers(release, frames):
    golden, found, video, z = release
    latents = 1 + (frames - 1) // 4
    mean, logvar = jitted(encode, found.config)(found.params, video[:, :frames])
    decoded = jitted(decode, found.config)(found.params, z[:, :latents])
    for x, key, length in ((mean, "mean", latents), (logvar, "logvar", latents), (decoded, "decoded", frames)):
        assert relative_error(np.moveaxis(x, -1, 1), golden[key][:, :, :length]) < NEAR, key


@pytest.mark.parametrize("latents", [1, 2])
def test_so_it_is_in_chunks(release, latents):
    golden, found, video, z = release
    mean, logvar = in_chunks(encode, found.config, found.params, with_filler(found.config, video), 4 * latents)
    decoded = in_chunks(decode, found.config, found.params, z, latents)[:, 3:]
    for x, key in ((mean, "mean"), (logvar, "logvar"), (decoded, "decoded")):
        assert relative_error(np.moveaxis(x, -1, 1), golden[key]) < NEAR, key


@pytest.mark.parametrize("name", RELEASES)
def test_full_size_has_the_parameters_that_the_peer_counts(name):
    specs = autoencoder_specs(RELEASES[name])
    found = [count(part) for part in (specs, specs["encoder"], specs["decoder"])]
    assert found == Golden("parameters").meta["parameters"][name]
    assert found[0] == {"wan21": 126_892_531, "wan22": 704_688_668}[name]


# ----------------------------------------------------------------------------------------------------- config


@BOTH
@pytest.mark.parametrize("latents", [1, 3])
def test_shapes(config, latents):
    params, time, space = abstract(autoencoder_specs(config)), config.time_factor, config.space_factor
    video = jax.ShapeDtypeStruct((2, 1 + time * (latents - 1), 2 * space, 3 * space, 3), jnp.float32)
    mean, logvar = jax.eval_shape(lambda p, v: encode(p, config, v), params, video)
    assert mean.shape == logvar.shape == (2, *latent_grid(config, *video.shape[1:4]), 2) == (2, latents, 2, 3, 2)
    decoded = jax.eval_shape(lambda p, z: decode(p, config, z), params, mean)
    assert decoded.shape == video.shape and decoded.dtype == jnp.float32


def test_the_compression_is_that_of_the_releases():
    assert latent_grid(RELEASES["wan21"], 81, 480, 832) == (21, 60, 104)
    assert latent_grid(RELEASES["wan22"], 121, 704, 1280) == (31, 44, 80)


@pytest.mark.parametrize(
    "size, said",
    [
        ((8, 16, 16), r"frames is 8; it must be 1 \+ a multiple of 4, such as 5 or 9"),
        ((0, 16, 16), r"frames is 0; .* such as 1$"),
        ((5, 18, 16), "height is 18; it must be a positive multiple of 8, such as 16 or 24"),
        ((5, 16, 7), "width is 7; it must be a positive multiple of 8, such as 8$"),
    ],
)
def test_other_sizes_are_refused_with_the_nearest(size, said):
    with pytest.raises(UserError, match=said):
        latent_grid(WanConfig(), *size)


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(width=0), "model.width is 0"),
        (dict(kl_weight=-1.0), "model.kl_weight is"),
        (dict(multipliers=()), "model.multipliers is"),
        (dict(multipliers=(1, 2)), "model.temporal_downsample is .* it must have 1 entries"),
        (dict(decoder_width=5), "model.decoder_width is 5; .* even"),
        (dict(dtype="float16"), "model.dtype is"),
        (dict(shortcuts=True, multipliers=(1, 3, 4, 4)), "model.shortcuts is True; .* 768 and 288 channels"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change, said):
    with pytest.raises(UserError, match=said):
        dataclasses.replace(WanConfig(), **change)


# -------------------------------------------------------------------------------------------------- causality


def last_nonzero(gradient):
    return int(np.flatnonzero(np.abs(gradient).max(axis=(0, 2, 3, 4))).max())


@BOTH
def test_no_latent_depends_on_a_later_frame_and_no_frame_on_a_later_latent(config, params_of):
    params, time = params_of(config), config.time_factor
    size = 2 * config.space_factor
    of_latent = jax.jit(jax.grad(lambda v, t: encode(params, config, v)[0][:, t].sum()))
    assert [last_nonzero(of_latent(clips(1, 1 + 2 * time, size, size), t)) for t in range(3)] == [0, time, 2 * time]
    of_frame = jax.jit(jax.grad(lambda z, t: decode(params, config, z)[:, t].sum()))
    z = jax.random.normal(jax.random.key(1), (1, 3, 2, 2, 2))
    found = [last_nonzero(of_frame(z, t)) for t in range(1 + 2 * time)]
    assert found == [0] + [1] * time + [2] * time


@BOTH
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_nothing_before_the_receptive_field_matters(config, direction, params_of):
    """Change the first of many latents: what lies beyond the radius keeps its bits, and the radius is not idle."""
    radius, _ = receptive_field(config, direction)
    params, length, size = params_of(config), radius + 3, config.space_factor
    if direction == "encode":
        x = clips(1, 1 + config.time_factor * (length - 1), size, size)
        result, frames = jitted(encode, config)(params, x)[0], 1
        other = jitted(encode, config)(params, x.at[:, 0].set(-x[:, 0]))[0]
    else:
        x, frames = jax.random.normal(jax.random.key(0), (1, length, 1, 1, 2)), config.time_factor
        result, other = (jitted(decode, config)(params, z) for z in (x, x.at[:, 0].set(-x[:, 0])))
    moved = np.flatnonzero(np.abs(result - other).max((0, 2, 3, 4)))
    last = -(-int(moved.max()) // frames)
    assert radius / 2 <= last <= radius


# ---------------------------------------------------------------------------------------------- parts of clips


@BOTH
def test_clips_that_begin_at_different_times_are_streamed_by_one_program(config, params_of):
    """The second clip begins with the third chunk, behind another one; the first runs all the time."""
    params, time, size = params_of(config), config.time_factor, config.space_factor
    video = with_filler(config, clips(2, 1 + 3 * time, size, 2 * size))
    z = jax.random.normal(jax.random.key(1), (2, 4, 1, 2, 2))
    alone = video[1:, 3 * time - 1 :], z[1:, 2:]
    means = in_chunks(encode, config, params, video, time, begins_at=(0, 2))
    decoded = in_chunks(decode, config, params, z, 1, begins_at=(0, 2))
    for found, wanted in zip(means, jitted(encode, config)(params, video[:1, time - 1 :]), strict=True):
        np.testing.assert_allclose(found[:1], wanted, atol=1e-5)
    for found, wanted in zip(means, jitted(encode, config)(params, alone[0]), strict=True):
        np.testing.assert_allclose(found[1:, 2:], wanted, atol=1e-5)
    np.testing.assert_allclose(decoded[:1, time - 1 :], jitted(decode, config)(params, z[:1]), atol=1e-5)
    np.testing.assert_allclose(decoded[1:, 3 * time - 1 :], jitted(decode, config)(params, alone[1]), atol=1e-5)


@BOTH
def test_padded_clips_are_what_they_are_alone(config, params_of):
    """Pad two clips to one shape, whole and in chunks; what lies outside does not matter, whatever it is."""
    params, time, space = params_of(config), config.time_factor, config.space_factor
    sizes = np.array([[2, 3], [3, 1]]) * space
    video, z = clips(2, 1 + time, 3 * space, 3 * space), jax.random.normal(jax.random.key(0), (2, 2, 3, 3, 2))
    found = [
        (*jitted(encode, config)(params, video, sizes), jitted(decode, config)(params, z, sizes)),
        (
            *in_chunks(encode, config, params, with_filler(config, video), time, (0, 0), sizes),
            in_chunks(decode, config, params, z, 1, (0, 0), sizes)[:, time - 1 :],
        ),
    ]
    for i, (height, width) in enumerate(sizes):
        h, w = height // space, width // space
        mean, logvar = jitted(encode, config)(params, video[i : i + 1, :, :height, :width])
        decoded = jitted(decode, config)(params, z[i : i + 1, :, :h, :w])
        for means, logvars, clip in found:
            np.testing.assert_allclose(means[i : i + 1, :, :h, :w], mean, atol=1e-5)
            np.testing.assert_allclose(logvars[i : i + 1, :, :h, :w], logvar, atol=1e-5)
            np.testing.assert_allclose(clip[i : i + 1, :, :height, :width], decoded, atol=1e-5)
    without = jitted(encode, config)(params, video)[0]
    assert np.abs(without - found[0][0])[0, :, :2].max() > 1e-2  # the sizes do matter


MESHES = [MeshConfig(data=4, fsdp=2), MeshConfig(data=2, sequence=4)]


@BOTH
@pytest.mark.parametrize("mesh_config", MESHES, ids=["clips", "rows"])
def test_split_over_eight_devices_equals_one_device(config, mesh_config, params_of):
    params, time, space = params_of(config), config.time_factor, config.space_factor
    video, sizes = np.asarray(clips(8, 1 + time, 4 * space, space)), np.full((8, 2), space, np.int32)
    sizes[::2, 0] *= 4
    wanted = jitted(encode, config)(params, video, sizes)
    mesh = make_mesh(mesh_config)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(autoencoder_specs(config), mesh))
        batch = place_batch({"video": video, "sizes": sizes}, mesh)
        found = jax.jit(lambda p, v, s: encode(p, config, v, s))(placed, batch["video"], batch["sizes"])
        decoded = jax.jit(lambda p, z, s: decode(p, config, z, s))(placed, found[0], batch["sizes"])
    found, decoded = [np.asarray(x) for x in found], np.asarray(decoded)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one[::2], other[::2], atol=1e-5)
        np.testing.assert_allclose(one[1::2, :, :1], other[1::2, :, :1], atol=1e-5)
    np.testing.assert_allclose(decoded[::2], jitted(decode, config)(params, wanted[0], sizes)[::2], atol=1e-5)


# --------------------------------------------------------------------------------------------------- training


def loss_of(config, params):
    video = clips(2, 1 + config.time_factor, 2 * config.space_factor, 2 * config.space_factor)
    mean, logvar = encode(params, config, video)
    decoded = decode(params, config, sample_posterior(jax.random.key(3), mean, logvar))
    return jnp.square(decoded - video).mean() + 1e-2 * kl_to_standard_normal(mean, logvar).mean()


@functools.cache
def loss_and_gradient(config):
    return jax.jit(jax.value_and_grad(functools.partial(loss_of, config)))


@BOTH
def test_every_parameter_has_a_gradient(config, params_of):
    gradients = loss_and_gradient(config)(params_of(config))[1]
    flat = jax.tree_util.tree_leaves_with_path(gradients)
    assert [jax.tree_util.keystr(path) for path, g in flat if np.abs(g).max() < 1e-7] == []


def test_remat_changes_no_number(params_of):
    config = CONFIGS["2.1"]
    assert_near(
        loss_and_gradient(dataclasses.replace(config, remat=True))(params_of(config)),
        loss_and_gradient(config)(params_of(config)),
    )


def test_half_precision_changes_the_loss_by_no_more_than_it_must(params_of):
    config = CONFIGS["2.2"]
    half = jax.jit(functools.partial(loss_of, dataclasses.replace(config, dtype="bfloat16")))(params_of(config))
    np.testing.assert_allclose(half, loss_and_gradient(config)(params_of(config))[0], rtol=2e-2)
