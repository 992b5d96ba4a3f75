"""Model FLOPs of a denoiser over packs, counted from its specs and the sizes of the clips."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from sora_jax.data.packing.packs import text_counts, token_counts
from sora_jax.models.counting import used_rows, weights
from sora_jax.models.text import TextConfig


class BlocksConfig(Protocol):
    """List what is read of a network's config."""

    @property
    def depth(self) -> int:
        """Return the number of blocks."""

    @property
    def width(self) -> int:
        """Return D."""

    @property
    def text(self) -> TextConfig | None:
        """Return the config of the text encoder, None for none."""


class Reads(NamedTuple):
    """Count what self-attention does not: tokens that a row adds to its clip, and further keys that a token reads."""

    added: int = 0
    further: int = 0


def pack_flops(
    config: BlocksConfig, specs: dict, batch: dict, encodes_condition: bool = True, reads: Reads = Reads()
) -> float:
    """Return the FLOPs (two per multiply-add) of one forward pass over the clips of a host batch.

    Products with weights count by the tokens that use them, attention by the squares of clip lengths. Padding,
    recomputation and attention across clips are work, but not model FLOPs. encodes_condition: captions are encoded in
    this pass, with their keys and values; a sampler does that once for all its passes.
    """
    lengths = token_counts(batch)
    rows_BR = used_rows(batch, lengths)
    rows_BS = np.stack([(rows_BR & (batch["row_slots_BR"] == slot)).sum(1) for slot in range(lengths.shape[1])], 1)
    added = reads.added * rows_BS
    text_lengths = text_counts(batch) if config.text else 0 * lengths
    uses = {
        "ends": lengths.sum(),
        "token": (lengths + added).sum(),
        "text": text_lengths.sum() * encodes_condition,
        "caption": text_lengths.sum() * encodes_condition,
        "row": rows_BR.sum(),
        "pair": 2 * rows_BR.sum(),
        "clip": (lengths > 0).sum(),
    }
    products = sum(2 * size * uses[user] for user, size in weights(specs, _user))
    pairs = ((lengths + added) ** 2).sum() + (lengths * text_lengths).sum() + reads.further * lengths.sum()
    attention = 4 * config.depth * config.width * pairs
    if config.text and encodes_condition:
        attention += 4 * config.text.depth * config.text.width * (text_lengths**2).sum()
    return float(products + attention)


def _user(names: Sequence[str]) -> str:
    if names[0] == "text":
        return "text"
    if "cross_kv" in names:
        return "caption"
    if "pooled" in names:
        return "clip"
    if "pair_kv" in names:
        return "pair"
    if {"patch", "head"} & set(names):
        return "ends"
    return "row" if {"modulation", "time_in", "time_out"} & set(names) else "token"
