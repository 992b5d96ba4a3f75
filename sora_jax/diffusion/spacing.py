"""The grid of times along which a solver steps, before it is shifted by clip size: host code.

    spacing    the times at which n steps begin; the last step ends at 0
    even       1, 1 - 1/n, .. 1/n
    trailing   every (1000 / n)th discrete step, counted back from the last, 999
    leading    every (1000 // n)th discrete step, counted up from the first, 0
    leading_1  as leading, from the second step, 1: the grid of Stable Diffusion 1 and 2
    linspace   n steps evenly from the last to the first, both included
    respaced   steps such as "250", "ddim50" or "10,15,20" as in `respaced_steps`
    sd3        n times evenly from 1 to 3 / 1002: the grid of SD3, for times that are shifted by its alpha of 3
    karras     noise levels sigma = b / a, even in sigma^(1/7), from the largest to the smallest
    times      a list that falls from 1, such as "1,0.98,0.9,0.725", as distilled models want; no size shifts it

`trailing`, `leading` and `linspace` are those of Lin et al. (2305.08891, table 2); step i is at time (i + 1) / 1000.
`leading_1` is `leading` of diffusers with steps_offset=1, as the schedulers of Stable Diffusion 1 and 2 are published.
`sd3` ends at the least of a thousand times after their shift, and is itself shifted again (2403.03206's code, and
diffusers' FlowMatchEulerDiscreteScheduler); it needs `times.shift_rule` `constant`.
The ends of `karras` (2206.00364, equation 5) are the levels of the first and the last step, but at least 0.002, and
80 where the last is infinite.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from sora_jax.config import check, choose
from sora_jax.diffusion.process import (
    DDPM_STEPS,
    EDM_RHO,
    EDM_SIGMA_MAX,
    Process,
    half_log_snr,
    process_named,
    time_of_half_log_snr,
    time_of_step,
)

SIGMA_MIN = 0.002
SD3_SHIFT = 3.0
_INFINITE = 1e4  # no process with a signal at t = 1 has so high a noise level


def base_times(process: str | Process, steps: int | str, spacing: str = "even") -> np.ndarray:
    """Return times (K,) float64, strictly decreasing to 0: one for each of the K - 1 steps, and the end.

    `steps` is a number; for `respaced` also a text, for `times` a list.

    Raises:
        UserError: an unknown spacing, a number of steps that the spacing cannot make, or a text it cannot read.
    """
    count = count_steps(steps, spacing)
    times_of = SPACINGS[spacing]
    if spacing == "times":
        return np.array([*_listed(str(steps)), 0.0])
    if times_of is None:
        return _times_of(respaced_steps(str(steps)))
    return times_of(process_named(process) if isinstance(process, str) else process, count)


def count_steps(steps: int | str, spacing: str) -> int:
    """Count the steps that `base_times` makes, for any process; no device is started.

    Raises:
        UserError: as `base_times`.
    """
    choose("spacing", spacing, SPACINGS)
    if spacing == "respaced":
        return len(respaced_steps(str(steps)))
    if spacing == "times":
        return len(_listed(str(steps)))
    most = {"even": None, "karras": None, "sd3": None, "leading_1": DDPM_STEPS - 1}
    return _count(steps, most.get(spacing, DDPM_STEPS))


def respaced_steps(sections: str, steps: int = DDPM_STEPS) -> list[int]:
    """Return the discrete steps, ascending, that a text keeps, as in the code of Dhariwal and Nichol and of DiT.

    "250" keeps that many, evenly from the first step to the last; "10,15,20" cuts the steps into as many equal
    sections and keeps that many of each; "ddim50" keeps every k-th from the first, k the smallest whole stride
    that gives exactly so many.

    Raises:
        UserError: the text cannot be read, a section has fewer steps than it should keep, or no stride fits.
    """
    if sections.startswith("ddim"):
        count = _count(sections.removeprefix("ddim"), steps)
        strides = [stride for stride in range(1, steps) if len(range(0, steps, stride)) == count]
        check(strides, f"steps is {sections!r}; no whole stride keeps {count} of {steps} steps")
        return list(range(0, steps, strides[0]))
    parts = sections.split(",")
    sizes = [steps // len(parts) + (part < steps % len(parts)) for part in range(len(parts))]
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    counts = [_count(part, size) for part, size in zip(parts, sizes, strict=True)]
    return [i for start, size, count in zip(starts, sizes, counts, strict=True) for i in _spread(start, size, count)]


def _listed(text: str) -> list[float]:
    """Read the times of a list at which steps begin; a 0 at its end is left out.

    Raises:
        UserError: the list is empty, does not begin at 1, or does not fall from each time to the next.
    """
    try:
        # As float32, which is what a solver is given: times that are equal there are equal.
        times = [float(np.float32(part)) for part in text.strip("()[] ").split(",")]
    except ValueError:
        times = []
    times = times[:-1] if times[-1:] == [0.0] else times
    falls = times[:1] == [1.0] and all(a > b for a, b in zip(times, [*times[1:], 0.0]))
    check(falls, f"steps is {text!r}; with spacing 'times' it must be times that fall from 1, such as 1,0.95,0.8,0.4")
    return times


def _spread(start: int, size: int, count: int) -> list[int]:
    # Python's rounding of the running sum is part of the convention: it decides between two steps at halves.
    stride, place, kept = (size - 1) / (count - 1) if count > 1 else 1.0, 0.0, []
    for _ in range(count):
        kept.append(int(start) + round(place))
        place += stride
    return kept


def _count(text: int | str, most: int | None) -> int:
    allowed = "a whole number of 1 or more" if most is None else f"a whole number from 1 to {most}"
    digits = str(text).strip()
    valid = digits.isascii() and digits.isdigit() and 1 <= int(digits) <= (most or int(digits))
    check(valid, f"steps is {text!r}; it must be {allowed}")
    return int(digits)


def _times_of(steps: ArrayLike | Sequence[int]) -> np.ndarray:
    """Return the times of discrete steps, from the last to the first, then 0."""
    return np.array([*time_of_step(np.sort(np.asarray(steps, np.float64))[::-1]), 0.0])


def _karras(process: Process, count: int) -> np.ndarray:
    ends = jnp.asarray([1.0, time_of_step(0)], jnp.float32)
    largest, smallest = np.exp(-np.asarray(half_log_snr(process, ends), np.float64))
    largest = largest if largest < _INFINITE else EDM_SIGMA_MAX
    roots = np.linspace(largest ** (1 / EDM_RHO), max(smallest, SIGMA_MIN) ** (1 / EDM_RHO), count)
    levels = jnp.asarray(-EDM_RHO * np.log(roots), jnp.float32)
    return np.array([*np.asarray(time_of_half_log_snr(process, levels), np.float64), 0.0])


def _even(process: Process, count: int) -> np.ndarray:
    return np.linspace(1.0, 0.0, count + 1)


def _leading(process: Process, count: int) -> np.ndarray:
    return _times_of(np.arange(count) * (DDPM_STEPS // count))


def _leading_1(process: Process, count: int) -> np.ndarray:
    return _times_of(1 + np.arange(count) * (DDPM_STEPS // count))


def _sd3(process: Process, count: int) -> np.ndarray:
    first = time_of_step(0)
    least = SD3_SHIFT * first / (1.0 + (SD3_SHIFT - 1.0) * first)
    return np.array([*np.linspace(1.0, least, count), 0.0])


def _trailing(process: Process, count: int) -> np.ndarray:
    return _times_of(np.round(DDPM_STEPS - np.arange(count) * DDPM_STEPS / count) - 1)


def _linspace(process: Process, count: int) -> np.ndarray:
    return _times_of(np.round(np.linspace(0, DDPM_STEPS - 1, count)) if count > 1 else [DDPM_STEPS - 1])


# (process, number of steps) -> times; `respaced` and `times` read a text instead of a number.
SPACINGS: dict[str, Callable[[Process, int], np.ndarray] | None] = {
    "even": _even,
    "respaced": None,
    "leading": _leading,
    "leading_1": _leading_1,
    "trailing": _trailing,
    "linspace": _linspace,
    "sd3": _sd3,
    "karras": _karras,
    "times": None,
}
