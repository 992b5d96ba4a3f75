"""Few shapes for many sizes."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_jax.train.padded_shapes import choose_padded_shapes, padded_shape_of

SIZES = st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=1, max_size=30)


@given(SIZES, st.integers(1, 5))
def test_each_clip_fits_the_smallest_shape_that_holds_it(sizes, most):
    padded_shapes = choose_padded_shapes(sizes, most)
    assert 1 <= len(padded_shapes) <= most
    for size in sizes:
        canvas = padded_shape_of(size, padded_shapes)
        holding = [c for c in padded_shapes if all(np.greater_equal(c, size))]
        assert canvas in holding and np.prod(canvas) == min(map(np.prod, holding))
    for canvas in padded_shapes:  # no side is longer than some clip needs
        assert all(any(size[axis] == canvas[axis] for size in sizes) for axis in range(3))


@given(SIZES)
def test_enough_shapes_waste_nothing(sizes):
    assert set(choose_padded_shapes(sizes, 30)) == set(sizes)


@given(st.lists(st.tuples(*[st.integers(1, 6)] * 3), min_size=3, max_size=4, unique=True))
@settings(max_examples=50)
def test_the_last_merge_is_the_best_of_all(sizes):
    """With one shape too many the greedy choice is the best: compared with all pairs."""

    def volume(padded_shapes):
        return sum(np.prod(padded_shape_of(size, padded_shapes)) for size in sizes)

    pairs = itertools.combinations(sizes, 2)
    merged = [[*(set(sizes) - {a, b}), tuple(np.maximum(a, b).tolist())] for a, b in pairs]
    assert volume(choose_padded_shapes(sizes, len(sizes) - 1)) <= min(map(volume, merged))


def test_images_are_not_put_on_the_shape_of_films():
    sizes = [(1, 64, 64)] * 100 + [(17, 64, 64)] * 100 + [(17, 64, 48)] * 3
    assert choose_padded_shapes(sizes, 2) == [(1, 64, 64), (17, 64, 64)]
