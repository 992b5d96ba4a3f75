"""Noise augmentation: a network that enlarges clips reads their low resolution with noise of a known level.

What it reads in sampling was made by another network, and is not quite what it has learnt from. Noise hides the
difference, and the level says how much of the low resolution is to be kept (Ho et al., 2106.15282; W.A.L.T,
2312.06662).
"""

import dataclasses

import jax.numpy as jnp
from jax import Array

from sora_jax.diffusion.keys import token_noise
from sora_jax.diffusion.process import Process, corrupt, input_scale
from sora_jax.nn.pack import Pack, per_slot, slot_of


def with_low_noise(process: Process, pack: Pack, key: Array, times_BS: Array) -> Pack:
    """Bring the low resolution of every clip of a pack to a noise level of the process, and say it to the network.

    The noise is a function of (key, clip id, token). A pack without low resolution stays as it is.
    """
    if pack.low_BLQ is None:
        return pack
    slots_BL = slot_of(pack.segments_BL)
    clip_ids_BL = per_slot(pack.clip_ids_BS, slots_BL)
    eps_BLQ = token_noise(key, clip_ids_BL, pack.index_BL, pack.low_BLQ.shape[-1])
    t_BL1 = per_slot(times_BS, slots_BL)[..., None]
    low_BLQ = corrupt(process, pack.low_BLQ.astype(jnp.float32), eps_BLQ, t_BL1)
    return dataclasses.replace(pack, low_BLQ=input_scale(process, t_BL1) * low_BLQ, low_times_BS=times_BS)
