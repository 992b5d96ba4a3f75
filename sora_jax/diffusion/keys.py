"""Random keys: every draw on the device is a function of (seed, step, purpose) and, for a clip, of its id.

Nothing is stored and advanced, so a run stopped at any step goes on with the same draws; and since a draw
knows the clip and not its place, a clip gets the same noise in whichever pack, row or device it travels.
"""

import enum
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32

from sora_jax.config import check
from sora_jax.shapes import ClipIdsBS, IndexBL, PerClipBS

# Draws belong to the run, not to the machine: whatever JAX is set to elsewhere (JAX_DEFAULT_PRNG_IMPL,
# JAX_THREEFRY_PARTITIONABLE), they come from this generator, in the form whose values do not depend on the mesh. Each
# draw names its dtype for the same reason: JAX_ENABLE_X64 would change it, and with it the bits.
GENERATOR = "threefry2x32"
jax.config.update("jax_threefry_partitionable", True)


class Purpose(enum.IntEnum):
    """Name the purpose of a random draw. The numbers enter the keys: changing one changes every run."""

    INIT = 0
    TIME = 1
    NOISE = 2
    CAPTION_DROPOUT = 3
    SAMPLE = 4
    SOLVER = 5
    LATENT_NOISE = 6
    EQUIVARIANCE = 7
    FEATURES = 8
    BANDS = 9
    DISCRIMINATOR = 10
    GIVEN = 11
    FRAME_TIMES = 12
    HELD_OUT_TIME = 13
    HELD_OUT_NOISE = 14
    PROBE = 15
    SELF_CONDITIONING = 16
    LOW_TIME = 17
    LOW_NOISE = 18


def step_key(seed: int | UInt32[Array, ""], step: int | Int[Array, ""], purpose: Purpose) -> Key[Array, ""]:
    """Return the key of one purpose at one training step; seed and step may be traced.

    Raises:
        UserError: the seed does not fit in 32 bits, where two seeds could give one key.
    """
    fits = not isinstance(seed, int) or 0 <= seed < 2**32
    check(fits, f"seed is {seed}; it must be from 0 to 4294967295")
    key = jax.random.key(jnp.uint32(seed), impl=GENERATOR)
    return jax.random.fold_in(jax.random.fold_in(key, step), int(purpose))


def clip_keys(key: Key[Array, ""], clip_ids_BS: ClipIdsBS) -> Key[Array, "B S"]:
    """Return one key per clip slot, a function of the clip's id alone."""
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (None, 0))(key, clip_ids_BS)


def clip_uniforms(key: Key[Array, ""], clip_ids_BS: ClipIdsBS) -> PerClipBS:
    """Draw a number from [0, 1) for each clip slot, a function of (key, clip id)."""
    draw = functools.partial(jax.random.uniform, dtype=jnp.float32)
    return jax.vmap(jax.vmap(draw))(clip_keys(key, clip_ids_BS))


def token_noise(
    key: Key[Array, ""], clip_ids_BL: UInt32[Array, "B L"], index_BL: IndexBL, width: int
) -> Float[Array, "B L {width}"]:
    """Draw standard normal float32 noise (B, L, width), a function of (key, clip id, token index in the clip).

    Padding (clip id 0, index 0) gets finite noise like any token.
    """

    def one_token(clip: Array, index: Array) -> Array:
        token_key = jax.random.fold_in(jax.random.fold_in(key, clip), index)
        return jax.random.normal(token_key, (width,), jnp.float32)

    return jax.vmap(jax.vmap(one_token))(clip_ids_BL, index_BL)
