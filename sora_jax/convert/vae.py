"""Convert folders of diffusers (config.json and weights) to frozen autoencoders and back.

Their classes are AutoencoderKL, of Stable Diffusion, SD3 and FLUX, and AutoencoderKLWan (`convert.wan`).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from sora_jax.convert import wan
from sora_jax.convert.links import KERNEL, MATRIX, SAME, Link, layer_links, read_tree, write_tree
from sora_jax.convert.record import Record, read_record
from sora_jax.convert.tensors import WEIGHTS, read_tensors, write_tensors
from sora_jax.errors import UserError
from sora_jax.files import as_path, write_json
from sora_jax.models.autoencoder import AutoencoderConfig
from sora_jax.models.autoencoder_kl import KLConfig
from sora_jax.models.autoencoder_wan import WanConfig
from sora_jax.models.first_stage import autoencoder_specs
from sora_jax.models.pixels import PixelsConfig
from sora_jax.train.frozen import FrozenAutoencoder

CLASS = "AutoencoderKL"
# Fields of config.json that have one value in `KLConfig`'s network.
FIXED = {"in_channels": 3, "out_channels": 3, "act_fn": "silu", "mid_block_add_attention": True}
BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
# Names of attention layers before 2023, which published folders still have.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_vae(folder: Path, notes: list[str] | None = None) -> FrozenAutoencoder:
    """Read a folder; latents are normalised by the statistics in its config.json. notes: see `read_tensors`.

    Raises:
        UserError: the architecture is neither that of `KLConfig` nor of `WanConfig`, or tensors do not fit.
    """
    record = read_record(as_path(folder) / "config.json")
    name = record.known("_class_name", (CLASS, wan.CLASS), CLASS)
    config: KLConfig | WanConfig = wan.read_config(record) if name == wan.CLASS else _config(record)
    mean, std = (wan.read_statistics if name == wan.CLASS else _latents)(record, config.latent_channels)
    tensors = {_new_name(name): x for name, x in read_tensors(folder, notes).items()}
    params = read_tree(links(config), autoencoder_specs(config), tensors, str(folder))
    return FrozenAutoencoder(config, params, mean, std)


def write_vae(autoencoder: FrozenAutoencoder, folder: Path) -> None:
    """Write config.json and weights as diffusers reads them.

    Raises:
        UserError: the autoencoder has neither a `KLConfig` nor a `WanConfig`.
    """
    config = autoencoder.config
    if isinstance(config, AutoencoderConfig | PixelsConfig):
        reason = f"the autoencoder must have a KLConfig or WanConfig for that format, and has {type(config).__name__}"
        raise UserError(f"--to is 'diffusers-vae'; {reason}")
    statistics = autoencoder.mean_C, autoencoder.std_C
    record = wan.write_record(config, *statistics) if isinstance(config, WanConfig) else _record(config, *statistics)
    tensors = write_tree(links(config), autoencoder.params)
    write_tensors(as_path(folder) / f"{WEIGHTS}.safetensors", tensors)
    write_json(as_path(folder) / "config.json", record)


def links(config: KLConfig | WanConfig) -> list[Link]:
    """Link every tensor of the folder."""
    return wan.links(config) if isinstance(config, WanConfig) else _links(config)


def _record(config: KLConfig, mean_C: np.ndarray, std_C: np.ndarray) -> dict:
    levels = len(config.widths)
    return {
        "_class_name": CLASS,
        **FIXED,
        **{name: [block] * levels for name, block in BLOCKS.items()},
        "block_out_channels": list(config.widths),
        "layers_per_block": config.blocks,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.groups,
        "use_quant_conv": config.quant,
        "use_post_quant_conv": config.quant,
        **_statistics(mean_C, std_C),
    }


def _config(record: Record) -> KLConfig:
    widths = record.wholes("block_out_channels")
    for name, value in FIXED.items():
        record.known(name, (value,), value)
    for name, block in BLOCKS.items():
        record.known(name, ([block] * len(widths),))
    quant = record.known("use_quant_conv", (True, False), True)
    record.known("use_post_quant_conv", (quant,), True)
    groups = record.whole("norm_num_groups", 32)
    record.require(all(w % groups == 0 for w in widths), "norm_num_groups", "a divisor of all block_out_channels")
    return KLConfig(
        latent_channels=record.whole("latent_channels", 4),
        widths=widths,
        blocks=record.whole("layers_per_block", 1),
        groups=groups,
        quant=bool(quant),
        remat=True,
    )


def _latents(record: Record, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Read mean and standard deviation of each latent channel."""
    scale = np.float32(record.number("scaling_factor", 0.18215, positive=True))
    shift = record.number("shift_factor", 0.0) if record.has("shift_factor") else 0.0
    mean = record.numbers("latents_mean", channels) if record.has("latents_mean") else [shift] * channels
    std = record.numbers("latents_std", channels, positive=True) if record.has("latents_std") else [1.0] * channels
    return np.asarray(mean, np.float32), np.asarray(std, np.float32) / scale


def _statistics(mean_C: np.ndarray, std_C: np.ndarray) -> dict:
    """Return the fields of config.json for these statistics: one for all channels, or one for each."""
    if len(set(mean_C.tolist())) == len(set(std_C.tolist())) == 1:
        shift = _shortest(lambda x: np.float32(x), mean_C[0])
        return {"scaling_factor": _shortest(lambda x: 1 / np.float32(x), std_C[0]), "shift_factor": shift or None}
    return {"scaling_factor": 1.0, "latents_mean": mean_C.tolist(), "latents_std": std_C.tolist()}


def _shortest(function: Callable, wanted: np.float32) -> float:
    """Return the shortest number that `function` maps to a float32: 0.18215, not 0.18215000629425049."""
    near = float(function(wanted))
    candidates = (float(f"{near:.{digits}g}") for digits in range(1, 18))
    return next(x for x in candidates if x == near or np.float32(function(x)) == wanted)


def _new_name(name: str) -> str:
    """Return the current name of a tensor of attention that has an old one."""
    head, _, rest = name.partition(".attentions.0.")
    module, _, kind = rest.rpartition(".")
    return f"{head}.attentions.0.{OLD_NAMES.get(module, module)}.{kind}" if rest else name


def _links(config: KLConfig) -> list[Link]:
    count = len(config.widths)
    widths = config.widths
    found = _middle("encoder") + _middle("decoder")
    for side, level, blocks, sizes in (
        ("encoder", "down_blocks", config.blocks, widths),
        ("decoder", "up_blocks", config.blocks + 1, widths[::-1]),
    ):
        steps, sampler = ("downs", "downsamplers") if side == "encoder" else ("ups", "upsamplers")
        found += layer_links((side, "stem"), f"{side}.conv_in", KERNEL)
        for i in range(count):
            name = f"{side}.{level}.{i}"
            for j in range(blocks):
                changes = j == 0 and i > 0 and sizes[i] != sizes[i - 1]
                found += _block((side, "levels", i, j), f"{name}.resnets.{j}", changes)
            if i < count - 1:
                found += layer_links((side, steps, i), f"{name}.{sampler}.0.conv", KERNEL)
        found += _norm((side, "norm"), f"{side}.conv_norm_out")
        found += layer_links((side, "head"), f"{side}.conv_out", KERNEL)
    if config.quant:
        found += layer_links(("quant",), "quant_conv", KERNEL) + layer_links(("post_quant",), "post_quant_conv", KERNEL)
    return found


def _middle(side: str) -> list[Link]:
    name, path = f"{side}.mid_block", (side, "middle")
    found = _block((*path, "first"), f"{name}.resnets.0") + _block((*path, "second"), f"{name}.resnets.1")
    found += _norm((*path, "attention", "norm"), f"{name}.attentions.0.group_norm")
    for ours, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("merge", "to_out.0")):
        found += layer_links((*path, "attention", ours), f"{name}.attentions.0.{theirs}", MATRIX)
    return found


def _block(path: tuple, name: str, changes_width: bool = False) -> list[Link]:
    found = [link for part in ("norm1", "norm2") for link in _norm((*path, part), f"{name}.{part}")]
    found += [link for part in ("conv1", "conv2") for link in layer_links((*path, part), f"{name}.{part}", KERNEL)]
    return found + (layer_links((*path, "shortcut"), f"{name}.conv_shortcut", KERNEL) if changes_width else [])


def _norm(path: tuple, name: str) -> list[Link]:
    return [Link((*path, "gain"), (f"{name}.weight",), SAME), Link((*path, "bias"), (f"{name}.bias",), SAME)]
