"""Causal convolution against flax.linen, causality by gradient, folding and its inverse against einops."""

import chex
import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.nn import conv
from sora_jax.nn.conv import causal_conv3d, causal_conv3d_specs, clip_axes, depth_to_space, repeat_first, space_to_depth
from sora_jax.nn.params import init
from sora_jax.parallel.mesh import MeshConfig, make_mesh, place_batch
from sora_jax.parallel.rules import layout_of

KERNELS = [(3, 3, 3), (1, 3, 3), (3, 1, 1), (1, 1, 1), (4, 5, 3)]
BLOCKS = [(1, 1, 1), (1, 2, 2), (2, 1, 3), (4, 2, 2)]


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def layer(inputs, outputs, kernel):
    params = init(causal_conv3d_specs(inputs, outputs, kernel), jax.random.key(0))
    return params | {"bias": random(outputs, seed=1)}


def linen_conv(params, x):
    """The same layer by Flax, with every pad written out."""
    time, height, breadth = params["weight"].shape[:3]
    front = jnp.repeat(x[:, :1], time - 1, axis=1)
    padding = [(0, 0), (height // 2, height // 2), (breadth // 2, breadth // 2)]
    module = nn.Conv(params["weight"].shape[-1], (time, height, breadth), padding=padding)
    variables = {"params": {"kernel": params["weight"], "bias": params["bias"]}}
    return module.apply(variables, jnp.concatenate([front, x], axis=1))


@pytest.mark.parametrize("kernel", KERNELS)
def test_equals_flax_convolution(kernel):
    params, x = layer(3, 5, kernel), random(2, 5, 7, 6, 3)
    ours, theirs = jax.jit(lambda p, x: (causal_conv3d(p, x), linen_conv(p, x)))(params, x)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1)])
def test_gradients_equal_flax_convolution(kernel):
    params, x = layer(3, 4, kernel), random(2, 3, 5, 4, 3)

    def gradients(function):
        return jax.jit(jax.grad(lambda p, x: jnp.sin(function(p, x)).sum(), (0, 1)))(params, x)

    ours, theirs = gradients(causal_conv3d), gradients(linen_conv)
    chex.assert_trees_all_close(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_platform_computes_the_same(kernel):
    weight, padded = layer(3, 5, kernel)["weight"], repeat_first(random(2, 4, 6, 7, 3), kernel[0] - 1)
    padding = tuple((0, size - 1) for size in kernel[1:])
    both = jax.jit(lambda *a: [way(*a, padding) for way in (conv._sum_over_taps, conv._convolution)])(padded, weight)
    np.testing.assert_allclose(*both, atol=2e-5)


def test_no_frame_depends_on_a_later_one():
    params, x = layer(2, 3, (3, 3, 3)), random(1, 5, 4, 4, 2)
    gradient = jax.jit(jax.grad(lambda x, frame: causal_conv3d(params, x)[:, frame].sum()))
    for frame in range(5):
        reached = np.abs(gradient(x, frame)).max(axis=(0, 2, 3, 4)) > 0
        assert reached.tolist() == [frame - 3 < t <= frame for t in range(5)]


def test_still_clip_is_an_image_at_every_time():
    params, image = layer(2, 3, (3, 3, 3)), random(1, 1, 4, 4, 2)
    still = causal_conv3d(params, jnp.repeat(image, 4, axis=1))
    np.testing.assert_allclose(still, jnp.repeat(causal_conv3d(params, image), 4, axis=1), atol=1e-6)


@pytest.mark.parametrize("block", BLOCKS)
def test_fold_and_unfold_are_inverses(block):
    x = random(2, 1 + 2 * block[0], 3 * block[1], 2 * block[2], 3)
    np.testing.assert_array_equal(depth_to_space(space_to_depth(x, block), block), x)


@pytest.mark.parametrize("block", BLOCKS)
def test_fold_equals_einops(block):
    pt, ph, pw = block
    x = random(2, 1 + 2 * pt, 3 * ph, 2 * pw, 3)
    padded = jnp.concatenate([jnp.repeat(x[:, :1], pt - 1, axis=1), x], axis=1)
    pattern = "b (t pt) (h ph) (w pw) c -> b t h w (pt ph pw c)"
    np.testing.assert_array_equal(space_to_depth(x, block), einops.rearrange(padded, pattern, pt=pt, ph=ph, pw=pw))


def test_first_block_holds_the_first_frame_alone():
    x = random(1, 5, 2, 2, 3)
    np.testing.assert_array_equal(space_to_depth(x, (4, 2, 2))[:, :1], space_to_depth(x[:, :1], (4, 2, 2)))


@pytest.mark.parametrize("kernel, rows", [((3, 3, 3), 8), ((2, 7, 1), 8), ((1, 1, 1), 8), ((3, 3, 3), 6)])
def test_rows_on_several_devices_are_convolved_as_on_one(kernel, rows):
    """Two rows on each of four devices, where a kernel of seven reaches beyond the neighbour; six rows stay whole."""
    params, x = layer(3, 4, kernel), random(2, 3, rows, 5, 3)

    def result(params, x):
        return jax.value_and_grad(lambda *a: jnp.sin(3 * causal_conv3d(*a)).sum(), (0, 1))(params, x)

    wanted = jax.jit(result)(params, x)
    mesh = make_mesh(MeshConfig(data=2, sequence=4))
    with jax.set_mesh(mesh):
        found = jax.jit(result)(params, place_batch(np.asarray(x), mesh))
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=2e-5)


def test_rows_are_split_where_every_device_gets_as_many():
    mesh = make_mesh(MeshConfig(data=2, sequence=4))
    with jax.set_mesh(mesh):
        assert [clip_axes(rows)[2] for rows in (4, 6, 8, 2)] == ["height", None, "height", None]
        video = place_batch(np.zeros((2, 5, 16, 4, 3), np.float32), mesh)
        coarse, coarser = space_to_depth(video, (4, 2, 2)), space_to_depth(space_to_depth(video, (4, 2, 2)), (1, 4, 1))
        again = depth_to_space(depth_to_space(coarser, (1, 4, 1)), (4, 2, 2))
        heights = [layout_of(x)[2] for x in (coarse, coarser, again)]
    assert heights == ["sequence", None, "sequence"]
