"""Make the latents of an autoencoder discrete without a learnt codebook: FSQ, LFQ and BSQ.

Each channel of a latent is rounded to one of a few fixed values, so a latent position is one of a fixed number of codes
and has an index. Rounding has no gradient; the gradient of what is rounded stands in for it (straight-through
estimator, 1308.3432).

====  =====================================  ================================================================
fsq   finite scalar quantization 2309.15505  `levels` values in [-1, 1] for each channel; needs no loss
lfq   lookup-free, MAGVIT-v2 2310.05737      the sign of each channel: one bit; entropy and commitment loss
bsq   binary spherical 2406.07548            the sign of each channel on the unit sphere: one bit; entropy loss
====  =====================================  ================================================================
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.config import check, choose
from sora_jax.nn.draws import per_clip
from sora_jax.parallel.rules import laid_out_as, on_mesh, out_sharding

NAMES = ("none", "fsq", "lfq", "bsq")
MARGIN = 1e-3  # by which FSQ's bound exceeds the outermost values, so that they can be reached (official code)
GROUP = 9  # bits whose joint distribution is computed: 512 codes (bsq-vit, official code)
INDEX_BITS = 31  # of an int32 index
EPS = 1e-6  # added to the mean square of a latent before it is normalised: the gradient at 0 stays finite
SMALLEST = 1e-30  # of a probability in a logarithm, and of a sum of weights in a quotient


@dataclasses.dataclass(frozen=True)
class CodesConfig:
    """Configure the discrete bottleneck of an autoencoder and its loss.

    The loss is `entropy_weight` (token entropy - `entropy_gamma` batch entropy) + `commit_weight` commitment.
    """

    name: Literal["none", "fsq", "lfq", "bsq"] = "none"  # how latents become discrete; "none": they stay continuous
    levels: tuple[int, ...] = (7, 5, 5, 5, 5)  # values of each channel, for "fsq" alone; "lfq" and "bsq" have 2
    entropy_weight: float = 0.1  # of the entropy loss of "lfq" and "bsq"
    entropy_gamma: float = 1.0  # of the batch's entropy, which is raised, against a token's, which is lowered
    commit_weight: float = 0.25  # of the squared distance of a latent to its code; for "lfq" alone, others are bounded
    tau: float = 1.0  # temperature of the probabilities in the entropy loss; the smaller, the surer is each bit
    warmup_noise: float = 0.1  # share of the run, at its start, in which noise replaces rounding; the caller applies it

    def __post_init__(self):
        choose("model.codes.name", self.name, dict.fromkeys(NAMES))
        check(
            bool(self.levels) and min(self.levels) > 2,
            f"model.codes.levels is {self.levels}; each must be at least 3 (for 2 use 'lfq' or 'bsq')",
        )
        for name in ("entropy_weight", "entropy_gamma", "commit_weight"):
            value = getattr(self, name)
            check(value >= 0, f"model.codes.{name} is {value}; it must be 0 or more")
        check(self.tau > 0, f"model.codes.tau is {self.tau}; it must be positive")
        share = self.warmup_noise
        check(0 <= share <= 1, f"model.codes.warmup_noise is {share}; it must be from 0 to 1")


def channels(config: CodesConfig, latent_channels: int) -> int:
    """Return the number of channels of a latent; UserError if FSQ has levels for another number of channels."""
    count = len(config.levels)
    check(
        config.name != "fsq" or latent_channels == count,
        f"model.latent_channels is {latent_channels}; with model.codes.levels {config.levels} it must be {count}",
    )
    return latent_channels


def codebook_size(config: CodesConfig, latent_channels: int) -> int:
    """Return the number of codes; UserError if the latents are continuous."""
    return math.prod(_levels(config, latent_channels))


def _levels(config: CodesConfig, latent_channels: int) -> tuple[int, ...]:
    """Return the number of values of each channel."""
    check(config.name != "none", "model.codes.name is 'none'; only 'fsq', 'lfq' and 'bsq' have codes")
    count = channels(config, latent_channels)
    return config.levels if config.name == "fsq" else (2,) * count


def _grid_size(config: CodesConfig, latent_channels: int) -> np.ndarray:
    """Return what the integers of the grid are divided by to make codes, for each channel."""
    if config.name == "fsq":
        return np.array(config.levels, np.float32) // 2
    return np.full(latent_channels, math.sqrt(latent_channels) if config.name == "bsq" else 1.0, np.float32)


def channel_values(config: CodesConfig, latent_channels: int) -> list[np.ndarray] | None:
    """Return the values that each channel of a code can have, in the order of an index's digits; None for "none"."""
    if config.name == "none":
        return None
    sizes = _grid_size(config, latent_channels)
    if config.name == "fsq":
        return [(np.arange(n) - n // 2) / size for n, size in zip(config.levels, sizes, strict=True)]
    return [np.array([-1, 1]) / size for size in sizes]


def _like(values: np.ndarray | tuple[int, ...], x: jax.Array) -> jax.Array:
    """Return one value for each channel with the dtype and the rank of x."""
    return jax.lax.broadcast_to_rank(jnp.asarray(values, x.dtype), x.ndim)


def quantize(
    config: CodesConfig,
    z_BthwC: jax.Array,
    key: jax.Array | None = None,
    soften: jax.Array | float | None = None,
) -> jax.Array:
    """Return the codes of latents, float32 of the same shape, with straight-through gradients.

    FSQ bounds z by tanh and rounds it (2309.15505); codes are multiples of 1 / (L // 2) in [-1, 1]. LFQ
    takes the sign, +1 at 0. BSQ takes the sign over sqrt(C), so that codes lie on the unit sphere (2406.07548).

    Args:
        config: that of the codes; of "none" z is returned.
        z_BthwC: latents, (..., C).
        key: draws the noise, see `nn.draws.per_clip`.
        soften: traced share from 0 to 1, or a boolean, by which noise replaces rounding. At 1 the result is the bounded
            latent (LFQ: clipped to [-1, 1]; BSQ: on the sphere) plus uniform noise of half a step either way, the
            error that rounding makes, with an exact gradient. None: no noise, and no key is needed.
    """
    if config.name == "none":
        return z_BthwC
    z = z_BthwC.astype(jnp.float32)
    levels = _levels(config, z.shape[-1])
    if config.name == "fsq":
        grid, step = _bound(z, levels), 1.0
        nearest = jnp.round(grid)
    else:
        grid, step = _sphere(z) * math.sqrt(z.shape[-1]) if config.name == "bsq" else z, 2.0
        nearest = jnp.where(grid >= 0, 1.0, -1.0)
    # In this order the value is the code to the last bit: the bracket is exactly 0.
    codes = jax.lax.stop_gradient(nearest) + (grid - jax.lax.stop_gradient(grid))
    if soften is not None:
        if key is None:
            raise ValueError("soften needs a key")
        bounded = jnp.clip(grid, -1.0, 1.0) if config.name == "lfq" else grid
        draw = lambda key: step * jax.random.uniform(key, z.shape[1:], jnp.float32, -0.5, 0.5)  # noqa: E731
        noise = laid_out_as(per_clip(draw, key, len(z)), z)
        codes = codes + jnp.asarray(soften, jnp.float32) * (bounded + noise - codes)
    return codes / _like(_grid_size(config, z.shape[-1]), z)


def _bound(z: jax.Array, levels: tuple[int, ...]) -> jax.Array:
    """Bound latents so that rounding gives L integers, from -(L // 2) on, and 0 at 0 (2309.15505, official code)."""
    count = np.array(levels)
    half = (count - 1) * (1 + MARGIN) / 2
    offset = np.where(count % 2, 0.0, 0.5)
    return jnp.tanh(z + _like(np.arctanh(offset / half), z)) * _like(half, z) - _like(offset, z)


def _sphere(z: jax.Array) -> jax.Array:
    """Normalise latents to length 1 over channels."""
    mean_square = jnp.mean(jnp.square(z), axis=-1, keepdims=True)
    return z * jax.lax.rsqrt(mean_square + EPS) / math.sqrt(z.shape[-1])


def indices(config: CodesConfig, codes_BthwC: jax.Array) -> jax.Array:
    """Return the index of each code, int32 (B, t, h, w), from 0 to `codebook_size` - 1; of softened codes the nearest.

    It is a number whose digits are the channels, the first channel with weight 1 (2309.15505, official code).

    Raises:
        UserError: there are more than 2^31 codes.
    """
    levels, weights = _levels(config, codes_BthwC.shape[-1]), digit_weights(config, codes_BthwC.shape[-1])
    if config.name == "fsq":
        half = _like(np.array(levels) // 2, codes_BthwC)
        digits = jnp.clip(jnp.round(codes_BthwC * half) + half, 0, _like(levels, codes_BthwC) - 1)
    else:
        digits = codes_BthwC >= 0
    digits = digits.astype(jnp.int32)
    return (digits * _like(weights, digits)).sum(-1, dtype=jnp.int32)


def codes_of(config: CodesConfig, indices_Bthw: jax.Array, latent_channels: int) -> jax.Array:
    """Return the codes with these indices: (B, t, h, w) -> (B, t, h, w, latent_channels) float32; inverts `indices`.

    Raises:
        UserError: there are more than 2^31 codes.
    """
    levels, weights = _levels(config, latent_channels), digit_weights(config, latent_channels)
    number = jnp.asarray(indices_Bthw, jnp.int32)[..., None]
    digits = number // _like(weights, number) % _like(levels, number)
    grid = digits - _like(np.array(levels) // 2, digits) if config.name == "fsq" else 2 * digits - 1
    values = grid.astype(jnp.float32)
    return values / _like(_grid_size(config, latent_channels), values)


def digit_weights(config: CodesConfig, latent_channels: int) -> tuple[int, ...]:
    """Return the weight of each channel in an index."""
    size = codebook_size(config, latent_channels)
    check(
        size <= 2**INDEX_BITS,
        f"model.latent_channels is {latent_channels}, which makes {size} codes; an index holds at most "
        f"{INDEX_BITS} bits, so there must be at most {2**INDEX_BITS}",
    )
    levels = _levels(config, latent_channels)
    return tuple(math.prod(levels[:k]) for k in range(len(levels)))


def code_losses(
    config: CodesConfig, z_BthwC: jax.Array, codes_BthwC: jax.Array, weight_Bthw: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the loss of the bottleneck, and its terms as metrics: (scalar, {"token_entropy", "batch_entropy", ...}).

    A bit of a token is 1 with probability sigmoid(4 z c / tau), c the magnitude of codes. "token_entropy" is the
    entropy of a token's bits, a mean over tokens; "batch_entropy" that of the mean distribution of all tokens, both in
    nats and at most C ln 2 (2310.05737, section 3.1; 2406.07548). The mean distribution is exact in groups
    of 9 bits, whose entropies are added; of more bits this is an upper bound. "commit" is the mean squared distance to
    the code, of LFQ. FSQ and "none" have no loss and no metrics.

    All means are over the global batch, whatever the mesh; over each part alone where a step accumulates several.

    Args:
        config: that of the codes.
        z_BthwC: latents, finite even where the weight is 0.
        codes_BthwC: what `quantize` made of them.
        weight_Bthw: weight of each token, or a mask; each axis of full size or 1. None: all tokens weigh the same.
    """
    if config.name not in ("lfq", "bsq"):
        return jnp.zeros((), jnp.float32), {}
    z = z_BthwC.astype(jnp.float32)
    share_Bthw = _shares(z, weight_Bthw)
    size = _grid_size(config, z.shape[-1])[0]
    logits = (_sphere(z) if config.name == "bsq" else z) * (4.0 / (size * config.tau))
    parts = {
        "token_entropy": (_bit_entropy(logits).sum(-1) * share_Bthw).sum(),
        "batch_entropy": _batch_entropy(logits, share_Bthw),
    }
    loss = config.entropy_weight * (parts["token_entropy"] - config.entropy_gamma * parts["batch_entropy"])
    if config.name == "lfq":
        squared = jnp.square(z - jax.lax.stop_gradient(codes_BthwC))
        parts["commit"] = (squared.mean(-1) * share_Bthw).sum()
        loss = loss + config.commit_weight * parts["commit"]
    return loss, parts


def _shares(z_BthwC: jax.Array, weight_Bthw: jax.Array | None) -> jax.Array:
    """Return the share of each token in a mean over tokens; all 0 if all weights are."""
    if weight_Bthw is None:
        return jnp.full_like(z_BthwC[..., 0], 1.0 / math.prod(z_BthwC.shape[:-1]))
    weight = jnp.broadcast_to(weight_Bthw.astype(jnp.float32), z_BthwC.shape[:-1])
    if on_mesh():
        weight = jax.reshard(weight, jax.typeof(z_BthwC[..., 0]).sharding.spec)
    return weight / jnp.maximum(weight.sum(), SMALLEST)


def _bit_entropy(logits: jax.Array) -> jax.Array:
    """Return the entropy of each bit in nats; from logits, so that the gradient is finite where a bit is certain."""
    no, yes = jax.nn.softplus(logits), jax.nn.softplus(-logits)  # -log of the probabilities
    return jax.nn.sigmoid(-logits) * no + jax.nn.sigmoid(logits) * yes


def _batch_entropy(logits_BthwC: jax.Array, share_Bthw: jax.Array) -> jax.Array:
    """Return the entropy of the mean over tokens of the distribution over codes, summed over groups of bits."""
    total = jnp.zeros((), jnp.float32)
    for start in range(0, logits_BthwC.shape[-1], GROUP):
        group = logits_BthwC[..., start : start + GROUP]
        middle = group.shape[-1] // 2
        # A token's table is an outer product. The sum over tokens is then a matrix product of two short tables, and
        # 512 probabilities for each token are never in memory.
        first = _with_bits(share_Bthw[..., None], group[..., :middle])
        second = _with_bits(jnp.ones_like(share_Bthw)[..., None], group[..., middle:])
        mean = jnp.einsum(
            "bthwi,bthwj->ij", first, second, precision=jax.lax.Precision.HIGHEST, out_sharding=out_sharding(None, None)
        )
        total = total - (mean * jnp.log(jnp.maximum(mean, SMALLEST))).sum()
    return total


def _with_bits(table: jax.Array, logits: jax.Array) -> jax.Array:
    """Extend tables of probabilities (..., n) by k independent bits: (..., 2^k n)."""
    for k in range(logits.shape[-1]):
        logit = logits[..., k : k + 1]
        table = jnp.concatenate([table * jax.nn.sigmoid(-logit), table * jax.nn.sigmoid(logit)], axis=-1)
    return table


class Usage:
    """Count on the host how often each code is used, over as many tokens as are added.

    One batch says nothing: n tokens use at most n codes, and few of a large codebook even if all codes are equally
    likely. Add several times more tokens than there are codes; a million is usual.
    """

    def __init__(self, size: int):
        self.size = size  # number of codes
        self._codes = np.zeros(0, np.int64)  # those seen, sorted: most of a large codebook may never be
        self._counts = np.zeros(0, np.int64)

    def add(self, indices: np.ndarray | jax.Array) -> None:
        """Count the codes of more tokens, an array of any shape; select those inside of clips before."""
        codes, counts = np.unique(np.asarray(indices), return_counts=True)
        if codes.size and not 0 <= codes[0] <= codes[-1] < self.size:
            raise ValueError(f"indices are from {codes[0]} to {codes[-1]}; there are {self.size} codes")
        self._codes, place = np.unique(np.concatenate([self._codes, codes]), return_inverse=True)
        counts = np.concatenate([self._counts, counts])
        self._counts = np.zeros(self._codes.size, np.int64)
        np.add.at(self._counts, place, counts)

    @property
    def tokens(self) -> int:
        """Return the number of tokens that were added."""
        return int(self._counts.sum())

    @property
    def use(self) -> float:
        """Return the share of codes that at least one of all tokens has."""
        return self._codes.size / self.size

    @property
    def perplexity(self) -> float:
        """Return exp(H) of the frequencies of codes, from 1 to the number of codes; NaN before any token."""
        if not self.tokens:
            return math.nan
        share = self._counts / self.tokens
        return float(np.exp(-(share * np.log(share)).sum()))

    def bits_per_pixel(self, block: tuple[int, int, int]) -> float:
        """Return log2(number of codes) over the pixels (time, height, width) that a latent position stands for.

        An entropy coder needs log2(perplexity) bits a position in place of log2(number of codes).
        """
        return math.log2(self.size) / math.prod(block)
