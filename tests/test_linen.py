"""The Linen modules are the functions: equal outputs and gradients, and parameter trees that travel both ways."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.models import autoencoder, autoencoder_kl
from sora_jax.models.text import TextConfig
from sora_jax.models.transformer import TransformerConfig, denoise, denoiser_specs
from sora_jax.nn.layers import dense_specs
from sora_jax.nn.linen import TREE, as_module
from sora_jax.nn.params import abstract

AUTOENCODER = autoencoder.AutoencoderConfig(
    2, 4, 4, patch=(2, 4), width=8, multipliers=(1,), encoder_blocks=1, decoder_blocks=1
)
PICTURES = autoencoder_kl.KLConfig(2, widths=(8, 16), blocks=1, groups=4, dtype="float32")
TEXT = TextConfig(vocabulary=16, width=16, depth=1, head_width=8)
MODEL = TransformerConfig(depth=2, width=24, heads=2, latent_channels=2, text=TEXT, dtype="float32")
DIT = dataclasses.replace(
    MODEL,
    text=None,
    classes=3,
    rotary=False,
    sincos_positions=True,
    sincos_axes="xy",
    qk_norm=False,
    learned_variance=True,
    step_times=True,
    joint_qkv_init=True,
)


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def test_the_first_parameters_are_drawn_by_the_key():
    specs = dense_specs(2, 3)
    module = as_module(specs, lambda params, x: x @ params["weight"] + params["bias"][None])
    x = jnp.ones((1, 2))
    one, again, other = (module.init(jax.random.key(seed), x)["params"][TREE] for seed in (0, 0, 1))
    assert shapes(one) == shapes(abstract(specs))
    chex.assert_trees_all_equal(one, again)
    assert (one["weight"] != other["weight"]).all() and (one["weight"] != 0).all()


@pytest.mark.parametrize(
    "config, code", [(AUTOENCODER, autoencoder), (PICTURES, autoencoder_kl)], ids=["video", "pictures"]
)
def test_the_autoencoder_as_a_module(config, code, randomised):
    specs = code.autoencoder_specs(config)
    module = as_module(specs, lambda params, video: code.decode(params, config, code.encode(params, config, video)[0]))
    video = jax.random.normal(jax.random.key(1), (2, 3, 8, 8, 3))
    variables = jax.eval_shape(module.init, jax.random.key(0), video)
    assert shapes(variables["params"][TREE]) == shapes(abstract(specs))
    params = randomised(specs)
    expected = jax.jit(lambda params: code.decode(params, config, code.encode(params, config, video)[0]))(params)
    assert np.isfinite(expected).all()
    apply = jax.jit(module.apply)
    np.testing.assert_array_equal(apply({"params": {TREE: params}}, video), expected)
    other = jax.tree.map(lambda x: x + 0.1, params)
    assert not np.allclose(apply({"params": {TREE: other}}, video), expected)


@pytest.mark.parametrize("config", [MODEL, DIT], ids=["captions", "classes"])
def test_the_denoiser_as_a_module(clips, packed, randomised, config):
    labelled = [dataclasses.replace(clip, label=label) for clip, label in zip(clips[:2], (2, 0))]
    pack = packed([labelled])
    module = as_module(denoiser_specs(config), lambda params, *inputs: denoise(params, config, *inputs))
    times = jnp.full((1, pack.row_slots_BR.shape[1]), 0.5)
    params = randomised(denoiser_specs(config))

    def by_module(params):
        return jnp.square(module.apply({"params": {TREE: params}}, pack, pack.tokens_BLP, times)).sum()

    def by_function(params):
        return jnp.square(denoise(params, config, pack, pack.tokens_BLP, times)).sum()

    one, other = (jax.jit(jax.value_and_grad(by))(params) for by in (by_module, by_function))
    assert 0 < one[0] < np.inf
    chex.assert_trees_all_equal(one, other)
