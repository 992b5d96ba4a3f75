"""Define which keys a query sees, once for all backends: by the places of both and a static pattern."""

import functools
import operator
from collections.abc import Iterator
from typing import NamedTuple

import jax


class Place(NamedTuple):
    """Hold the places of tokens: queries, or keys. Leading axes are free, (B, L) in a batch of packs.

    segments_BL  clip of each token, any integers; padding is a segment of its own
    coords_BL3   (t, y, x) of each token in its clip, for `Pattern.nearby`
    index_BL     index of each token in its clip, for `Pattern.causal`
    windows_BL2  first and last window of its clip that each token belongs to, for `Pattern.windows`
    """

    segments_BL: jax.Array
    coords_BL3: jax.Array | None = None
    index_BL: jax.Array | None = None
    windows_BL2: jax.Array | None = None


class Places(NamedTuple):
    """The places of queries and of keys; twice the same in self-attention."""

    q: Place
    k: Place


class Pattern(NamedTuple):
    """Select what a query sees of its own segment; everything by default. Static and hashable.

    causal: keys whose index is not above the query's own.
    nearby: keys within these distances in (t, y, x), in the units of the coordinates, bounds included; None is any.
    windows: keys whose windows include those of the query. So a word that belongs to all windows of its clip is seen by
    all tokens of the clip, and a token that belongs to one by the tokens of that window.
    """

    causal: bool = False
    nearby: tuple[float | None, float | None, float | None] | None = None
    windows: bool = False


FULL = Pattern()


def visible(pattern: Pattern, q: Place, k: Place) -> jax.Array:
    """Return which keys each query sees: places (..., L) and (..., M) -> bool (..., L, M)."""
    seen = q.segments_BL[..., :, None] == k.segments_BL[..., None, :]
    for of_q, of_k, low, high in _limits(pattern, q, k):
        further = of_k[..., None, :] - of_q[..., :, None]
        seen &= further <= high
        if low is not None:
            seen &= further >= low
    return seen


def reachable(pattern: Pattern, q: Place, k: Place) -> jax.Array:
    """Return False for pairs of blocks in which no query sees a key: places (X, l) and (Y, m) -> bool (X, Y).

    A bound by the least and the largest value of a block: where it is True there may still be nothing to see. The
    difference of two floats grows with the first and falls with the second, rounding included, so the bound is safe.
    """
    within = (q.segments_BL, k.segments_BL, 0, 0)
    bounds = []
    for of_q, of_k, low, high in (within, *_limits(pattern, q, k)):
        bounds.append(of_k.min(1)[None, :] - of_q.max(1)[:, None] <= high)
        if low is not None:
            bounds.append(of_k.max(1)[None, :] - of_q.min(1)[:, None] >= low)
    return functools.reduce(operator.and_, bounds)


def _limits(pattern: Pattern, q: Place, k: Place) -> Iterator[tuple]:
    """Yield what a pattern asks: a value of queries and of keys, and the least and largest difference of key to query.

    Masks and bounds are both made of it, so a block is never left out in which a mask would show something.
    """
    if pattern.causal:
        yield q.index_BL, k.index_BL, None, 0
    for axis, radius in enumerate(pattern.nearby or ()):
        if radius is not None:
            assert q.coords_BL3 is not None and k.coords_BL3 is not None  # `needed` refuses places without them
            yield q.coords_BL3[..., axis], k.coords_BL3[..., axis], -radius, radius
    if pattern.windows:
        assert q.windows_BL2 is not None and k.windows_BL2 is not None
        yield q.windows_BL2[..., 0], k.windows_BL2[..., 0], None, 0
        yield -q.windows_BL2[..., 1], -k.windows_BL2[..., 1], None, 0


def needed(pattern: Pattern, places: Places) -> Places:
    """Return the places without the arrays that the pattern does not read: no device then sends or cuts them.

    Raises ValueError where one is missing.
    """

    read = {"coords_BL3": pattern.nearby, "index_BL": pattern.causal, "windows_BL2": pattern.windows}

    def reduced(place: Place) -> Place:
        for name, wanted in read.items():
            if wanted and getattr(place, name) is None:
                raise ValueError(f"{pattern} reads {name}, which the place of queries or keys does not have")
        return Place(place.segments_BL, *(getattr(place, name) if wanted else None for name, wanted in read.items()))

    return Places(*map(reduced, places))
