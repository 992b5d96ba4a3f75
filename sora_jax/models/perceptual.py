"""Compare decoded clips with their originals: Haar bands, pyramids of frames, random features.

Clips are (B, T, H, W, C) with values in [-1, 1]. Every term is a mean, so that its scale depends on no size. On a mesh
each device compares whole frames of its own clips: rows that are split over devices are gathered first.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sora_jax.config import check, choose
from sora_jax.nn.draws import per_clip
from sora_jax.nn.images import IMAGES, conv2d, to_images
from sora_jax.parallel.rules import reshard

FRAMES = ("batch", "time", *IMAGES[1:])  # logical axes of clips whose frames are whole on one device
CHARBONNIER = 0.1  # half width of the rounded tip of the Charbonnier penalty, in units of a coefficient
FEATURES_EPS = 0.1  # added to the mean magnitude of a channel, which is 0 for a frame of zeros
LEAK = 0.2  # slope of leaky ReLU below zero


def magnitude(x: jax.Array) -> jax.Array:
    """Return |x| with a gradient of 0 at 0, where that of `jnp.abs` is 1: equal clips are then a minimum of a loss."""
    return x * jnp.sign(x)


FORMS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "squared": jnp.square,
    # Zero, and not its half width, at zero.
    "charbonnier": lambda x: jnp.sqrt(jnp.square(x) + CHARBONNIER**2) - CHARBONNIER,
    "l1": magnitude,
}


def whole_frames(x_BTHWC: jax.Array) -> jax.Array:
    """Convert clips to float32 and reshard them by `FRAMES`."""
    return reshard(x_BTHWC.astype(jnp.float32), *FRAMES)


def average(terms: list[jax.Array]) -> jax.Array:
    """Return the mean of scalars."""
    return sum(terms[1:], terms[0]) / len(terms)


def choose_frames(key: jax.Array, count: int, *videos: jax.Array) -> list[jax.Array]:
    """Draw `count` frames of each clip, without repetition and in any order, the same frames of all `videos`.

    A video (B, T, H, W, C) becomes (B, count, H, W, C), or stays as it is where T is not larger than `count`. key: see
    `nn.draws.per_clip`.
    """
    check(count > 0, f"frames is {count}; it must be at least 1")
    clips, frames = videos[0].shape[:2]
    if count >= frames:
        return list(videos)
    draws_BT = reshard(
        per_clip(lambda key: jax.random.uniform(key, (frames,), jnp.float32), key, clips), "batch", "time"
    )
    chosen = jnp.argsort(draws_BT, axis=1)[:, :count, None, None, None]
    return [jnp.take_along_axis(video, chosen, axis=1) for video in videos]


def haar(x_BTHWC: jax.Array, axes: str = "THW") -> dict[str, jax.Array]:
    """Apply one level of the orthonormal Haar transform along `axes`, letters of "THW": 2^n bands of half the size.

    A name has a letter for each axis, in the order of `axes`: "LHL" is high in the second axis and low in the others.
    The band of low letters alone comes first. Of a pair (a, b), low is (a + b) / sqrt(2) and high (a - b) / sqrt(2). An
    odd size is extended first: height and width by a copy of the last row and column; time by a copy of the first frame
    in front, so that pairs are those of the autoencoder's latent frames (`nn.conv.space_to_depth`).
    """
    bands = {"": x_BTHWC}
    for axis in axes:
        halves = {name: _low_and_high(x, axis) for name, x in bands.items()}
        bands = {name + letter: half for name, pair in halves.items() for letter, half in zip("LH", pair)}
    return bands


def _low_and_high(x_BTHWC: jax.Array, axis: str) -> tuple[jax.Array, jax.Array]:
    first, second = _pairs(x_BTHWC, "BTHWC".index(axis), in_front=axis == "T")
    return (first + second) * math.sqrt(0.5), (first - second) * math.sqrt(0.5)


def _pairs(x: jax.Array, axis: int, in_front: bool = False) -> tuple[jax.Array, jax.Array]:
    """Return the first and the second of each pair of neighbours along `axis`, whose odd size is extended by a copy."""
    size = x.shape[axis]
    if size % 2:
        copy = jax.lax.slice_in_dim(x, 0 if in_front else size - 1, 1 if in_front else size, axis=axis)
        x = jnp.concatenate([copy, x] if in_front else [x, copy], axis=axis)
    return jax.lax.slice_in_dim(x, 0, None, 2, axis), jax.lax.slice_in_dim(x, 1, None, 2, axis)


def haar_bands(x_BTHWC: jax.Array, levels: int, temporal: bool = True) -> list[dict[str, jax.Array]]:
    """Return the bands of each level, finest first, where each level transforms the low band of the one before.

    Only the last level keeps its low band: together the bands hold every value once. The transform is 3-D if
    `temporal`, as long as there is more than one frame, and else 2-D, without the letter of time in the bands' names.
    """
    check(levels > 0, f"levels is {levels}; it must be positive")
    bands = []
    for level in range(levels):
        found = haar(x_BTHWC, "THW" if temporal and x_BTHWC.shape[1] > 1 else "HW")
        low = next(iter(found))
        x_BTHWC = found[low]
        bands.append({name: band for name, band in found.items() if name != low or level == levels - 1})
    return bands


def random_shift(key: jax.Array, levels: int) -> jax.Array:
    """Draw the `shift` of `bands_loss`: (2,) int32, each from 0 to 2^levels - 1."""
    return jax.random.randint(key, (2,), 0, 2**levels, jnp.int32)


def bands_loss(
    decoded_BTHWC: jax.Array,
    video_BTHWC: jax.Array,
    levels: int,
    form: str,
    shift: jax.Array,
    *,
    temporal: bool = True,
    low: bool = False,
) -> jax.Array:
    """Return the mean penalty of the Haar coefficients of the error (with L1: LTX-Video, 2501.00103).

    All coefficients have the same weight. "squared" with `low` is then the mean squared error, by Parseval's theorem,
    where no size is odd at any level. L1 blurs sparse pictures early in training, as the median of their high bands is
    0: begin with "squared" or "charbonnier".

    Args:
        decoded_BTHWC: the result; gradients flow to it.
        video_BTHWC: the original.
        levels: of the transform.
        form: "squared", "charbonnier" or "l1", the penalty of one coefficient.
        shift: (2,) int, by how many pixels both are rolled in height and width, because the transform is not invariant
            to shifts (`random_shift`). Rolled, not cropped, so that every pixel counts; one row and one column of
            blocks then join opposite edges of the frame.
        temporal: transform time, too.
        low: include the low band of the last level.
    """
    penalty = choose("form", form, FORMS)
    error = whole_frames(decoded_BTHWC) - whole_frames(video_BTHWC)  # the transform is linear: once for the difference
    *fine, last = haar_bands(jnp.roll(error, shift, (2, 3)), levels, temporal)
    bands = [band for level in fine for band in level.values()] + list(last.values())[0 if low else 1 :]
    return sum(penalty(band).sum() for band in bands) / sum(band.size for band in bands)


def average_pool(x: jax.Array) -> jax.Array:
    """Average blocks of 2 x 2 pixels: (..., H, W, C) -> (..., ceil(H / 2), ceil(W / 2), C).

    An odd height or width is extended by a copy of the last row or column.
    """
    for axis in (x.ndim - 3, x.ndim - 2):
        first, second = _pairs(x, axis)
        x = 0.5 * (first + second)
    return x


def pyramid_l1(decoded_BTHWC: jax.Array, video_BTHWC: jax.Array, levels: int) -> jax.Array:
    """Return the L1 distance of frames that are halved 1 to `levels` times by `average_pool`, averaged over levels.

    The distance of the frames themselves is not included: it is the L1 term of the autoencoder.
    """
    check(levels > 0, f"levels is {levels}; it must be positive")
    error = whole_frames(decoded_BTHWC) - whole_frames(video_BTHWC)
    distances = []
    for _ in range(levels):
        error = average_pool(error)
        distances.append(magnitude(error).mean())
    return average(distances)


def random_features_loss(
    key: jax.Array, decoded_BTHWC: jax.Array, video_BTHWC: jax.Array, frames: int, widths: tuple[int, ...] = (32, 64)
) -> jax.Array:
    """Return the relative L1 distance of random convolutional features, whose weights are drawn from `key`.

    Features of untrained networks agree with people better than pixels do (1801.03924). With a new key at
    every step the loss is an unbiased estimate of the mean over all such networks. A level is a 3 x 3 convolution of
    normal weights, leaky ReLU and, before the next, average pooling. Per frame and channel the distance is divided by
    the mean magnitude of the original's features, then averaged over channels, frames and levels.

    Args:
        key: of the weights and of the choice of frames.
        decoded_BTHWC: the result; gradients flow to it.
        video_BTHWC: the original.
        frames: how many frames of each clip are compared, to save time; drawn anew with each key.
        widths: channels of each level.
    """
    chosen_key, weights_key = jax.random.split(key)
    pair = choose_frames(chosen_key, frames, whole_frames(decoded_BTHWC), whole_frames(video_BTHWC))
    x, y = map(to_images, pair)
    distances = []
    for level, width in enumerate(widths):
        conv = _random_conv(jax.random.fold_in(weights_key, level), x.shape[-1], width)
        x, y = (jax.nn.leaky_relu(conv2d(conv, average_pool(z) if level else z), LEAK) for z in (x, y))
        size = jax.lax.stop_gradient(jnp.abs(y).mean((1, 2)))
        distances.append((magnitude(x - y).mean((1, 2)) / (size + FEATURES_EPS)).mean())
    return average(distances)


def _random_conv(key: jax.Array, inputs: int, outputs: int) -> dict:
    """Draw normal weights that keep the variance through ReLUs (He et al. 1502.01852), without a bias."""
    weight = jax.random.normal(key, (3, 3, inputs, outputs), jnp.float32) * math.sqrt(2 / (9 * inputs))
    return {"weight": weight, "bias": jnp.zeros(outputs)}
