"""The Linen modules are the functions: equal outputs and gradients, and parameter trees that travel both ways."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.models.autoencoder import AutoencoderConfig, autoencoder_specs, decode, encode
from sora_jax.models.text import TextConfig
from sora_jax.models.transformer import TransformerConfig, denoise, transformer_specs
from sora_jax.nn.linen import TREE, as_module
from sora_jax.nn.params import abstract

AUTOENCODER = AutoencoderConfig(2, 4, 4, patch=(2, 4), width=8, multipliers=(1,), encoder_blocks=1, decoder_blocks=1)
TEXT = TextConfig(vocabulary=16, width=16, depth=1, head_width=8)
MODEL = TransformerConfig(depth=2, width=24, heads=2, latent_channels=2, text=TEXT, dtype="float32")


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def test_the_autoencoder_as_a_module():
    specs = autoencoder_specs(AUTOENCODER)
    module = as_module(specs, lambda params, video: decode(params, AUTOENCODER, encode(params, AUTOENCODER, video)[0]))
    video = jax.random.normal(jax.random.key(1), (2, 3, 8, 8, 3))
    variables = module.init(jax.random.key(0), video)
    assert shapes(variables["params"][TREE]) == shapes(abstract(specs))
    params = variables["params"][TREE]
    expected = jax.jit(lambda params: decode(params, AUTOENCODER, encode(params, AUTOENCODER, video)[0]))(params)
    apply = jax.jit(module.apply)
    np.testing.assert_array_equal(apply(variables, video), expected)
    other = jax.tree.map(lambda x: x + 0.1, params)
    assert not np.allclose(apply({"params": {TREE: other}}, video), expected)


def test_the_denoiser_as_a_module(clips, packed):
    pack = packed([clips[:2]])
    module = as_module(transformer_specs(MODEL), lambda params, *inputs: denoise(params, MODEL, *inputs))
    times = jnp.full((1, pack.row_slots_BR.shape[1]), 0.5)
    variables = module.init(jax.random.key(0), pack, pack.tokens_BLP, times)
    # At initialisation the output is zero; so that there is something to compare, no parameter may be.
    params = jax.tree.map(lambda x: x + 0.05, variables["params"][TREE])

    def by_module(params):
        return jnp.square(module.apply({"params": {TREE: params}}, pack, pack.tokens_BLP, times)).sum()

    def by_function(params):
        return jnp.square(denoise(params, MODEL, pack, pack.tokens_BLP, times)).sum()

    one, other = (jax.jit(jax.value_and_grad(by))(params) for by in (by_module, by_function))
    assert one[0] > 0
    chex.assert_trees_all_equal(one, other)
