"""Share among the tests of sources: pictures of one shade, and how to look into a source."""

import numpy as np

from sora_jax.data.reading.media import DecodedClip, SpanRule
from sora_jax.data.sources import Source


def frame(shade: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.full((height, width, 3), shade, np.uint8)


def entries(source: Source) -> list:
    return [source.entry(i) for i in range(len(source))]


def decoded(source: Source, index: int, rule: SpanRule = SpanRule()) -> DecodedClip:
    return source.open(index).decode(rule, None)


def shade(source: Source, index: int) -> int:
    return int(decoded(source, index).frames.mean().round())


def kinds(source: Source) -> dict[str, str]:
    """Return what stands before the first colon of the reason of each refused file."""
    return {name: reason.split(":")[0] for name, reason in source.refused}
