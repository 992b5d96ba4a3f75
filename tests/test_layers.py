"""Layers against flax.linen on random weights, initial spreads in closed form, and the timestep embedding."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_near

from sora_jax.nn.layers import (
    compute_dtype,
    dense,
    dense_specs,
    embed,
    embedding_specs,
    layer_norm,
    mlp,
    mlp_specs,
    out_proj,
    out_proj_specs,
    qkv_proj,
    qkv_proj_specs,
    rms_norm,
    rms_norm_specs,
    time_features,
)
from sora_jax.nn.params import init
from sora_jax.parallel.mesh import MeshConfig, make_mesh
from sora_jax.parallel.rules import partition

AXES = ("batch", "length", "width")
B, L, D, F, N, K = 2, 5, 12, 20, 3, 4


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def linen(module, params, x):
    return module.apply({"params": params}, x)


def kernel(params):
    """Our names to those of Flax."""
    return {"kernel" if name == "weight" else name: value for name, value in params.items()}


@pytest.mark.parametrize("bias", [True, False])
def test_dense_equals_flax(randomised, bias):
    params, x = randomised(dense_specs(D, F, bias=bias)), random(B, L, D)
    assert ("bias" in params) == bias
    assert_near(dense(params, x, AXES), linen(nn.Dense(F, use_bias=bias), kernel(params), x))


@pytest.mark.parametrize("scale, offset", [(1.0, 0.0), (1e-3, 0.0), (30.0, 500.0)])
def test_layer_norm_equals_flax(scale, offset):
    x = scale * random(B, L, D) + offset
    module = nn.LayerNorm(epsilon=1e-6, use_scale=False, use_bias=False, use_fast_variance=False)
    assert_near(layer_norm(x), linen(module, {}, x))


@pytest.mark.parametrize("scale", [1.0, 1e-3, 100.0])
def test_rms_norm_equals_flax(randomised, scale):
    gain, x = randomised(rms_norm_specs(D)), scale * random(B, L, D)
    assert_near(rms_norm(gain, x), linen(nn.RMSNorm(epsilon=1e-6), {"scale": gain}, x))


@pytest.mark.parametrize("norm", [layer_norm, lambda x: rms_norm(jnp.ones(x.shape[-1]), x)])
def test_norms_of_bfloat16_are_taken_in_float32(norm):
    x = (random(B, L, 1024) * 3).astype(jnp.bfloat16)
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm(x), norm(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_mlp_equals_flax(randomised):
    params, x = randomised(mlp_specs(D, F)), random(B, L, D)
    module = nn.Sequential([nn.Dense(F), nn.gelu, nn.Dense(D)])
    assert_near(
        mlp(params, x), linen(module, {"layers_0": kernel(params["up"]), "layers_2": kernel(params["down"])}, x)
    )


def test_embedding_equals_flax(randomised):
    table, ids = randomised(embedding_specs(7, D)), jnp.asarray([[0, 6, 3], [3, 3, 1]])
    np.testing.assert_array_equal(embed(table, ids, AXES), linen(nn.Embed(7, D), {"embedding": table}, ids))


def test_head_projections_equal_flax(randomised):
    params, x = randomised(qkv_proj_specs(D, 2, N, K)), random(B, L, D)
    expected = linen(nn.DenseGeneral((2, N, K)), kernel(params), x)
    parts = qkv_proj(params, x)
    assert_near(jnp.stack(parts, axis=2), expected)
    back = randomised(out_proj_specs(N, K, D))
    assert_near(out_proj(back, parts[1]), linen(nn.DenseGeneral(D, axis=(-2, -1)), kernel(back), expected[:, :, 1]))


@pytest.mark.parametrize(
    "specs, fans",
    [
        (dense_specs(300, 500), (300, 500)),
        (qkv_proj_specs(300, 3, 10, 40), (300, 400)),  # each of q, k and v counts as a layer of its own
        (qkv_proj_specs(300, 3, 10, 40, joint=True), (300, 1200)),
        (out_proj_specs(10, 40, 300), (400, 300)),
    ],
)
def test_projections_start_xavier_uniform(specs, fans):
    """Uniform within sqrt(6 / (fan in + fan out)), biases zero (Glorot and Bengio 2010, equation 16)."""
    params, bound = jax.jit(lambda key: init(specs, key))(jax.random.key(0)), np.sqrt(6 / sum(fans))
    weight = np.abs(params["weight"])
    assert 0.999 * bound < weight.max() <= bound * (1 + 1e-6)
    np.testing.assert_allclose(weight.mean(), bound / 2, rtol=0.01)
    assert not params["bias"].any()


def test_layers_compute_in_the_dtype_of_their_input(randomised):
    x = random(B, L, D).astype(jnp.bfloat16)
    params = randomised({"mlp": mlp_specs(D, F), "qkv": qkv_proj_specs(D, 3, N, K), "merge": out_proj_specs(N, K, D)})
    heads = qkv_proj(params["qkv"], x)
    for y in (mlp(params["mlp"], x), *heads, out_proj(params["merge"], heads[0])):
        assert y.dtype == jnp.bfloat16


def test_time_features_are_the_published_ones():
    """DiT's embedding of timestep 1 of 1000 in 256 channels: cosines first."""
    features = np.asarray(time_features(jnp.float32([1.0, 0.0]), 256))
    np.testing.assert_allclose(features[0, :3], [0.540302, 0.597375, 0.647906], atol=2e-6)
    np.testing.assert_allclose(features[0, 128:131], [0.841471, 0.801962, 0.761720], atol=2e-6)
    np.testing.assert_array_equal(features[1], np.repeat([1.0, 0.0], 128))


def test_time_features_in_closed_form():
    n, i = np.float32([200, 900, 123.45, 987.65])[:, None], np.arange(4)
    angles = n.astype(np.float64) * 10_000.0 ** (-2 * i / 8)
    features = time_features(jnp.asarray(n[:, 0]), 8)
    np.testing.assert_allclose(features, np.concatenate([np.cos(angles), np.sin(angles)], -1), atol=1e-6)


def test_compute_dtype_on_a_cpu():
    assert compute_dtype("auto") == jnp.float32 and compute_dtype("bfloat16") == jnp.bfloat16


def test_rows_of_a_table_that_is_split_as_the_batch_is_are_taken_where_they_belong():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    rows = np.arange(40.0 * 32, dtype=np.float32).reshape(40, 32)
    table = jax.device_put(rows, jax.NamedSharding(mesh, partition("vocabulary", "embed")))
    ids = jax.device_put(np.arange(8 * 6).reshape(8, 6) % 40, jax.NamedSharding(mesh, partition("batch", "length")))
    with jax.set_mesh(mesh):
        take = jax.jit(lambda table, ids: embed(table, ids, ("batch", "length", "width")))
        np.testing.assert_array_equal(take(table, ids), np.asarray(table)[np.asarray(ids)])
        text = take.lower(table, ids).compile().as_text()
    moved = re.findall(r"= (\S+?)\{\S+ (all-gather|all-to-all|all-reduce|collective-permute)\(", text)
    assert moved == [("f32[40,32]", "all-gather")]  # the table itself, as of all parameters, and no rows
