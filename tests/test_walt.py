"""W.A.L.T: packed equals alone, windows and the identity of images by gradients, an independent oracle, exact counts.

All parameters are random, so no gate is closed; float32. Clips of 5 x 4 x 6 and 3 x 2 x 5 tokens and the like have
windows that they do not divide: (2, 3) in a frame, (2, 2) through all frames.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_near

from sora_jax.data.packing.packs import PackItem
from sora_jax.models.denoiser import MODULES, denoise, encode_condition, forward_flops
from sora_jax.models.text import TextConfig
from sora_jax.models.walt import WaltConfig, denoiser_specs
from sora_jax.nn.pack import Pack, per_slot
from sora_jax.nn.params import abstract, count, init

TEXT = TextConfig(vocabulary=16, width=16, depth=1, head_width=8)
CONFIG = WaltConfig(
    depth=4,
    width=24,
    heads=2,
    patch=(1, 1, 1),
    latent_channels=2,
    spatial_window=(2, 3),
    spatiotemporal_window=(2, 2),
    positions=(2, 3, 4),
    text=TEXT,
    classes=3,
    remat="none",
    dtype="float32",
)
GRIDS = ((4, 3, 5), (1, 4, 7), (3, 2, 2), (1, 1, 1))
SCALE = 0.15  # of the parameters: larger ones make the network magnify what rounding leaves
WORDS = ((3, 4, 5), (6,), (7, 8, 9, 10), (11, 12))


@pytest.fixture(scope="module")
def clips():
    """Four clips, two of them images, which the windows of CONFIG do not divide."""
    rng = np.random.default_rng(0)
    latents = [rng.standard_normal((*grid, 2), np.float32) for grid in GRIDS]
    return [PackItem(z, 11 * i + 11, np.array(w), label=i - 1) for i, (z, w) in enumerate(zip(latents, WORDS))]


@pytest.fixture(scope="module")
def pack_of(packed):
    return lambda rows, length=120, **sizes: packed(rows, length, patch=CONFIG.patch, **sizes)


@pytest.fixture(scope="module")
def single(alone):
    return lambda clip: alone(clip, patch=CONFIG.patch)


@pytest.fixture(scope="module")
def params(randomised):
    return jax.device_get(randomised(denoiser_specs(CONFIG), scale=SCALE))


def times_of(pack: Pack):
    return per_slot((pack.clip_ids_BS % 7 + 1) / 9, pack.row_slots_BR)


@functools.cache
def evaluator(config: WaltConfig):
    """Compiled (params, pack) -> outputs, and the gradient of a sum over real tokens, whose terms know no pack."""

    def value(params, pack):
        out_BLP = denoise(params, config, pack, pack.tokens_BLP, times_of(pack))
        return jnp.where(pack.segments_BL[..., None] > 0, jnp.sin(out_BLP), 0).sum(), out_BLP

    return jax.jit(lambda params, pack: jax.value_and_grad(value, has_aux=True)(params, pack))


def outputs(out_BLP, pack: Pack) -> dict[int, np.ndarray]:
    """The output of each clip, in the order of its tokens."""
    return {
        int(pack.clip_ids_BS[b, slot]): np.asarray(out_BLP[b])[np.flatnonzero(pack.segments_BL[b] == slot + 1)]
        for b, slot in zip(*np.nonzero(pack.clip_ids_BS), strict=True)
    }


WAYS = {
    "as it is": {},
    "full rank, no text": {"adaln_rank": 0, "text": None},
    "in blocks": {"attention": "blockwise", "remat": "full"},
    "images in windows": {"image_identity": False, "input_skip": True, "learned_variance": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_packed_equals_one_by_one(randomised, clips, pack_of, single, way):
    """Outputs and the gradient of every parameter, to 1e-5 of the largest."""
    config = dataclasses.replace(CONFIG, **WAYS[way])
    params = jax.device_get(randomised(denoiser_specs(config), scale=SCALE))
    together = pack_of([[clips[0], clips[1]], [clips[3], clips[2]]])
    (_, out), gradient = evaluator(config)(params, together)
    found, total = outputs(out, together), []
    for clip in clips:
        pack = single(clip)
        (_, own), slope = evaluator(config)(params, pack)
        assert np.abs(own).max() > 0.1
        assert_near(found[clip.clip_id], own[0], 1e-5)
        total.append(slope)
    total = jax.tree.map(lambda *parts: sum(parts), *total)
    assert_near(gradient, total, 1e-5, share=0.01)
