"""The weight of a prediction's error at each noise level.

Each weight is defined once, on the squared error of x_0 or of eps, and converted to the model's prediction: by
equation (7) of `process`, an error e of the prediction c x_0 + d eps at a known x_t is an error of

    -b e / (a d - b c)  in x_0,      a e / (a d - b c)  in eps                            (1)

    name       weight of the squared error
    uniform    1 on the model's own prediction, but for the score, which is infinite at t = 0
    eps        1 on eps: DDPM's simple loss, Ho et al. 2006.11239, equation 14; b^2 on the score, as score matching
               weighs it, Song and Ermon 1907.05600, section 4.2
    elbo       -d log snr / dt on eps: twice the bound on the likelihood, Kingma et al. 2107.00630
    min_snr    min(snr, gamma) on x_0; Hang et al. 2303.09556
    sigmoid    sigmoid(bias - log snr) (-d log snr / dt) on eps; Kingma and Gao 2303.00848; Hoogeboom et al.
               2410.19324
    edm        (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on x_0, sigma = b / a; Karras et al. 2206.00364,
               table 1. With sigma_data = 1 it is 1 on the prediction `edm`, and on v where variance is preserved
    velocity   1 on the velocity, at most 400 on the model's own prediction: the loss of JiT, Li and He 2511.13720,
               which predicts x_0 of the linear flow and divides its error by t, but never by less than 0.05

The slope of log snr makes `elbo` and `sigmoid` mean the same on every process, for uniform times.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sora_jax.config import check, choose
from sora_jax.diffusion.prediction import form_of
from sora_jax.diffusion.process import Process, derivatives, half_log_snr, half_log_snr_slope

# Beyond this |lambda| a model cannot tell data from noise; the limit keeps the weights finite in float32.
_MAX_HALF_LOG_SNR = 15.0
# Without signal at t = 1 lambda falls to -infinity: the last of a thousand steps has the weight of its start.
_LATEST = 0.999
_MAX_VELOCITY_WEIGHT = 400.0


@dataclass(frozen=True)
class WeightConfig:
    """Choose the weight of the squared error at each noise level."""

    name: str = "uniform"  # weight of the error at each noise level, see docs/training.md
    gamma: float = 5.0  # of min_snr: the largest signal-to-noise ratio that counts
    bias: float = 2.0  # of sigmoid: the log signal-to-noise ratio at which the sigmoid is 1/2
    sigma_data: float = 1.0  # of edm: the standard deviation of the data

    def __post_init__(self):
        choose("weight.name", self.name, WEIGHTS)
        for name in ("gamma", "bias", "sigma_data"):
            value = getattr(self, name)
            check(math.isfinite(value), f"weight.{name} is {value}; it must be finite")
            check(name == "bias" or value > 0, f"weight.{name} is {value}; it must be above 0")


# (config, lambda, d log snr / dt) -> weight, and the space it is defined in ("" for the model's own).
WEIGHTS: dict[str, tuple[str, Callable[[WeightConfig, Array, Array], Array]]] = {
    "uniform": ("", lambda config, half, slope: jnp.ones_like(half)),
    "eps": ("eps", lambda config, half, slope: jnp.ones_like(half)),
    "elbo": ("eps", lambda config, half, slope: -slope),
    "min_snr": ("x0", lambda config, half, slope: jnp.minimum(jnp.exp(2.0 * half), config.gamma)),
    "sigmoid": ("eps", lambda config, half, slope: -slope * jax.nn.sigmoid(config.bias - 2.0 * half)),
    "edm": ("x0", lambda config, half, slope: config.sigma_data**-2 + jnp.exp(2.0 * half)),
    "velocity": ("velocity", lambda config, half, slope: jnp.ones_like(half)),
}


def check_weight(name: str, prediction_type: str) -> None:
    """Check that the error of this prediction can have this weight.

    Raises:
        UserError: `uniform` with score, whose squared error grows as 1 / b^2 towards the data.
    """
    form_of(prediction_type)
    check(
        (name, prediction_type) != ("uniform", "score"),
        f"weight.name is {name!r}; with the prediction score it must be one of "
        f"{', '.join(other for other in WEIGHTS if other != 'uniform')}",
    )


def noise_level_weight(config: WeightConfig, process: Process, prediction_type: str, t: Array) -> Array:
    """Return the factor on the squared error of a prediction, float32, shaped like t; for 0 < t."""
    space, weight = WEIGHTS[config.name]
    t = jnp.minimum(t, _LATEST)
    half = jnp.clip(half_log_snr(process, t), -_MAX_HALF_LOG_SNR, _MAX_HALF_LOG_SNR)
    value = weight(config, half, 2.0 * half_log_snr_slope(process, t))
    return value * jnp.square(_error_ratio(process, prediction_type, space, half, t)) if space else value


def _error_ratio(process: Process, prediction_type: str, space: str, half: Array, t: Array) -> Array:
    """Evaluate equation (1) for e = 1, divided through by a or b: neither end of time may overflow.

    An error of the velocity is a' times that in x_0 and b' times that in eps.
    """
    c, d = form_of(prediction_type)(process, t)
    if space == "velocity":
        slope_a, slope_b = derivatives(process, t)
        ratio = (jnp.exp(half) * slope_b - slope_a) / (jnp.exp(half) * d - c)
        return jnp.clip(ratio, -(_MAX_VELOCITY_WEIGHT**0.5), _MAX_VELOCITY_WEIGHT**0.5)
    if space == "x0":
        return 1.0 / (c - jnp.exp(half) * d)
    return 1.0 / (d - jnp.exp(-half) * c)
