"""Tell decoded clips from real ones: discriminators of patches, and the losses of both sides.

One network sees frames (PatchGAN, 1611.07004), another sees motion too (a 3-D PatchGAN). Norms are per frame: batch
norms would make the score of a clip depend on its neighbours in the batch.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from sora_jax.config import check, choose
from sora_jax.models.perceptual import LEAK, average, magnitude, whole_frames
from sora_jax.nn.conv import causal_conv3d_specs
from sora_jax.nn.draws import per_clip
from sora_jax.nn.images import group_norm, group_norm_specs, to_clips, to_images
from sora_jax.nn.layers import compute_dtype
from sora_jax.parallel.rules import reshard
from sora_jax.shapes import PyTree

KERNELS = {"2d": (1, 4, 4), "3d": (3, 3, 3)}  # (time, height, width) of the convolutions of a level
WIDEST = 8  # times the width of the first level
Output = tuple[jax.Array, list[jax.Array]]  # of one network: scores (B, t, h, w) and the features of its levels


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes and loss of the discriminator."""

    width: int = 32  # channels of the first level; each further one has twice as many, up to 8 times
    levels: int = 3  # convolutions of stride 2 in height and width
    form: Literal["hinge", "pair"] = "hinge"
    """"hinge": score one clip (1705.02894); "pair": say which of two clips, side by side, is real (2501.00103)"""
    networks: Literal["2d", "3d", "both"] = "both"  # of frames, of clips, or both with equal weights
    norm: Literal["group", "none"] = "group"  # after all convolutions but the first: one group per frame, or none
    lecam_weight: float = 0.0  # of the LeCam term (2104.03310), for hinge alone; a usual value is 0.05
    r1_weight: float = 0.0  # gamma of the R1 term (1801.04406), which grows with the number of pixels
    dtype: str = "auto"  # of activations: "float32", "bfloat16" or "auto" (`nn.layers.compute_dtype`)

    def __post_init__(self):
        for name in ("width", "levels"):
            value = getattr(self, name)
            check(value > 0, f"discriminator.{name} is {value}; it must be positive")
        for name in ("lecam_weight", "r1_weight"):
            value = getattr(self, name)
            check(value >= 0, f"discriminator.{name} is {value}; it must be 0 or more")
        choose("discriminator.form", self.form, {"hinge": 0, "pair": 0})
        choose("discriminator.networks", self.networks, {"2d": 0, "3d": 0, "both": 0})
        choose("discriminator.norm", self.norm, {"group": 0, "none": 0})
        choose("discriminator.dtype", self.dtype, {"auto": 0, "float32": 0, "bfloat16": 0})
        check(
            self.form == "hinge" or not self.lecam_weight,
            f"discriminator.lecam_weight is {self.lecam_weight}; it must be 0 where discriminator.form is 'pair'",
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the networks."""
        return tuple(KERNELS) if self.networks == "both" else (self.networks,)

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the channels of each level, finest first."""
        return tuple(self.width * min(2**level, WIDEST) for level in range(self.levels))


def discriminator_specs(config: DiscriminatorConfig) -> dict:
    """Declare all parameters: a tree for each of `config.names`."""
    return {name: network_specs(config, name) for name in config.names}


def network_specs(config: DiscriminatorConfig, name: str) -> dict:
    """Declare the parameters of one network, "2d" or "3d"."""
    inputs = (6 if config.form == "pair" else 3, *config.widths)
    levels: list[dict] = [
        {"conv": causal_conv3d_specs(before, width, KERNELS[name])} for before, width in zip(inputs, config.widths)
    ]
    for level, width in zip(levels[1:], config.widths[1:]):
        level |= {"norm": group_norm_specs(width)} if config.norm == "group" else {}
    time = KERNELS[name][0]
    return {"levels": levels, "head": causal_conv3d_specs(config.widths[-1], 1, (time, 3, 3))}


def discriminator(params: dict, config: DiscriminatorConfig, video_BTHWC: jax.Array) -> list[Output]:
    """Return scores, and features of each level, by each network: float32 (B, t, h, w), and (B, t', h', w', D).

    High scores say "real". The network "2d" has t = T; "3d" halves time at every level but the first. Clips of one
    frame are allowed.

    Args:
        params: the tree that `discriminator_specs` declares.
        config: that of the discriminator.
        video_BTHWC: (B, T, H, W, 3) in [-1, 1]; in form "pair" (B, T, H, W, 6), two clips. Then scores are logits of
            "the first is real".

    Raises:
        UserError: the frames are smaller than one position of the last level.
    """
    height, width = video_BTHWC.shape[2:4]
    least = 2**config.levels
    check(
        min(height, width) >= least,
        f"frames are {height} x {width} pixels; with discriminator.levels = {config.levels} they must be at least "
        f"{least} x {least}",
    )
    x = whole_frames(video_BTHWC).astype(compute_dtype(config.dtype))
    return [_network(params[name], x) for name in config.names]


def _network(p: dict, x_BTHWC: jax.Array) -> Output:
    features: list[jax.Array] = []
    for number, level in enumerate(p["levels"]):
        in_time = 2 if number and level["conv"]["weight"].shape[0] > 1 else 1
        x_BTHWC = conv3d(level["conv"], x_BTHWC, (in_time, 2))
        if "norm" in level:
            clips = x_BTHWC.shape[0], x_BTHWC.shape[1]
            x_BTHWC = to_clips(group_norm(level["norm"], to_images(x_BTHWC), 1), clips)
        x_BTHWC = jax.nn.leaky_relu(x_BTHWC, LEAK)
        features.append(x_BTHWC)
    return conv3d(p["head"], x_BTHWC, (1, 1))[..., 0].astype(jnp.float32), features


def conv3d(params: dict, x_BTHWC: jax.Array, strides: tuple[int, int]) -> jax.Array:
    """Convolve with strides in (time, space), in the dtype of x; a kernel of 3 or 4 is padded by one on each side.

    The padding is zeros in space and copies of the first and last frame in time: a still clip has still features.
    """
    weight, bias = (params[name].astype(x_BTHWC.dtype) for name in ("weight", "bias"))
    taps, *sizes = weight.shape[:3]
    in_time, in_space = strides
    pads = [((size - 1) // 2,) * 2 for size in sizes]
    copies = (taps - 1) // 2
    padded = jnp.concatenate([x_BTHWC[:, :1]] * copies + [x_BTHWC] + [x_BTHWC[:, -1:]] * copies, axis=1)

    def from_tap(tap: int) -> jax.Array:
        frames = padded[:, tap : padded.shape[1] - taps + tap + 1 : in_time]
        numbers = ("NHWC", "HWIO", "NHWC")
        images = jax.lax.conv_general_dilated(
            to_images(frames), weight[tap], (in_space, in_space), pads, dimension_numbers=numbers
        )
        return to_clips(images, (len(x_BTHWC), len(images) // len(x_BTHWC)))

    # A sum of 2-D convolutions: on CPUs XLA's 3-D convolution is slower (`nn.conv`).
    first, *others = map(from_tap, range(taps))
    return sum(others, first) + jax.lax.broadcast_to_rank(bias, 5)


def discriminator_loss(
    params: dict,
    config: DiscriminatorConfig,
    video_BTHWC: jax.Array,
    decoded_BTHWC: jax.Array,
    key: jax.Array,
    lecam: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the loss of the discriminator, averaged over its networks, and metrics.

    "hinge": mean relu(1 - D(x)) + mean relu(1 + D(y)) for real x and decoded y; "pair": binary cross entropy. R1 is
    gamma / 2 times the squared norm of the gradient of a clip's mean score by its pixels, a mean over clips.

    Args:
        params: the tree that `discriminator_specs` declares; gradients flow to it alone.
        config: that of the discriminator.
        video_BTHWC: real clips.
        decoded_BTHWC: the same clips, decoded.
        key: of the order of the two in form "pair".
        lecam: running means of the scores of real and of decoded clips; used if the LeCam term has a
            weight.

    Returns:
        The loss, and {"real", "fake": mean scores, "accuracy"} with "lecam" and "r1" if they have weights. In form
        "pair" a real clip's score is the logit of the right answer, and that of a decoded one its negative.
    """
    video, decoded = map(jax.lax.stop_gradient, (whole_frames(video_BTHWC), whole_frames(decoded_BTHWC)))
    sign_B = _order(key, len(video))
    real, fake = _scores(params, config, video, decoded, sign_B)
    if config.form == "hinge":
        loss = average([jax.nn.relu(1 - x).mean() + jax.nn.relu(1 + y).mean() for x, y in zip(real, fake)])
    else:
        loss = average([jax.nn.softplus(-x).mean() for x in real])
    metrics = {
        "real": average([x.mean() for x in real]),
        "fake": average([y.mean() for y in fake]),
        "accuracy": average([0.5 * ((x > 0).mean() + (y < 0).mean()) for x, y in zip(real, fake)]),
    }
    if config.lecam_weight:
        metrics["lecam"] = average([lecam_penalty(x, y, lecam) for x, y in zip(real, fake)])
        loss += config.lecam_weight * metrics["lecam"]
    if config.r1_weight:
        metrics["r1"] = _squared_gradient(params, config, video, decoded, sign_B)
        loss += 0.5 * config.r1_weight * metrics["r1"]
    return loss, metrics


def lecam_penalty(real: jax.Array, fake: jax.Array, lecam: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Return mean relu(D(x) - fake mean)^2 + mean relu(real mean - D(y))^2 (2104.03310, official code)."""
    real_mean, fake_mean = lecam
    over, under = jax.nn.relu(real - fake_mean), jax.nn.relu(real_mean - fake)
    return jnp.square(over).mean() + jnp.square(under).mean()


def _squared_gradient(
    params: dict, config: DiscriminatorConfig, video: jax.Array, decoded: jax.Array, sign_B: jax.Array
) -> jax.Array:
    """Return the squared norm of the gradient of a real clip's mean score by its pixels, a mean over clips."""

    def total(video: jax.Array) -> jax.Array:
        real, _ = _scores(params, config, video, decoded, sign_B)
        return average([x.mean((1, 2, 3)).sum() for x in real])  # the sum over clips: none depends on another

    return jnp.square(jax.grad(total)(video)).sum((1, 2, 3, 4)).mean()


def generator_loss(
    params: dict, config: DiscriminatorConfig, video_BTHWC: jax.Array, decoded_BTHWC: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the adversarial and the feature matching term of the decoder, each averaged over the networks.

    Adversarial: -mean D(y), or in form "pair" the binary cross entropy of the wrong answer. Feature matching (after
    1512.09300) is the L1 distance of the features of the decoded clip from those of the real one, over the mean
    magnitude of the latter, averaged over levels. In form "pair" it compares the features of (real, decoded) with those
    of (real, real).

    Args:
        params: of the discriminator; no gradients flow to them.
        config: that of the discriminator.
        video_BTHWC: real clips.
        decoded_BTHWC: the same clips, decoded; gradients flow to them alone.
        key: of the order of the two in form "pair".
    """
    params, video = jax.lax.stop_gradient((params, whole_frames(video_BTHWC)))
    decoded, sign_B = whole_frames(decoded_BTHWC), _order(key, len(video_BTHWC))
    if config.form == "pair":
        video, decoded = _pair(video, video, sign_B), _pair(video, decoded, sign_B)
    wanted, found = (discriminator(params, config, x) for x in (video, decoded))
    if config.form == "pair":
        terms = [jax.nn.softplus(_signed(scores, sign_B)).mean() for scores, _ in found]
    else:
        terms = [-scores.mean() for scores, _ in found]
    return average(terms), average([_distance(*both) for both in zip(wanted, found)])


def _distance(wanted: Output, found: Output) -> jax.Array:
    """Return the relative L1 distance of the features of one network, averaged over levels."""
    distances = []
    for x, y in zip(jax.lax.stop_gradient(wanted[1]), found[1]):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        distances.append(magnitude(x - y).mean() / (jnp.abs(x).mean() + 1e-6))
    return average(distances)


def adaptive_weight(reconstruction: PyTree, adversarial: PyTree, most: float) -> jax.Array:
    """Return the ratio of the norms of two gradients, at most `most`, as a constant (2012.09841, equation 7).

    It makes the adversarial term pull at the decoder as hard as the reconstruction does. It grows without bounds where
    the adversarial gradient vanishes, as when the discriminator is sure of its answers: `most` from 1 to 10 is safe.

    Args:
        reconstruction: gradient of the reconstruction terms by the decoder's last layer, an array or a tree.
        adversarial: gradient of the adversarial term by the same.
        most: the upper bound.
    """
    ratio = _norm(reconstruction) / (_norm(adversarial) + 1e-4)
    return jax.lax.stop_gradient(jnp.minimum(ratio, most))


def _norm(tree: PyTree) -> jax.Array:
    return jnp.sqrt(sum(jnp.square(x.astype(jnp.float32)).sum() for x in jax.tree.leaves(tree)))


def _scores(
    params: dict, config: DiscriminatorConfig, video: jax.Array, decoded: jax.Array, sign_B: jax.Array
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Return the scores of real and of decoded clips by each network; in form "pair" one is the negative of the other.

    R1 differentiates only the first, and the compiler drops the rest.
    """
    if config.form == "hinge":
        real, fake = (discriminator(params, config, x) for x in (video, decoded))
        return [x for x, _ in real], [y for y, _ in fake]
    scores = [_signed(x, sign_B) for x, _ in discriminator(params, config, _pair(video, decoded, sign_B))]
    return scores, [-x for x in scores]


def _order(key: jax.Array, clips: int) -> jax.Array:
    """Draw for each clip 1, if the real one comes first, or -1; key: see `nn.draws.per_clip`."""
    return jnp.where(
        reshard(per_clip(lambda key: jax.random.bernoulli(key, jnp.float32(0.5)), key, clips), "batch"), 1.0, -1.0
    )


def _signed(scores: jax.Array, sign_B: jax.Array) -> jax.Array:
    return scores * sign_B[:, None, None, None]


def _pair(video: jax.Array, decoded: jax.Array, sign_B: jax.Array) -> jax.Array:
    """Concatenate both on channels, the real one first where the sign is 1."""
    first = sign_B[:, None, None, None, None] > 0
    both = jnp.where(first, video, decoded), jnp.where(first, decoded, video)
    return jnp.concatenate(both, axis=-1)
