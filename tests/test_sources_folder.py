"""The folder source: listing, captions beside clips and in tables, zip files, strips."""

import json
import os
import pickle
import zipfile
from functools import partial

import numpy as np
import pytest

from sora_jax.data.reading.media import SpanRule
from sora_jax.data.reading.tracks import MediaError
from sora_jax.data.sources import SourceConfig, make_source
from sora_jax.data.viewing.write import save_png, write_video
from sora_jax.errors import UserError


def frame(shade: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.full((height, width, 3), shade, np.uint8)


def folder(path, **options):
    return make_source(SourceConfig("folder", str(path), **options))


def entries(source):
    return [source.entry(i) for i in range(len(source))]


def frames(source, index, rule=SpanRule()):
    return source.open(index).decode(rule, None).frames


def write_parquet(path, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


def test_folder_is_read_in_order_with_captions_from_text_and_csv(tmp_path):
    save_png(tmp_path / "b.png", frame(20))
    save_png(tmp_path / "a/z.png", frame(10))
    write_video(tmp_path / "c.mp4", np.stack([frame(30)] * 4), 8)
    save_png(tmp_path / ".hidden.png", frame(0))
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden/captions.csv").write_text("nothing,to,see\n")
    (tmp_path / "b.txt").write_text("  from\nthe text ")
    (tmp_path / "README.md").write_text("no clip")
    (tmp_path / "captions.csv").write_text(
        '\ufefffile,split,caption\nb.png,test,from the list\na/z.png,,"one, two"\ngone.mp4,,nobody\n',
        encoding="utf-8",
    )
    source = folder(tmp_path)
    assert source.name == f"folder:{tmp_path}"
    assert [(e.file, e.captions, e.split) for e in entries(source)] == [
        ("b.png", {"original": "from the text"}, "test"),
        ("c.mp4", {}, None),
        ("a/z.png", {"original": "one, two"}, None),
    ]
    assert [frames(source, i).mean() for i in range(3)] == pytest.approx([20, 30, 10], abs=2)
    assert frames(source, 1).shape == (4, 8, 8, 3)
    assert source.refused == [("gone.mp4", "missing: named in captions.csv but not there")]


def test_text_files_name_their_kind_and_go_before_tables(tmp_path):
    for name in ("fox.png", "fox.2.png", "owl.png", "yak.png"):
        save_png(tmp_path / name, frame(1))
    texts = {"fox.txt": "a fox", "fox.synthetic.txt": "long", "fox.2.txt": "second", "owl.original.txt": "an owl"}
    for name, text in (texts | {"elk.txt": "no elk", "fox.original.txt": "not this", "fox.table.txt": ""}).items():
        (tmp_path / name).write_text(text)
    (tmp_path / "yak.TXT").write_text("a yak")
    (tmp_path / "yak.original.txt").write_text("not this")
    table = "file,caption,caption_synthetic,caption_table,caption_other\nfox.png,t,t,t,kept\nowl.png,t,t,,\n"
    (tmp_path / "captions.csv").write_text(table)
    found = {entry.file: entry.captions for entry in entries(folder(tmp_path))}
    assert found == {
        "fox.png": {"original": "a fox", "synthetic": "long", "other": "kept"},
        "fox.2.png": {"original": "second"},
        "owl.png": {"original": "an owl", "synthetic": "t"},
        "yak.png": {"original": "a yak"},
    }
    assert all(next(iter(captions)) == "original" for captions in found.values())


def test_the_same_captions_from_every_table(tmp_path):
    rows = [
        {"file": "a.png", "caption": "one", "caption_long": "one in words", "split": "test", "label": "ox"},
        {"file": "sub/b.png", "caption": "two", "caption_long": "two in words", "split": "train", "label": "ape"},
    ]
    found = []
    for kind in ("csv", "jsonl", "parquet"):
        root = tmp_path / kind
        save_png(root / "a.png", frame(1))
        save_png(root / "sub/b.png", frame(2))
        if kind == "csv":
            lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
            (root / "captions.csv").write_text("\n".join(lines))
        elif kind == "jsonl":
            (root / "metadata.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
        else:
            write_parquet(root / "any.parquet", rows)
        found.append(entries(folder(root, label="class")))
    assert found[0] == found[1] == found[2]
    assert [(e.label, e.label_name, e.split) for e in found[0]] == [(1, "ox", "test"), (0, "ape", "train")]
    assert found[0][1].captions == {"original": "two", "long": "two in words"}


def test_tables_with_mappings_lists_and_other_columns(tmp_path):
    for name in "abc":
        save_png(tmp_path / f"{name}.png", frame(1))
    (tmp_path / "captions.jsonl").write_text(
        '{"file_name": "a.png", "captions": {"synthetic": "s", "original": "o"}}\n'
        '{"file": "./b.png", "captions": ["x", "y"]}\n'
    )
    write_parquet(tmp_path / "c.parquet", [{"file": "c.png", "captions": {"k": "z"}, "sentence": "by its name"}])
    (tmp_path / "log.jsonl").write_text('{"step": 1}\nnot JSON\n')
    write_parquet(tmp_path / "other.parquet", [{"step": 1}])
    assert [entry.captions for entry in entries(folder(tmp_path))] == [
        {"original": "o", "synthetic": "s"},
        {"original": "x", "2": "y"},
        {"k": "z"},
    ]
    (tmp_path / "captions.jsonl").unlink()
    found = entries(folder(tmp_path, caption_field="sentence"))
    assert found[2].captions == {"original": "by its name", "k": "z"}


def test_a_deeper_table_goes_before_one_above(tmp_path):
    save_png(tmp_path / "sub/a.png", frame(1))
    (tmp_path / "captions.csv").write_text("file,caption,split,label\nsub/a.png,above,test,4\n")
    (tmp_path / "sub/captions.csv").write_text("file,caption\na.png,near\n")
    (entry,) = entries(folder(tmp_path, label="class"))
    assert (entry.captions, entry.split, entry.label) == ({"original": "near"}, "test", 4)


def test_zip_members_are_read_in_place(tmp_path):
    save_png(tmp_path / "one.png", frame(50))
    data = (tmp_path / "one.png").read_bytes()
    (tmp_path / "one.png").unlink()
    (tmp_path / "set").mkdir()
    with zipfile.ZipFile(tmp_path / "set/pack.zip", "w") as archive:
        for name in ("train/x.png", "../out.png", "/abs.png", "train/notes.txt", "c:/x.png", "c:x.png"):
            archive.writestr(name, data)
    (tmp_path / "set/captions.csv").write_text("file,caption\ntrain/x.png,a grey square\n")
    (tmp_path / "bad.zip").write_bytes(b"PK not a zip")
    source = pickle.loads(pickle.dumps(folder(tmp_path)))
    assert [(e.file, e.captions) for e in entries(source)] == [
        ("set/pack.zip/train/x.png", {"original": "a grey square"})
    ]
    assert (frames(source, 0) == 50).all()
    assert {name: reason.split(":")[0] for name, reason in source.refused} == {
        "set/pack.zip/../out.png": "unsafe",
        "set/pack.zip//abs.png": "unsafe",
        "set/pack.zip/c:/x.png": "unsafe",
        "set/pack.zip/c:x.png": "unsafe",
        "bad.zip": "unreadable",
    }


def test_a_damaged_member_is_a_media_error(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x.png", b"0123456789" * 20)
    data = (tmp_path / "a.zip").read_bytes().replace(b"0123456789", b"9876543210", 1)
    (tmp_path / "a.zip").write_bytes(data)
    media = folder(tmp_path).open(0)
    for use in (media.content_id, lambda: media.decode(SpanRule(), None)):
        with pytest.raises(MediaError, match="CRC"):
            use()


def _locked(scandir, locked, path):
    if str(path) == locked:
        raise PermissionError(13, "Permission denied", path)
    return scandir(path)


def test_links_pipes_and_locked_folders_are_listed(tmp_path, monkeypatch):
    save_png(tmp_path / "a.png", frame(1))
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "a.png")
    os.mkfifo(tmp_path / "d.mp4")
    (tmp_path / "e").symlink_to(tmp_path)
    (tmp_path / "f").mkdir()
    monkeypatch.setattr(os, "scandir", partial(_locked, os.scandir, str(tmp_path / "f")))
    source = folder(tmp_path)
    assert [entry.file for entry in entries(source)] == ["a.png", "c.png"]
    assert {name: reason.split(":")[0] for name, reason in source.refused} == {
        "b.png": "missing",
        "d.mp4": "not a file",
        "e": "not a file",
        "f": "unreadable",
    }


def test_a_file_that_goes_away_is_a_media_error(tmp_path):
    save_png(tmp_path / "a.png", frame(1))
    source = folder(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(MediaError):
        source.open(0).content_id()
    with pytest.raises(MediaError):
        source.open(0).decode(SpanRule(), None)


def test_strips_become_frames(tmp_path):
    save_png(tmp_path / "strip.png", np.concatenate([frame(10 * k, 6, 4) for k in range(5)], axis=1))
    save_png(tmp_path / "uneven.png", frame(0, 6, 21))
    source = folder(tmp_path, strip_frames=5, strip_fps=12.0)
    decoded = source.open(0).decode(SpanRule(), None)
    assert decoded.fps == 12.0
    np.testing.assert_array_equal(decoded.frames, np.stack([frame(10 * k, 6, 4) for k in range(5)]))
    last = frames(source, 0, SpanRule(max_frames=3, place=1.0))
    np.testing.assert_array_equal(last[:, 0, 0, 0], [20, 30, 40])
    with pytest.raises(MediaError, match="21 pixels"):
        frames(source, 1)


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("captions.csv", "name,caption\na.png,x\n", "row 2, has no file"),
        ("captions.csv", "file,split\na.png,x\n", "no caption"),
        ("captions.csv", "file,caption\n../a.png,x\n", "row 2.*outside"),
        ("captions.csv", "file,caption\na.png,x\nb.png,y, z\n", "row 3.*2 cells"),
        ("captions.csv", "file,caption\na.png\n", "row 2.*2 cells"),
        ("captions.csv", "file,caption\na.png,x\n./a.png,y\n", "row 3.*again"),
        ("captions.csv", b"file,caption\na.png,\xff\xfe\n", "UTF-8"),
        ("captions.jsonl", '{"file": "a.png"}\n{"file": "b.png"', "row 2, is not JSON"),
        ("captions.jsonl", '{"file": "a.png"}\n\n[1]\n', "row 3, is not a JSON object"),
        ("captions.jsonl", '{"caption": "x"}\n', "row 1, has no file"),
        ("captions.jsonl", '{"file": "/a.png", "caption": "x"}', "row 1.*outside"),
        ("clips.jsonl", '{"file": "a.png", "caption": 7}', "row 1.*caption.*7"),
        ("clips.jsonl", '{"file": "a.png", "caption": "\\ud800"}', "row 1.*surrogate"),
        ("captions.jsonl", "[" * 100_000, "row 1"),
        ("captions.parquet", b"PAR1 not really", "Parquet"),
    ],
)
def test_unusable_tables_are_user_errors(tmp_path, name, text, match):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=match) as raised:
        folder(tmp_path)
    assert name in str(raised.value) and "\n" not in str(raised.value)


def test_a_field_that_no_table_has_is_named(tmp_path):
    (tmp_path / "captions.csv").write_text("file,caption\n")
    with pytest.raises(UserError, match="caption_field='sentence'.*file, caption"):
        folder(tmp_path, caption_field="sentence")


def test_captions_that_are_not_utf8_cost_one_clip(tmp_path):
    save_png(tmp_path / "a.png", frame(1))
    save_png(tmp_path / "b.png", frame(2))
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    source = folder(tmp_path)
    assert [entry.file for entry in entries(source)] == ["b.png"]
    assert [name for name, _ in source.refused] == ["a.png"]


def test_missing_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        folder(tmp_path / "nowhere")
