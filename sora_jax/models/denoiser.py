"""Every denoising network behind one set of functions; only this file imports them.

The class of the config says which module does the work. A network is one module with `denoiser_specs`,
`encode_condition`, `denoise` and `forward_flops`, a config with the fields of `DenoiserConfig`, and one line in
`MODULES`.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Annotated, Any, Protocol

import jax

from sora_jax.config import OneOf
from sora_jax.models import crate, transformer, unet, walt
from sora_jax.models.crate import CrateConfig
from sora_jax.models.text import TextConfig
from sora_jax.models.transformer import TransformerConfig
from sora_jax.models.unet import UNetConfig
from sora_jax.models.walt import WaltConfig
from sora_jax.nn.pack import Pack


class DenoiserConfig(Protocol):
    """List what the config of a network must have: fields or properties of a frozen dataclass."""

    @property
    def name(self) -> str:
        """Return the name by which files tell the network from others."""

    @property
    def patch(self) -> tuple[int, int, int]:
        """Return the latent positions (t, y, x) in one token."""

    @property
    def latent_channels(self) -> int:
        """Return C, the channels of the latents."""

    @property
    def patch_values(self) -> int:
        """Return P, the values in a token."""

    @property
    def learned_variance(self) -> bool:
        """Return True if the output has a second half, for the variance of a step."""

    @property
    def positions_in_time(self) -> bool:
        """Return True if positions tell tokens of different frames apart: clips may have several frames."""

    @property
    def guides(self) -> bool:
        """Return True if the network tells tokens of guides, such as key frames, from those of clips."""

    @property
    def text(self) -> TextConfig | None:
        """Return the config of the text encoder; None for a network that reads no captions."""

    @property
    def classes(self) -> int:
        """Return the number of classes; 0 for none."""


# Called with the trunk and its tokens (B, L, D); returns what the trunk makes of them, or an estimate of that.
RunTrunk = Callable[[Callable[[jax.Array], jax.Array], jax.Array], jax.Array]

MODULES: dict[type, ModuleType] = {
    TransformerConfig: transformer,
    WaltConfig: walt,
    CrateConfig: crate,
    UNetConfig: unet,
}
AnyDenoiser = Annotated[DenoiserConfig, OneOf(MODULES)]


def denoiser_specs(config: DenoiserConfig) -> dict:
    """Declare all parameters."""
    return MODULES[type(config)].denoiser_specs(config)


def encode_condition(params: dict, config: DenoiserConfig, pack: Pack) -> Any:
    """Encode what stays the same while a pack is denoised (captions); for `denoise`. None where there is nothing.

    A sampler calls it once for all its steps.
    """
    return MODULES[type(config)].encode_condition(params, config, pack)


def denoise(
    params: dict,
    config: DenoiserConfig,
    pack: Pack,
    x_BLP: jax.Array,
    times_BR: jax.Array,
    condition: Any = None,
    run_trunk: RunTrunk | None = None,
    previous_BLP: jax.Array | None = None,
) -> jax.Array:
    """Predict the target of every token of a pack: noisy tokens (B, L, P), noise levels (B, R) -> (B, L, P) float32.

    The result is (B, L, 2 P) where the variance is learned, too. condition: the result of `encode_condition`, which
    is computed here when None. run_trunk: calls the blocks of a network that has a trunk, see `has_trunk`.
    previous_BLP: an estimate of the clean tokens, for a network that reads one, see `reads_estimate`; None: no such.
    """
    given = {"run_trunk": run_trunk, "previous_BLP": previous_BLP}
    given = {name: value for name, value in given.items() if value is not None}
    return MODULES[type(config)].denoise(params, config, pack, x_BLP, times_BR, condition, **given)


def reads_estimate(config: DenoiserConfig) -> bool:
    """Return True if the network reads an estimate of the clean tokens: its config has `self_conditioning`, True."""
    return getattr(config, "self_conditioning", False)


def reads_low(config: DenoiserConfig) -> bool:
    """Return True if the network reads clips at half their rows and columns: its config has `low_resolution`, True."""
    return getattr(config, "low_resolution", False)


def room_multiple(config: DenoiserConfig) -> tuple[int, int]:
    """Return the rows and columns of tokens that the room of a clip in a pack is a multiple of, see `PackingConfig`.

    (1, 1) where the config has no `room_multiple`: only networks that halve resolutions need one.
    """
    return getattr(config, "room_multiple", (1, 1))


def has_trunk(config: DenoiserConfig) -> bool:
    """Return True if the network is a trunk of blocks that add to tokens: its module has `trunk_zeros`."""
    return hasattr(MODULES[type(config)], "trunk_zeros")


def trunk_zeros(config: DenoiserConfig, pack: Pack) -> jax.Array:
    """Return zeros with the shape, dtype and sharding of the tokens (B, L, D) that the trunk works on."""
    return MODULES[type(config)].trunk_zeros(config, pack)


def forward_flops(config: DenoiserConfig, batch: dict, encodes_condition: bool = True) -> float:
    """Return the model FLOPs of one forward pass over the clips of a host batch, see `pack_flops`."""
    return MODULES[type(config)].forward_flops(config, batch, encodes_condition)


def train_flops(config: DenoiserConfig, batch: dict, trained: float = 1.0) -> float:
    """Return the model FLOPs of one forward and backward pass over a host batch: three times the forward ones.

    trained: share of the parameters that are trained; gradients of the others are not computed. A network that reads
    an estimate makes it by another forward pass.
    """
    return (2 + trained + reads_estimate(config)) * forward_flops(config, batch)
