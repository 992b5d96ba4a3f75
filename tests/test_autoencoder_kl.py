"""The image autoencoder: sizes, padded pictures, frames as pictures, mesh, and independent layers."""

import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures_runs import CLIPS, build_options, run, write_clips

from sora_jax.config import from_dict, to_dict
from sora_jax.data.storing.latents import LatentCache
from sora_jax.data.storing.manifest import Dataset
from sora_jax.errors import UserError
from sora_jax.models.autoencoder import AutoencoderConfig
from sora_jax.models.autoencoder_kl import KLConfig, autoencoder_specs, decode, encode, latent_grid
from sora_jax.models.flops import autoencoder_train_flops
from sora_jax.nn import images
from sora_jax.nn.params import abstract, count, shardings
from sora_jax.parallel.mesh import MeshConfig, make_mesh, place_batch
from sora_jax.train.autoencoder import AutoencoderRun
from sora_jax.train.frozen import FrozenAutoencoder, load_autoencoder, save_autoencoder
from sora_jax.train.reconstruction import reconstruction_loss

SMALL = KLConfig(latent_channels=2, widths=(8, 16), blocks=1, groups=4, dtype="float32")
DEEP = KLConfig(latent_channels=2, widths=(8, 16, 16), blocks=1, groups=4, quant=False, dtype="float32")


@pytest.fixture(scope="module")
def params(randomised):
    return randomised(autoencoder_specs(SMALL))


def pictures(batch, frames, height, width, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (batch, frames, height, width, 3)), jnp.float32)


@functools.cache
def jitted(function, config):
    return jax.jit(lambda params, *inputs: function(params, config, *inputs))


def test_the_number_of_parameters_is_that_of_stable_diffusion():
    # As the peer counts its own (tests/peers/make_model_goldens.py): with convolutions around 4 channels, without
    # around 16.
    assert count(autoencoder_specs(KLConfig())) == 83_653_863
    assert count(autoencoder_specs(KLConfig(latent_channels=16, quant=False))) == 83_819_683


@pytest.mark.parametrize("config", [SMALL, DEEP])
def test_shapes(config):
    params, factor = abstract(autoencoder_specs(config)), config.space_factor
    video = jax.ShapeDtypeStruct((2, 3, 4 * factor, 3 * factor, 3), jnp.float32)
    mean, logvar = jax.eval_shape(lambda p, v: encode(p, config, v), params, video)
    assert mean.shape == logvar.shape == (2, *latent_grid(config, *video.shape[1:4]), 2) == (2, 3, 4, 3, 2)
    assert jax.eval_shape(lambda p, z: decode(p, config, z), params, mean).shape == video.shape


@pytest.mark.parametrize(
    "size, named", [((1, 12, 8), "height is 12"), ((1, 8, 4), "width is 4"), ((0, 8, 8), "frames")]
)
def test_other_sizes_are_refused_with_the_nearest(size, named):
    with pytest.raises(UserError, match=named):
        latent_grid(KLConfig(), *size)


@pytest.mark.parametrize("change", [dict(widths=(8, 18)), dict(widths=()), dict(groups=0), dict(kl_weight=-1.0)])
def test_a_config_that_cannot_be_is_refused(change):
    with pytest.raises(UserError, match=f"model.{next(iter(change))} is"):
        dataclasses.replace(SMALL, **change)


def test_group_norm_is_that_of_linen():
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 12)) * 3 + 1
    oracle = nn.GroupNorm(num_groups=4, epsilon=1e-6)
    gain, bias = jnp.arange(12.0) - 3, jnp.arange(12.0) / 7
    wanted = oracle.apply({"params": {"scale": gain, "bias": bias}}, x)
    np.testing.assert_allclose(images.group_norm({"gain": gain, "bias": bias}, x, 4), wanted, atol=2e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_is_that_of_linen_and_halves_towards_the_first_corner(stride):
    x = jax.random.normal(jax.random.key(0), (2, 4, 6, 5))
    p = {"weight": jax.random.normal(jax.random.key(1), (3, 3, 5, 7)), "bias": jnp.arange(7.0)}
    oracle = nn.Conv(7, (3, 3), stride, padding=((2 - stride, 1),) * 2)
    wanted = oracle.apply({"params": {"kernel": p["weight"], "bias": p["bias"]}}, x)
    np.testing.assert_allclose(images.conv2d(p, x, stride=stride), wanted, atol=2e-5)


def test_upsampling_within_a_convolution_is_upsampling_before_it():
    x, weight = jax.random.normal(jax.random.key(0), (2, 5, 7, 3)), jax.random.normal(jax.random.key(1), (3, 3, 3, 4))
    p = {"weight": weight, "bias": jnp.arange(4.0)}
    rows = np.arange(5) < np.array([[5], [3]])
    for inside in (None, jnp.asarray(np.broadcast_to(rows[:, :, None, None], (2, 5, 7, 1)))):
        shown = x if inside is None else jnp.where(inside, x, 0)
        doubled = shown.repeat(2, axis=1).repeat(2, axis=2)
        wanted = nn.Conv(4, (3, 3)).apply({"params": {"kernel": weight, "bias": p["bias"]}}, doubled)
        np.testing.assert_allclose(images.upsample_conv2d(p, x, inside), wanted, atol=2e-5)


def test_attention_by_rows_is_attention_at_once(monkeypatch):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 6, 4, 8))
    mask = jnp.arange(4)[None, None, :, None] < jnp.array([4, 3])[:, None, None, None]
    mask = jnp.broadcast_to(mask, (2, 6, 4, 1))
    whole = images.attend_in_images(q, k, v, mask)
    wanted = nn.dot_product_attention(*(x[1, :, :3].reshape(1, 18, 1, 8) for x in (q, k, v)))
    np.testing.assert_allclose(whole[1, :, :3].reshape(1, 18, 1, 8), wanted, atol=2e-6)
    monkeypatch.setattr(images, "QUERIES_AT_ONCE", 8)
    np.testing.assert_allclose(images.attend_in_images(q, k, v, mask), whole, atol=2e-6)


def test_a_padded_picture_has_the_latent_it_has_alone(params):
    sizes = [(8, 6), (4, 10), (8, 10)]
    video = pictures(3, 2, 8, 10)
    for function in (lambda x: x, lambda x: x * 0 + 1e3):  # what lies outside does not matter, whatever it is
        spoiled = function(video)
        for i, (height, width) in enumerate(sizes):
            spoiled = spoiled.at[i, :, :height, :width].set(video[i, :, :height, :width])
        together = jitted(encode, SMALL)(params, spoiled, jnp.array(sizes))
        for i, (height, width) in enumerate(sizes):
            alone = jitted(encode, SMALL)(params, video[i : i + 1, :, :height, :width])
            for one, all_ in zip(alone, together):
                np.testing.assert_allclose(all_[i, :, : height // 2, : width // 2], one[0], atol=1e-5)


def test_the_frames_of_a_clip_are_pictures(params):
    video = pictures(2, 3, 8, 6)
    mean, logvar = jitted(encode, SMALL)(params, video)
    decoded = jitted(decode, SMALL)(params, mean)
    apart = video.reshape(6, 1, 8, 6, 3)
    means, logvars = jitted(encode, SMALL)(params, apart)
    np.testing.assert_allclose(means.reshape(mean.shape), mean, atol=1e-5)
    np.testing.assert_allclose(logvars.reshape(mean.shape), logvar, atol=1e-5)
    np.testing.assert_allclose(jitted(decode, SMALL)(params, means).reshape(video.shape), decoded, atol=1e-5)
    assert np.abs(mean[:, 0] - mean[:, 1]).max() > 0.1


KEY = jax.random.key(3)


def loss_of(config, params):
    return reconstruction_loss(params, config, pictures(2, 1, 8, 8), KEY).model


@functools.cache
def loss_and_gradient(config):
    return jax.jit(jax.value_and_grad(functools.partial(loss_of, config)))


def test_every_parameter_has_a_gradient(params):
    flat = jax.tree_util.tree_leaves_with_path(loss_and_gradient(SMALL)(params)[1])
    # A bias before softmax that is the same for all keys changes nothing.
    still = [jax.tree_util.keystr(path) for path, g in flat if np.abs(g).max() < 1e-7]
    assert all("['k']['bias']" in name for name in still), still


def test_remat_changes_no_number(params):
    assert not SMALL.remat
    (loss, gradient), (other, recomputed) = (
        loss_and_gradient(config)(params) for config in (SMALL, dataclasses.replace(SMALL, remat=True))
    )
    np.testing.assert_allclose(loss, other, rtol=1e-6)
    chex.assert_trees_all_close(gradient, recomputed, atol=1e-5)


def test_half_precision_changes_the_loss_by_no_more_than_it_must(params):
    half = jax.jit(functools.partial(loss_of, dataclasses.replace(SMALL, dtype="bfloat16")))(params)
    np.testing.assert_allclose(half, loss_and_gradient(SMALL)(params)[0], rtol=2e-2)


@pytest.mark.parametrize("mesh_config", [MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_split_over_eight_devices_equals_one_device(params, mesh_config):
    video, sizes = pictures(8, 1, 8, 6), np.array([[8, 6], [4, 4]] * 4, np.int32)
    wanted = jitted(encode, SMALL)(params, video, sizes)
    mesh = make_mesh(mesh_config)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(autoencoder_specs(SMALL), mesh))
        batch = place_batch({"video": np.asarray(video), "sizes": sizes}, mesh)
        found = jax.jit(lambda p, v, s: encode(p, SMALL, v, s))(placed, batch["video"], batch["sizes"])
        decoded = jax.jit(lambda p, z: decode(p, SMALL, z))(placed, found[0])
        assert "data" in str(decoded.sharding.spec)
    found, decoded = [np.asarray(x) for x in found], np.asarray(decoded)
    for one, other in zip(found, wanted):
        np.testing.assert_allclose(one[0], other[0], atol=1e-5)
        np.testing.assert_allclose(one[1, :, :2, :2], other[1, :, :2, :2], atol=1e-5)
    np.testing.assert_allclose(decoded, jitted(decode, SMALL)(params, found[0]), atol=1e-5)


def test_flops_are_those_of_its_convolutions():
    config = KLConfig(latent_channels=2, widths=(8,), blocks=1, groups=4, quant=False)
    blocks = (2 + 1) + (2 + 2)  # of encoder and decoder, the middle's among them, all 8 -> 8 at full size
    convolutions = 9 * (blocks * 2 * 64 + (3 * 8 + 8 * 4) + (2 * 8 + 8 * 3))
    attention = 2 * (4 * 64 + 2 * 8 * 16)  # projections and two products with 16 keys
    assert autoencoder_train_flops(config, 1, 4, 4) == 3 * 2 * 16 * (convolutions + attention)


def test_a_frozen_one_is_saved_and_read_with_its_own_statistics(params, tmp_path):
    mean, std = np.array([0.5, -1.0], np.float32), np.array([2.0, 0.5], np.float32)
    autoencoder = FrozenAutoencoder(SMALL, params, mean, std)
    save_autoencoder(autoencoder, tmp_path / "frozen", {})
    found = load_autoencoder(tmp_path)
    assert found.config == SMALL and found.fingerprint == autoencoder.fingerprint
    clips = [
        np.random.default_rng(i).integers(0, 256, (2, *size, 3), np.uint8) for i, size in enumerate([(8, 6), (4, 10)])
    ]
    latents = list(found.encode(clips, batch=2, padded_shapes=[(2, 8, 10)]))
    for clip, latent in zip(clips, latents, strict=True):
        raw, _ = encode(params, SMALL, jnp.asarray(clip[None] / 127.5 - 1, jnp.float32))
        np.testing.assert_allclose(latent, (np.asarray(raw[0]) - mean) / std, atol=1e-5)
    assert [clip.shape for clip in found.decode(latents)] == [clip.shape for clip in clips]


def test_the_kind_of_autoencoder_is_known_by_the_names_in_its_config():
    for model in (SMALL, AutoencoderConfig()):
        config = AutoencoderRun(model=model, crop=(1, 16, 16))
        assert from_dict(AutoencoderRun, to_dict(config)) == config
    with pytest.raises(UserError, match="config.model.colour is not an option"):
        from_dict(AutoencoderRun, {"model": {"name": "kl", "colour": 3}})


CONFIG = """
from sora_jax.config import to_config_dict
from sora_jax.models.autoencoder_kl import KLConfig
from sora_jax.train.autoencoder import AutoencoderRun

def get_config(variant=""):
    config = to_config_dict(AutoencoderRun(model=KLConfig(latent_channels=2, widths=(8, 16), blocks=1, groups=4)))
    config.crop, config.batch, config.image_share = (1, 16, 16), 4, 0.0
    config.loop.steps = 3
    config.loop.preview_every = 3
    return config
"""


def test_train_and_encode_commands_take_it(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    write_clips(tmp_path / "clips")
    assert run(*build_options(tmp_path / "clips", tmp_path / "data")) == 0
    options = [
        f"--config={tmp_path / 'config.py'}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data={tmp_path / 'data'}",
    ]
    assert run("train", *options) == 0 and len(list((tmp_path / "run" / "samples").iterdir())) == 1
    folders = [f"--autoencoder={tmp_path / 'run'}", f"--data={tmp_path / 'data'}", f"--out={tmp_path / 'latents'}"]
    assert run("data", "encode", *folders, "--shapes=1") == 0
    cache, dataset = LatentCache(tmp_path / "latents"), Dataset(tmp_path / "data")
    autoencoder = load_autoencoder(tmp_path / "run")
    rows = {row["id"]: row for row in dataset.rows()}
    assert len(cache) == len(CLIPS)
    for i, name in enumerate(cache.ids(range(len(cache)))):
        latent = next(autoencoder.encode([dataset[rows[name]["index"]].frames]))
        np.testing.assert_allclose(cache[i], latent, atol=4e-3)  # float16
