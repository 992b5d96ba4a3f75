"""Orders that are computed and not stored, and draws that belong to a name."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sora_jax.data.draws import mix64, uniforms
from sora_jax.data.feeding.epochs import SECTION, ClipIndex, section_bounds, section_count
from sora_jax.data.feeding.shuffle import Permutation


@given(st.integers(1, 3000), st.integers(0, 2**31), st.integers(0, 1000))
def test_an_order_is_a_permutation(n, seed, epoch):
    order = Permutation(n, seed, "order", epoch)(np.arange(n))
    np.testing.assert_array_equal(np.sort(order), np.arange(n))


def test_orders_differ_by_seed_purpose_and_epoch():
    keys = ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))
    assert len({tuple(Permutation(500, *key)(np.arange(500))) for key in keys}) == 4


def test_every_thing_comes_to_every_place():
    """The thing at each of 12 places over 6,000 orders is uniform (chi-squared, at the one in 10,000 level)."""
    things = np.stack([Permutation(12, 0, "order", epoch)(np.arange(12)) for epoch in range(6000)])
    for place in range(12):
        assert stats.chisquare(np.bincount(things[:, place], minlength=12)).pvalue > 1e-4
    pairs = np.bincount(things[:, 0] * 12 + things[:, 1], minlength=144)
    assert stats.chisquare(np.delete(pairs, np.arange(12) * 13)).pvalue > 1e-4


def test_mixing_is_one_to_one():
    assert len(np.unique(mix64(np.arange(2**18, dtype=np.uint64)))) == 2**18


def test_draws_are_uniform_and_belong_to_their_name():
    names = np.arange(20_000)
    draws = uniforms(0, "caption", 3, names)
    assert stats.kstest(draws, "uniform").pvalue > 1e-4
    np.testing.assert_array_equal(uniforms(0, "caption", 3, names[::-7]), draws[::-7])
    others = [uniforms(1, "caption", 3, names), uniforms(0, "size", 3, names), uniforms(0, "caption", 4, names)]
    others.append(uniforms(0, "caption", 3, names, copies=1))
    for other in others:
        assert abs(np.corrcoef(draws, other)[0, 1]) < 0.03


@given(st.integers(1, 10_000), st.integers(1, 500))
def test_sections_part_the_places_evenly(clips, size):
    bounds = [section_bounds(clips, size, number) for number in range(section_count(clips, size))]
    assert bounds[0][0] == 0 and bounds[-1][1] == clips
    assert all(one[1] == other[0] for one, other in zip(bounds, bounds[1:]))
    sizes = [last - first for first, last in bounds]
    assert max(sizes) <= size and max(sizes) - min(sizes) <= 1


def test_a_section_of_1e8_clips_is_drawn_without_a_list_of_all():
    """Its clips come from all over the data set, none twice, and none of them is in another section."""
    n, number = 10**8, 95
    index = ClipIndex(_Computed(n, None), None, _Computed(n, None), _Computed(n, 1.0))
    assert section_count(n) == 96
    clips, copies = index.section(0, 3, number, SECTION)
    first, end = section_bounds(n, SECTION, number)
    assert len(np.unique(clips)) == end - first <= SECTION and not copies.any()
    assert stats.chisquare(np.bincount(clips * 100 // n, minlength=100)).pvalue > 1e-4
    other, _ = index.section(0, 3, (number + 1) % 96, SECTION)
    assert not np.isin(clips, other).any()


class _Computed:
    """As an array of so many values, all equal or their own indices, of which few are asked for."""

    def __init__(self, count, value):
        self.count, self.value = count, value

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return np.asarray(index) if self.value is None else np.full(len(index), self.value)
