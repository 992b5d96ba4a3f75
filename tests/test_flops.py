"""Model FLOPs: against a formula written by hand and what XLA counts, and as sums over clips."""

import dataclasses

import jax
import numpy as np
import pytest

from sora_jax.models.autoencoder import AutoencoderConfig, autoencoder_specs, decode, encode
from sora_jax.models.denoiser import denoise, denoiser_specs, forward_flops, train_flops
from sora_jax.models.flops import autoencoder_train_flops
from sora_jax.models.text import TextConfig
from sora_jax.models.transformer import TransformerConfig
from sora_jax.nn.params import abstract

TEXT = TextConfig(vocabulary=16, width=64, depth=1, head_width=32)
CONFIG = TransformerConfig(
    depth=2, width=128, heads=2, latent_channels=2, text=TEXT, remat="none", unroll=2, dtype="float32"
)


def arrays(pack) -> dict:
    return {name: values for name, values in vars(pack).items() if values is not None}


def by_hand(tokens, words, rows, D=128, F=512, P=8, E=64, depth=2):
    """Multiply-adds of one clip; for a block those of DiT, 12 T D^2 + 2 T^2 D + 6 D^2, plus cross-attention."""
    text = words * 12 * E * E + 2 * words**2 * E
    ends = tokens * 2 * P * D + rows * (256 * D + D * D + 2 * D * D) + E * D
    block = tokens * (4 * D * D + 2 * D * F) + 2 * tokens**2 * D + rows * 6 * D * D
    cross = tokens * 2 * D * D + words * 2 * E * D + 2 * tokens * words * D
    return text + ends + depth * (block + cross)


def test_equal_the_formula(clips, alone):
    for clip in clips:
        tokens, words = np.prod(clip.values.shape[:3]) // 4, len(clip.text)
        one, two = arrays(alone(clip)), arrays(alone(clip, rows_per_clip=2))
        assert forward_flops(CONFIG, one) == 2 * by_hand(tokens, words, 1)
        assert forward_flops(CONFIG, two) == 2 * by_hand(tokens, words, 2)
        deeper = dataclasses.replace(CONFIG, head_hidden=64)  # 128 -> 64 -> 8 in place of 128 -> 8
        assert forward_flops(deeper, one) - forward_flops(CONFIG, one) == 2 * tokens * 64 * (128 + 8 - 16)
        assert train_flops(CONFIG, one) == 3 * forward_flops(CONFIG, one)
        assert train_flops(CONFIG, one, trained=0.25) == 2.25 * forward_flops(CONFIG, one)


@pytest.mark.parametrize("slots", [4, 9])
def test_a_batch_costs_what_its_clips_cost(clips, packed, alone, slots):
    """Padding and empty slots are no model FLOPs."""
    batch = arrays(packed([clips[:3], clips[3:]], slots=slots, length=100))
    assert forward_flops(CONFIG, batch) == sum(forward_flops(CONFIG, arrays(alone(clip))) for clip in clips)


def test_agree_with_what_xla_counts(clips, alone):
    """XLA also counts norms, softmax and activations, and spreading modulation rows: at most a tenth more."""
    clip = dataclasses.replace(clips[0], values=np.zeros((4, 16, 16, 2), np.float32), text=np.arange(3, 13))
    pack = alone(clip)

    def forward(params, pack):
        return denoise(params, CONFIG, pack, pack.tokens_BLP, np.full((1, 1), 0.5, np.float32))

    counted = jax.jit(forward).lower(abstract(denoiser_specs(CONFIG)), pack).compile().cost_analysis()["flops"]
    assert 1.0 < counted / forward_flops(CONFIG, arrays(pack)) < 1.1


def test_autoencoder_agrees_with_what_xla_counts():
    """XLA leaves out products with the zeros around a frame, few in a large one, and counts norms and activations."""
    config = AutoencoderConfig(2, 4, 4, patch=(1, 2), width=32, multipliers=(1, 2), encoder_blocks=1, decoder_blocks=1)
    video = jax.ShapeDtypeStruct((1, 5, 96, 96, 3), np.float32)
    both = jax.jit(lambda params, x: decode(params, config, encode(params, config, x)[0]))
    counted = both.lower(abstract(autoencoder_specs(config)), video).compile().cost_analysis()["flops"]
    assert 0.95 < counted / (autoencoder_train_flops(config, 5, 96, 96) / 3) < 1.05
