"""Train a video autoencoder of any size and compression, in three stages; train a transformer on its latents after.

    sora-jax train --config=configs/video_autoencoder.py:s_4x8x8 --workdir=runs/autoencoder --config.data=data/clips
    sora-jax evaluate --autoencoder=runs/autoencoder --data=data/clips
    sora-jax data encode --autoencoder=runs/autoencoder --data=data/clips --out=data/latents

A variant is SIZE_COMPRESSION, such as configs/video_autoencoder.py:xs_4x8x8 or configs/video_autoencoder.py:m_2x4x4.
Parameters at 4x8x8 (encoder, decoder), and what we would train it on:

    xs     0.64 M   (0.26,  0.38)   two CPU cores
    s      2.79 M   (1.41,  1.38)   two CPU cores
    m     19.15 M   (5.46, 13.69)   one accelerator
    b     79.23 M  (21.98, 57.25)   one accelerator
    l    127.09 M  (38.50, 88.59)   several accelerators

Compressions (frames x height x width, latent channels): 1x8x8 (4), 2x4x4 (8), 4x4x4 (16), 4x8x8 (16), 4x16x16 (48),
8x8x8 (32). The dataset's clips must have 1 + f_t k frames, and sides that are multiples of f_s.

Stages: reconstruct (L1, L2, KL, equivariance), sharpen (features and bands), and a decoder that learns against noise
on latents and discriminators at larger crops, while the encoder is frozen: latents cached after the second stage
(`--autoencoder=RUN/stage_2`) stay valid. The lengths of the stages are for accelerators and were not trained here; on a
CPU shorten them, such as `--config.stages[0].steps=5000`. What smaller runs of the same code reached:
experiments/autoencoder/README.md.
"""

import dataclasses

from sora_jax.config import choose, to_config_dict
from sora_jax.models.discriminator import DiscriminatorConfig
from sora_jax.train.autoencoder import AutoencoderRun, StageConfig
from sora_jax.train.optim import OptimConfig
from sora_jax.train.reconstruction import LossConfig

VARIANTS = ("s_4x8x8", "xs_4x8x8", "m_4x8x8", "b_4x8x8", "l_4x8x8")  # the docstring names other compressions

COMPRESSIONS = {  # (time, space, channels)
    "1x8x8": (1, 8, 4),
    "2x4x4": (2, 4, 8),
    "4x4x4": (4, 4, 16),
    "4x8x8": (4, 8, 16),
    "4x16x16": (4, 16, 48),
    "8x8x8": (8, 8, 32),
}
SEPARABLE = ((1, 3, 3), (3, 1, 1))
FULL = ((3, 3, 3), (3, 3, 3))
SIZES = {  # (width, decoder width, multiples of it by level, blocks of encoder and decoder, kernels, first crop)
    "xs": (48, 48, (1, 2), (1, 2), SEPARABLE, 32),
    "s": (96, 96, (1, 2), (2, 2), SEPARABLE, 64),
    "m": (96, 128, (1, 2, 4), (2, 3), SEPARABLE, 128),
    "b": (96, 128, (1, 2, 4), (2, 3), FULL, 128),
    "l": (96, 120, (1, 2, 4, 4), (2, 3), FULL, 256),
}


def get_config(variant: str = "s_4x8x8"):
    size, _, compression = (variant or "s_4x8x8").partition("_")
    option = "variant of configs/video_autoencoder.py"
    width, decoder_width, multipliers, blocks, kernels, side = choose(option, size, SIZES)
    time, space, channels = choose(option, compression or "4x8x8", COMPRESSIONS)
    config = to_config_dict(AutoencoderRun())
    network(config.model, (time, space, channels), multipliers)
    config.model.width = width
    config.model.decoder_width = decoder_width
    config.model.encoder_blocks, config.model.decoder_blocks = blocks
    config.model.kernels = kernels
    config.model.remat = size in ("b", "l")
    config.model.attention = size == "l"

    frames = 1 + 2 * max(time, 4)
    config.batch = 16
    config.crop = (frames, side, side)
    config.crops = tuple((1 + k * max(time, 4), side, side) for k in (1, 4))
    config.image_share = 0.25
    config.latent_scale = "effect"
    config.discriminator = to_config_dict(DiscriminatorConfig(width=32, lecam_weight=0.05))
    stages(config, (frames, 2 * side, 2 * side))
    return config


def network(model, compression, multipliers):
    """Set the compression; what the levels do not compress, the space to depth before the first convolution does."""
    time, space, channels = compression
    steps = len(multipliers) - 1
    in_space = min(steps, space.bit_length() - 2)  # at least 2 x 2 pixels are folded
    in_time = min(steps, max(time.bit_length() - 2, 0))
    model.time_factor = time
    model.space_factor = space
    model.latent_channels = channels
    model.patch = (time // 2**in_time, space // 2**in_space)
    model.multipliers = multipliers
    model.shortcuts = True
    model.linear = True
    model.l1_weight = 0.25
    model.l2_weight = 8.0
    model.kl_weight = 1e-4


def stages(config, large_crop):
    """Set the three stages."""
    optim = OptimConfig(learning_rate=2e-3, method="muon", schedule="cosine", warmup_steps=500, b2=0.95)
    gentle = dataclasses.replace(optim, learning_rate=5e-4, muon_rate=5e-3)
    equivariant = LossConfig(equivariance=0.25, equivariance_scales=(0.5,))
    sharper = dataclasses.replace(equivariant, bands_weight=1.0, bands_form="charbonnier", features_weight=0.05)
    adversary = LossConfig(
        features_weight=0.05, adversarial_weight=0.05, matching_weight=0.1, latent_noise=0.1, adversarial_start=1000
    )
    config.stages = tuple(
        to_config_dict(stage)
        for stage in (
            StageConfig(steps=100_000, loss=equivariant, optim=optim),
            StageConfig(steps=20_000, loss=sharper, optim=gentle),
            StageConfig(steps=20_000, crop=large_crop, batch=8, trained="decoder", loss=adversary, optim=gentle),
        )
    )
