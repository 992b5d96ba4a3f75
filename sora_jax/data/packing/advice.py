"""Find the limit that leaves packs half empty, and the sizes that would fill them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from sora_jax.data.draws import generator
from sora_jax.data.packing.packs import PackingConfig
from sora_jax.data.packing.planning import Plan, plan

POOR = 0.15  # share of padding from which on there is advice
GAIN = 0.05  # share of padding that a change must save
NEAR = 0.02  # a smaller size that leaves so much more padding than the best is good enough
CLIPS = 2048  # planned to find out, drawn at random
TABLE = 1 << 24  # entries of a plan's table, (slots + 1) x 2 length, at most: 64 MB
STEPS = {"slots": 4, "text_length": 32}  # sizes are rounded up to multiples


def advise(lengths: np.ndarray, texts: np.ndarray, sizes: PackingConfig) -> str:
    """Name the limit that leaves packs empty and what would fill them; "" where they are full, or nothing helps.

    lengths, texts: tokens and text tokens of each clip.
    """
    some = np.arange(len(lengths))
    if len(some) > CLIPS:
        some = generator(0, "advice").choice(len(lengths), CLIPS, replace=False)
    clips = _Clips(lengths[some], texts[some])
    found = clips.padding(sizes)
    if found <= POOR:
        return ""
    wide = _without_limits(clips, sizes)
    tries = [["slots"], ["text_length"], ["slots", "text_length"]]
    left = [clips.padding(_changed(sizes, wide, names)) for names in tries]
    best = min(left)
    if best > found - GAIN:
        return _advise_length(clips, sizes, found)
    names = next(names for names, padding in zip(tries, left, strict=True) if padding <= best + NEAR)
    for chosen in _candidates(clips, sizes, wide, names):
        if (padding := clips.padding(chosen)) <= best + NEAR:
            break
    return _sentence(sizes, chosen, names, padding)


def _sentence(sizes: PackingConfig, chosen: PackingConfig, limiting: list[str], padding: float) -> str:
    limits = " and ".join(f"packing.{name} = {getattr(sizes, name)}" for name in limiting)
    changed = [name for name in vars(sizes) if getattr(sizes, name) != getattr(chosen, name)]
    options = " ".join(f"--config.packing.{name}={getattr(chosen, name)}" for name in changed)
    verb = "is the limit" if len(limiting) == 1 else "are the limits"
    return f"{limits} {verb}; {options} would leave {padding:.0%} padding"


def _advise_length(clips: _Clips, sizes: PackingConfig, found: float) -> str:
    """Advise longer packs where clips do not fill those of this length."""
    for times in (2, 3, 4):
        longer = {name: times * getattr(sizes, name) for name in ("length", "slots", "text_length")}
        if (padding := clips.padding(replace(sizes, **longer))) < found / 2:
            return _sentence(sizes, replace(sizes, **longer), ["length"], padding)
    return ""


@dataclass(frozen=True)
class _Clips:
    """Tokens and text tokens of some clips."""

    lengths: np.ndarray
    texts: np.ndarray

    def packs(self, sizes: PackingConfig) -> Plan:
        """Plan the clips into packs of these sizes."""
        return plan(0, 0, self.lengths, self.texts, sizes)

    def padding(self, sizes: PackingConfig) -> float:
        """Return the share of padding in packs of these sizes."""
        return 1 - self.lengths.sum() / (len(self.packs(sizes)) * sizes.length)


def _without_limits(clips: _Clips, sizes: PackingConfig) -> PackingConfig:
    """Return sizes whose slots and text tokens no pack uses up, as far as a plan's table allows."""
    slots = min(int(sizes.length // clips.lengths.min()), TABLE // (2 * sizes.length + 2))
    slots = max(sizes.slots, slots)
    return replace(sizes, slots=slots, text_length=max(sizes.text_length, slots * int(clips.texts.max())))


def _candidates(clips: _Clips, sizes: PackingConfig, wide: PackingConfig, names: list[str]) -> Iterable[PackingConfig]:
    """Yield sizes from small to large: enough for half of the packs without limits, for more, at last for all."""
    packs = clips.packs(_changed(sizes, wide, names))
    ends = packs.offsets
    texts = np.concatenate([[0], np.cumsum(clips.texts[packs.order])])
    used = {"slots": np.diff(ends), "text_length": np.diff(texts[ends])}
    for share in (0.5, 0.75, 0.9, 1.0):
        most = {name: int(np.quantile(used[name], share)) for name in names}
        rounded = {name: -(-most[name] // STEPS[name]) * STEPS[name] for name in names}
        yield replace(sizes, **{name: max(rounded[name], getattr(sizes, name)) for name in names})


def _changed(sizes: PackingConfig, other: PackingConfig, names: list[str]) -> PackingConfig:
    return replace(sizes, **{name: getattr(other, name) for name in names})
