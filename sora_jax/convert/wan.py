"""Link Wan's autoencoder (`models.autoencoder_wan`) to folders of diffusers' AutoencoderKLWan."""

from collections.abc import Callable
from functools import partial

import numpy as np

from sora_jax.convert.links import KERNEL, Form, Link, form, layer_links
from sora_jax.convert.record import Record
from sora_jax.models.autoencoder_wan import WanConfig
from sora_jax.models.autoencoder_wan_layers import POINT

CLASS = "AutoencoderKLWan"
COLOURS = 3


def _kernel(there: Callable = lambda w: w, back: Callable = lambda w: w) -> Form:
    """Return the form of a 3-D kernel, (outputs, inputs, time, height, width) in PyTorch, changed there and back."""
    return form(lambda w: there(w).transpose(2, 3, 4, 1, 0), lambda w: back(w.transpose(4, 3, 0, 1, 2)))


def _colours_last(x: np.ndarray, axis: int, patch: int) -> np.ndarray:
    """Reorder pixels of a patch in one axis from (colour, column, row) to (row, column, colour)."""
    return _reversed(x, axis, (COLOURS, patch, patch))


def _colours_first(x: np.ndarray, axis: int, patch: int) -> np.ndarray:
    """Invert `_colours_last`."""
    return _reversed(x, axis, (patch, patch, COLOURS))


def _reversed(x: np.ndarray, axis: int, sizes: tuple[int, int, int]) -> np.ndarray:
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    order = (*range(axis), axis + 2, axis + 1, axis, *range(axis + 3, x.ndim + 2))
    return x.reshape(*before, *sizes, *after).transpose(order).reshape(x.shape)


CUBE = _kernel()
PIXEL = form(lambda w: w[:, :, 0, 0].transpose(1, 0), lambda w: w.transpose(1, 0)[:, :, None, None])  # a dense layer
VIDEO_SCALE = form(lambda x: x.reshape(-1), lambda x: x[:, None, None, None])
IMAGE_SCALE = form(lambda x: x.reshape(-1), lambda x: x[:, None, None])


def read_config(record: Record) -> WanConfig:
    """Read the architecture.

    Raises:
        UserError: it is not that of `WanConfig`.
    """
    multipliers = record.wholes("dim_mult")
    patch = record.whole("patch_size") if record.has("patch_size") else 1
    record.known("attn_scales", ([],), [])
    for name in ("in_channels", "out_channels"):
        record.known(name, (COLOURS * patch**2,), COLOURS)
    steps = record.values.get("temperal_downsample")  # so spelt there
    changes = len(multipliers) - 1
    fits = isinstance(steps, list) and len(steps) == changes and all(type(step) is bool for step in steps)
    record.require(fits, "temperal_downsample", f"a list of {changes}, each true or false")
    width = record.whole("base_dim", 96)
    return WanConfig(
        latent_channels=record.whole("z_dim", 16),
        width=width,
        decoder_width=record.whole("decoder_base_dim") if record.has("decoder_base_dim") else width,
        multipliers=multipliers,
        blocks=record.whole("num_res_blocks", 2),
        temporal_downsample=tuple(steps or ()),
        patch=patch,
        shortcuts=bool(record.known("is_residual", (True, False), False)),
        remat=True,
    )


def read_statistics(record: Record, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Read mean and standard deviation of each latent channel."""
    mean = record.numbers("latents_mean", channels)
    std = record.numbers("latents_std", channels, positive=True)
    return np.asarray(mean, np.float32), np.asarray(std, np.float32)


def write_record(config: WanConfig, mean_C: np.ndarray, std_C: np.ndarray) -> dict:
    """Return the fields of config.json."""
    return {
        "_class_name": CLASS,
        "base_dim": config.width,
        "decoder_base_dim": config.decoder_width,
        "z_dim": config.latent_channels,
        "dim_mult": list(config.multipliers),
        "num_res_blocks": config.blocks,
        "attn_scales": [],
        "temperal_downsample": list(config.temporal_downsample),
        "dropout": 0.0,
        "is_residual": config.shortcuts,
        "in_channels": COLOURS * config.patch**2,
        "out_channels": COLOURS * config.patch**2,
        "patch_size": config.patch if config.patch > 1 else None,
        "scale_factor_temporal": config.time_factor,
        "scale_factor_spatial": config.space_factor,
        "latents_mean": mean_C.tolist(),
        "latents_std": std_C.tolist(),
    }


def links(config: WanConfig) -> list[Link]:
    """Link every tensor of the folder."""
    side = partial(_pixels, config.patch)
    found = [*side(("encoder", "stem"), "encoder.conv_in", 1), *side(("decoder", "head"), "decoder.conv_out", 0)]
    found += layer_links(("encoder", "head"), "encoder.conv_out", CUBE)
    found += layer_links(("decoder", "stem"), "decoder.conv_in", CUBE)
    for name in ("quant", "post_quant"):
        found += layer_links((name,), f"{name}_conv", CUBE)
    for side_ in ("encoder", "decoder"):
        found += _middle(side_)
        found += _scale((side_, "norm"), f"{side_}.norm_out")
    return found + _encoder(config) + _decoder(config)


def _encoder(config: WanConfig) -> list[Link]:
    """Link the levels of the encoder. Version 2.1 counts blocks and downsamplings through all levels."""
    found: list[Link] = []
    number = 0
    for i, (inputs, outputs, step) in enumerate(config.encoder_levels):
        root = f"encoder.down_blocks.{i}"
        names = [f"{root}.resnets.{j}" for j in range(config.blocks)] + [f"{root}.downsampler"]
        if not config.shortcuts:
            names = [f"encoder.down_blocks.{number + j}" for j in range(config.blocks + 1)]
            number += len(names)
        for j, name in enumerate(names[:-1]):
            found += _block(("encoder", "levels", i, j), name, j == 0 and inputs != outputs)
        if step != POINT:
            found += _resampling(("encoder", "downs", i), names[-1], step)
    return found


def _decoder(config: WanConfig) -> list[Link]:
    found: list[Link] = []
    for i, (inputs, outputs, step) in enumerate(config.decoder_levels):
        root = f"decoder.up_blocks.{i}"
        for j in range(config.blocks + 1):
            found += _block(("decoder", "levels", i, j), f"{root}.resnets.{j}", j == 0 and inputs != outputs)
        if step != POINT:
            name = "upsampler" if config.shortcuts else "upsamplers.0"
            found += _resampling(("decoder", "ups", i), f"{root}.{name}", step)
    return found


def _pixels(patch: int, path: tuple, name: str, axis: int) -> list[Link]:
    """Link the convolution whose inputs (axis 1) or outputs (axis 0) are pixels of a patch."""
    weight = _kernel(*(partial(order, axis=axis, patch=patch) for order in (_colours_last, _colours_first)))
    found, bias = layer_links(path, name, weight)
    if axis == 0:
        order = form(partial(_colours_last, axis=0, patch=patch), partial(_colours_first, axis=0, patch=patch))
        bias = Link(bias.path, bias.names, order)
    return [found, bias]


def _resampling(path: tuple, name: str, step: tuple[int, int, int]) -> list[Link]:
    found = layer_links((*path, "space"), f"{name}.resample.1", KERNEL)
    return found + (layer_links((*path, "time"), f"{name}.time_conv", CUBE) if step[0] == 2 else [])


def _middle(side: str) -> list[Link]:
    name, path = f"{side}.mid_block", (side, "middle")
    found = _block((*path, "first"), f"{name}.resnets.0") + _block((*path, "second"), f"{name}.resnets.1")
    found += _scale((*path, "attention", "norm"), f"{name}.attentions.0.norm", IMAGE_SCALE)
    for ours, theirs in (("qkv", "to_qkv"), ("out", "proj")):
        found += layer_links((*path, "attention", ours), f"{name}.attentions.0.{theirs}", PIXEL)
    return found


def _block(path: tuple, name: str, changes_width: bool = False) -> list[Link]:
    found = [link for part in ("norm1", "norm2") for link in _scale((*path, part), f"{name}.{part}")]
    found += [link for part in ("conv1", "conv2") for link in layer_links((*path, part), f"{name}.{part}", CUBE)]
    return found + (layer_links((*path, "shortcut"), f"{name}.conv_shortcut", CUBE) if changes_width else [])


def _scale(path: tuple, name: str, shape: Form = VIDEO_SCALE) -> list[Link]:
    return [Link(path, (f"{name}.gamma",), shape)]
