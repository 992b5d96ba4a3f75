"""A dataset of this package as a source of another one."""

import pickle

import numpy as np
import pytest
from fixtures_datasets import write_dataset

from sora_jax.data.reading.media import SpanRule
from sora_jax.data.sources import SourceConfig, make_source
from sora_jax.data.storing.clips import Clip
from sora_jax.data.storing.manifest import add_clip
from sora_jax.errors import UserError

NOISE = np.random.default_rng(0)
CLIPS = [
    Clip("id-a", NOISE.integers(0, 256, (4, 8, 8, 3), np.uint8), 8.0, {"original": "a", "long": "a a"}, "x", 3, 1.5),
    Clip("id-b", NOISE.integers(0, 256, (1, 8, 16, 3), np.uint8), 1.0, {}, "x", flags=("partial: damaged",)),
]


@pytest.fixture
def source(tmp_path):
    with write_dataset(tmp_path / "set", {}) as writer:
        for clip, split in zip(CLIPS, ("train", "held-out")):
            add_clip(writer, clip, f"{clip.id}.mp4", split)
        add_clip(writer, CLIPS[0], "id-a.mp4", "train", variant=1)
    return make_source(SourceConfig("array_record", str(tmp_path / "set"), label="class"))


def test_a_dataset_keeps_ids_captions_labels_and_places(source):
    entries = [source.entry(i) for i in range(len(source))]
    by_file = {(entry.file, source.open(i).content_id()): (i, entry) for i, entry in enumerate(entries)}
    assert set(by_file) == {("id-a.mp4", "id-a"), ("id-b.mp4", "id-b"), ("id-a.mp4", "id-a.v1")}
    for clip, split in zip(CLIPS, ("train", "held-out")):
        index, entry = by_file[f"{clip.id}.mp4", clip.id]
        assert (entry.captions, entry.label, entry.split) == (clip.captions, clip.label, split)
        decoded = source.open(index).decode(SpanRule(), None)
        np.testing.assert_array_equal(decoded.frames, clip.frames)
        assert (decoded.fps, decoded.start, decoded.flags) == (clip.fps, clip.start, clip.flags)
    index, _ = by_file["id-a.mp4", "id-a"]
    late = pickle.loads(pickle.dumps(source.open(index))).decode(SpanRule(max_frames=2, place=1.0), None)
    np.testing.assert_array_equal(late.frames, CLIPS[0].frames[2:])
    assert late.start == pytest.approx(1.5 + 2 / 8)


@pytest.mark.parametrize("name", ["", "none", "x.array_record"])
def test_what_is_no_dataset_is_one_sentence(tmp_path, name):
    (tmp_path / "x.array_record").touch()
    path = tmp_path / name
    with pytest.raises(UserError, match=f"^--path is '{path}'; it must be a dataset folder, as `sora-jax data build`"):
        make_source(SourceConfig("array_record", str(path)))
