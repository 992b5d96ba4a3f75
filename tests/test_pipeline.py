"""Streams: a pure function of (seed, step), the same for any threads, restarts and numbers of hosts."""

import pickle
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest

from sora_jax.data.latents import LatentCache, LatentEntry, LatentWriter, clip_uid
from sora_jax.data.manifest import Dataset, write_dataset
from sora_jax.data.packing import PackingConfig, unpack, unstack
from sora_jax.data.pipeline import CropConfig, HostShare, crop_batches, packed_batches, sizes_and_clips
from sora_jax.data.sources import Clip
from sora_jax.data.tokenizer import TokenizerConfig, train
from sora_jax.errors import UserError

GRIDS = [(1, 6, 6), (1, 8, 10), (3, 6, 6), (3, 10, 6), (5, 6, 6), (2, 8, 8)]
CONFIG = PackingConfig(length=96, slots=8, text_length=200, patch=(1, 2, 2), window=64)
BYTES = train([], TokenizerConfig(kind="bytes", max_tokens=24))
CLIPS = 90


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("latents") / "cache"
    draws = np.random.default_rng(0)
    with LatentWriter(path, "print", "data", 2, (2, 4, 4), shard_clips=32) as writer:
        for number in range(CLIPS):
            t, h, w = GRIDS[number % len(GRIDS)]
            split = "test" if number % 9 == 0 else "train"
            words = "" if number % 7 == 0 else f"clip {number}"
            entry = LatentEntry(f"clip-{number}", 2 * t - 1, 4 * h, 4 * w, 8.0, words, split)
            writer.add(entry, draws.normal(size=(t, h, w, 2)))
    return LatentCache(path)


def batches(cache, seed=0, batch=4, **options):
    return packed_batches(cache, BYTES, CONFIG, batch, seed, **options)


def same(one, other):
    assert set(one) == set(other)
    for name in one:
        assert one[name].dtype == other[name].dtype
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_an_epoch_has_every_clip_of_the_split_once_with_its_latent_and_caption(cache):
    stream = batches(cache)
    train_clips = cache.indices("train")
    seen = []
    for row in range(stream.report().packs):
        pack = stream.row(row)
        uids = pack["clips_S"][pack["clips_S"] > 0]
        for slot, (uid, latent) in enumerate(zip(uids, unpack(pack, CONFIG.patch), strict=True)):
            clip = int(np.flatnonzero(cache.uids == uid)[0])
            seen.append(clip)
            np.testing.assert_array_equal(latent, cache[clip])
            text = pack["text_M"][pack["text_segments_M"] == slot + 1]
            np.testing.assert_array_equal(text, BYTES.encode(cache.captions[clip]))
    np.testing.assert_array_equal(np.sort(seen), train_clips)


def test_batches_follow_the_rows_across_epochs(cache):
    stream = batches(cache, batch=5)
    packs = stream.report().packs
    steps = 3 * packs // 5
    for step in (0, 1, packs // 5, steps):
        for row, pack in enumerate(unstack(stream[step])):
            same(pack, stream.row(5 * step + row))
    assert stream.epoch(0) == 0 and stream.epoch(steps) >= 2
    seen = [uid for row in range(packs) for uid in stream.row(row)["clips_S"]]
    again = [uid for row in range(packs, 2 * packs) for uid in stream.row(row)["clips_S"]]
    assert seen != again


def test_a_batch_depends_on_seed_and_step_only(cache):
    far = batches(cache)[40]  # asked for first, before any other
    stream = batches(cache)
    for step in (3, 0, 40, 7):
        stream[step]
    same(stream[40], far)
    assert not np.array_equal(batches(cache, seed=1)[40]["clips_BS"], far["clips_BS"])
    assert not np.array_equal(stream[39]["clips_BS"], far["clips_BS"])


@pytest.mark.parametrize("start,threads", [(0, 0), (0, 3), (17, 2)])
def test_the_stream_is_the_same_for_any_threads_and_start(cache, start, threads):
    expected = batches(cache)
    for step, batch in enumerate(islice(batches(cache).stream(start, threads, ahead=3), 25), start):
        same(batch, expected[step])


@pytest.mark.parametrize("hosts", [2, 4])
def test_the_shares_of_hosts_make_up_the_batch_of_one(cache, hosts):
    shares = [batches(cache, process_index=host, process_count=hosts) for host in range(hosts)]
    for step in (0, 11, 30):
        parts = [share[step] for share in shares]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        same(joined, batches(cache)[step])


def test_a_pickled_stream_goes_on(cache):
    stream = batches(cache)
    stream[20]
    same(pickle.loads(pickle.dumps(stream))[21], stream[21])


def test_report_counts_the_padding_of_an_epoch(cache):
    stream = batches(cache)
    report = stream.report()
    rows = [stream.row(row) for row in range(report.packs)]
    padding = np.mean([row["segments_L"] == 0 for row in rows])
    assert report.padding == pytest.approx(padding) and report.fill == pytest.approx(1 - padding)
    assert report.clips == len(cache.indices("train")) and f"{padding:.2%}" in str(report)


def test_another_split_has_other_clips(cache):
    test = batches(cache, split="test")
    uids = {uid for step in range(9) for uid in test[step]["clips_BS"].ravel()} - {0}
    assert uids == set(cache.uids[cache.indices("test")])


@pytest.mark.parametrize(
    "make,word",
    [
        (lambda cache: batches(cache, split="none"), "'none'"),
        (lambda cache: batches(cache, batch=0), "batch is 0"),
        (lambda cache: batches(cache, batch=5, process_count=2), "5 rows"),
        (lambda cache: batches(cache, process_index=2, process_count=2), "process_index is 2"),
        (
            lambda cache: packed_batches(cache, BYTES, PackingConfig(length=40, patch=(1, 2, 2)), 4, 0),
            "packing.length is 40",
        ),
        (lambda cache: packed_batches(cache, BYTES, PackingConfig(patch=(1, 4, 4)), 4, 0), "multiple"),
        (
            lambda cache: packed_batches(cache, BYTES, PackingConfig(text_length=3, patch=(1, 2, 2)), 4, 0)[0],
            "text_length is 3",
        ),
    ],
)
def test_mistakes(cache, make, word):
    with pytest.raises(UserError, match=word):
        make(cache)


# Crops


@dataclass
class Frames:
    frames: np.ndarray


SIZES = [(1, 20, 30), (9, 20, 30), (12, 16, 24), (9, 12, 40), (5, 40, 40)]
CROP = CropConfig(frames=8, height=16, width=20, batch=8, image_share=0.25)


@pytest.fixture(scope="module")
def clips():
    """Clips whose every pixel tells its clip and place: (20 clip + t, y, x)."""
    made = []
    for number, size in enumerate(SIZES):
        t, y, x = np.indices(size)
        made.append(Frames(np.stack([20 * number + t, y, x], axis=-1).astype(np.uint8)))
    return made


def origin(crop):
    """Clip, frame, row, column of the first pixel, after checking that the crop is one solid block."""
    t, y, x = np.indices(crop.shape[:3])
    first = crop[0, 0, 0].astype(int)
    np.testing.assert_array_equal(crop, np.stack([t, y, x], -1) + first)
    return first[0] // 20, first[0] % 20, first[1], first[2]


def test_crops_are_solid_blocks_of_clips_that_are_large_enough(clips):
    stream = crop_batches(clips, CROP, seed=0)
    starts = set()
    for step in range(60):
        batch = stream[step]
        assert batch["videos_BTHW3"].shape == (6, 8, 16, 20, 3) and batch["videos_BTHW3"].dtype == np.uint8
        assert batch["images_BTHW3"].shape == (2, 1, 16, 20, 3)
        for crop, clip in zip(batch["videos_BTHW3"], batch["videos_clips_B"], strict=True):
            start = origin(crop)
            assert start[0] == clip
            starts.add(start)
        assert set(batch["images_clips_B"]) <= {0, 1, 2, 4}
    assert {start[0] for start in starts} == {1, 2}
    for axis, most in zip((1, 2, 3), ((1, 4), (4, 0), (10, 4)), strict=True):
        for clip in (1, 2):  # every start there is occurs, the first and the last of each axis among them
            assert {start[axis] for start in starts if start[0] == clip} == set(range(most[clip - 1] + 1))


def test_one_kind_only(clips):
    assert set(crop_batches(clips, CropConfig(8, 16, 20, 4), 0)[0]) == {"videos_BTHW3", "videos_clips_B"}
    images = crop_batches(clips, CropConfig(99, 16, 20, 4, image_share=1.0), 0)[0]
    assert set(images) == {"images_BTHW3", "images_clips_B"}


def test_crop_streams_are_pure_and_shared_by_hosts(clips):
    expected = crop_batches(clips, CROP, seed=3)
    for step, batch in enumerate(islice(crop_batches(clips, CROP, 3).stream(5, threads=3), 10), 5):
        same(batch, expected[step])
    halves = [crop_batches(clips, CROP, 3, process_index=host, process_count=2)[4] for host in (0, 1)]
    same({name: np.concatenate([half[name] for half in halves]) for name in halves[0]}, expected[4])
    other = crop_batches(clips, CROP, seed=4)[4]
    assert not np.array_equal(other["videos_BTHW3"], expected[4]["videos_BTHW3"])
    assert not np.array_equal(expected[5]["videos_BTHW3"], expected[4]["videos_BTHW3"])


def test_crops_of_a_split_of_a_dataset_folder(clips, tmp_path):
    with write_dataset(tmp_path / "data", {}) as writer:
        for number, clip in enumerate(clips):
            made = Clip(f"c{number}", clip.frames, 8.0, "", "test")
            writer.add(made, f"c{number}", "test" if number == 1 else "train")
    dataset = Dataset(tmp_path / "data")
    sizes, train_clips = sizes_and_clips(dataset, "train")
    np.testing.assert_array_equal(sizes, SIZES)
    batch = crop_batches(dataset, CROP, 0, sizes, train_clips)[0]
    assert set(batch["videos_clips_B"]) == {2}  # clip 1 is large enough, but in the other split
    same(batch, crop_batches(clips, CROP, 0, clips=train_clips)[0])


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda clips: crop_batches(clips, CropConfig(13, 16, 16), 0), ["13 x 16 x 16", "12 x 40 x 40"]),
        (lambda clips: crop_batches([], CROP, 0), ["0 clips"]),
        (lambda clips: crop_batches(clips, CROP, 0, process_count=4), ["6 rows", "4 processes"]),
        (lambda clips: CropConfig(frames=0), ["crop.frames", "0"]),
        (lambda clips: CropConfig(image_share=1.5), ["crop.image_share", "1.5"]),
    ],
)
def test_crop_mistakes(clips, make, words):
    with pytest.raises(UserError) as error:
        make(clips)
    for word in words:
        assert word in str(error.value)


def test_shares_part_the_rows():
    rows = [row for host in range(3) for row in HostShare(host, 3).rows(12)]
    assert rows == list(range(12))


def test_uids_of_this_test_differ():
    assert len({clip_uid(f"clip-{number}") for number in range(CLIPS)}) == CLIPS
