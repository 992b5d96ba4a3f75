"""Streams: a pure function of (seed, step), the same for any threads, restarts and numbers of hosts."""

import functools
from itertools import islice

import chex
import numpy as np
import pytest
from fixtures_caches import clip_row, packs_of, write_cache

from sora_jax.data.feeding.feed import FeedConfig
from sora_jax.data.feeding.pipeline import PackedBatches
from sora_jax.data.feeding.tokenizer import TokenizerConfig, train
from sora_jax.data.packing.packs import PackingConfig, unpack, unstack
from sora_jax.data.shard_spec import ShardSpec
from sora_jax.errors import UserError

GRIDS = [(1, 6, 6), (1, 8, 10), (3, 6, 6), (3, 10, 6), (5, 6, 6), (2, 8, 8)]
CONFIG = PackingConfig(length=96, slots=8, text_length=200, patch=(1, 2, 2), window=64)
BYTES = train([], TokenizerConfig(kind="bytes", max_tokens=24))
CLIPS = 90


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    rows = []
    for number in range(CLIPS):
        captions = {"original": "" if number % 7 == 0 else f"clip {number}"}
        split = "test" if number % 9 == 0 else "train"
        rows.append(clip_row(number, GRIDS[number % len(GRIDS)], captions, split=split))
    return write_cache(tmp_path_factory.mktemp("latents") / "cache", rows)


assert_same = functools.partial(chex.assert_trees_all_equal, strict=True)  # types, too


def batches(cache, seed=0, batch=4, config=CONFIG, **options):
    return PackedBatches(cache, BYTES, config, batch, seed, **options)


def test_an_epoch_has_every_clip_of_the_split_once_with_its_latent_and_caption(cache):
    stream, seen = batches(cache), []
    captions = cache.column("captions").to_pylist()
    for row, pack in enumerate(packs_of(stream, stream.report().packs)):
        latents = unpack(pack, CONFIG.patch)
        for slot, (clip, latent) in enumerate(zip(stream.clips(row), latents, strict=True)):
            seen.append(clip)
            assert pack["clip_ids_S"][slot] == cache.clip_ids[clip]
            np.testing.assert_array_equal(latent, cache[clip])
            text = pack["text_M"][pack["text_segments_M"] == slot + 1]
            np.testing.assert_array_equal(text, BYTES.encode(captions[clip][0]))
    np.testing.assert_array_equal(np.sort(seen), cache.indices("train"))


def test_batches_follow_the_rows_across_epochs(cache):
    stream, rows = batches(cache, batch=2), batches(cache, batch=1)
    packs = stream.report().packs
    steps = 3 * packs // 2
    for step in (0, 1, packs // 2 - 1, steps):
        for row, pack in enumerate(unstack(stream[step]), 2 * step):
            assert_same(pack, unstack(rows[row])[0])
    assert stream.epoch(0) == 0 and stream.epoch(steps) >= 2


def test_a_batch_depends_on_seed_and_step_only(cache):
    far = batches(cache)[40]  # asked for first, before any other
    stream = batches(cache)
    for step in (3, 0, 40, 7):
        stream[step]
    assert_same(stream[40], far)
    assert not np.array_equal(batches(cache, seed=1)[40]["clip_ids_BS"], far["clip_ids_BS"])
    assert not np.array_equal(stream[39]["clip_ids_BS"], far["clip_ids_BS"])


@pytest.mark.parametrize("start,threads,ahead", [(0, 0, 4), (0, 3, 1), (17, 2, 9)])
def test_the_stream_is_the_same_for_any_threads_and_start(cache, start, threads, ahead):
    expected = batches(cache)
    feed = FeedConfig(threads=threads, ahead=ahead)
    for step, (batch, position) in enumerate(islice(batches(cache).stream(start, feed), 25), start):
        assert_same(batch, expected[step])
        assert position == expected.position(step)


def test_a_position_saves_the_count_and_changes_nothing(cache, monkeypatch):
    expected = batches(cache, section=20)
    position = expected.position(200)
    assert position.section > 30 and position.row <= 200 * 4
    late = batches(cache, section=20)
    planned = []
    monkeypatch.setattr(late._epochs, "_plan_of", lambda *which: planned.append(which) or late._plan(*which))
    assert_same(next(late.stream(201, FeedConfig(threads=0), position))[0], expected[201])
    assert min(epoch * late._epochs.sections + section for epoch, section in planned) == position.section
    assert_same(late[3], expected[3])  # what lies before the hint is counted from the first


@pytest.mark.parametrize("section, split", [(7, "train"), (80, "train"), (1000, "test")])
def test_sections_make_up_the_epoch(cache, section, split):
    stream = batches(cache, section=section, split=split)
    wanted = sorted(cache.clip_ids[cache.indices(split)])
    epochs: dict[int, list] = {}
    for row in range(400):
        epochs.setdefault(stream._epochs.epoch(row), []).extend(cache.clip_ids[stream.clips(row)])
    assert max(epochs) >= 3
    orders = [epochs[epoch] for epoch in range(max(epochs))]
    assert all(sorted(order) == wanted for order in orders) and orders[0] != orders[1]


def test_report_counts_the_padding_of_an_epoch(cache):
    stream = batches(cache)
    report = stream.report()
    padding = np.mean([pack["segments_L"] == 0 for pack in packs_of(stream, report.packs)])
    assert report.padding == pytest.approx(padding)
    assert report.clips == len(cache.indices("train")) and f"{padding:.2%}" in str(report)


@pytest.mark.parametrize(
    "make,word",
    [
        (lambda cache: batches(cache, split="none"), "'none'"),
        (lambda cache: batches(cache, batch=0), "batch is 0"),
        (lambda cache: batches(cache, batch=5, share=ShardSpec(0, 2)), "batch is 5 rows"),
        (lambda cache: ShardSpec(2, 2), "--shard is '2/2'"),
        (lambda cache: batches(cache, config=PackingConfig(40, patch=(1, 2, 2))), "packing.length is 40"),
        (lambda cache: batches(cache, config=PackingConfig(patch=(1, 4, 4))), "multiple"),
        (lambda cache: batches(cache, config=PackingConfig(text_length=3, patch=(1, 2, 2))), "text_length is 3"),
    ],
)
def test_mistakes(cache, make, word):
    with pytest.raises(UserError, match=word):
        make(cache)


def test_a_caption_too_long_is_told_before_the_first_step_whatever_the_epoch_takes(tmp_path):
    rows = [clip_row(n, (1, 2, 2), {"original": "short", "synthetic": "long " * 5}) for n in range(3)]
    config = PackingConfig(length=8, slots=4, text_length=8, patch=(1, 2, 2))
    with pytest.raises(
        UserError, match="text_length is 8; it must be at least 24, the tokens of a caption of clip 'clip-0'"
    ):
        batches(write_cache(tmp_path / "cache", rows), batch=1, config=config)


def test_weights_that_empty_the_epochs_are_told(tmp_path):
    cache = write_cache(tmp_path / "cache", [clip_row(n, (1, 2, 2), weight=0.01) for n in range(2)])
    with pytest.raises(UserError, match="an epoch of 0.02 clips"):
        batches(cache)
    rare = batches(write_cache(tmp_path / "rare", [clip_row(n, (1, 2, 2), weight=0.1) for n in range(12)]), batch=1)
    assert "clips in" in str(rare.report()) and (rare[30]["clip_ids_BS"] > 0).any()


WEIGHTS = {0: 0.25, 1: 1.0, 2: 2.0, 3: 2.5}


def test_weights_say_how_often_a_clip_comes_in_an_epoch(tmp_path):
    rows = [clip_row(n, (1, 2, 2), weight=WEIGHTS[n % 4]) for n in range(80)]
    stream = batches(write_cache(tmp_path / "cache", rows), batch=1)
    counts, epoch, row = [], 0, 0
    while epoch < 40:
        if epoch == len(counts):
            counts.append(dict.fromkeys([row["id"] for row in rows], 0))
        for name in stream.store.ids(stream.clips(row)):
            counts[epoch][name] += 1
        row += 1
        epoch = stream._epochs.epoch(row)
    counts = np.array([list(each.values()) for each in counts])  # (epochs, clips)
    for number, weight in WEIGHTS.items():
        mine = counts[:, number::4]
        assert set(np.unique(mine)) == {int(np.floor(weight)), int(np.ceil(weight))}
        assert mine.mean() == pytest.approx(weight, abs=0.06)  # five standard deviations of 800 draws


def test_variants_of_a_clip_are_taken_in_turn(tmp_path):
    rows = [clip_row(n, (1, 2, 2 + 2 * v), variant=v) for n in range(30) for v in range(3)]
    stream = batches(write_cache(tmp_path / "cache", rows), batch=1)
    taken, row = {}, 0
    while (epoch := stream._epochs.epoch(row)) < 6:
        pack = stream[row]
        for clip_id, grid in zip(pack["clip_ids_BS"][0], pack["grids_BS3"][0], strict=True):
            if clip_id:
                taken.setdefault(clip_id, {}).setdefault(epoch, []).append(int(grid[2]) - 1)
        row += 1
    assert len(taken) == 30
    for epochs in taken.values():
        turns = [variant for epoch in range(6) for (variant,) in [epochs[epoch]]]  # one in each epoch
        assert sorted(turns[:3]) == [0, 1, 2] and turns[3:] == turns[:3]
    assert len({tuple(epochs[0]) for epochs in taken.values()}) == 3  # not all begin with the same
