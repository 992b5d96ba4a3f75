"""The dataset folder: what goes in comes out, whatever the workers; nothing bad stops a build."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path

import numpy as np
import pytest
from fixtures_datasets import same_folder, write_dataset

from sora_jax import cli
from sora_jax.data.building import build as building
from sora_jax.data.building import prepare as preparing
from sora_jax.data.building.build import build
from sora_jax.data.building.inspect import aspect, choose_shown, duration, inspect, length
from sora_jax.data.building.prepare import BuildConfig, hashed_split, split_draw
from sora_jax.data.draws import uniform
from sora_jax.data.reading.media import decode
from sora_jax.data.sources import SourceConfig
from sora_jax.data.sources.opened import FileMedia
from sora_jax.data.storing.clips import Clip
from sora_jax.data.storing.manifest import Dataset, add_clip
from sora_jax.data.viewing.write import save_png, write_video
from sora_jax.errors import UserError
from sora_jax.worlds import WorldConfig


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


SOURCE = ("name", "path", "limit", "weight", "world", "world_held_out", "strip_frames")


def options(tmp_path, folder, **more) -> BuildConfig:
    """A build of one source; options of the source and of the build in one."""
    source = {"path": str(folder)} | {name: more.pop(name) for name in SOURCE if name in more}
    build = {"out": str(tmp_path / "out"), "sources": (SourceConfig(**source),), "multiple": 8, "workers": 0}
    return BuildConfig(**(build | more))


def world_options(out, limit, **more) -> BuildConfig:
    config = more.pop("world", WorldConfig())
    source = SourceConfig("world", limit=limit, world=config, world_held_out=more.pop("held_out", 0))
    return BuildConfig(**({"out": str(out), "sources": (source,), "multiple": 8, "workers": 0} | more))


def files(dataset) -> list[str]:
    return [row["file"] for row in dataset.rows()]


def make(tmp_path, folder, **more) -> Dataset:
    return build(options(tmp_path, folder, **more), progress=False)


def test_clips_come_out_as_the_rules_say(tmp_path, folder):
    dataset = make(tmp_path, folder, place="start")
    assert files(dataset) == ["long.gif", "short.gif", "still.png"]
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
        assert (row["index"], row["id"], row["fps"], row["captions"]) == (i, clip.id, clip.fps, [clip.caption])
        t, h, w = 1 + (row["frames"] - 1) // 4, row["height"] // 8, row["width"] // 8
        assert (row["tokens"], row["kinds"], row["label"], row["weight"]) == (t * h * w, ["original"], -1, 1.0)
        assert clip.id == FileMedia(folder / row["file"]).content_id()
        assert row["split"] == hashed_split(options(tmp_path, folder), clip.id)
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_policies(tmp_path, folder):
    dataset = make(tmp_path, folder, length_rule="pad", min_frames=5, missing_caption="empty")
    assert files(dataset) == ["long.gif", "short.gif"] and [len(clip.frames) for clip in dataset] == [13, 5]
    np.testing.assert_array_equal(dataset[1].frames[3], dataset[1].frames[2])
    reasons = {entry["file"]: entry["reason"] for entry in dataset.refused}
    assert reasons["still.png"].startswith("too short") and reasons["silent.png"].startswith("too short")


def test_workers_do_not_change_the_result(tmp_path, folder):
    random = dict(place="random", variants=3, clips_per_file=2, max_frames=5)
    drawn = dict(resolution="uniform", min_pixels=256, variants=2)
    for number, more in enumerate((random, drawn, {"name": "world", "limit": 20, "path": ""})):
        one = make(tmp_path, folder, out=str(tmp_path / f"{number}"), **more)
        two = make(tmp_path, folder, out=str(tmp_path / f"{number} again"), workers=2, **more)
        assert one.table.equals(two.table) and one.refused == two.refused
        assert all(np.array_equal(a.frames, b.frames) for a, b in zip(one, two, strict=True))


def deadly(mix, config, unit):
    """Prepare a unit; the third file kills the process, as a decoder's crash does."""
    return preparing.prepare(mix, config, unit) if unit.entry != 2 else os.kill(os.getpid(), signal.SIGKILL)


def test_a_crash_of_the_decoder_costs_one_clip(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(building, "prepare", deadly)
    dataset = make(tmp_path, folder, workers=2)
    assert files(dataset) == ["long.gif", "still.png"]
    crash = {"file": "short.gif", "reason": "crash: its process ended with SIGKILL"}
    assert crash in dataset.refused


def test_the_same_build_again_is_reused_another_is_refused(tmp_path, folder):
    make(tmp_path, folder)
    stamp = (tmp_path / "out/manifest.parquet").stat().st_mtime_ns
    make(tmp_path, folder, workers=2)
    assert (tmp_path / "out/manifest.parquet").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="--out is .*built with --max-frames=17, not 9"):
        make(tmp_path, folder, max_frames=9)
    save_png(folder / "new.png", noise(0, 32, 32))
    with pytest.raises(UserError, match="other files"):
        make(tmp_path, folder)


def test_a_dataset_of_a_version_with_fewer_options_is_reused(tmp_path):
    """An option that it did not have yet was by default."""
    config = world_options(tmp_path / "w", 3)
    build(config, progress=False)
    info = json.loads((tmp_path / "w/dataset.json").read_text())
    del info["options"]["mirror"], info["options"]["sources"][0]["strip_fps"]
    del info["options"]["sources"][0]["world"]["extra_captions"]
    (tmp_path / "w/dataset.json").write_text(json.dumps(info))
    assert len(build(config, progress=False)) == 3
    with pytest.raises(UserError, match="it was built with --mirror=False, not True"):
        build(replace(config, mirror=True))


def test_names_may_hold_what_unicode_takes_for_the_end_of_a_line(tmp_path):
    folder = tmp_path / "in"
    save_png(folder / "a.png", noise(0, 32, 32))
    save_png(folder / "twin\u0085\u2029.png", noise(0, 32, 32))
    (folder / "b\u2028c.mp4").write_bytes(b"no video")
    dataset = make(tmp_path, folder, missing_caption="empty")
    assert files(dataset) == ["a.png"]
    assert [entry["file"] for entry in dataset.refused] == ["b\u2028c.mp4", "twin\u0085\u2029.png"]


def test_one_line_builds_a_dataset_and_says_what_became_of_the_files(tmp_path, folder, capfd):
    out = tmp_path / "out"
    assert cli.main(["data", "build", f"--path={folder}", f"--out={out}", "--missing-caption=empty"]) == 0
    told = capfd.readouterr().out
    assert f"{out}: 4 clips, 3 of them images" in told
    assert f"1 files refused (1 x unreadable); reasons: {out / 'refused.jsonl'}" in told


SHARES = ("2/2", "x", "1")  # which cannot be


@pytest.mark.parametrize(
    "option, message",
    [
        ("--max-frames=0", "--max-frames is 0; it must be at least 1"),
        ("--missing-caption=no", "--missing-caption is 'no'; allowed: 'refuse', 'empty'"),
        (
            "--resolution=largst",
            "--resolution is 'largst'; allowed: 'largest', 'uniform', 'navit'; did you mean largest?",
        ),
        ("--multiple=512", "--max-pixels is 65536; it must be at least multiple^2 = 262144"),
        *[(f"--shard={n}", f"--shard is '{n}'; it must be i/n with i from 0 to n - 1, such as 0/4") for n in SHARES],
    ],
)
def test_a_wrong_option_is_named_as_it_is_typed(tmp_path, folder, capfd, option, message):
    assert cli.main(["data", "build", f"--path={folder}", f"--out={tmp_path / 'out'}", option]) == 2
    assert f"sora-jax: {message}\n" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_nothing_to_build_from_is_a_user_error(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="it must hold videos or pictures, there are none"):
        make(tmp_path, empty)
    (empty / "a.mp4").write_bytes(b"junk")
    with pytest.raises(UserError, match="nothing usable: 1 x unreadable"):
        make(tmp_path, empty, missing_caption="empty")
    with pytest.raises(UserError, match="must be a folder"):
        make(tmp_path, tmp_path / "nowhere")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep")
    with pytest.raises(UserError, match="already exists"):
        build(world_options(tmp_path / "out", 2), progress=False)
    for out in ("", "."):
        with pytest.raises(UserError, match="it must be a new folder"):
            build(world_options(out, 2), progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "out"]


BAD = dict(length_rule="stretch", max_frames=0, holdout=1.0, max_pixels=10, min_pixels=10, max_tokens=0, variants=2)
BAD |= dict(resolution="small", framing="wide", place="end", max_fps=0.0, fps=-1.0, seconds=0.0, clips_per_file=0)
MORE_BAD = [("sources", ()), ("seconds", inf), ("seconds", 86401.0), ("fps", inf), ("max_fps", inf)]


@pytest.mark.parametrize("name, value", [*BAD.items(), *MORE_BAD])
def test_bad_options_are_user_errors(name, value):
    with pytest.raises(UserError, match=f"{name} is ".replace("_", "-")):
        BuildConfig(**({"out": "x", "sources": (SourceConfig(path="y"),)} | {name: value}))


def test_world_dataset(tmp_path):
    dataset = build(world_options(tmp_path / "w", 20, held_out=5), progress=False)
    assert dataset.table["split"].to_pylist() == ["train"] * 15 + ["held-out"] * 5
    assert {clip.frames.shape[1:3] for clip in dataset} <= set(WorldConfig().sizes)
    assert all((len(clip.frames) - 1) % 4 == 0 for clip in dataset)
    with pytest.raises(UserError, match="--sources="):
        build(world_options(tmp_path / "w", 20, held_out=5, world=WorldConfig(seed=1)))


def test_clips_of_the_world_are_cropped_to_squares_where_that_is_asked(tmp_path):
    world = WorldConfig(sizes=((24, 36), (36, 24)))
    native = build(world_options(tmp_path / "native", 8, world=world, multiple=12, max_pixels=256), progress=False)
    assert {clip.frames.shape[1:3] for clip in native} == {(24, 36), (36, 24)}  # as they are drawn
    with pytest.raises(UserError, match="--multiple is 16; it must be a divisor"):
        build(world_options(tmp_path / "other", 8, world=world, multiple=16), progress=False)
    square = build(world_options(tmp_path / "square", 8, world=world, framing="square", multiple=12), progress=False)
    whole = {clip.id: clip.frames for clip in map(native.__getitem__, range(8))}
    for clip in map(square.__getitem__, range(8)):
        frames = whole[clip.id]
        middle = frames[:, 6:30] if frames.shape[1] == 36 else frames[:, :, 6:30]
        np.testing.assert_array_equal(clip.frames, middle)


def test_limit_is_spread_over_the_source(tmp_path, folder):
    dataset = make(tmp_path, folder, limit=2)  # of broken, long, short, silent, still
    assert files(dataset) == ["short.gif"]
    assert [entry["file"] for entry in dataset.refused] == ["broken.mp4"]


def test_draws_depend_on_seed_purpose_and_id_only():
    draws = [uniform(seed, purpose, clip) for seed in (0, 1) for purpose in ("a", "b") for clip in ("x", "y")]
    assert len(set(draws)) == 8 and all(0 <= draw < 1 for draw in draws)
    config = BuildConfig("x", (SourceConfig(path="y"),), holdout=0.25)
    share = np.mean([hashed_split(config, f"clip {i}") == "held-out" for i in range(2000)])
    assert abs(share - 0.25) < 0.04


def test_a_build_that_was_killed_goes_on_after_its_last_whole_part(tmp_path, folder, monkeypatch):
    whole = make(tmp_path, folder, out=str(tmp_path / "whole"), clips_per_shard=2)  # 2 + 2 + 1 entries
    asked = []

    def stopping(mix, config, unit, at=2):
        asked.append(unit.entry)
        if unit.entry == at:
            raise KeyboardInterrupt
        return prepare(mix, config, unit)

    prepare = preparing.prepare
    monkeypatch.setattr(building, "prepare", stopping)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, folder, clips_per_shard=2)
    assert not (tmp_path / "out").exists()
    asked.clear()
    monkeypatch.setattr(building, "prepare", partial(stopping, at=None))
    again = make(tmp_path, folder, clips_per_shard=2)
    assert asked == [2, 3, 4]
    same_folder(whole.path, again.path)


def test_shares_of_two_processes_make_the_dataset_of_one(tmp_path, folder):
    whole = make(tmp_path, folder, out=str(tmp_path / "whole"), clips_per_shard=1)
    assert make(tmp_path, folder, clips_per_shard=1, shard="1/2") is None
    assert not (tmp_path / "out").exists()
    shared = make(tmp_path, folder, clips_per_shard=1, shard="0/2")
    same_folder(whole.path, shared.path)


def test_equal_files_are_one_clip_and_the_other_is_listed(tmp_path, folder):
    (folder / "twin.gif").write_bytes((folder / "long.gif").read_bytes())
    (folder / "twin.txt").write_text("the same again")
    dataset = make(tmp_path, folder)
    assert files(dataset) == ["long.gif", "short.gif", "still.png"]
    assert {"file": "twin.gif", "reason": "duplicate: the same content as long.gif"} in dataset.refused


def test_a_long_file_gives_several_clips_that_do_not_overlap(tmp_path):
    frames = np.arange(40, dtype=np.uint8)[:, None, None, None] * np.full((1, 32, 32, 3), 5, np.uint8)
    write_video(tmp_path / "in" / "count.gif", frames, 10)
    found = make(tmp_path, tmp_path / "in", max_frames=9, clips_per_file=3, missing_caption="empty", place="start")
    spans = [clip.frames[:, 0, 0, 0] // 5 for clip in found]
    assert [span.tolist() for span in spans] == [list(range(s[0], s[0] + 9)) for s in spans]
    assert all(a[-1] < b[0] for a, b in zip(spans, spans[1:])) and len(spans) == 3
    assert [clip.start for clip in found] == pytest.approx([span[0] / 10 for span in spans])
    assert len({clip.id for clip in found}) == 3 and len({row["split"] for row in found.rows()}) == 1
    more = dict(out=str(tmp_path / "m"), max_frames=9, clips_per_file=99, missing_caption="empty")
    many = make(tmp_path, tmp_path / "in", **more)
    assert len(many) == 4 and not many.refused  # as many as fit


def test_variants_differ_in_size_and_share_an_id(tmp_path, folder):
    more = dict(resolution="uniform", min_pixels=8 * 8, multiple=8, variants=6, max_frames=1)
    rows = make(tmp_path, folder, **more).rows()
    assert [row["variant"] for row in rows] == list(range(6)) * 3
    for clip in range(3):
        mine = rows[6 * clip : 6 * clip + 6]
        assert len({row["id"] for row in mine}) == 1 and len({(row["height"], row["width"]) for row in mine}) > 2
    again = make(tmp_path, folder, out=str(tmp_path / "seed"), seed=1, **more).rows()
    assert [row["height"] for row in again] != [row["height"] for row in rows]


def test_mirror_images_follow_their_clips(tmp_path, folder):
    dataset = make(tmp_path, folder, mirror=True, variants=2, place="random", max_frames=5)
    assert [row["variant"] for row in dataset.rows()] == list(range(4)) * 3
    for clip in range(3):
        for variant in range(2):
            one, other = dataset[4 * clip + variant], dataset[4 * clip + 2 + variant]
            assert one.id == other.id and one.captions == other.captions
            np.testing.assert_array_equal(one.frames[:, :, ::-1], other.frames)
            assert (one.frames != other.frames).any()


def test_a_rate_for_all_keeps_pictures_and_flags_frames_that_are_repeated(tmp_path, folder):
    dataset = make(tmp_path, folder, fps=24.0, max_frames=33)  # the files have 8 frames a second
    lengths = {row["file"]: row["frames"] for row in dataset.rows()}
    assert lengths["long.gif"] == 33 and lengths["short.gif"] > 3 and lengths["still.png"] == 1
    flags = {row["file"]: [flag.split(":")[0] for flag in row["flags"]] for row in dataset.rows()}
    assert flags == {"long.gif": ["repeated"], "short.gif": ["repeated"], "still.png": []}
    assert inspect(dataset.path).summary["flagged"] == {"repeated": 2}
    np.testing.assert_array_equal(dataset[0].frames[0], dataset[0].frames[2])


def test_sources_are_mixed_with_their_weights(tmp_path, folder):
    world = SourceConfig("world", limit=4, world=WorldConfig(), weight=0.5)
    made = options(tmp_path, folder, weight=2.0)
    dataset = build(replace(made, sources=(*made.sources, world)), progress=False)
    assert [row["weight"] for row in dataset.rows()] == [2.0] * 3 + [0.5] * 4
    assert [row["source"].partition(":")[0] for row in dataset.rows()] == ["folder"] * 3 + ["world"] * 4


def labelled(path, **labels):
    for name, label in labels.items():
        save_png(path / f"{name}.png", noise(len(name) + ord(name[0]), 32, 32))
        (path / f"{name}.cls").write_text(label)
    return SourceConfig(path=str(path))


def classes(out, *sources, workers=0) -> dict:
    dataset = build(BuildConfig(str(out), sources, multiple=8, workers=workers), progress=False)
    return {row["file"][:-4]: (row["label"], *row["captions"]) for row in dataset.rows()}


def test_classes_keep_their_names_and_have_one_number_in_all_sources(tmp_path):
    one, two = labelled(tmp_path / "1", a="fox", b="cat"), labelled(tmp_path / "2", c="ape", d="fox")
    found = classes(tmp_path / "one", one)
    assert found == {"a": (1, "fox"), "b": (0, "cat")}
    again = SourceConfig("array_record", str(tmp_path / "one"))
    assert classes(tmp_path / "again", again) == found
    expected = {"a": (2, "fox"), "b": (1, "cat"), "c": (0, "ape"), "d": (2, "fox")}
    for workers, source in enumerate((one, again)):
        assert classes(tmp_path / f"both {workers}", source, two, workers=workers) == expected
    numbers = labelled(tmp_path / "3", e="7", f="0"), labelled(tmp_path / "4", g="7")
    assert classes(tmp_path / "numbers", *numbers) == {"e": (7, "7"), "f": (0, "0"), "g": (7, "7")}
    only = replace(two, label="caption")
    assert classes(tmp_path / "caption", one, only) == expected | {"c": (-1, "ape"), "d": (-1, "fox")}


def test_a_source_that_changes_during_a_build_is_a_user_error(tmp_path, folder, monkeypatch):
    config = options(tmp_path, folder, workers=1)
    mix = preparing.open_sources(config)
    save_png(folder / "new.png", noise(0, 32, 32))
    monkeypatch.setattr(building, "open_sources", lambda config: mix)
    with pytest.raises(UserError, match="--path is .*; it has changed while it was read"):
        build(config, progress=False)


def test_any_error_of_one_clip_costs_that_clip(tmp_path, folder, monkeypatch):
    def clip(id, frames, *more):
        if len(frames) == 12:
            raise ValueError("no such rate")
        return Clip(id, frames, *more)

    monkeypatch.setattr(preparing, "Clip", clip)
    dataset = make(tmp_path, folder, max_frames=13)
    assert files(dataset) == ["short.gif", "still.png"]
    assert {"file": "long.gif", "reason": "unreadable: no such rate"} in dataset.refused


def test_a_clip_is_never_made_square_unless_it_is_asked_for(tmp_path):
    write_video(tmp_path / "in" / "wide.gif", noise(0, 5, 24, 96), 8)
    common = dict(missing_caption="empty", max_pixels=1024)
    native = make(tmp_path, tmp_path / "in", **common)
    square = make(tmp_path, tmp_path / "in", out=str(tmp_path / "s"), framing="square", **common)
    assert native[0].frames.shape[1:3] == (16, 64) and square[0].frames.shape[1:3] == (24, 24)


def test_a_world_clip_over_the_token_budget_is_refused_with_what_would_fit(tmp_path):
    world = WorldConfig(sizes=((24, 40),), frames=(5, 17), image_share=0.0)
    dataset = build(world_options(tmp_path / "w", 12, world=world, max_tokens=40), progress=False)
    assert set(row["tokens"] for row in dataset.rows()) == {30}  # 2 x 3 x 5
    why = "too long: 17 frames of 40x24 have 75 tokens, --max-tokens is 40"
    fits = "5 frames of that size or 17 frames of 16x16 would fit"
    assert {entry["reason"] for entry in dataset.refused} == {f"{why}; {fits}"}


def test_the_token_budget_makes_longer_clips_smaller(tmp_path):
    for frames in (1, 5, 17):
        write_video(tmp_path / "in" / f"{frames}.webp", noise(frames, frames, 64, 96), 8)
    common = dict(missing_caption="empty", max_tokens=24, multiple=8)
    sizes = {len(clip.frames): clip.frames.shape[1:3] for clip in make(tmp_path, tmp_path / "in", **common)}
    assert sizes == {1: (32, 48), 5: (24, 32), 17: (8, 16)}  # 24, 2 x 12 and 5 x 2 tokens: 5 x 4 would crop more
    few = make(tmp_path, tmp_path / "in", out=str(tmp_path / "few"), **common | dict(max_tokens=4))
    reasons = {entry["file"]: entry["reason"] for entry in few.refused}
    assert reasons["17.webp"].startswith(
        "too long: 17 frames have at least 5 tokens, --max-tokens is 4; at most 13 frames"
    )


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


def shown_rows(sizes: dict) -> list[dict]:
    """Return rows of so many clips of each (frames, height, width), two of each file."""
    names = ("frames", "height", "width")
    flat = [size for size, count in sizes.items() for _ in range(count)]
    return [dict(zip(names, size), index=i, file=f"{i // 2}.mp4") for i, size in enumerate(flat)]


@pytest.mark.parametrize(
    "sizes, videos, pictures",
    [
        ({(1, 8, 8): 3667, (9, 8, 8): 11, (5, 8, 8): 1}, 12, 12),  # all videos, though there are few
        ({(9, 8, 8): 1000, (9, 8, 16): 2, (1, 8, 8): 50}, 18, 6),
        ({(9, 8, 8): 5}, 5, 0),
        ({(1, 8, 8): 5}, 0, 5),
    ],
)
def test_the_sheet_shows_videos_first_and_all_sizes(sizes, videos, pictures):
    rows = shown_rows(sizes)
    shown = choose_shown(rows, 24, 6)
    assert [row["frames"] > 1 for row in shown] == [True] * videos + [False] * pictures
    assert len({row["index"] for row in shown}) == len(shown)
    kinds = {(row["frames"], row["height"], row["width"]) for row in shown}
    assert kinds == set(sizes)
    many = [row["file"] for row in shown if (row["frames"], row["height"], row["width"]) == max(sizes, key=sizes.get)]
    assert len(set(many)) == len(many) or sizes[max(sizes, key=sizes.get)] < 2 * len(many)


def test_a_length_is_told_in_seconds():
    assert length(17, 30.0) == "17 frames at 30 fps, 0.57 s"
    assert length(9, 8.0) == "9 frames at 8 fps, 1.1 s"


def test_short_clips_of_a_high_rate_are_advised_to_drop_frames(tmp_path):
    for name, fps in (("fast", 30.0), ("slow", 8.0)):
        video = np.random.default_rng(0).integers(0, 255, (9, 16, 16, 3)).astype(np.uint8)
        write_video(tmp_path / name / "clip.mp4", video, fps)
        (tmp_path / name / "clip.txt").write_text("a clip")
        make(tmp_path / name, tmp_path / name, multiple=8)
    fast, slow = (inspect(tmp_path / name / "out").text for name in ("fast", "slow"))
    assert "1 of 1 videos last less than 1 s; with --max-fps=8, 9 frames of a longer file last 1.1 s" in fast
    assert "--max-fps" not in slow


def test_inspect_counts_and_draws(tmp_path, folder):
    make(tmp_path, folder)
    before = {path.name: path.stat().st_mtime_ns for path in [tmp_path / "out", *(tmp_path / "out").iterdir()]}
    assert inspect(tmp_path / "out").pictures == ()
    report = inspect(tmp_path / "out", out=tmp_path / "look")
    after = {path.name: path.stat().st_mtime_ns for path in [tmp_path / "out", *(tmp_path / "out").iterdir()]}
    assert before == after  # a dataset may lie on a medium that is only read
    assert report.summary["clips"] == 3 and report.summary["images"] == 2
    assert report.summary["sizes"] == {"48x40": 3}
    assert report.summary["refused"] == {"unreadable": 1, "no caption": 1}
    assert "48x40 (3)" in report.text
    assert report.summary["aspects"] == {"4:3": 3} and report.summary["durations"] == {"image": 2, "< 2 s": 1}
    assert report.summary["tokens"] == {"min": 30, "max": 90, "mean": 50}
    fill = {"pack_length": 180, "slots": 16, "packs": 1, "fill": round(150 / 180, 4), "clips": 3, "advice": ""}
    assert report.summary["fill"] == fill
    assert report.text.count("fps") == 1 and list(report.summary["lengths"].values()) == [1]
    assert report.pictures == (tmp_path / "look/contact_sheet.png", tmp_path / "look/histogram.png")
    for picture in report.pictures:
        pixels = decode(picture).frames[0]
        assert pixels.shape[0] > 40 and (pixels != 255).any()
    for tokens in (80, 0):
        with pytest.raises(UserError, match=f"--pack-length is {tokens}; .* 90 tokens"):
            inspect(tmp_path / "out", pack_length=tokens)


def test_names_of_shapes_and_durations():
    sizes = [(9, 16), (16, 9), (10, 10), (100, 133), (21, 9), (48, 32)]
    assert [aspect(*size) for size in sizes] == ["16:9", "9:16", "1:1", "4:3", "9:21", "2:3"]
    spans = [(1, 8.0), (7, 8.0), (8, 8.0), (31, 8.0), (4000, 8.0)]
    assert [duration(*span) for span in spans] == ["image", "< 1 s", "< 2 s", "< 4 s", ">= 60 s"]


def test_of_five_files_or_more_one_is_held_out_whoever_builds(tmp_path):
    folder = tmp_path / "in"
    for i in range(7):
        save_png(folder / f"{i}.png", np.full((32, 32, 3), 9 * i, np.uint8))

    def built(out, **more):
        return make(tmp_path, folder, out=str(tmp_path / out), missing_caption="empty", **more)

    dataset, config = built("whole", clips_per_shard=2), options(tmp_path, folder)
    draws = {row["id"]: split_draw(config, row["id"]) for row in dataset.rows()}
    assert min(draws.values()) > config.holdout  # so the hashes hold out none
    assert [row["id"] for row in dataset.held_out()] == [min(draws, key=draws.__getitem__)]
    assert built("shared", clips_per_shard=2, shard="1/2") is None
    same_folder(dataset.path, built("shared", clips_per_shard=2, shard="0/2").path)
    assert len(built("most", holdout=0.9).held_out()) == sum(draw < 0.9 for draw in draws.values())
    assert not built("four", limit=4).held_out() and not built("none", holdout=0.0).held_out()
    (folder / "captions.csv").write_text("file,caption,split\n" + "".join(f"{i}.png,a,train\n" for i in range(7)))
    assert not built("given").held_out()


def test_every_split_but_the_trained_one_is_held_out(tmp_path):
    names = ["train", "test", "held-out", "train", "val"]
    with write_dataset(tmp_path / "d", {}) as writer:
        for number, split in enumerate(names):
            add_clip(writer, Clip(f"{number}", np.zeros((1, 2, 2, 3), np.uint8), 8.0), "", split)
    dataset = Dataset(tmp_path / "d")
    assert [row["split"] for row in dataset.held_out()] == ["test", "held-out", "val"]
    assert [row["index"] for row in dataset.held_out("val")] == [0, 1, 2, 3]


def test_drawn_clips_try_the_small_form_of_own_video(tmp_path):
    """As the pages say: without clips at hand, a folder of drawn ones is built by the same command."""
    root = Path(__file__).parents[1]
    script = root / "experiments" / "video" / "make_clips.py"
    options = [f"--out={tmp_path / 'clips'}", "--count=8"]
    subprocess.run([sys.executable, script, *options], check=True, capture_output=True)
    config = f"--config={root / 'configs' / 'video.py'}:small_data"
    assert cli.main(["data", "build", config, f"--path={tmp_path / 'clips'}", f"--out={tmp_path / 'out'}"]) == 0
    rows = Dataset(tmp_path / "out").rows()
    assert len({row["file"] for row in rows}) == 8 and all(row["captions"][0].startswith("a") for row in rows)
    assert all(row["height"] * row["width"] <= 4096 and row["frames"] in (1, 9) for row in rows)
    assert inspect(tmp_path / "out").summary["clips"] == len(rows) > 8  # 17 and 25 frames give several clips
