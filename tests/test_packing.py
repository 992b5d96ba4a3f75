"""Plan, patches, packs: exact inverses and the promises of a plan."""

import einops
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_jax.data.draws import generator
from sora_jax.data.packing.packs import (
    PackingConfig,
    PackItem,
    check_fits,
    grid_of,
    pack,
    patchify,
    stack,
    unpack,
    unpatchify,
    unstack,
)
from sora_jax.data.packing.planning import plan
from sora_jax.errors import UserError

MIX = np.array([9, 15, 16, 18, 27, 30, 32, 45, 48])
sides = st.tuples(*[st.integers(1, 4)] * 3)
patches = st.tuples(*[st.integers(1, 3)] * 3)


def sums(values, made):
    return np.array([values[made[p]].sum() for p in range(len(made))])


def planned(lengths, texts, L, S, M, window=1024, seed=0, epoch=0):
    return plan(seed, epoch, np.asarray(lengths), np.asarray(texts), PackingConfig(L, S, M, window=window))


def mixed(count, seed=0, kinds=MIX):
    draws = np.random.default_rng(seed)
    return draws.choice(kinds, count), draws.integers(1, 16, count)


@given(sides, patches, st.integers(1, 5), st.integers(0, 2))
def test_patchify_is_the_documented_order_and_unpatchify_its_inverse(grid, patch, channels, batch):
    size = [g * p for g, p in zip(grid, patch, strict=True)]
    latent = np.random.default_rng(0).normal(size=[2] * batch + size + [channels])
    tokens = patchify(latent, patch)
    names = dict(zip(("pt", "ph", "pw"), patch, strict=True))
    pattern = "... (t pt) (h ph) (w pw) c -> ... (t h w) (pt ph pw c)"
    np.testing.assert_array_equal(tokens, einops.rearrange(latent, pattern, **names))
    np.testing.assert_array_equal(unpatchify(tokens, grid_of(size, patch), patch), latent)


def test_patchify_serves_jax_arrays():
    latent = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    tokens = patchify(jnp.asarray(latent), (1, 2, 2))
    np.testing.assert_array_equal(tokens, patchify(latent, (1, 2, 2)))
    np.testing.assert_array_equal(unpatchify(tokens, (2, 2, 3), (1, 2, 2)), latent)


@st.composite
def packs(draw):
    """Items with a config in which they fit, with room to spare or none."""
    patch, channels = draw(patches), draw(st.integers(1, 3))
    grids = draw(st.lists(sides, min_size=1, max_size=5))
    draws = np.random.default_rng(draw(st.integers(0, 99)))
    items = [
        PackItem(
            values=draws.normal(size=(*np.multiply(grid, patch), channels)).astype("f4"),
            clip_id=int(draws.integers(1, 2**32)),
            text=draws.integers(1, 500, draws.integers(1, 6)),
        )
        for grid in grids
    ]
    config = PackingConfig(
        length=int(sum(np.prod(grid) for grid in grids)) + draw(st.integers(0, 9)),
        slots=len(items) + draw(st.integers(0, 3)),
        text_length=sum(len(item.text) for item in items) + draw(st.integers(0, 5)),
        patch=patch,
        rows_per_clip=draw(st.integers(1, 2)),
    )
    return items, config


@given(packs())
def test_unpack_inverts_pack_to_the_bit_in_any_order_of_tokens(case):
    items, config = case
    row, order = pack(items, config), np.random.default_rng(1).permutation(config.length)
    for tokens in (row, row | {name: row[name][order] for name in ("tokens_LP", "segments_L", "index_L")}):
        for latent, item in zip(unpack(tokens, config.patch), items, strict=True):
            assert latent.dtype == np.float32
            np.testing.assert_array_equal(latent.view(np.int32), item.values.view(np.int32))


@given(packs())
def test_fields_of_a_pack(case):
    items, config = case
    row = pack(items, config)
    real = row["segments_L"] > 0
    for name in ("tokens_LP", "coords_L3", "index_L", "rows_L"):
        assert not row[name][~real].any(), f"padding of {name} is not zero"
    assert row["row_slots_R"].shape == (config.slots * config.rows_per_clip,)
    np.testing.assert_array_equal(row["row_slots_R"][row["rows_L"]][real], row["segments_L"][real] - 1)
    for slot, item in enumerate(items):
        mine = row["segments_L"] == slot + 1
        grid = row["grids_S3"][slot]
        assert row["clip_ids_S"][slot] == item.clip_id
        t, y, x = row["coords_L3"][mine].T
        np.testing.assert_array_equal((t * grid[1] + y) * grid[2] + x, row["index_L"][mine])
        np.testing.assert_array_equal(np.sort(row["index_L"][mine]), np.arange(grid.prod()))
        words = row["text_segments_M"] == slot + 1
        np.testing.assert_array_equal(row["text_M"][words], item.text)
        np.testing.assert_array_equal(row["text_positions_M"][words], np.arange(len(item.text)))
    assert not row["clip_ids_S"][len(items) :].any() and not row["grids_S3"][len(items) :].any()
    assert not row["text_M"][row["text_segments_M"] == 0].any()


@given(packs())
def test_unstack_inverts_stack(case):
    row = pack(*case)
    other = row | {"tokens_LP": row["tokens_LP"] + 1}
    batch = stack([row, other])
    assert set(batch) == {
        "tokens_BLP", "segments_BL", "coords_BL3", "index_BL", "rows_BL", "row_slots_BR", "clip_ids_BS", "labels_BS",
        "grids_BS3", "text_BM", "text_segments_BM", "text_positions_BM",
    }  # fmt: skip
    for got, expected in zip(unstack(batch), (row, other), strict=True):
        assert set(got) == set(expected)
        for name in expected:
            np.testing.assert_array_equal(got[name], expected[name])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9)), max_size=400),
    st.integers(40, 90),
    st.integers(1, 9),
    st.integers(9, 30),
    st.integers(1, 64),
    st.integers(0, 3),
)
def test_plan_is_a_partition_within_all_caps(clips, L, S, M, window, epoch):
    lengths, texts = (np.array([clip[k] for clip in clips], int) for k in (0, 1))
    made = planned(lengths, texts, L, S, M, window, epoch=epoch)
    np.testing.assert_array_equal(np.sort(made.order), np.arange(len(clips)))
    assert made.offsets[0] == 0 and made.offsets[-1] == len(clips)
    if clips:
        sizes = np.diff(made.offsets)
        assert sizes.min() >= 1 and sizes.max() <= S
        assert sums(lengths, made).max() <= L and sums(texts, made).max() <= M


@pytest.mark.parametrize("L,S,M", [(192, 12, 10_000), (256, 16, 10_000), (256, 12, 10_000), (192, 12, 72)])
@pytest.mark.parametrize("count", [2_000, 20_000])
def test_plan_fills_real_mixes(L, S, M, count):
    lengths, texts = mixed(count)
    made = planned(lengths, texts, L, S, M)
    assert lengths.sum() / (len(made) * L) >= (0.995 if M > 72 else 0.98)


def test_plan_comes_within_a_pack_or_two_of_the_bound_where_slots_are_the_limit():
    lengths, texts = mixed(5_000, kinds=np.array([9, 9, 9, 9, 15, 16, 30]))
    assert len(planned(lengths, texts, 192, 12, 10_000)) <= 1.02 * max(lengths.sum() / 192, len(lengths) / 12)


def best_fit_decreasing(lengths, L) -> int:
    """Packs of the textbook method, an independent one: the longest clip goes where the least room is left."""
    rooms = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [room for room in rooms if room >= length]
        rooms.append((min(fitting) if fitting else L) - length)
        if fitting:
            rooms.remove(min(fitting))
    return len(rooms)


@pytest.mark.parametrize("kinds,L", [(np.arange(16, 1025), 2048), ([70, 90, 130], 256), (np.arange(900, 1300), 2048)])
@pytest.mark.parametrize("count", [60, 2_000])
def test_many_or_awkward_lengths_take_no_more_packs_than_best_fit_decreasing(kinds, L, count):
    """Windows alone take a sixth more for three awkward lengths."""
    lengths, texts = mixed(count, kinds=kinds)
    assert len(planned(lengths, texts, L, 128, 10_000)) <= best_fit_decreasing(lengths, L)


def test_packs_stay_mixed_in_size():
    lengths, texts = mixed(20_000)
    made = planned(lengths, texts, 192, 12, 10_000)
    means = sums(lengths, made) / np.diff(made.offsets)
    alike = np.mean([len(set(lengths[made[p]].tolist())) == 1 for p in range(len(made))])
    assert alike < 0.02 and np.quantile(means, 0.99) < 45 and np.quantile(means, 0.01) > 16


def test_plan_is_pure_and_epochs_and_seeds_differ():
    lengths, texts = mixed(500)
    first, again = (planned(lengths, texts, 192, 12, 999, seed=3, epoch=1) for _ in range(2))
    np.testing.assert_array_equal(first.order, again.order)
    np.testing.assert_array_equal(first.offsets, again.offsets)
    for seed, epoch in ((3, 2), (4, 1)):
        other = planned(lengths, texts, 192, 12, 999, seed=seed, epoch=epoch)
        assert (first.order != other.order).mean() > 0.9
    together = {frozenset(first[p].tolist()) for p in range(len(first))}
    assert len(together & {frozenset(other[p].tolist()) for p in range(len(other))}) < 5


def test_packs_come_in_random_order():
    lengths, texts = np.full(1_001, 16), np.ones(1_001, int)  # 12 to a pack, and one pack of 5
    made = [planned(lengths, texts, 192, 12, 999, epoch=epoch) for epoch in range(8)]
    places = {int(np.argmin(np.diff(epoch.offsets))) for epoch in made}
    assert all(sorted(np.diff(epoch.offsets))[:2] == [5, 12] for epoch in made)
    assert len(places) > 3


def test_generator_depends_on_each_argument():
    keys = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 0), (0, "a", 1), (0, "a", 0, 0)]
    assert len({generator(*key).integers(2**62) for key in keys * 2}) == len(keys)


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: planned([9, 320], [1, 1], 192, 4, 9), ["320", "packing.length is 192"]),
        (lambda: planned([9, 9], [1, 10], 192, 4, 9), ["10", "packing.text_length is 9"]),
        (lambda: check_fits((5, 8, 8), 192), ["320", "192", "3 x 8 x 8", "5 x 6 x 6"]),
        (lambda: grid_of((5, 7, 8), (1, 2, 2)), ["5 x 7 x 8", "1 x 2 x 2"]),
        (lambda: PackingConfig(length=0), ["packing.length", "0"]),
        (lambda: PackingConfig(patch=(1, 2)), ["packing.patch", "(1, 2)"]),
        (lambda: PackingConfig(window=2**20 + 1), ["packing.window is 1048577; it must be at most 1048576"]),
        (lambda: pack([], PackingConfig(patch=(1, 2, 2))), ["0 clips", "packing.slots"]),
    ],
)
def test_mistakes_are_told_in_one_sentence(make, words):
    with pytest.raises(UserError) as error:
        make()
    for word in words:
        assert word in str(error.value)
    for grid in ((3, 8, 8), (5, 6, 6)):  # which an error recommends
        check_fits(grid, 192)


def test_pack_refuses_what_does_not_fit():
    item = PackItem(np.zeros((1, 4, 4, 1), "f4"), 1, np.array([5, 6]))
    for limits in (dict(length=7), dict(slots=1), dict(text_length=3)):
        with pytest.raises(UserError, match=f"packing.{next(iter(limits))}"):
            pack([item, item], PackingConfig(patch=(1, 2, 2), **limits))
