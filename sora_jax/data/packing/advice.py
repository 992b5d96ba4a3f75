"""Find the limit that leaves packs half empty, and the sizes that would fill them."""

from dataclasses import replace
from typing import Any

import numpy as np

from sora_jax.data.draws import generator
from sora_jax.data.packing.packs import PackingConfig
from sora_jax.data.packing.planning import plan

POOR = 0.15  # share of padding from which on there is advice
GAIN = 0.05  # share of padding that a change must save
NEAR = 0.02  # a smaller change that leaves so much more padding than the best is good enough
CLIPS = 2048  # planned to find out, drawn at random
TABLE = 1 << 24  # entries of a plan's table, (slots + 1) x 2 length, at most: 64 MB
TIMES = (1.5, 2, 3, 4, 6, 8, 12, 16, 32)  # what limits are multiplied by
ALL: tuple[str, ...] = ("length", "slots", "text_length")
# In order: the limits that are raised together, and by how much at most.
RAISED: tuple[dict[tuple[str, ...], int], ...] = (
    {("slots",): 32, ("text_length",): 32, ("slots", "text_length"): 32},
    {ALL: 4},
)


def advise(lengths: np.ndarray, texts: np.ndarray, sizes: PackingConfig) -> str:
    """Name the limit that leaves packs empty and what would fill them; "" where they are full, or nothing helps.

    lengths, texts: tokens and text tokens of each clip.
    """
    if len(lengths) > CLIPS:
        some = generator(0, "advice").choice(len(lengths), CLIPS, replace=False)
        lengths, texts = lengths[some], texts[some]

    def padding(sizes: PackingConfig) -> float:
        return 1 - lengths.sum() / (len(plan(0, 0, lengths, texts, sizes)) * sizes.length)

    found = padding(sizes)
    for raised in RAISED if found > POOR else ():
        left = {names: padding(_raise(sizes, names, most)) for names, most in raised.items()}
        best = min(left.values())
        if best <= found - GAIN:
            names = next(names for names, padded in left.items() if padded <= best + NEAR)
            for chosen in (_raise(sizes, names, times) for times in TIMES if times <= raised[names]):
                if (padded := padding(chosen)) <= best + NEAR:
                    break
            return _sentence(sizes, chosen, names, padded)
    return ""


def _raise(sizes: PackingConfig, names: tuple[str, ...], times: float) -> PackingConfig:
    larger: dict[str, Any] = {name: int(times * getattr(sizes, name)) for name in names}
    changed = replace(sizes, **larger)
    most = max(sizes.slots, TABLE // (2 * changed.length + 2))
    return replace(changed, slots=min(changed.slots, most))


def _sentence(sizes: PackingConfig, chosen: PackingConfig, names: tuple[str, ...], padding: float) -> str:
    limits = ("length",) if names == ALL else names
    values = " and ".join(f"packing.{name} = {getattr(sizes, name)}" for name in limits)
    options = " ".join(f"--config.packing.{name}={getattr(chosen, name)}" for name in names)
    verb = "is the limit" if len(limits) == 1 else "are the limits"
    return f"{values} {verb}; {options} would leave {padding:.0%} padding"
