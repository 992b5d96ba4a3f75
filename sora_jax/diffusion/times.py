"""Noise levels: the times at which a clip is trained and the grid along which it is sampled.

Both pass through the same size-dependent shift: more tokens average noise away more easily, so a large clip
needs more of it to lose as much (Esser et al. 2403.03206, section 5.3.2),

    shift(t) = alpha t / (1 + (alpha - 1) t),    alpha = sqrt(tokens / base_tokens)       (1)
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Num

from sora_jax.diffusion.keys import clip_keys
from sora_jax.errors import UserError
from sora_jax.shapes import ClipsBS

DISTRIBUTIONS = ("uniform", "logit_normal")

# Time 0 is kept for tokens that are given; a clip in training always has at least this much noise.
MIN_TIME = 1e-5


@dataclass(frozen=True)
class TimesConfig:
    """How training times are drawn and how clip size moves all times.

    `logit_normal` draws t = sigmoid(mean + std n), n ~ N(0, 1); `uniform` ignores mean and std.
    A clip of `base_tokens` tokens is not shifted; base_tokens = 0 shifts no clip.
    """

    distribution: str = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    base_tokens: int = 256

    def __post_init__(self):
        if self.distribution not in DISTRIBUTIONS:
            allowed = ", ".join(DISTRIBUTIONS)
            raise UserError(f"times.distribution must be one of {allowed}, not {self.distribution!r}.")
        if not self.std > 0:
            raise UserError(f"times.std must be above 0, not {self.std}.")
        if self.base_tokens < 0:
            raise UserError(f"times.base_tokens must be 0 (no shift) or more, not {self.base_tokens}.")


def shift(config: TimesConfig, t: Float[Array, "..."], tokens: Int[Array, "..."]) -> Float[Array, "..."]:
    """Times moved by clip size, equation (1); t and tokens have one shape. Exact at t = 0 and t = 1."""
    if config.base_tokens == 0:
        return t
    # An empty slot has no tokens: any positive count keeps its time finite.
    alpha = jnp.sqrt(jnp.maximum(tokens, 1).astype(jnp.float32) / config.base_tokens)
    # Equation (1) with the denominator in the order that rounds to exactly alpha at t = 1.
    return alpha * t / (alpha * t + (1.0 - t))


def draw_times(
    config: TimesConfig, key: Key[Array, ""], clips_BS: ClipsBS, tokens_BS: Int[Array, "B S"]
) -> Float[Array, "B S"]:
    """One training time per clip, in [MIN_TIME, 1], float32: a function of (key, clip id, clip size)."""
    draw = jax.random.uniform if config.distribution == "uniform" else jax.random.normal
    drawn_BS = jax.vmap(jax.vmap(lambda clip_key: draw(clip_key, (), jnp.float32)))(clip_keys(key, clips_BS))
    if config.distribution == "logit_normal":
        drawn_BS = jax.nn.sigmoid(config.mean + config.std * drawn_BS)
    return jnp.clip(shift(config, drawn_BS, tokens_BS), MIN_TIME, 1.0)


def sampling_times(config: TimesConfig, steps: int, tokens_BR: Int[Array, "B R"]) -> Float[Array, "K B R"]:
    """The steps + 1 times from 1 to 0 of every row, evenly spaced before the shift, float32.

    tokens_BR counts the tokens of the clip that a row serves. To hold a row of given tokens, set all its
    times to 0.

    Raises:
        UserError: fewer than one step.
    """
    if steps < 1:
        raise UserError(f"steps must be 1 or more, not {steps}.")
    even_K = jnp.linspace(1.0, 0.0, steps + 1, dtype=jnp.float32)
    return jax.vmap(lambda t: shift(config, jnp.full_like(tokens_BR, t, jnp.float32), tokens_BR))(even_K)


def per_token(values_BR: Num[Array, "B R"], rows_BL: Int[Array, "B L"]) -> Num[Array, "B L"]:
    """The value of every token's row (or slot): values_BR[b, rows_BL[b, l]]."""
    # Comparison and sum, not a gather: legal and local whichever axes of rows_BL are sharded.
    rows_11R = jnp.arange(values_BR.shape[1], dtype=rows_BL.dtype)[None, None, :]
    mine_BLR = rows_BL[:, :, None] == rows_11R
    return jnp.sum(jnp.where(mine_BLR, values_BR[:, None, :], 0), axis=2, dtype=values_BR.dtype)
