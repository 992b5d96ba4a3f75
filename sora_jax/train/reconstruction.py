"""Compute the loss that trains an autoencoder of any kind: reconstruction, its bottleneck, and a discriminator's part.

Every term is a mean over its elements, so weights do not depend on sizes. Codes that sum over the pixels of a clip and
over its latents have, in these terms, a KL weight that is smaller by the ratio of the two numbers.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.config import check, choose
from sora_jax.diffusion.keys import Purpose
from sora_jax.models import codes
from sora_jax.models.discriminator import DiscriminatorConfig, adaptive_weight, discriminator_loss, generator_loss
from sora_jax.models.first_stage import (
    TrainedConfig,
    block_of,
    codes_of,
    decode,
    encode,
    kl_to_standard_normal,
    psnr,
    sample_posterior,
)
from sora_jax.models.lpips import lpips
from sora_jax.models.perceptual import (
    FORMS,
    bands_loss,
    choose_frames,
    pyramid_l1,
    random_features_loss,
    random_shift,
    whole_frames,
)
from sora_jax.nn.draws import per_clip
from sora_jax.parallel.rules import laid_out_as, reshard

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of what is added to the L1, L2 and KL terms of the model's config; 0: the term is not computed."""

    kl_target: float = 0.0  # KL in nats per latent value to which the KL weight is adapted; 0: the weight is fixed
    bands_weight: float = 0.0  # of the Haar bands of the error
    bands_form: Literal["squared", "charbonnier", "l1"] = "squared"  # penalty of a coefficient; L1 from scratch blurs
    bands_levels: int = 2  # of the Haar transform
    pyramid_weight: float = 0.0  # of the L1 distance of frames that are halved several times
    pyramid_levels: int = 3  # how often they are halved
    features_weight: float = 0.0  # of the distance of features of a random network, a new one at every step
    features_frames: int = 4  # frames of each clip whose features are compared, also by LPIPS
    lpips_weight: float = 0.0  # of LPIPS
    lpips_file: str = ""  # file with the weights of LPIPS (`models.lpips.read_lpips` says how to make it)
    adversarial_weight: float = 0.0  # of the adversarial term
    matching_weight: float = 0.0  # of the distance of the discriminator's features
    discriminator_start: int = 0  # step at which the discriminator begins to learn
    adversarial_start: int = 0  # step at which the decoder begins to feel it, at least `discriminator_start`
    adversarial_warmup: int = 1000  # steps in which the weights of its terms rise linearly
    adaptive_most: float = 0.0  # most by which the ratio of gradients scales the adversarial term; 0: no such scaling
    equivariance: float = 0.0  # share of the loss that compares scaled and turned latents with clips changed alike
    equivariance_scales: tuple[float, ...] = (0.5, 0.75, 1.0)  # of height and width; each costs its square in time
    latent_noise: float = 0.0  # deviation, in those of the latents, of the noise level that is added before decoding

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)):
                check(value >= 0, f"loss.{field.name} is {value}; it must be 0 or more")
        for name in ("bands_levels", "pyramid_levels", "features_frames"):
            check(getattr(self, name) > 0, f"loss.{name} is {getattr(self, name)}; it must be positive")
        choose("loss.bands_form", self.bands_form, FORMS)
        check(
            not self.lpips_weight or bool(self.lpips_file),
            "loss.lpips_file is not given; with loss.lpips_weight it must be a file of weights",
        )
        check(self.equivariance <= 1, f"loss.equivariance is {self.equivariance}; it must be from 0 to 1")
        check(
            bool(self.equivariance_scales) and all(0 < scale <= 1 for scale in self.equivariance_scales),
            f"loss.equivariance_scales is {self.equivariance_scales}; each must be above 0 and at most 1",
        )
        check(
            self.adversarial_start >= self.discriminator_start,
            f"loss.adversarial_start is {self.adversarial_start}; it must be at least loss.discriminator_start = "
            f"{self.discriminator_start}",
        )

    @property
    def adversarial(self) -> bool:
        """True if a discriminator is trained."""
        return self.adversarial_weight > 0 or self.matching_weight > 0


class Aids(NamedTuple):
    """Hold what the loss reads beside the autoencoder.

    kl_weight: in place of the model's. soften: share of noise in place of rounding (`codes.quantize`). lpips: its
    parameters. discriminator: parameters and config. lecam: running means of its scores. ramp: factor, from 0 to 1, of
    the terms that a discriminator gives. rows_B: the numbers of the clips in the whole batch of a step, which key their
    draws; None: 0, 1, 2...
    """

    kl_weight: jax.Array | None = None
    soften: jax.Array | None = None
    lpips: dict | None = None
    discriminator: tuple[dict, DiscriminatorConfig] | None = None
    lecam: tuple[jax.Array, jax.Array] | None = None
    ramp: jax.Array | float = 1.0
    rows_B: jax.Array | None = None


class Losses(NamedTuple):
    """Hold the loss of the autoencoder, that of the discriminator (0 without one), and all terms as metrics."""

    model: jax.Array
    discriminator: jax.Array
    metrics: Metrics


def reconstruction_loss(
    params: dict,
    config: TrainedConfig,
    video_BTHWC: jax.Array,
    key: jax.Array,
    loss: LossConfig = LossConfig(),
    aids: Aids = Aids(),
) -> Losses:
    """Return the training losses of a batch of clips in [-1, 1], and their terms.

    Draws of a step (turns, shifts, random features) are functions of `key` and their purpose; draws of a clip (its
    latents, noise, frames, order) of its row, too, so that they are the same in whatever micro-batch. PSNR is a mean
    over clips, of the result clipped to [-1, 1].
    """
    mean, logvar = encode(params, config, video_BTHWC)
    keys = _Keys(key, _rows(video_BTHWC) if aids.rows_B is None else aids.rows_B)
    drawn = _draw(config, mean, logvar, keys, aids)
    z = drawn
    if loss.latent_noise:
        z = add_latent_noise(z, keys.of_clips(Purpose.LATENT_NOISE), loss.latent_noise)

    def compare(z: jax.Array, video: jax.Array) -> Losses:
        return _compare(decode(params, config, z), video, config, keys, loss, aids)

    found = _transformed(compare, z, video_BTHWC, keys, loss) if loss.equivariance else compare(z, video_BTHWC)
    # After the decoder: in another order the gradients of the posterior would be added in another one, and runs of
    # earlier versions would not go on to the bit.
    bottleneck, metrics = _bottleneck(config, mean, logvar, drawn, aids)
    return Losses(found.model + bottleneck, found.discriminator, found.metrics | metrics)


class _Keys(NamedTuple):
    """Give the keys of a batch's draws by their purpose: those of the step, and those of its clips."""

    key: jax.Array
    rows_B: jax.Array

    def of_step(self, purpose: Purpose) -> jax.Array:
        return jax.random.fold_in(self.key, purpose)

    def of_clips(self, purpose: Purpose) -> jax.Array:
        return jax.vmap(jax.random.fold_in, (None, 0))(self.of_step(purpose), self.rows_B)


def _rows(video_BTHWC: jax.Array) -> jax.Array:
    return reshard(jnp.arange(len(video_BTHWC), dtype=jnp.int32), "batch")


def _draw(config: TrainedConfig, mean: jax.Array, logvar: jax.Array, keys: _Keys, aids: Aids) -> jax.Array:
    """Return the latents that are decoded: drawn from the posterior, or the codes of its mean."""
    discrete = codes_of(config)
    if discrete.name == "none":
        return sample_posterior(keys.of_clips(Purpose.NOISE), mean, logvar)
    return codes.quantize(discrete, mean, keys.of_clips(Purpose.NOISE), aids.soften)


def _bottleneck(
    config: TrainedConfig, mean: jax.Array, logvar: jax.Array, drawn: jax.Array, aids: Aids
) -> tuple[jax.Array, Metrics]:
    """Return the loss of the bottleneck, and its terms."""
    if codes_of(config).name != "none":
        return codes.code_losses(codes_of(config), mean, drawn)
    kl = kl_to_standard_normal(mean, logvar).mean()
    weight = config.kl_weight if aids.kl_weight is None else aids.kl_weight
    return weight * kl, {"kl": kl}


def add_latent_noise(z_BthwC: jax.Array, key: jax.Array, deviation: float) -> jax.Array:
    """Add noise of a level that is drawn for each clip, |N(0, deviation^2)| of the deviation of the batch's latents.

    A decoder that has seen it forgives the errors of a denoiser (SSVAE, 2512.05394; LTX-Video, 2501.00103). key: see
    `nn.draws.per_clip`. The deviation is that of the clips given, so of a micro-batch, not of the whole batch.
    """
    clips, *shape = z_BthwC.shape

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        level, noise = jax.random.split(key)
        tau = jax.random.normal(level, (1,) * len(shape), jnp.float32)
        return tau, jax.random.normal(noise, shape, jnp.float32)

    level, noise = per_clip(draw, key, clips)
    tau = jnp.abs(deviation * laid_out_as(level, z_BthwC[:, :1, :1, :1, :1]))
    # With its gradient: else larger latents would be a way out. The gradient of a root has no value at 0.
    std = jnp.sqrt(z_BthwC.var((0, 1, 2, 3), keepdims=True) + 1e-12)
    return z_BthwC + tau * std * laid_out_as(noise, z_BthwC)


def _transformed(
    compare: Callable[[jax.Array, jax.Array], Losses],
    z_BthwC: jax.Array,
    video_BTHWC: jax.Array,
    keys: _Keys,
    loss: LossConfig,
) -> Losses:
    """Compare clips, and also scaled and turned clips with what is decoded of latents changed alike (2502.09509).

    A step takes all scales, not one drawn: a convolution in a branch of a `switch` runs several times slower on CPUs.
    """
    scales = [s for s in loss.equivariance_scales if fits(s, z_BthwC.shape[2:4]) and fits(s, video_BTHWC.shape[2:4])]
    square = z_BthwC.shape[2] == z_BthwC.shape[3]
    turn_key = keys.of_step(Purpose.EQUIVARIANCE)
    quarters, step = (4, 1) if square else (2, 2)
    turn = step * jax.random.randint(turn_key, (), 0, quarters, jnp.int32)
    plain = compare(z_BthwC, video_BTHWC)
    if not scales:
        return plain
    changed = [compare(*(_turn(resize(x, scale), turn, square) for x in (z_BthwC, video_BTHWC))) for scale in scales]
    share = loss.equivariance

    def mixed(name: str) -> jax.Array:
        return (1 - share) * getattr(plain, name) + share * sum(getattr(c, name) for c in changed) / len(changed)

    return Losses(mixed("model"), mixed("discriminator"), plain.metrics)


def fits(scale: float, sides: tuple[int, ...]) -> bool:
    """Return True if the scaled sides are whole numbers."""
    return all(math.isclose(scale * side, round(scale * side), abs_tol=1e-6) for side in sides)


def resize(x_BTHWC: jax.Array, scale: float) -> jax.Array:
    """Scale height and width by a factor of at most 1, linearly, with antialiasing."""
    if scale == 1:
        return whole_frames(x_BTHWC)
    rows, columns = (
        jnp.asarray(jax.image.resize(np.eye(side, dtype=np.float32), (round(side * scale), side), "linear"))
        for side in x_BTHWC.shape[2:4]
    )
    return jnp.einsum("oh,pw,bthwc->btopc", rows, columns, whole_frames(x_BTHWC))


def _turn(x_BTHWC: jax.Array, quarters: jax.Array, square: bool) -> jax.Array:
    """Turn frames by so many quarters; by halves alone where they are no squares."""
    if not square:
        return jnp.where(quarters == 2, x_BTHWC[:, :, ::-1, ::-1], x_BTHWC)
    x_BTHWC = jnp.where(quarters >= 2, x_BTHWC[:, :, ::-1, ::-1], x_BTHWC)
    return jnp.where(quarters % 2 == 1, jnp.swapaxes(x_BTHWC, 2, 3)[:, :, ::-1], x_BTHWC)


def _compare(
    decoded: jax.Array, video: jax.Array, config: TrainedConfig, keys: _Keys, loss: LossConfig, aids: Aids
) -> Losses:
    """Return the losses of decoded clips, without that of the bottleneck."""
    video = laid_out_as(video, decoded)
    total, metrics = _distances(decoded, video, config, keys, loss, aids)
    metrics |= {"psnr": psnr(jnp.clip(decoded, -1.0, 1.0), video).mean()}
    if aids.discriminator is None:
        return Losses(total, jnp.zeros(()), metrics)
    params, networks = aids.discriminator
    order = keys.of_clips(Purpose.DISCRIMINATOR)
    adversarial, matching = generator_loss(params, networks, video, decoded, order)
    weight = jnp.float32(loss.adversarial_weight)
    if loss.adaptive_most:
        here = jax.lax.stop_gradient(decoded)
        of_distances = jax.grad(lambda x: _distances(x, video, config, keys, loss, aids)[0])(here)
        of_adversary = jax.grad(lambda x: generator_loss(params, networks, video, x, order)[0])(here)
        weight = weight * adaptive_weight(of_distances, of_adversary, loss.adaptive_most)
        metrics["adversarial_weight"] = weight
    total = total + aids.ramp * (weight * adversarial + loss.matching_weight * matching)
    lecam = aids.lecam or (jnp.zeros(()), jnp.zeros(()))
    own, scores = discriminator_loss(params, networks, video, decoded, order, lecam)
    scores = {f"scores_{name}": value for name, value in scores.items()}
    return Losses(total, own, metrics | {"adversarial": adversarial, "matching": matching} | scores)


def _distances(
    decoded: jax.Array, video: jax.Array, config: TrainedConfig, keys: _Keys, loss: LossConfig, aids: Aids
) -> tuple[jax.Array, Metrics]:
    """Return the weighted sum of all distances of decoded clips from the original, and each of them."""
    error = decoded - video
    parts = {"l1": jnp.abs(error).mean(), "l2": jnp.square(error).mean()}
    total = config.l1_weight * parts["l1"] + config.l2_weight * parts["l2"]

    def bands() -> jax.Array:
        shift = random_shift(keys.of_step(Purpose.BANDS), loss.bands_levels)
        return bands_loss(decoded, video, loss.bands_levels, loss.bands_form, shift)

    def chosen() -> tuple[jax.Array, jax.Array]:
        whole = whole_frames(decoded), whole_frames(video)
        first, second = choose_frames(keys.of_clips(Purpose.FEATURES), loss.features_frames, *whole)
        return first, second

    def features() -> jax.Array:
        return random_features_loss(keys.of_step(Purpose.FEATURES), *chosen(), loss.features_frames)

    # Functions: a term without a weight is not traced.
    terms: dict[str, tuple[float, Callable[[], Any]]] = {
        "bands": (loss.bands_weight, bands),
        "pyramid": (loss.pyramid_weight, lambda: pyramid_l1(decoded, video, loss.pyramid_levels)),
        "features": (loss.features_weight, features),
        "lpips": (loss.lpips_weight, lambda: lpips(aids.lpips or {}, *chosen()).mean()),
    }
    for name, (weight, term) in terms.items():
        if weight:
            parts[name] = term()
            total = total + weight * parts[name]
    return total, parts


def resolution(config: TrainedConfig, loss: LossConfig = LossConfig()) -> float | None:
    """Return the `resolution_of_loss` of an autoencoder; None where its KL weight is adapted, or it has no KL term."""
    if codes_of(config).name != "none" or loss.kl_target:
        return None
    values = 3 * math.prod(block_of(config)) / config.latent_channels
    return resolution_of_loss(config.l1_weight, config.l2_weight, config.kl_weight, values)


def resolution_of_loss(l1_weight: float, l2_weight: float, kl_weight: float, values: float) -> float | None:
    """Return the level in dB of the finest detail that the loss keeps; None if its weights set no such level.

    The loss is a mean over pixel values plus `kl_weight` times a mean over latent values, of which there are `values`
    times fewer. Detail of deviation s per pixel value is worth its nats as long as its error costs more than they do:
    l2 s^2 + l1 s / sqrt(2 pi) = kl_weight values / 2, for Gaussian errors. Of L2 alone this is the variance of the
    Gaussian likelihood that the loss is equivalent to (beta-VAE; 2006.13202). Peak 2: pixels are in [-1, 1].
    """
    price, linear = kl_weight * values / 2, l1_weight / math.sqrt(2 * math.pi)
    if price == 0 or l1_weight == l2_weight == 0:
        return None
    std = 2 * price / (linear + math.sqrt(linear**2 + 4 * l2_weight * price))
    return 20 * math.log10(2 / std)
