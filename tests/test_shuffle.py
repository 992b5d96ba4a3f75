"""Orders that are computed and not stored, and draws that belong to a name."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sora_jax.data.draws import mix64, uniforms
from sora_jax.data.feeding.epochs import SECTION, ClipIndex, section_bounds, section_count
from sora_jax.data.feeding.shuffle import Permutation

BILLION = 10**9


@given(st.integers(1, 3000), st.integers(0, 2**31), st.integers(0, 1000))
def test_an_order_is_a_permutation_and_place_inverts_it(n, seed, epoch):
    permutation = Permutation.of(n, seed, "order", epoch)
    order = permutation.order(np.arange(n))
    np.testing.assert_array_equal(np.sort(order), np.arange(n))
    np.testing.assert_array_equal(permutation.place(order), np.arange(n))


def test_orders_differ_by_seed_purpose_and_epoch():
    made = [
        Permutation.of(500, *key).order(np.arange(500)) for key in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))
    ]
    assert len({tuple(order) for order in made}) == 4


def test_every_thing_comes_to_every_place():
    """The place of each of 12 things over 6,000 orders is uniform (chi-squared, at the one in 10,000 level)."""
    places = np.stack([Permutation.of(12, 0, "order", epoch).place(np.arange(12)) for epoch in range(6000)])
    pairs = places[:, 0] * 12 + places[:, 1]
    for thing in range(12):
        assert stats.chisquare(np.bincount(places[:, thing], minlength=12)).pvalue > 1e-4
    apart = [12 * a + b for a in range(12) for b in range(12) if a != b]
    assert stats.chisquare(np.bincount(pairs, minlength=144)[apart]).pvalue > 1e-4


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


def test_a_billion_clips_are_cut_into_sections_without_a_list():
    assert section_count(BILLION) == 954
    ends = [section_bounds(BILLION, SECTION, number) for number in range(954)]
    assert ends[0][0] == 0 and ends[-1][1] == BILLION and all(a[1] == b[0] for a, b in zip(ends, ends[1:]))
    permutation = Permutation.of(BILLION, 0, "order", 7)
    chosen = np.random.default_rng(0).integers(0, BILLION, 50_000)
    places = permutation.place(chosen)  # each clip is in one place, in one section
    np.testing.assert_array_equal(permutation.order(places), chosen)
    sections = np.searchsorted([last for _, last in ends], places, side="right")
    assert stats.chisquare(np.bincount(sections, minlength=954)).pvalue > 1e-4
    inside = [ends[s][0] <= p < ends[s][1] for s, p in zip(sections, places, strict=True)]
    assert all(inside)


class Million:
    """As an array of a billion equal values of which few are asked for."""

    def __init__(self, value):
        self.value = value

    def __len__(self):
        return BILLION

    def __getitem__(self, index):
        return np.full(len(index), self.value) if self.value is not None else np.asarray(index)


@pytest.mark.parametrize("number", [0, 500, 953])
def test_a_section_of_a_billion_clips_holds_its_own_clips_only(number):
    subjects = ClipIndex(rows=Million(None), starts=Million(None), clip_ids=Million(None), weights=Million(1.0))
    clips, copies = subjects.section(0, 3, number, SECTION)
    first, last = section_bounds(BILLION, SECTION, number)
    places = Permutation.of(BILLION, 0, "order", 3).place(clips)
    np.testing.assert_array_equal(places, np.arange(first, last))
    assert not copies.any()
