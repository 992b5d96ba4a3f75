"""Check what the configs of networks have in common."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from sora_jax.config import check, check_word
from sora_jax.nn.attention import BACKENDS, SEQUENCES
from sora_jax.nn.positions import axis_widths
from sora_jax.nn.remat import REMAT

COUNTS = ("depth", "width", "heads", "latent_channels", "unroll", "blocks", "head_width")
CHOICES = {"attention": BACKENDS, "sequence": SEQUENCES, "remat": REMAT, "dtype": ("float32", "bfloat16")}


def check_network(config: Any, **words: Iterable[str]) -> None:
    """Check the fields that a network's config shares with others, those of them that it has.

    words: what is allowed of fields of CHOICES where it is not the same for all networks.

    Raises:
        UserError: names the field as it is typed, its value and what is allowed.
    """
    own = {field.name for field in dataclasses.fields(config)}  # not what is computed of them, such as a head's width
    for name in (name for name in COUNTS if name in own):
        value = getattr(config, name)
        check(value > 0, f"model.{name} is {value}; it must be positive")
    for name in ("mlp_ratio", "position_theta"):
        value = getattr(config, name, 1.0)
        check(0 < value < math.inf, f"model.{name} is {value}; it must be positive and finite")
    if isinstance(config.patch, tuple):
        check(min(config.patch) > 0, f"model.patch is {config.patch}; its entries must be positive")
    for name in ("classes", "head_hidden"):
        value = getattr(config, name, 0)
        check(value >= 0, f"model.{name} is {value}; it must be 0 (none) or more")
    for name, allowed in (CHOICES | words).items():
        if hasattr(config, name):
            automatic = () if name == "remat" else ("auto",)
            check_word(f"model.{name}", getattr(config, name), (*automatic, *allowed))


def check_positions(config: Any) -> None:
    """Check the heads and positions of a network that has both kinds: rotary ones and sin-cos tables."""
    width, heads, axes = config.width, config.heads, config.sincos_axes
    even = width % (2 * heads) == 0
    check(even, f"model.width is {width}; it must be an even multiple of model.heads = {heads}")
    check(
        not config.rotary or axis_widths(width // heads)[1] > 0,
        f"model.width / model.heads is {width // heads}; with model.rotary it must be at least 6",
    )
    check(
        bool(axes) and set(axes) <= set("tyx") and len(set(axes)) == len(axes),
        f"model.sincos_axes is {axes!r}; it must be some of the letters t, y and x, in any order",
    )
