"""LPIPS against an independent implementation on random weights, its files, and a mesh."""

import functools
import re

import jax
import numpy as np
import pytest
import scipy.ndimage
from safetensors.numpy import save_file

from sora_jax.errors import UserError
from sora_jax.models.lpips import lpips, read_lpips
from sora_jax.parallel.mesh import MeshConfig, make_mesh, place_batch

VGG = {0: 2, 2: 3, 5: 4, 7: 3, 10: 2, 12: 3, 14: 4, 17: 3, 19: 2, 21: 3, 24: 2, 26: 4, 28: 3}  # narrow
ALEX = {0: (3, 11), 3: (4, 5), 6: (2, 3), 8: (3, 3), 10: (4, 3)}
TAPS = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}  # torchvision's numbers of the ReLUs that are compared
POOLS = {"vgg": {4: 2, 9: 2, 16: 2, 23: 2}, "alex": {2: 3, 5: 3}}


def video(batch=2, frames=1, height=64, width=68, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (batch, frames, height, width, 3)).astype(np.float32)


@functools.cache
def tensors(net):
    """Random tensors with the names of torchvision and of the lpips package."""
    rng = np.random.default_rng(0)
    layers = {number: (width, 3) for number, width in VGG.items()} if net == "vgg" else ALEX
    found, inputs, widths = {}, 3, {}
    for number, (outputs, size) in layers.items():
        scale = np.sqrt(2 / (inputs * size * size))
        found[f"features.{number}.weight"] = scale * rng.standard_normal((outputs, inputs, size, size))
        found[f"features.{number}.bias"] = 0.1 * rng.standard_normal(outputs)
        inputs = widths[number] = outputs
    for level, tap in enumerate(TAPS[net]):
        width = widths[max(number for number in widths if number < tap)]
        found[f"lin{level}.model.1.weight"] = rng.uniform(0, 1, (1, width, 1, 1))
    return {name: np.ascontiguousarray(x, np.float32) for name, x in found.items()}


def save(tmp_path, values, name="lpips.safetensors"):
    save_file(values, tmp_path / name)
    return tmp_path / name


@pytest.fixture
def params(tmp_path):
    return lambda net="vgg": read_lpips(save(tmp_path, tensors(net), f"{net}.safetensors"))


def features_by_hand(net, image):
    """Run the layers one after the other, as torchvision numbers them, channel by channel: image (H, W, 3)."""
    weights = tensors(net)
    x = (image.astype(np.float64) - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
    x, found = x.transpose(2, 0, 1), []
    for number in range(TAPS[net][-1] + 1):
        if f"features.{number}.weight" in weights:
            weight, bias = weights[f"features.{number}.weight"], weights[f"features.{number}.bias"]
            same = [
                sum(scipy.ndimage.correlate(c, k, mode="constant") for c, k in zip(x, kernels)) for kernels in weight
            ]
            x = np.stack(same) + bias[:, None, None]
            if weight.shape[-1] == 11:  # padding 2 and stride 4: centres 3, 7, ... of the convolution of equal size
                x = x[:, 3:-3:4, 3:-3:4]
        elif number in POOLS[net]:
            size = POOLS[net][number]
            x = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))[:, ::2, ::2].max((-2, -1))
        else:
            x = np.maximum(x, 0)
        if number in TAPS[net]:
            found.append(x)
    return found


def lpips_by_hand(net, a, b):
    total = 0.0
    for level, pair in enumerate(zip(*(features_by_hand(net, image) for image in (a, b)), strict=True)):
        x, y = (z / np.maximum(np.linalg.norm(z, axis=0), 1e-12) for z in pair)
        total += np.mean(np.tensordot(tensors(net)[f"lin{level}.model.1.weight"].ravel(), (x - y) ** 2, 1))
    return total


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_equals_an_implementation_layer_by_layer(net, params):
    a, b = video(frames=2), np.clip(video(frames=2) + 0.5 * video(frames=2, seed=1), -1, 1)
    wanted = [np.mean([lpips_by_hand(net, *frames) for frames in zip(*clips)]) for clips in zip(a, b)]
    found = jax.jit(lpips)(params(net), a, b)
    np.testing.assert_allclose(found, wanted, rtol=2e-4)
    assert min(wanted) > 0.01


def test_a_clip_is_at_no_distance_from_itself_and_distances_are_symmetric(params):
    run, (a, b) = jax.jit(functools.partial(lpips, params())), (video(), video(seed=1))
    assert run(a, a).tolist() == [0.0, 0.0]
    np.testing.assert_allclose(run(a, b), run(b, a), rtol=1e-5)


def test_a_stronger_distortion_is_farther(params):
    run, a, noise = jax.jit(functools.partial(lpips, params())), video(1), video(1, seed=1)
    distances = [float(run(a, a + strength * noise)[0]) for strength in (0.05, 0.2, 0.8)]
    assert distances == sorted(distances) and distances[-1] > 3 * distances[0]


def test_frames_are_drawn_by_the_key(params):
    """The distance of the drawn frames is that of one of them, where only one differs."""
    read = params("alex")
    a = video(1, frames=4, width=64)
    b = a.copy()
    b[:, 2] = video(1, width=64, seed=1)[:, 0]
    run = jax.jit(lambda key: lpips(read, a, b, 2, key)[0])
    whole, some = float(lpips(read, a, b)[0]), [float(run(jax.random.key(seed))) for seed in range(8)]
    assert {round(value / whole, 3) for value in some} == {0.0, 2.0}
    with pytest.raises(ValueError, match="needs a key"):
        lpips(read, a, b, 2)


def test_gradients_are_finite_where_all_features_are_zero(params):
    """A bias far below zero closes all ReLUs."""
    read = params("alex")
    read["convs"][0][0]["bias"] = read["convs"][0][0]["bias"] - 100
    read["convs"][1][0]["bias"] = read["convs"][1][0]["bias"] - 100
    gradient = jax.jit(jax.grad(lambda x: lpips(read, x, video(1)).sum()))(video(1, seed=1))
    assert np.isfinite(gradient).all()


def test_gradient_equals_a_finite_difference(params):
    """Large biases keep features away from zero, where the direction of a vector jumps."""
    read, a, b = params("alex"), video(1, width=64), video(1, width=64, seed=1)
    for level in read["convs"]:
        level[0]["bias"] = level[0]["bias"] + 3
    run = jax.jit(lambda x: lpips(read, x, b)[0])
    slope = np.asarray(jax.jit(jax.grad(run))(a))
    direction = slope / np.linalg.norm(slope)
    difference = (run(a + 0.05 * direction) - run(a - 0.05 * direction)) / 0.1
    np.testing.assert_allclose(difference, np.linalg.norm(slope), rtol=0.02)


def test_small_frames_are_named():
    with pytest.raises(UserError, match="frames are 64 x 48 pixels; for LPIPS they must be at least 64 x 64"):
        lpips({}, video(width=48), video(width=48))


def test_every_way_to_name_and_to_store_tensors_is_read(tmp_path, params):
    """The state dict of the lpips package has other names of the same tensors, some of them twice."""
    renamed = {}
    for name, x in tensors("vgg").items():
        number = int(re.findall(r"\d+", name)[0])
        if name.startswith("features"):
            renamed[re.sub(r"features", f"net.slice{1 + sum(number > tap for tap in TAPS['vgg'])}", name)] = x
        else:
            renamed |= {name: x, f"lins.{number}.model.1.weight": x}
    renamed["scaling_layer.shift"] = np.zeros((1, 3, 1, 1), np.float32)
    np.savez(tmp_path / "lpips.npz", **tensors("vgg"))
    for other in (read_lpips(save(tmp_path, renamed)), read_lpips(str(tmp_path / "lpips.npz"))):
        assert jax.tree.structure(other) == jax.tree.structure(params())
        for one, two in zip(*map(jax.tree.leaves, (other, params())), strict=True):
            np.testing.assert_array_equal(one, two)


def without(*names):
    return lambda values: {name: x for name, x in values.items() if name not in names}


@pytest.mark.parametrize(
    "change, message",
    [
        (without("features.5.weight"), "must hold the 13 convolutions of VGG16 or the 5 of AlexNet .* holds 12"),
        (without("features.5.bias"), "must hold features.5.bias"),
        (without("lin3.model.1.weight"), "must hold lin3.model.1.weight"),
        (lambda values: values | {"lin1.model.1.weight": np.zeros((1, 9, 1, 1), np.float32)}, "lin1 has 9 weights"),
        (lambda values: values | {"features.2.weight": np.zeros((3, 5, 3, 3), np.float32)}, "level 0 has 5 inputs"),
    ],
)
def test_wrong_files_are_named(tmp_path, change, message):
    path = save(tmp_path, change(tensors("vgg")))
    with pytest.raises(UserError, match=f"LPIPS file is '.*lpips.safetensors'; .*{message}"):
        read_lpips(path)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"12345678901234567890")
    (tmp_path / "broken.npz").write_bytes(b"1234567890")
    for name in ("missing.safetensors", "broken.safetensors", "broken.npz"):
        with pytest.raises(UserError, match=f"{name}'; it cannot be read"):
            read_lpips(tmp_path / name)
    with pytest.raises(UserError, match="vgg.pth'; it must end in .safetensors or .npz"):
        read_lpips(tmp_path / "vgg.pth")


def test_distances_on_a_mesh_are_those_of_one_device(params):
    def both(params, a, b):
        return lpips(params, a, b), jax.grad(lambda a: lpips(params, a, b, 1, jax.random.key(0)).sum())(a)

    read, a, b = params("alex"), video(2, 2, width=64), video(2, 2, width=64, seed=1)
    wanted = jax.jit(both)(read, a, b)
    mesh = make_mesh(MeshConfig(data=2, sequence=4))
    with jax.set_mesh(mesh):
        found = jax.jit(both)(read, place_batch(a, mesh), place_batch(b, mesh))
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-5 * np.abs(wanted[1]).max())
