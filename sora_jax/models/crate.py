"""The white-box denoiser: CRATE's blocks (2306.01129) over packed spacetime patches of any size.

What a denoiser needs and CRATE has not, and how little of it is enough:

time, class, pooled caption   One modulation serves all blocks, as in PixArt-alpha (2310.00426, 2.3): its 5 D^2 weights
                              in each block would be more than the block itself. It moves the three things that the
                              theory lets depend on the noise level: the scale of the tokens, which is the temperature
                              of the softmax; the length of the step that compresses; the bias before ISTA, which is its
                              threshold. What ISTA returns is normalised next and needs no modulation of its own.
captions                      A cross-attention between the halves adds to the tokens before they are made sparse.
positions                     Sin-cos tables at the input, and rotary positions that turn the subspaces (`mssa`).
prediction                    It is read off a sparse code without a residual stream, which cannot carry the noisy
                              tokens to the end; so they are added to it, times a gate for each value (`input_skip`).

With the modulation at its start, 0, a block is exactly that of the paper.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax

from sora_jax.data.packing.packs import token_counts
from sora_jax.models.checks import check_network, check_positions
from sora_jax.models.conditioning import (
    caption_attention,
    caption_attention_specs,
    condition,
    condition_specs,
    encode_captions,
    modulation,
    modulation_specs,
    with_keys_values,
)
from sora_jax.models.crate_blocks import Ista, Modulation, Where, block_specs, check_ista, compress, sparsify
from sora_jax.models.ends import embed_tokens, ends_specs, predict
from sora_jax.models.pack_flops import pack_flops
from sora_jax.models.text import TextConfig, TextContext, text_specs
from sora_jax.nn.attention import How
from sora_jax.nn.layers import compute_dtype
from sora_jax.nn.pack import Pack
from sora_jax.nn.params import stack
from sora_jax.nn.positions import rotary_angles
from sora_jax.nn.remat import REMAT

SIZES = {  # depth, width, heads (2306.01129, table 1)
    "T": (12, 384, 6),
    "S": (12, 576, 12),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
}
MODULATED = len(Modulation._fields)


@dataclasses.dataclass(frozen=True)
class CrateConfig:
    """Configure the white-box denoiser."""

    depth: int = 12  # number of blocks
    width: int = 384  # D, channels of a token
    heads: int = 6  # N, subspaces; each has width / heads dimensions, an even number
    patch: tuple[int, int, int] = (1, 2, 2)  # (t, y, x) latent positions in one token
    latent_channels: int = 16  # C, channels of the latents
    text: TextConfig | None = TextConfig()  # text encoder, for cross-attention and, pooled, modulation; None: no text
    classes: int = 0  # number of classes; 0: none
    ista_step: float = 0.1  # eta, length of the step towards a sparse code
    ista_threshold: float = 0.1  # lambda, weight of the code's l1 norm
    rotary: bool = True  # rotary positions in every block
    sincos_positions: bool = True  # add factorised sin-cos position tables to the tokens
    sincos_axes: str = "tyx"  # axes that share the width of those tables, in order
    position_theta: float = 10_000.0  # ratio of the longest wavelength of both embeddings to the shortest
    input_skip: bool = True  # add the noisy tokens to the prediction, times a gate for each value
    guides: bool = False  # embed the kinds of guide tokens: key frames and sketches that are packed beside clips
    learned_variance: bool = False  # predict the variance of a step, too, between its bounds: 2 P outputs
    attention: str = "auto"  # what computes attention: auto, dense, blockwise, splash (TPU), cudnn (GPU)
    sequence: str = "auto"  # how parts of a split sequence meet: auto, gather, all_to_all, ring
    remat: str = "full"  # activations that are recomputed in the backward pass: none, dots, attention, full
    unroll: int = 1  # blocks that one iteration of the scan over depth holds
    dtype: str = "auto"  # of the computation: float32, bfloat16; auto is bfloat16 on accelerators
    name: Literal["crate"] = "crate"  # tells this network from others in files

    def __post_init__(self):
        check_network(self)
        check_positions(self)
        check_ista(self.ista)

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def ista(self) -> Ista:
        return Ista(self.ista_step, self.ista_threshold)

    @property
    def positions_in_time(self) -> bool:
        """Return True if tokens of different frames have different positions."""
        return self.rotary or (self.sincos_positions and "t" in self.sincos_axes)

    @property
    def patch_values(self) -> int:
        """Return the number P of values in a token."""
        return math.prod(self.patch) * self.latent_channels


def denoiser_specs(config: CrateConfig) -> dict:
    """Declare all parameters; modulation, the output projection of cross-attention and the head are zero at first."""
    width, text = config.width, config.text
    own = block_specs(width, config.heads)
    captions = caption_attention_specs(width, config.heads, text.width) if text else {}
    return {
        **({"text": text_specs(text)} if text else {}),
        **ends_specs(config),
        **condition_specs(width, text.width if text else 0, config.classes),
        "blocks": stack(own | captions, config.depth),
        **modulation_specs(width, MODULATED + 2),
    }


def encode_condition(params: dict, config: CrateConfig, pack: Pack) -> TextContext | None:
    """Encode what does not change while a pack is denoised: captions, with their keys and values in every block."""
    return with_keys_values(params["blocks"], _encode_captions(params, config, pack))


def _encode_captions(params: dict, config: CrateConfig, pack: Pack) -> TextContext | None:
    return encode_captions(params, config.text, pack, compute_dtype(config.dtype))


class Context(NamedTuple):
    """Hold what every block reads beside its tokens, and the shift and scale of the head."""

    where: Where
    modulation: Modulation
    text: TextContext | None
    head: tuple[jax.Array, jax.Array]


def enter(
    params: dict, config: CrateConfig, pack: Pack, x_BLP: jax.Array, times_BR: jax.Array, text: TextContext | None
) -> tuple[jax.Array, Context]:
    """Return the tokens (B, L, D) that the first block reads, and the context of all blocks; see `denoise`."""
    dtype = compute_dtype(config.dtype)
    text = _encode_captions(params, config, pack) if text is None else text
    known = condition(params, pack, 1000.0 * times_BR, text, dtype)
    *moved, shift, scale = modulation(params, known, MODULATED + 2)
    angles = rotary_angles(pack.coords_BL3, config.head_width, config.position_theta) if config.rotary else None
    where = Where(pack.segments_BL, angles, How(config.attention, config.sequence))
    x_BLD = embed_tokens(params, config, pack, x_BLP, dtype)
    return x_BLD, Context(where, Modulation(*moved), text, (shift, scale))


def block(p: dict, config: CrateConfig, x_BLD: jax.Array, context: Context) -> jax.Array:
    """Apply one block, (B, L, D) -> same, to tokens that are 0 or more but for the first block."""
    x_BLD = compress(p, x_BLD, context.where, context.modulation)
    if context.text is not None:
        with jax.named_scope("cross_attention"):
            x_BLD += caption_attention(p, x_BLD, context.where.segments_BL, context.text, config.attention)
    return sparsify(p, x_BLD, config.ista, context.modulation)


def denoise(
    params: dict,
    config: CrateConfig,
    pack: Pack,
    x_BLP: jax.Array,
    times_BR: jax.Array,
    text: TextContext | None = None,
) -> jax.Array:
    """Predict the target of every token of a pack, of whatever type the model is trained for (velocity, noise...).

    x_BLP are the noisy tokens, times_BR in [0, 1] the noise level of each row, `text` the result of
    `encode_condition`; when None, captions are encoded here. Returns (B, L, P) float32, or (B, L, 2 P) where the
    variance is learned, too. With initial parameters the result is exactly 0.
    """
    x_BLD, context = enter(params, config, pack, x_BLP, times_BR, text)

    def layer(x_BLD, xs):
        p, keys_values = xs
        own = context.text and dataclasses.replace(context.text, keys_values=keys_values)
        return block(p, config, x_BLD, context._replace(text=own)), None

    if config.remat != "none":
        layer = jax.checkpoint(layer, policy=REMAT[config.remat], prevent_cse=False)  # a scan is barrier enough
    keys_values = context.text.keys_values if context.text else None
    x_BLD, _ = jax.lax.scan(layer, x_BLD, (params["blocks"], keys_values), unroll=config.unroll)
    return predict(params, config, x_BLD, x_BLP, context.head)


def forward_flops(config: CrateConfig, batch: dict, encodes_condition: bool = True) -> float:
    """Return the FLOPs of one forward pass over the clips of a host batch, see `pack_flops`; D is multiplied twice."""
    again = 2 * config.depth * config.width**2 * token_counts(batch).sum()
    return float(again + pack_flops(config, denoiser_specs(config), batch, encodes_condition))
