"""Convert the weights of DiT and SiT from and to their official checkpoints, DiT's also to diffusers' folders.

SiT (2401.08740, `willisma/SiT`) has DiT's tensors. Its time s runs from noise to data, and it predicts dx/ds; here
t = 1 - s, so the network is shown 1 - t (`data_times`) and its last layer is negated: dx/dt = -dx/ds. By default SiT
has the output of a learned variance, which it does not use: that half is left out.

Both formats of DiT hold the same network, but diffusers computes with it differently in two places. Its time features
have the frequencies 10000^(-i/127), those of the official code and of this package 10000^(-i/128). Its norm before the
MLP takes `norm_eps` of config.json, 1e-5 in the published folder, whereas the weights were trained with 1e-6, as used
here.
"""

import dataclasses
import math
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from sora_jax.config import check
from sora_jax.convert.links import MATRIX, Form, Link, form, layer_links, read_tree, write_tree
from sora_jax.convert.record import Record, read_record
from sora_jax.convert.tensors import WEIGHTS, read_tensors, write_tensors
from sora_jax.files import as_path, write_json
from sora_jax.models.transformer import SIZES, TransformerConfig, denoiser_specs

DIT = TransformerConfig(
    latent_channels=4,
    text=None,
    classes=1000,
    rotary=False,
    sincos_positions=True,
    sincos_axes="xy",
    qk_norm=False,
    learned_variance=True,
    step_times=True,
    joint_qkv_init=True,
)
SIT = dataclasses.replace(DIT, learned_variance=False, step_times=False, data_times=True)
# Fields that the formats leave open; in all others a model must equal DIT or SIT.
OPEN = (
    "depth", "width", "heads", "mlp_ratio", "patch", "latent_channels", "classes", "learned_variance",
    "joint_qkv_init", "attention", "remat", "unroll", "dtype",
)  # fmt: skip
EMBEDDER = "x_embedder.proj.weight"
POSITIONS = "pos_embed"
TABLE = "pos_embed.pos_embed"  # in folders of older versions of diffusers
HEAD = "final_layer.linear"
POSITION_ERROR = 1e-5  # largest difference of a stored position table from the computed one: float32 rounding
HALVES = (jnp.bfloat16, jnp.float16)
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}


@dataclasses.dataclass(frozen=True)
class Network:
    """Hold a DiT or SiT."""

    config: TransformerConfig
    params: dict
    side: int  # height and width of the latents that its position table is for


def read_dit(path: Path, heads: int | None = None, notes: list[str] | None = None) -> Network:
    """Read an official checkpoint; `heads` is needed if depth and width are not those of a published size.

    notes: gets sentences for the user, see `read_tensors`.
    """
    return _read_official(read_tensors(path, notes), DIT, heads, str(path))


def read_sit(path: Path, heads: int | None = None, notes: list[str] | None = None) -> Network:
    """Read an official checkpoint of SiT, as `read_dit` reads one of DiT."""
    tensors, source = read_tensors(path, notes), str(path)
    config = _infer(tensors, DIT, heads, source)
    if config.learned_variance:
        if notes is not None:
            notes.append("the second half of the output was left out: SiT does not use it")
        tensors = {name: _first_half(x, config) if name.startswith(f"{HEAD}.") else x for name, x in tensors.items()}
    return _read_official(_with_head_negated(tensors), SIT, heads, source)


def _first_half(x: np.ndarray, config: TransformerConfig) -> np.ndarray:
    """Return the rows of a tensor of the last layer, which run (place, half, channel), that are of the first half."""
    places, channels = config.patch[1] ** 2, config.latent_channels
    fits = len(x) == 2 * places * channels  # `read_tree` names a tensor of another shape
    return x.reshape(places, 2, channels, -1)[:, 0].reshape(-1, *x.shape[1:]) if fits else x


def _with_head_negated(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: -x if name.startswith(f"{HEAD}.") else x for name, x in tensors.items()}


def _read_official(tensors: dict[str, np.ndarray], base: TransformerConfig, heads: int | None, source: str) -> Network:
    config = _infer(tensors, base, heads, source)
    tokens = tensors[POSITIONS].size // config.width if POSITIONS in tensors else 0
    grid = math.isqrt(tokens)
    check(
        grid > 0 and tensors[POSITIONS].shape == (1, grid**2, config.width),
        f"the tensors of {source!r} are not those of this model: {POSITIONS} must have shape (1, grid^2, width)",
    )
    _check_positions(POSITIONS, tensors.pop(POSITIONS), config.width, grid, source)
    params = read_tree(official_links(config), denoiser_specs(config), tensors, source)
    return Network(config, params, grid * config.patch[1])


def write_dit(network: Network, path: Path) -> None:
    """Write a safetensors file with the names of the official checkpoint, including the position table."""
    write_tensors(path, _official_tensors(network, path, DIT, "dit"))


def write_sit(network: Network, path: Path) -> None:
    """Write a safetensors file as `write_dit` does, for SiT with learn_sigma=False."""
    write_tensors(path, _with_head_negated(_official_tensors(network, path, SIT, "sit")))


def _official_tensors(network: Network, path: Path, base: TransformerConfig, kind: str) -> dict[str, np.ndarray]:
    config = network.config
    suffix = as_path(path).suffix
    check(suffix == ".safetensors", f"--out is {str(path)!r}; for --to={kind} it must end in .safetensors")
    _check_fits(config, base, kind)
    table = position_table(config.width, network.side // config.patch[1])
    return {POSITIONS: table[None]} | write_tree(official_links(config), network.params)


def read_diffusers(folder: Path, notes: list[str] | None = None) -> Network:
    """Read a folder of diffusers. Each of its blocks stores a copy of the embeddings; they must be equal.

    notes: gets sentences for the user, see `read_tensors`.
    """
    source = str(folder)
    record = read_record(as_path(folder) / "config.json")
    config = _from_record(record)
    side = record.whole("sample_size", 32)
    patch = config.patch[1]
    record.require(side % patch == 0, "sample_size", f"a multiple of patch_size = {patch}")
    tensors = read_tensors(folder, notes)
    if TABLE in tensors:
        _check_positions(TABLE, tensors.pop(TABLE), config.width, side // patch, source)
    tensors = _without_copies(tensors, config.depth, source)
    params = read_tree(diffusers_links(config), denoiser_specs(config), tensors, source)
    return Network(config, params, side)


def write_diffusers(network: Network, folder: Path) -> None:
    """Write config.json and weights as diffusers reads them."""
    config = network.config
    _check_fits(config, DIT, "diffusers-dit")
    ratio = config.mlp_ratio
    check(ratio == 4, f"config.model.mlp_ratio is {ratio}; for the format 'diffusers-dit' it must be 4")
    channels = config.latent_channels
    record = {
        "_class_name": CLASSES[0],
        **FIXED,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_width,
        "in_channels": channels,
        "out_channels": channels * (2 if config.learned_variance else 1),
        "num_layers": config.depth,
        "sample_size": network.side,
        "patch_size": config.patch[1],
        "num_embeds_ada_norm": config.classes,
        "norm_eps": 1e-6,
    }
    tensors = write_tree(diffusers_links(config), network.params)
    tensors |= {name: tensors[first] for name, first in _copies(config.depth, tensors).items()}
    write_tensors(as_path(folder) / f"{WEIGHTS}.safetensors", tensors)
    write_json(as_path(folder) / "config.json", record)


def position_table(width: int, grid: int) -> np.ndarray:
    """Return the fixed position table of a square grid of tokens in raster order: (grid^2, width) float32, x then y."""
    frequencies = 1 / 10_000.0 ** (np.arange(width // 4) / (width / 4))
    angles = np.arange(grid)[:, None] * frequencies
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    columns, rows = np.tile(axis, (grid, 1)), np.repeat(axis, grid, axis=0)
    return np.concatenate([columns, rows], axis=1).astype(np.float32)


def _check_positions(name: str, found: np.ndarray, width: int, grid: int, source: str) -> None:
    wanted = (1, grid**2, width)
    check(
        found.shape == wanted,
        f"the tensors of {source!r} are not those of this model: {name} {found.shape} instead of {wanted}",
    )
    # The table is dropped and computed again, so it must be the fixed one and not learned.
    error = np.abs(found.reshape(grid**2, width) - position_table(width, grid)).max()
    check(
        bool(error < POSITION_ERROR + _rounding(found)),
        f"{name} of {source!r} differs by {error:.2g} from DiT's position table; learned tables are not supported",
    )


def _rounding(table: np.ndarray) -> float:
    """Return the largest error, in [-1, 1], of the half precision that can hold these float32 values; 0 for none."""
    held = [dtype for dtype in HALVES if np.array_equal(table, table.astype(dtype).astype(np.float32))]
    return float(jnp.finfo(held[0]).eps) / 4 if held else 0.0


def _infer(
    tensors: dict[str, np.ndarray], base: TransformerConfig, heads: int | None, source: str
) -> TransformerConfig:
    """Infer the config from the shapes of an official checkpoint; the rest is that of `base`."""
    shapes = {name: x.shape for name, x in tensors.items()}
    needed = {
        EMBEDDER: 4,
        "y_embedder.embedding_table.weight": 2,
        "blocks.0.mlp.fc1.weight": 2,
        "final_layer.linear.weight": 2,
    }
    missing = [name for name, axes in needed.items() if len(shapes.get(name, ())) != axes]
    check(not missing, f"{source!r} is no checkpoint of DiT or SiT; missing or of another shape: {', '.join(missing)}")
    width, channels, patch, _ = shapes[EMBEDDER]
    depth = 1 + max(int(m[1]) for m in map(re.compile(r"blocks\.(\d+)\.").match, shapes) if m)
    known = {(d, w): n for d, w, n in SIZES.values()}.get((depth, width))
    check(
        bool(heads or known),
        f"--heads is not given; it must be, as {source!r} has {depth} blocks of width {width}, which is none of DiT's "
        f"sizes, and shapes do not determine the number of attention heads",
    )
    return dataclasses.replace(
        base,
        depth=depth,
        width=width,
        heads=heads or known or 0,
        mlp_ratio=shapes["blocks.0.mlp.fc1.weight"][0] / width,
        patch=(1, patch, patch),
        latent_channels=channels,
        classes=shapes["y_embedder.embedding_table.weight"][0] - 1,
        learned_variance=shapes["final_layer.linear.weight"][0] == 2 * patch**2 * channels,
    )


def _from_record(record: Record) -> TransformerConfig:
    """Read the config from config.json of diffusers."""
    record.known("_class_name", CLASSES, CLASSES[0])
    for name, value in FIXED.items():
        record.known(name, (value,), value)
    channels, patch = record.whole("in_channels", 4), record.whole("patch_size", 2)
    outputs = record.whole("out_channels") if record.has("out_channels") else channels
    record.require(outputs in (channels, 2 * channels), "out_channels", f"in_channels = {channels}, or twice that")
    heads, head_width = record.whole("num_attention_heads", 16), record.whole("attention_head_dim", 72)
    record.require(head_width % 2 == 0, "attention_head_dim", "even")
    return dataclasses.replace(
        DIT,
        depth=record.whole("num_layers", 28),
        width=heads * head_width,
        heads=heads,
        patch=(1, patch, patch),
        latent_channels=channels,
        classes=record.whole("num_embeds_ada_norm", 1000),
        learned_variance=outputs == 2 * channels,
    )


def _check_fits(config: TransformerConfig, base: TransformerConfig, kind: str) -> None:
    for field in dataclasses.fields(TransformerConfig):
        found, wanted = (getattr(c, field.name) for c in (config, base))
        check(
            field.name in OPEN or found == wanted,
            f"config.model.{field.name} is {found!r}; for the format {kind!r} it must be {wanted!r}",
        )
    time, rows, columns = config.patch
    check(
        time == 1 and rows == columns and config.classes > 0,
        f"config.model.patch is {config.patch} and classes {config.classes}; for the format {kind!r} patches must be "
        f"square, of one frame, and there must be classes",
    )


def _copies(depth: int, tensors: dict[str, np.ndarray]) -> dict[str, str]:
    """Map the names of the later blocks' embeddings to those of the first block that they copy."""
    first = "transformer_blocks.0.norm1.emb."
    shared = [name for name in tensors if name.startswith(first)]
    return {name.replace(".0.", f".{block}.", 1): name for name in shared for block in range(1, depth)}


def _without_copies(tensors: dict[str, np.ndarray], depth: int, source: str) -> dict[str, np.ndarray]:
    """Return the tensors with the embeddings once; UserError names copies that are missing or differ."""
    copies = _copies(depth, tensors)
    differ = [
        name
        for name, first in copies.items()
        if name not in tensors or not np.array_equal(tensors[name], tensors[first])
    ]
    check(not differ, f"all blocks of {source!r} must hold equal embeddings; missing or different: {', '.join(differ)}")
    return {name: x for name, x in tensors.items() if name not in copies}


def official_links(config: TransformerConfig) -> list[Link]:
    """Link every tensor of the official checkpoint except the position table."""
    found = _patch("x_embedder.proj", config)
    found += layer_links(("time_in",), "t_embedder.mlp.0", MATRIX)
    found += layer_links(("time_out",), "t_embedder.mlp.2", MATRIX)
    found += [Link(("classes",), ("y_embedder.embedding_table.weight",))]
    found += layer_links(("modulation",), "final_layer.adaLN_modulation.1", MATRIX)
    found += _head("final_layer.linear", config)
    for i in range(config.depth):
        name = f"blocks.{i}"
        found += _block_links(i, config, f"{name}.adaLN_modulation.1", f"{name}.attn.proj", f"{name}.mlp.fc")
        found += [
            Link(("blocks", "qkv", "weight"), (f"{name}.attn.qkv.weight",), _joint(config), i),
            Link(("blocks", "qkv", "bias"), (f"{name}.attn.qkv.bias",), _joint(config), i),
        ]
    return found


def diffusers_links(config: TransformerConfig) -> list[Link]:
    """Link every tensor of a diffusers folder, with the embeddings once, under the first block."""
    first = "transformer_blocks.0.norm1.emb"
    found = _patch("pos_embed.proj", config)
    found += layer_links(("time_in",), f"{first}.timestep_embedder.linear_1", MATRIX)
    found += layer_links(("time_out",), f"{first}.timestep_embedder.linear_2", MATRIX)
    found += [Link(("classes",), (f"{first}.class_embedder.embedding_table.weight",))]
    found += layer_links(("modulation",), "proj_out_1", MATRIX) + _head("proj_out_2", config)
    for i in range(config.depth):
        name = f"transformer_blocks.{i}"
        names = [f"{name}.attn1.to_{part}" for part in "qkv"]
        found += _block_links(i, config, f"{name}.norm1.linear", f"{name}.attn1.to_out.0", f"{name}.ff.net")
        found += [
            Link(("blocks", "qkv", kind), tuple(f"{part}.{kind}" for part in names), _separate(config), i)
            for kind in ("weight", "bias")
        ]
    return found


def _block_links(i: int, config: TransformerConfig, modulation: str, out_proj: str, mlp: str) -> list[Link]:
    heads, head_width, width = config.heads, config.head_width, config.width
    to_width = form(lambda w: w.transpose(1, 0).reshape(heads, head_width, width), lambda w: w.reshape(-1, width).T)
    up, down = (f"{mlp}1", f"{mlp}2") if mlp.endswith("fc") else (f"{mlp}.0.proj", f"{mlp}.2")
    return [
        *layer_links(("blocks", "modulation"), modulation, MATRIX, i),
        *layer_links(("blocks", "merge"), out_proj, to_width, i),
        *layer_links(("blocks", "mlp", "up"), up, MATRIX, i),
        *layer_links(("blocks", "mlp", "down"), down, MATRIX, i),
    ]


def _patch(name: str, config: TransformerConfig) -> list[Link]:
    """Link the patch embedding, a convolution (width, channels, rows, columns); a token runs row, column, channel."""
    _, rows, columns = config.patch
    shape = (rows, columns, config.latent_channels, config.width)
    kernel = form(
        lambda w: w.transpose(2, 3, 1, 0).reshape(-1, w.shape[0]), lambda w: w.reshape(shape).transpose(3, 2, 0, 1)
    )
    return layer_links(("patch",), name, kernel)


def _head(name: str, config: TransformerConfig) -> list[Link]:
    """Link the last layer: outputs run row, column, (prediction or variance), channel; ours has predictions first."""
    halves, channels = (2 if config.learned_variance else 1), config.latent_channels
    theirs, ours = (-1, halves, channels), (halves, -1, channels)
    weight = form(
        lambda w: w.reshape(*theirs, config.width).transpose(3, 1, 0, 2).reshape(config.width, -1),
        lambda w: w.reshape(config.width, *ours).transpose(2, 1, 3, 0).reshape(-1, config.width),
    )
    bias = form(
        lambda b: b.reshape(theirs).transpose(1, 0, 2).reshape(-1),
        lambda b: b.reshape(ours).transpose(1, 0, 2).reshape(-1),
    )
    return [Link(("head", "weight"), (f"{name}.weight",), weight), Link(("head", "bias"), (f"{name}.bias",), bias)]


def _joint(config: TransformerConfig) -> Form:
    """Return the layout of queries, keys and values of all heads in one tensor: weight (3 D, D) or bias (3 D)."""
    parts = (3, config.heads, config.head_width)

    def write(x: np.ndarray) -> np.ndarray:
        return x.reshape(-1) if x.ndim == 3 else x.transpose(1, 2, 3, 0).reshape(-1, config.width)

    def read(w: np.ndarray) -> np.ndarray:
        return w.reshape(parts) if w.ndim == 1 else w.reshape(*parts, -1).transpose(3, 0, 1, 2)

    return form(read, write)


def _separate(config: TransformerConfig) -> Form:
    """Return the layout of queries, keys and values in a tensor each."""
    joint = _joint(config)
    width = config.width

    def write(x: np.ndarray) -> list[np.ndarray]:
        (whole,) = joint.write(x)
        return [whole[i * width : (i + 1) * width] for i in range(3)]

    return Form(lambda *parts: joint.read(np.concatenate(parts)), write)
