"""The denoiser: DiT blocks over packed spacetime patches of any size (2212.09748, 2307.06304).

One transformer for images and video, classes and captions: DiT is a configuration of it (`configs/dit.py`).
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from sora_jax.config import check, choose
from sora_jax.errors import UserError
from sora_jax.models.checks import check_network, check_positions
from sora_jax.models.conditioning import (
    MODULATED,
    Condition,
    block_modulation,
    caption_attention,
    caption_attention_specs,
    condition,
    condition_cross_attention,
    condition_cross_attention_specs,
    condition_specs,
    context_segments,
    encode_captions,
    modulation,
    modulation_specs,
    step_number,
    with_keys_values,
)
from sora_jax.models.ends import embed_tokens, ends_specs, predict
from sora_jax.models.pack_flops import Reads, pack_flops
from sora_jax.models.text import TextConfig, TextContext, text_specs
from sora_jax.nn.attention import How, Place, Places, attention
from sora_jax.nn.layers import (
    compute_dtype,
    layer_norm,
    mlp,
    mlp_specs,
    out_proj,
    out_proj_specs,
    qkv_proj,
    qkv_proj_specs,
    rms_norm,
    rms_norm_specs,
)
from sora_jax.nn.pack import Pack
from sora_jax.nn.params import stack
from sora_jax.nn.positions import rotary_angles, rotate
from sora_jax.nn.remat import REMAT
from sora_jax.parallel.rules import parts, reshard

SIZES = {  # depth, width, heads (DiT, table 1)
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Configure the transformer denoiser."""

    depth: int = 12  # number of blocks
    width: int = 384  # D, channels of a token
    heads: int = 6  # N, attention heads; width / heads must be even
    mlp_ratio: float = 4.0  # hidden width of the MLP over `width`
    patch: tuple[int, int, int] = (1, 2, 2)  # (t, y, x) latent positions in one token
    latent_channels: int = 16  # C, channels of the latents
    text: TextConfig | None = TextConfig()  # text encoder, for cross-attention and, pooled, modulation; None: no text
    classes: int = 0  # number of classes; 0: none
    conditioning: str = "adaln_zero"  # how time, class and pooled text reach the blocks (DiT 2212.09748, 3.2)
    rotary: bool = True  # rotary position embedding in every block
    sincos_positions: bool = False  # add factorised sin-cos position tables to the tokens
    sincos_axes: str = "tyx"  # axes that share the width of those tables, in order; DiT's is "xy"
    # Wavelengths of both embeddings run from 2 pi to this many times as many tokens. With far longer ones than the
    # largest clip most channels hardly tell its tokens apart, and a small model is slow to learn motion.
    position_theta: float = 10_000.0
    qk_norm: bool = True  # RMS norm of queries and keys
    # Add the noisy tokens to the prediction, times a gate for each value: velocity and noise contain them, but the
    # norms of a narrow network do not pass on their sizes.
    input_skip: bool = False
    # Hidden width of an MLP that reads the prediction off the last tokens; 0: a linear map, which from D channels makes
    # no more than D dimensions of the P values of a token. Wide tokens of pixels have more.
    head_hidden: int = 0
    guides: bool = False  # embed the kinds of guide tokens: key frames and sketches that are packed beside clips
    learned_variance: bool = False  # predict the variance of a step, too, between its bounds: 2 P outputs
    step_times: bool = False  # show the network the number of a discrete step, 1000 t - 1, as DiT does
    data_times: bool = False  # show the network 1 - t, from 0 at noise to 1 at data, as SiT does
    joint_qkv_init: bool = False  # initialise queries, keys and values as one matrix, as DiT does, not as three
    attention: str = "auto"  # what computes attention: auto, dense, blockwise, splash (TPU), cudnn (GPU)
    sequence: str = "auto"  # how parts of a split sequence meet: auto, gather, all_to_all, ring
    remat: str = "full"  # activations that are recomputed in the backward pass: none, dots, attention, full
    unroll: int = 1  # blocks that one iteration of the scan over depth holds
    dtype: str = "auto"  # of the computation: float32, bfloat16; auto is bfloat16 on accelerators
    name: Literal["transformer"] = "transformer"  # tells this network from others in files

    def __post_init__(self):
        check_network(self)
        check_positions(self)
        both = self.step_times and self.data_times
        check(not both, "model.data_times is True; with model.step_times it must be False")
        choose("model.conditioning", self.conditioning, MODULATED)

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def positions_in_time(self) -> bool:
        """True if tokens of different frames have different positions."""
        return self.rotary or (self.sincos_positions and "t" in self.sincos_axes)

    @property
    def patch_values(self) -> int:
        """The number P of values in a token."""
        pt, ph, pw = self.patch
        return pt * ph * pw * self.latent_channels


def denoiser_specs(config: TransformerConfig) -> dict:
    """Declare all parameters.

    Zero at the start are every modulation and gate, the output projection of cross-attention, and the last layer.
    """
    width, text = config.width, config.text
    last = 2 if MODULATED[config.conditioning] else 0
    return {
        **({"text": text_specs(text)} if text else {}),
        **ends_specs(config),
        **condition_specs(width, text.width if text else 0, config.classes),
        "blocks": stack(block_specs(config), config.depth),
        **modulation_specs(width, last),
    }


def encode_condition(params: dict, config: TransformerConfig, pack: Pack) -> TextContext | None:
    """Encode what does not change while a pack is denoised: captions, with their keys and values in every block."""
    return with_keys_values(params["blocks"], _encode_captions(params, config, pack))


def _encode_captions(params: dict, config: TransformerConfig, pack: Pack) -> TextContext | None:
    return encode_captions(params, config.text, pack, compute_dtype(config.dtype))


Trunk = Callable[[jax.Array], jax.Array]  # all blocks: tokens (B, L, D) -> same


def trunk_zeros(config: TransformerConfig, pack: Pack) -> jax.Array:
    """Return zeros with the shape, dtype and sharding of the tokens (B, L, D) that the blocks work on."""
    length = pack.segments_BL.shape[1]
    if config.conditioning == "in_context":
        length += 2 * pack.row_slots_BR.shape[1]
    zero_BLD = jnp.zeros((pack.segments_BL.shape[0], length, config.width), compute_dtype(config.dtype))
    return reshard(zero_BLD, "batch", "length", "width")


class Context(NamedTuple):
    """Hold what every block reads beside its tokens: condition, rotary angles, places in the pack, captions."""

    condition: Condition
    angles_BLK: jax.Array | None
    segments_BL: jax.Array
    text: TextContext | None


def denoise(
    params: dict,
    config: TransformerConfig,
    pack: Pack,
    x_BLP: jax.Array,
    times_BR: jax.Array,
    text: TextContext | None = None,
    run_trunk: Callable[[Trunk, jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Predict the target of every token of a pack, of whatever type the model is trained for (velocity, noise...).

    x_BLP are the noisy tokens, times_BR in [0, 1] the noise level of each row, `text` the result of
    `encode_condition`; when None, captions are encoded here, and their keys and values computed block by block.
    run_trunk(trunk, x_BLD) stands for trunk(x_BLD): it may reuse what the blocks added at another noise level
    (`generate.skipping`). Returns (B, L, P) float32, or (B, L, 2 P) where the variance is learned, too: predictions,
    then variance values. A token attends to its own clip alone and depends on its coordinates, not on its place in the
    pack; with initial parameters the result is exactly 0.
    """
    dtype = compute_dtype(config.dtype)
    text = _encode_captions(params, config, pack) if text is None else text
    known = condition(params, pack, shown_times(config, times_BR), text, dtype)
    x_BLD = embed_tokens(params, config, pack, x_BLP, dtype)
    segments_BL, coords_BL3 = pack.segments_BL, pack.coords_BL3
    if config.conditioning == "in_context":
        x_BLD, segments_BL, coords_BL3 = _with_context(pack, known, x_BLD)
    angles_BLK = rotary_angles(coords_BL3, config.head_width, config.position_theta) if config.rotary else None
    context = Context(known, angles_BLK, segments_BL, text)

    def layer(x_BLD, xs):
        p, keys_values = xs
        own = text and dataclasses.replace(text, keys_values=keys_values)
        return block(p, config, x_BLD, context._replace(text=own)), None

    if config.remat != "none":
        layer = jax.checkpoint(layer, policy=REMAT[config.remat], prevent_cse=False)  # a scan is barrier enough
    keys_values = text.keys_values if text else None
    trunk = lambda x_BLD: jax.lax.scan(layer, x_BLD, (params["blocks"], keys_values), unroll=config.unroll)[0]  # noqa: E731
    x_BLD = run_trunk(trunk, x_BLD) if run_trunk else trunk(x_BLD)
    x_BLD = x_BLD[:, : x_BLP.shape[1]]
    shift, scale = modulation(params, known, 2) if "modulation" in params else (0.0, 0.0)
    return predict(params, config, x_BLD, x_BLP, (shift, scale))


def shown_times(config: TransformerConfig, times_BR: jax.Array) -> jax.Array:
    """Return the numbers by which noise levels enter the time embedding."""
    if config.data_times:
        return 1.0 - times_BR
    return step_number(times_BR) if config.step_times else 1000.0 * times_BR


def _with_context(pack: Pack, known: Condition, x_BLD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Append noise level and label of each row as two more tokens of their clip: tokens, segments, coordinates."""
    if parts("length") > 1:
        raise UserError("model.conditioning is 'in_context'; its tokens cannot be split: mesh.sequence must be 1")
    context_BX = context_segments(pack)
    coords_BX3 = jnp.zeros((*context_BX.shape, 3), pack.coords_BL3.dtype)

    def joined(tokens, context, *axes):
        # The length is whole here; resharding only gives both sides the same axis names, which Explicit meshes compare.
        context = reshard(context, "batch", "length", *axes)
        return jnp.concatenate([reshard(tokens, "batch", "length", *axes), context], axis=1)

    return (
        joined(x_BLD, known.pair_BXD, "width"),
        joined(pack.segments_BL, context_BX),
        joined(pack.coords_BL3, coords_BX3, None),
    )


def block_specs(config: TransformerConfig) -> dict:
    """Declare the parameters of one block."""
    width, heads, head_width = config.width, config.heads, config.head_width
    norms = {"q_norm": rms_norm_specs(head_width), "k_norm": rms_norm_specs(head_width)} if config.qk_norm else {}
    return {
        **modulation_specs(width, MODULATED[config.conditioning]),
        "qkv": qkv_proj_specs(width, 3, heads, head_width, joint=config.joint_qkv_init),
        **norms,
        "merge": out_proj_specs(heads, head_width, width),
        **(condition_cross_attention_specs(width, heads) if config.conditioning == "cross_attention" else {}),
        **(caption_attention_specs(width, heads, config.text.width) if config.text else {}),
        "mlp": mlp_specs(width, int(config.mlp_ratio * width)),
    }


def block(p: dict, config: TransformerConfig, x_BLD: jax.Array, context: Context) -> jax.Array:
    """Apply one DiT block, (B, L, D) -> same: self-attention, attention to what is known of the clip, MLP."""
    known, angles_BLK, segments_BL, text = context
    shift1, scale1, gate1, shift2, scale2, gate2 = block_modulation(p, known, config.conditioning)
    with jax.named_scope("self_attention"):
        q, k, v = qkv_proj(p["qkv"], layer_norm(x_BLD) * (1 + scale1) + shift1)
        q, k = _placed(p.get("q_norm"), q, angles_BLK), _placed(p.get("k_norm"), k, angles_BLK)
        place = Place(segments_BL)
        out = attention(q, k, v, Places(place, place), how=How(config.attention, config.sequence))
        x_BLD += gate1 * out_proj(p["merge"], out)
    if config.conditioning == "cross_attention":
        with jax.named_scope("condition_cross_attention"):
            x_BLD += condition_cross_attention(p, x_BLD, known, config.attention)
    if text is not None:
        with jax.named_scope("cross_attention"):
            x_BLD += caption_attention(p, x_BLD, segments_BL, text, config.attention)
    with jax.named_scope("mlp"):
        return x_BLD + gate2 * mlp(p["mlp"], layer_norm(x_BLD) * (1 + scale2) + shift2)


def _placed(scale: jax.Array | None, x_BLNK: jax.Array, angles_BLK: jax.Array | None) -> jax.Array:
    """Normalise queries or keys where there is a scale, and rotate them by their positions where there are angles."""
    x_BLNK = x_BLNK if scale is None else rms_norm(scale, x_BLNK)
    return x_BLNK if angles_BLK is None else rotate(x_BLNK, angles_BLK)


def forward_flops(config: TransformerConfig, batch: dict, encodes_condition: bool = True) -> float:
    """Return the FLOPs of one forward pass over the clips of a host batch, see `pack_flops`."""
    reads = Reads(
        added=2 if config.conditioning == "in_context" else 0,
        further=2 if config.conditioning == "cross_attention" else 0,  # noise level and label of the token's own row
    )
    return pack_flops(config, denoiser_specs(config), batch, encodes_condition, reads)
