"""ArrayRecord: datasets of this package, and records of media files with a table beside them."""

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from operator import methodcaller

import numpy as np
import pytest
from fixtures_datasets import write_dataset

from sora_jax.data.reading.media import SpanRule
from sora_jax.data.sources import SourceConfig, make_source
from sora_jax.data.sources.opened import FileMedia
from sora_jax.data.storing.clips import Clip
from sora_jax.data.storing.manifest import add_clip
from sora_jax.data.viewing.write import save_png
from sora_jax.errors import UserError


def frame(shade: int) -> np.ndarray:
    return np.full((8, 8, 3), shade, np.uint8)


def records(path, **options):
    return make_source(SourceConfig("array_record", str(path), **options))


def entries(source):
    return [source.entry(i) for i in range(len(source))]


@pytest.fixture
def write_records(tmp_path):
    """write_records(name, shades): an ArrayRecord file of pictures."""
    from array_record.python.array_record_module import ArrayRecordWriter

    def write(name, shades):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for shade in shades:
            writer.write(save_png(tmp_path / "made/x.png", frame(shade)).read_bytes())
        writer.close()
        return path

    return write


def test_records_with_tables_of_every_kind(tmp_path, write_records):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"caption": f"number {n}", "label": f"n{n % 2}", "split": "test"} for n in range(3)]
    for name in "abc":
        write_records(f"d/{name}.array_record", [10, 20, 30])
    (tmp_path / "d/a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "d/b.csv").write_text("\n".join(["caption,label,split", *(",".join(row.values()) for row in rows)]))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d/c.parquet")
    source = records(tmp_path / "d", label="class")
    found = entries(source)
    assert [e.file for e in found] == [f"{name}.array_record/{n}" for name in "abc" for n in range(3)]
    for entry, number in zip(found, [0, 1, 2] * 3):
        assert (entry.captions, entry.split) == ({"original": f"number {number}"}, "test")
        assert (entry.label, entry.label_name) == (number % 2, f"n{number % 2}")
    shades = [source.open(i).decode(SpanRule(), None).frames[0, 0, 0, 0] for i in range(9)]
    assert shades == [10, 20, 30] * 3 and source.refused == []
    assert entries(records(tmp_path / "d/b.array_record", label="class")) == found[3:6]
    save_png(tmp_path / "x.png", frame(20))
    assert source.open(1).content_id() == FileMedia(tmp_path / "x.png").content_id()


@pytest.mark.parametrize(
    ("tables", "match"),
    [
        ({}, "0 tables beside it"),
        ({"a.csv": "caption\nx\ny\n", "a.jsonl": "{}\n{}\n"}, "2 tables beside it"),
        ({"a.csv": "caption\nx\n"}, "holds 2 records and a.csv 1 rows"),
        ({"a.jsonl": '{"caption": 1}\n{}\n'}, "a.jsonl, row 1"),
    ],
)
def test_records_without_a_fitting_table_are_user_errors(tmp_path, write_records, tables, match):
    path = write_records("a.array_record", [1, 2])
    for name, text in tables.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=match):
        records(path)


def test_a_damaged_file_is_refused_and_none_is_a_user_error(tmp_path, write_records):
    with pytest.raises(UserError, match="holds no .array_record"):
        records(tmp_path)
    for name in "ab":
        write_records(f"{name}.array_record", [1])
        (tmp_path / f"{name}.csv").write_text("caption\nx\n")
    (tmp_path / "a.array_record").write_bytes(b"not records" * 10_000)
    source = records(tmp_path)
    assert [entry.file for entry in entries(source)] == ["b.array_record/0"]
    assert [(name, reason.split(":")[0]) for name, reason in source.refused] == [("a.array_record", "unreadable")]


def test_a_dataset_keeps_ids_captions_labels_and_places(tmp_path):
    rng = np.random.default_rng(0)
    clips = [
        Clip("id-a", rng.integers(0, 256, (4, 8, 8, 3), np.uint8), 8.0, {"original": "a", "long": "a a"}, "x", 3, 1.5),
        Clip("id-b", rng.integers(0, 256, (1, 8, 16, 3), np.uint8), 1.0, {}, "x", flags=("partial: damaged",)),
    ]
    with write_dataset(tmp_path / "set", {}) as writer:
        for clip, split in zip(clips, ("train", "held-out")):
            add_clip(writer, clip, f"{clip.id}.mp4", split)
        add_clip(writer, clips[0], "id-a.mp4", "train", variant=1)
    source = records(tmp_path / "set", label="class")
    by_file = {(entry.file, source.open(i).content_id()): (i, entry) for i, entry in enumerate(entries(source))}
    assert set(by_file) == {("id-a.mp4", "id-a"), ("id-b.mp4", "id-b"), ("id-a.mp4", "id-a.v1")}
    for clip, split in zip(clips, ("train", "held-out")):
        index, entry = by_file[f"{clip.id}.mp4", clip.id]
        assert (entry.captions, entry.label, entry.split) == (clip.captions, clip.label, split)
        decoded = source.open(index).decode(SpanRule(), None)
        np.testing.assert_array_equal(decoded.frames, clip.frames)
        assert (decoded.fps, decoded.start, decoded.flags) == (clip.fps, clip.start, clip.flags)
    index, _ = by_file["id-a.mp4", "id-a"]
    late = source.open(index).decode(SpanRule(max_frames=2, place=1.0), None)
    np.testing.assert_array_equal(late.frames, clips[0].frames[2:])
    assert late.start == pytest.approx(1.5 + 2 / 8)


def test_records_are_read_in_another_process(tmp_path, write_records):
    path = write_records("a.array_record", [1, 2])
    (tmp_path / "a.csv").write_text("caption\nx\ny\n")
    source = records(path)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(methodcaller("entry", 1), source).result() == source.entry(1)
        there = pool.submit(methodcaller("decode", SpanRule(), None), source.open(1)).result()
    np.testing.assert_array_equal(there.frames[0], frame(2))
