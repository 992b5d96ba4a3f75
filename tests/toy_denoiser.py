"""A denoising network of some thirty lines: each token is a linear map of itself, moved by its noise level."""

import dataclasses
import math
from typing import Literal

import numpy as np

from sora_jax.nn.pack import per_slot
from sora_jax.nn.params import ParamSpec, normal


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    patch: tuple[int, int, int] = (1, 2, 2)
    latent_channels: int = 4
    learned_variance: bool = False
    positions_in_time: bool = True
    guides: bool = False
    text: None = None
    classes: int = 0
    name: Literal["toy"] = "toy"

    @property
    def patch_values(self) -> int:
        return math.prod(self.patch) * self.latent_channels


def denoiser_specs(config):
    values = config.patch_values
    square = ParamSpec((values, values), (None, None), normal(0.1))
    return {"token": {"weight": square, "level": ParamSpec((values,), (None,), normal(0.1))}}


def encode_condition(params, config, pack):
    return None


def denoise(params, config, pack, x_BLP, times_BR, condition):
    times_BL1 = per_slot(times_BR, pack.rows_BL)[..., None]
    return x_BLP @ params["token"]["weight"] + times_BL1 * params["token"]["level"][None, None]


def forward_flops(config, batch, encodes_condition=True):
    return float(2 * batch["grids_BS3"].astype(np.int64).prod(-1).sum() * config.patch_values**2)
