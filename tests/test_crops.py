"""Crops for the autoencoder: solid blocks of clips, a pure function of (seed, step)."""

from itertools import islice

import chex
import numpy as np
import pytest
from fixtures_datasets import write_dataset

from sora_jax.data.feeding.feed import FeedConfig
from sora_jax.data.shard_spec import ShardSpec
from sora_jax.data.storing.clips import Clip
from sora_jax.data.storing.manifest import Dataset, add_clip
from sora_jax.errors import UserError
from sora_jax.train.crops import CropBatches, CropConfig

SIZES = [(1, 20, 30), (9, 20, 30), (12, 16, 24), (9, 12, 40), (5, 40, 40)]
CROP = CropConfig(frames=8, height=16, width=20, batch=8, image_share=0.25)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A dataset of clips whose every pixel tells its clip and place: (20 clip + t, y, x); the last is held out."""
    folder = tmp_path_factory.mktemp("crops") / "data"
    with write_dataset(folder, {}) as writer:
        for number, size in enumerate([*SIZES, SIZES[2]]):
            t, y, x = np.indices(size)
            frames = np.stack([20 * number + t, y, x], axis=-1).astype(np.uint8)
            split = "train" if number < len(SIZES) else "test"
            add_clip(writer, Clip(f"c{number}", frames, 8.0), f"c{number}", split)
    return Dataset(folder)


def origin(crop):
    """Clip, frame, row, column of the first pixel, after checking that the crop is one solid block."""
    t, y, x = np.indices(crop.shape[:3])
    first = crop[0, 0, 0].astype(int)
    np.testing.assert_array_equal(crop, np.stack([t, y, x], -1) + first)
    return first[0] // 20, first[0] % 20, first[1], first[2]


def test_crops_are_solid_blocks_of_clips_that_are_large_enough(clips):
    stream = CropBatches(clips, CROP, 0)
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
    videos = CropBatches(clips, CropConfig(8, 16, 20, 4), 0)[0]
    assert set(videos) == {"videos_BTHW3", "videos_clips_B", "videos_rows_B"}
    images = CropBatches(clips, CropConfig(99, 16, 20, 4, image_share=1.0), 0)[0]
    assert set(images) == {"images_BTHW3", "images_clips_B", "images_rows_B"}


def test_crop_streams_are_pure_and_shared_by_hosts(clips):
    expected = CropBatches(clips, CROP, seed=3)
    for step, batch in enumerate(islice(CropBatches(clips, CROP, 3).stream(5, FeedConfig(threads=3)), 10), 5):
        chex.assert_trees_all_equal(batch, expected[step])
    halves = [CropBatches(clips, CROP, 3, share=ShardSpec(host, 2))[4] for host in (0, 1)]
    chex.assert_trees_all_equal(
        {name: np.concatenate([half[name] for half in halves]) for name in halves[0]}, expected[4]
    )
    other = CropBatches(clips, CROP, seed=4)[4]
    assert not np.array_equal(other["videos_BTHW3"], expected[4]["videos_BTHW3"])
    assert not np.array_equal(expected[5]["videos_BTHW3"], expected[4]["videos_BTHW3"])


def test_crops_of_a_split(clips):
    assert set(CropBatches(clips, CROP, 0, "test")[0]["videos_clips_B"]) == {len(SIZES)}


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda clips: CropBatches(clips, CropConfig(13, 16, 16), 0), ["13 x 16 x 16", "12 x 40 x 40"]),
        (lambda clips: CropBatches(clips, CROP, 0, "val"), ["config.split is 'val'", "test, train"]),
        (lambda clips: CropBatches(clips, CROP, 0, share=ShardSpec(0, 4)), ["batch is 6 rows", "4 processes"]),
        (lambda clips: CropConfig(frames=0), ["crop is (0, 64, 64)"]),
        (lambda clips: CropConfig(image_share=1.5), ["image_share is 1.5"]),
    ],
)
def test_crop_mistakes(clips, make, words):
    with pytest.raises(UserError) as error:
        make(clips)
    for word in words:
        assert word in str(error.value)
