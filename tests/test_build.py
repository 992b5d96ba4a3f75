"""The dataset folder: what goes in comes out, whatever the workers; nothing bad stops a build."""

import json
import multiprocessing
import os
import pickle
import resource
import signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from sora_jax.data import build as building
from sora_jax.data.build import BuildConfig, build, hashed_split, inspect, uniform
from sora_jax.data.manifest import Dataset, write_dataset
from sora_jax.data.media import decode, save_png, write_video
from sora_jax.data.sources import Clip, FolderSource
from sora_jax.data.world import WorldConfig
from sora_jax.errors import UserError


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "in"
    for name, frames in {"long.gif": 12, "short.gif": 3, "still.png": 1}.items():
        write_video(path / name, noise(frames, frames, 40, 52), 8)
        (path / name).with_suffix(".txt").write_text(f"a {name[:-4]} clip")
    (path / "broken.mp4").write_bytes(b"nothing" * 30)
    (path / "broken.txt").write_text("never seen")
    save_png(path / "silent.png", noise(0, 32, 32))
    return path


def options(tmp_path, folder, **more) -> BuildConfig:
    return BuildConfig(**({"out": str(tmp_path / "out"), "path": str(folder), "multiple": 8} | more))


def make(tmp_path, folder, **more) -> Dataset:
    return build(options(tmp_path, folder, **more), progress=False)


def test_clips_come_out_as_the_rules_say(tmp_path, folder):
    dataset = make(tmp_path, folder, place="start")
    assert [clip.id for clip in dataset] == ["long.gif", "short.gif", "still.png"]
    assert [clip.frames.shape for clip in dataset] == [(9, 40, 48, 3), (1, 40, 48, 3), (1, 40, 48, 3)]
    assert [clip.caption for clip in dataset] == ["a long clip", "a short clip", "a still clip"]
    native = decode(folder / "long.gif").frames[:9, :, 2:-2]  # the ratio costs two columns on each side
    np.testing.assert_array_equal(dataset[0].frames, native)
    assert {entry["file"]: entry["reason"].split(":")[0] for entry in dataset.refused} == {
        "broken.mp4": "unreadable",
        "silent.png": "no caption",
    }


def test_rows_describe_the_clips(tmp_path, folder):
    dataset = make(tmp_path, folder)
    for i, clip in enumerate(dataset):
        row = dataset.row(i)
        assert (row["frames"], row["height"], row["width"]) == clip.frames.shape[:3]
        assert (row["index"], row["id"], row["fps"], row["caption"]) == (i, clip.id, clip.fps, clip.caption)
        assert row["split"] == hashed_split(options(tmp_path, folder), clip.id)
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_policies(tmp_path, folder):
    dataset = make(tmp_path, folder, length_rule="pad", min_frames=5, missing_caption="empty")
    assert [(clip.id, len(clip.frames)) for clip in dataset] == [("long.gif", 13), ("short.gif", 5)]
    np.testing.assert_array_equal(dataset[1].frames[3], dataset[1].frames[2])
    reasons = {entry["file"]: entry["reason"] for entry in dataset.refused}
    assert reasons["still.png"].startswith("too short") and reasons["silent.png"].startswith("too short")


def test_workers_do_not_change_the_result(tmp_path, folder):
    for name, more in {"folder": {"place": "random"}, "world": {"source": "world", "limit": 20}}.items():
        one = make(tmp_path, folder, out=str(tmp_path / name), **more)
        two = make(tmp_path, folder, out=str(tmp_path / f"{name} again"), workers=2, **more)
        assert one.table.equals(two.table) and one.refused == two.refused
        assert all(np.array_equal(a.frames, b.frames) for a, b in zip(one, two, strict=True))


class Deadly(FolderSource):
    """A source whose clip "short.gif" kills the process that reads it, as a decoder's crash does."""

    def read(self, index, **wanted):
        if self.entry(index).id == "short.gif":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index, **wanted)


def test_a_crash_of_the_decoder_costs_one_clip(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(building, "make_source", lambda config: Deadly(config.path))
    dataset = make(tmp_path, folder, workers=2)
    assert [clip.id for clip in dataset] == ["long.gif", "still.png"]
    assert {"file": "short.gif", "reason": "crash: the decoder took its process down"} in dataset.refused


def test_the_same_build_again_is_reused_another_is_refused(tmp_path, folder):
    make(tmp_path, folder)
    stamp = (tmp_path / "out/manifest.parquet").stat().st_mtime_ns
    make(tmp_path, folder, workers=2)
    assert (tmp_path / "out/manifest.parquet").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="max_frames=17, not 9"):
        make(tmp_path, folder, max_frames=9)
    save_png(folder / "new.png", noise(0, 32, 32))
    with pytest.raises(UserError, match="other files"):
        make(tmp_path, folder)


def test_nothing_to_build_from_is_a_user_error(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="is empty"):
        make(tmp_path, empty)
    (empty / "a.mp4").write_bytes(b"junk")
    with pytest.raises(UserError, match="nothing usable: 1 x unreadable"):
        make(tmp_path, empty, missing_caption="empty")
    with pytest.raises(UserError, match="not a folder"):
        make(tmp_path, tmp_path / "nowhere")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep")
    with pytest.raises(UserError, match="already exists"):
        build(BuildConfig(out=str(tmp_path / "out"), source="world", limit=2, multiple=8), progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "out"]


@pytest.mark.parametrize(
    "bad",
    [
        dict(source="web"),
        dict(length_rule="stretch"),
        dict(max_frames=0),
        dict(holdout=1.0),
        dict(max_pixels=10),
        dict(place="end"),
        dict(max_fps=0.0),
        dict(source="world"),
        dict(path=""),
    ],
)
def test_bad_options_are_user_errors(bad):
    with pytest.raises(UserError, match=next(iter(bad)) if bad != dict(source="world") else "limit"):
        BuildConfig(**({"out": "x", "path": "y"} | bad))


def test_world_dataset(tmp_path):
    config = BuildConfig(str(tmp_path / "w"), "world", limit=20, multiple=8, holdout=0.25)
    dataset = build(config, progress=False)
    assert dataset.table["split"].to_pylist() == ["train"] * 15 + ["held-out"] * 5
    assert {clip.frames.shape[1:3] for clip in dataset} <= set(WorldConfig().sizes)
    assert all((len(clip.frames) - 1) % 4 == 0 for clip in dataset)


def test_the_world_is_part_of_the_options(tmp_path):
    build(BuildConfig(str(tmp_path / "w"), "world", limit=3, multiple=8), progress=False)
    with pytest.raises(UserError, match="world="):
        build(BuildConfig(str(tmp_path / "w"), "world", world=WorldConfig(seed=1), limit=3, multiple=8))


def test_limit_is_spread_over_the_source(tmp_path, folder):
    dataset = make(tmp_path, folder, limit=2)  # of broken, long, short, silent, still
    assert [clip.id for clip in dataset] == ["short.gif"]
    assert [entry["file"] for entry in dataset.refused] == ["broken.mp4"]


def test_draws_depend_on_seed_purpose_and_id_only():
    draws = [uniform(seed, purpose, clip) for seed in (0, 1) for purpose in ("a", "b") for clip in ("x", "y")]
    assert len(set(draws)) == 8 and all(0 <= draw < 1 for draw in draws)
    config = BuildConfig(out="x", path="y", holdout=0.25)
    share = np.mean([hashed_split(config, f"clip {i}") == "held-out" for i in range(2000)])
    assert abs(share - 0.25) < 0.04


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), write_dataset(tmp_path / "out", {}) as writer:
        writer.add(Clip("a", noise(0, 2, 8, 8), 8.0, "", "test"), "a", "train")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def fill_the_disk(out: str) -> str:
    """What a build says when files cannot grow beyond 20 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        with write_dataset(out, {}) as writer:
            for i in range(50):
                writer.add(Clip(str(i), noise(i, 5, 32, 32), 8.0, "", "test"), "a", "train")
    except UserError as error:
        return str(error)
    return ""


def test_a_full_disk_is_a_user_error_and_leaves_nothing(tmp_path):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        message = pool.submit(fill_the_disk, str(tmp_path / "out")).result()
    assert "cannot be written" in message
    assert list(tmp_path.iterdir()) == []


def test_shards_and_random_access(tmp_path):
    clips = [Clip(str(i), noise(i, 1 + 4 * (i % 2), 8, 16), 8.0, f"clip {i}", "test") for i in range(7)]
    with write_dataset(tmp_path / "out", {}, shard_bytes=4000) as writer:
        for clip in clips:
            writer.add(clip, "f", "train")
    dataset = pickle.loads(pickle.dumps(Dataset(tmp_path / "out")))
    assert dataset.info["shards"] > 1
    assert len(list((tmp_path / "out").glob(f"clips-*-of-{dataset.info['shards']:05d}.array_record"))) > 1
    for i in (6, 0, 3, 3, 5):
        np.testing.assert_array_equal(dataset[i].frames, clips[i].frames)
        assert dataset[i].caption == clips[i].caption


def test_open_readers_survive_a_fork(tmp_path, folder):
    dataset = make(tmp_path, folder)
    expected = [int(clip.frames.sum()) for clip in dataset]  # opens the shard here
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    child = fork.Process(target=lambda: results.put([int(clip.frames.sum()) for clip in dataset]))
    child.start()
    assert results.get(timeout=30) == expected
    child.join()


def test_what_is_no_dataset_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="is not a dataset folder"):
        Dataset(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        Dataset(tmp_path)


def test_inspect_counts_and_draws(tmp_path, folder):
    make(tmp_path, folder)
    report = inspect(tmp_path / "out")
    assert report.summary["clips"] == 3 and report.summary["images"] == 2
    assert report.summary["sizes"] == {"48x40": 3}
    assert report.summary["refused"] == {"unreadable": 1, "no caption": 1}
    assert "48x40 (3)" in report.text
    sheet = decode(report.sheet).frames[0]
    assert sheet.shape[0] > 40 and (sheet != 255).any()


def test_every_split_but_the_trained_one_is_held_out(tmp_path):
    names = ["train", "test", "held-out", "train", "val"]
    with write_dataset(tmp_path / "d", {}) as writer:
        for number, split in enumerate(names):
            writer.add(Clip(f"{number}", np.zeros((1, 2, 2, 3), np.uint8), 8.0, "", "test"), "", split)
    dataset = Dataset(tmp_path / "d")
    assert [row["split"] for row in dataset.held_out()] == ["test", "held-out", "val"]
    assert [row["index"] for row in dataset.held_out("val")] == [0, 1, 2, 3]


def test_the_world_comes_as_it_is_drawn_or_not_at_all(tmp_path):
    world = WorldConfig(sizes=((24, 40), (40, 24)), seed=3)
    options = BuildConfig(str(tmp_path / "out"), "world", world=world, limit=8, multiple=8, max_pixels=256)
    dataset = build(options, progress=False)
    assert {clip.frames.shape[1:3] for clip in dataset} == {(24, 40), (40, 24)}
    with pytest.raises(UserError, match="multiple=16 does not divide"):
        build(replace(options, out=str(tmp_path / "other"), multiple=16), progress=False)
