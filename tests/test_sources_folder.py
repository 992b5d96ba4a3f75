"""The folder source: listing, captions beside clips and in tables, archives, strips."""

import json
import os
import pickle
import re
import tarfile
import unicodedata
import zipfile
from decimal import Decimal
from functools import partial

import numpy as np
import pytest
from fixtures_sources import decoded, entries, frame, kinds, shade

from sora_jax.data.reading.media import SpanRule
from sora_jax.data.reading.tracks import MediaError
from sora_jax.data.sources import SourceConfig, make_source
from sora_jax.data.viewing.write import save_png, write_video
from sora_jax.errors import UserError


def folder(path, **options):
    return make_source(SourceConfig("folder", str(path), **options))


def make(path, *names, **texts):
    """A folder with a picture a name, of shades 0, 10, ...; and texts."""
    for number, name in enumerate(names):
        save_png(path / name, frame(10 * number))
    for name, text in texts.items():
        (path / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return path


def captions(source):
    return {entry.file: entry.captions.get("original") for entry in entries(source)}


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
    assert [shade(source, i) for i in range(3)] == pytest.approx([20, 30, 10], abs=2)
    assert decoded(source, 1).frames.shape == (4, 8, 8, 3)
    assert source.refused == [("gone.mp4", "missing: named in captions.csv but not there")]


def test_text_files_name_their_kind_and_go_before_tables(tmp_path):
    make(tmp_path, "fox.png", "fox.2.png", "owl.png", "yak.png")
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


def test_tables_with_mappings_lists_and_other_columns(tmp_path):
    make(tmp_path, "a.png", "b.png", "c.png")
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
    make(tmp_path, "sub/a.png", captions__csv="file,caption,split,label\nsub/a.png,above,test,4\n")
    make(tmp_path / "sub", captions__csv="file,caption\na.png,near\n")
    (entry,) = entries(folder(tmp_path, label="class"))
    assert (entry.captions, entry.split, entry.label) == ({"original": "near"}, "test", 4)


def pack(folder, path):
    """Put the files of a folder into a zip or tar file."""
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    if path.suffix.lower() == ".zip":
        opened, add = zipfile.ZipFile(path, "w"), zipfile.ZipFile.write
    else:
        opened, add = tarfile.open(path, "w"), tarfile.TarFile.add
    with opened as archive:
        for name in names:
            add(archive, folder / name, f"./{name}")
    return path


@pytest.mark.parametrize("ending", [".zip", ".tar", ".ZIP"])
@pytest.mark.parametrize("alone", [True, False])
def test_an_archive_is_the_folder_that_it_holds(tmp_path, ending, alone):
    table = {"captions__csv": "file,caption,split\nb.png,from the table,test\nsub/c.png,deep,\n"}
    texts = {"a__txt": "a fox", "a__long__txt": "long"}
    inside = make(tmp_path / "in", "a.png", "b.png", "sub/c.png", "._a.png", **texts, **table)
    (tmp_path / "out").mkdir()
    path = pack(inside, tmp_path / f"out/set{ending}")
    as_folder, source = folder(inside), pickle.loads(pickle.dumps(folder(path if alone else tmp_path / "out")))
    expected = {entry.file: (entry.captions, entry.split) for entry in entries(as_folder)}
    assert expected["a.png"][0] == {"original": "a fox", "long": "long"} and expected["b.png"][1] == "test"
    assert {e.file: (e.captions, e.split) for e in entries(source)} == {
        f"set{ending}/{name}": given for name, given in expected.items()
    }
    shades = {entry.file: shade(source, index) for index, entry in enumerate(entries(source))}
    assert shades == {f"set{ending}/a.png": 0, f"set{ending}/b.png": 10, f"set{ending}/sub/c.png": 20}
    assert source.refused == []


def test_hostile_and_damaged_archives(tmp_path):
    data = save_png(tmp_path / "made/one.png", frame(50)).read_bytes()
    (tmp_path / "in/set").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "in/set/pack.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        for name in ("train/x.png", "../out.png", "/abs.png", "train/notes.txt", "c:/x.png", "c:x.png"):
            archive.writestr(name, data)
        archive.writestr("train/x.long.txt", "the first")
        archive.writestr("train/x.long.txt", "the second")
        archive.writestr("train/x.png", save_png(tmp_path / "made/two.png", frame(90)).read_bytes())
    make(tmp_path / "in/set", captions__csv="file,caption\ntrain/x.png,as if unpacked\n")
    (tmp_path / "in/bad.zip").write_bytes(b"PK not a zip")
    (tmp_path / "in/bad.tar").write_bytes(b"not a tar" * 99)
    (tmp_path / "in/x.tgz").write_bytes(b"not looked at")
    source = folder(tmp_path / "in")
    assert captions(source) == {"set/pack.zip/train/x.png": "as if unpacked"} and shade(source, 0) == 50
    assert source.entry(0).captions["long"] == "the first"
    unsafe = dict.fromkeys(("../out.png", "/abs.png", "c:/x.png", "c:x.png"), "unsafe")
    unsafe |= dict.fromkeys(("train/x.png", "train/x.long.txt"), "repeated")
    bad = {"bad.zip": "unreadable", "bad.tar": "damaged", "x.tgz": "compressed"}
    assert kinds(source) == {f"set/pack.zip/{name}": reason for name, reason in unsafe.items()} | bad


def test_what_cannot_be_read_is_a_media_error(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x.png", b"0123456789" * 20)
    data = (tmp_path / "a.zip").read_bytes().replace(b"0123456789", b"9876543210", 1)
    (tmp_path / "a.zip").write_bytes(data)
    save_png(tmp_path / "b.png", frame(1))
    media = [folder(tmp_path).open(index) for index in range(2)]
    (tmp_path / "b.png").unlink()
    for each, reason in zip(media, ("CRC", "No such file"), strict=True):
        for use in (each.content_id, lambda each=each: each.decode(SpanRule(), None)):
            with pytest.raises(MediaError, match=f"^unreadable: .*{reason}"):
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
    assert kinds(source) == {"b.png": "missing", "d.mp4": "not a file", "e": "not a file", "f": "unreadable"}


def test_strips_become_frames(tmp_path):
    save_png(tmp_path / "strip.png", np.concatenate([frame(10 * k, 6, 4) for k in range(5)], axis=1))
    save_png(tmp_path / "uneven.png", frame(0, 6, 21))
    source = folder(tmp_path, strip_frames=5, strip_fps=12.0)
    assert decoded(source, 0).fps == 12.0
    np.testing.assert_array_equal(decoded(source, 0).frames, np.stack([frame(10 * k, 6, 4) for k in range(5)]))
    last = decoded(source, 0, SpanRule(max_frames=3, place=1.0)).frames
    np.testing.assert_array_equal(last[:, 0, 0, 0], [20, 30, 40])
    with pytest.raises(MediaError, match="21 pixels"):
        decoded(source, 1)


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("captions.csv", "name,caption\na.png,x\n", "its columns are name, caption; it must have one of file, file_n"),
        ("captions.csv", "file,split\na.png,x\n", "file, split; .* and one of caption, text"),
        ("captions.csv", 'file,caption\na.png,x\nb.png,"12 inch\nc.png,a dog\nd.png,y\n', "row 3 opens a quote"),
        ("clips.tsv", 'file\tcaption\na.png\t"a 12" record\nb.png\ta dog"\n', ""),
        ("Captions.JSONL", '{"caption": "x"}\n', "its columns are caption; .*one of file"),
        ("captions.jsonl", "[" * 100_000, "row 1: it is not JSON"),
        ("captions.parquet", b"PAR1 not really", "Parquet|parquet"),
    ],
)
def test_unusable_tables_are_user_errors(tmp_path, name, text, match):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    if not match:
        assert kinds(folder(tmp_path)) == {name: "bad row", "b.png": "missing"}
        return
    with pytest.raises(UserError, match=match) as raised:
        folder(tmp_path)
    assert name in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "rows", "reason"),
    [
        ("captions.jsonl", '{"file": "b.png", "caption": "x", "label": ["cat", "dog"]}', r"label is \['cat', 'dog'\]"),
        ("captions.jsonl", '{"file": "b.png", "caption": "x", "label": Infinity}', "label is inf; it must be a class"),
        ("captions.jsonl", '{"file": "b.png", "caption": 7}', "caption of kind original is 7; it must be a text"),
        ("captions.jsonl", '{"file": "b.png", "caption": "\\ud800"}', "is not UTF-8; it must be saved as UTF-8"),
        ("captions.jsonl", '{"file": "b.png", "caption": "x"', "it is not JSON"),
        ("captions.jsonl", "[1]", r"it is \[1\]; it must be a JSON object"),
        ("captions.jsonl", '{"caption": "x"}', "it names no file"),
        ("captions.csv", b"b.png,caf\xe9", r"'caf\\udce9' is not UTF-8; it must be saved as UTF-8"),
        ("captions.csv", b"caf\xe9.png,x", r"'caf\\udce9.png' is not UTF-8"),
        ("captions.csv", "b.png,y, z", "it has 3 cells, the header 2"),
        ("captions.csv", "b.png", "it has 1 cells, the header 2"),
        ("captions.csv", 'b.png,"a" z', "its quotes do not match"),
        ("captions.csv", "b.png,x\n./b.png,y", "it names ./b.png again"),
        ("captions.csv", ",x", "it names no file"),
    ],
)
def test_a_bad_row_costs_its_clip(tmp_path, name, rows, reason):
    first, last = "file,caption\na.png,one\n", "c.png,three\n"
    if name == "captions.jsonl":
        first, last = '{"file": "a.png", "caption": "one"}\n', '{"file": "c.png", "caption": "three"}\n'
    data = rows if isinstance(rows, bytes) else rows.encode()
    (make(tmp_path, "a.png", "b.png", "c.png") / name).write_bytes(first.encode() + data + b"\n" + last.encode())
    source = folder(tmp_path)
    known = b"b.png" in data and not reason.startswith(("it is not JSON", "its quotes"))
    assert captions(source) == {"a.png": "one", "c.png": "three"} | ({} if known else {"b.png": None})
    ((file, why),) = source.refused
    row = 2 if name == "captions.jsonl" else 4 if "again" in reason else 3
    assert file == ("b.png" if known else "caf?.png" if b"caf" in data else name) and why.startswith(
        f"bad row: {name}, row {row}: "
    )
    assert re.search(reason, why)


def test_captions_that_are_not_utf8_cost_one_clip(tmp_path):
    (make(tmp_path, "a.png", "b.png") / "a.txt").write_bytes(b"caf\xe9")
    assert captions(folder(tmp_path)) == {"b.png": None} and kinds(folder(tmp_path)) == {"a.png": "bad name or caption"}


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="--path is .*nowhere; it must be a folder of videos or pictures"):
        folder(tmp_path / "nowhere")
    make(tmp_path, captions__csv="file,caption\n")
    with pytest.raises(UserError, match="--path is .*captions.csv; it must be the folder of the clips"):
        folder(tmp_path / "captions.csv")
    with pytest.raises(UserError, match="file, caption; it must have one of file,.* sentence"):
        folder(tmp_path, caption_field="sentence")


def test_names_are_found_as_users_mean_them(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    root = make(tmp_path / "in", f"{decomposed}.png", f"{composed} 2.png", "sub/a b.png", "sub/c.png", "d.png", "e.png")
    (root / f"{composed}.long.txt").write_text("a long text")
    table = f"""file;caption
{composed}.png;"one; with {decomposed}"
{decomposed} 2.png;12" record
.\\sub\\a b.png;three
{root}/sub/c.png;four
{root.resolve()}/gone.png;
sub/../d;five
/elsewhere/e.png;six
../f.png;seven
;
;
"""
    make(root, Captions__CSV="\ufeff" + table)
    source = folder(root)
    assert captions(source) == {
        f"{composed} 2.png": '12" record',
        f"{decomposed}.png": f"one; with {decomposed}",
        "d.png": "five",
        "e.png": None,
        "sub/a b.png": "three",
        "sub/c.png": "four",
    }
    assert source.entry(0).captions["long"] == "a long text"
    assert kinds(source) == {"gone.png": "missing", "/elsewhere/e.png": "outside", "../f.png": "outside"}
    data = pack(root, tmp_path / "mac.zip").read_bytes()
    for signature, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # macOS does not mark its names as UTF-8
        parts = data.split(signature)
        unmarked = [part[: at - 3] + bytes([part[at - 3] & ~8]) + part[at - 2 :] for part in parts[1:]]
        data = signature.join([parts[0], *unmarked])
    (tmp_path / "mac.zip").write_bytes(data)
    assert captions(folder(tmp_path / "mac.zip")) == {
        f"mac.zip/{name}": text for name, text in (captions(source) | {"sub/c.png": None}).items()
    }


TABLES = {
    "metadata.csv": "file_name,text,width\na.png,one,8\nb.png,two,8\n",  # Hugging Face
    "metadata.jsonl": '{"file_name": "a.png", "text": "one"}\n{"file_name": "b.png", "text": "two"}\n',
    "METADATA.CSV": '"video","prompt"\n"a.png","one"\n"b.png","two"\n',  # DiffSynth
    "captions.tsv": "Image\tCaption\na.png\tone\nb.png\ttwo\n",
    "clips.csv": "path, text\r\na.png, one\r\nb.png, two\r\n",  # Open-Sora
    "train.jsonl": '{"image_path": "a.png", "caption": "one"}\n{"video_path": "b.png", "caption": "two"}\n',  # musubi
    "meta_cap.json": '{"a.png": {"caption": "one", "tags": "x"}, "b": {"caption": "two"}}',  # kohya
    "captions.json": '{"a.png": "one", "b.png": ["two", "three"]}',
    "metadata.json": '[{"file_name": "a.png", "text": "one"}, {"file_name": "b.png", "text": "two"}]',
    "metadata.parquet": [{"file_name": "a.png", "text": "one"}, {"file_name": "b.png", "text": "two"}],
    "sheet.csv": "sep=;\r\nfile;caption\r\na.png;one\r\nb.png;two\r\n",  # read and written by Excel
    "captions.csv": "file,caption\na.png,one\nb.png,two\n".encode("utf-16"),  # Excel
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_other_programs(tmp_path, name):
    make(tmp_path, "a.png", "b.png")
    if name.endswith(".parquet"):
        write_parquet(tmp_path / name, TABLES[name])
    else:
        (tmp_path / name).write_bytes(TABLES[name] if isinstance(TABLES[name], bytes) else TABLES[name].encode())
    source = folder(tmp_path)
    assert captions(source) == {"a.png": "one", "b.png": "two"} and source.refused == []


@pytest.mark.parametrize(
    ("name", "text", "field"),
    [
        ("captions.csv", "File,Caption,Caption_Long,caption_EN\na.png,one,x,y\n", ""),
        ("captions.csv", "FILE,Title,CAPTION_LONG,caption_EN\na.png,one,x,y\n", "title"),
        ("a.json", '{"Title": "one", "Caption_Long": "x", "caption_EN": "y"}', "TITLE"),
    ],
)
def test_capitals_of_a_column_do_not_count(tmp_path, name, text, field):
    (make(tmp_path, "a.png") / name).write_text(text)
    (entry,) = entries(folder(tmp_path, caption_field=field))
    assert entry.captions == {"original": "one", "long": "x", "EN": "y"}


def test_of_names_that_differ_in_their_form_each_has_its_row(tmp_path):
    names = [unicodedata.normalize(form, "café.png") for form in ("NFC", "NFD")]
    table = f"file,caption\n{names[0]},composed\n{tmp_path}/{names[1]},decomposed\n"
    source = folder(make(tmp_path, *names, captions__csv=table))
    assert captions(source) == dict(zip(names, ("composed", "decomposed"))) and source.refused == []


def test_a_file_has_the_captions_that_it_has_in_its_folder(tmp_path):
    table = {"captions__csv": "file,caption,split\na.png,one,test\na.2.png,two,\ngone.png,x,\n"}
    make(tmp_path, "a.png", "a.2.png", "b.png", a__short__txt="short", a__2__long__txt="long", a__cls="3", **table)
    (tmp_path / "a.tar").write_bytes(b"not a tar")
    whole, source = folder(tmp_path), folder(tmp_path / "a.png")
    assert entries(source) == [entry for entry in entries(whole) if entry.file == "a.png"] and source.refused == []
    (entry,) = entries(source)
    assert entry.captions == {"original": "one", "short": "short", "label": "3"} and (entry.label, entry.split) == (
        3,
        "test",
    )


def test_a_long_caption_and_columns_of_pandas(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    make(tmp_path, "a.png", "b.png", captions__csv=f'file,caption\na.png,"{"x" * 200_000}"\n')
    assert len(captions(folder(tmp_path))["a.png"]) == 200_000
    (tmp_path / "captions.csv").unlink()
    for kind in (pa.dictionary(pa.int32(), pa.string()), pa.string_view(), pa.large_string()):
        columns = {
            "image": pa.array(["a.png", "b.png"]).cast(kind),
            "text": ["one", "two"],
            "label": [Decimal(1), Decimal(2)],
        }
        pq.write_table(pa.table(columns), tmp_path / "train.parquet")
        found = entries(folder(tmp_path))
        assert [(entry.captions["original"], entry.label) for entry in found] == [("one", 1), ("two", 2)]


def test_the_files_of_a_phone(tmp_path):
    names = ("DCIM/IMG_1.HEIC", "DCIM/IMG_1.MOV", "DCIM/IMG_2.JPG", "Movies/VID.mp4")
    for name in (*names, "DCIM/IMG_1.AAE", "DCIM/Thumbs.db", "DCIM/.DS_Store", "desktop.ini"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"not opened")
    takeout = {"title": "IMG_1.HEIC", "description": "", "photoTakenTime": {"timestamp": "1"}}
    for name in ("IMG_1.HEIC.json", "IMG_2.JPG.supplemental-metadata.json", "metadata.json"):
        (tmp_path / "DCIM" / name).write_text(json.dumps(takeout))
    (tmp_path / "DCIM/IMG_2.JPG.txt").write_text("on the beach")
    source = folder(tmp_path)
    assert captions(source) == dict.fromkeys(names) | {"DCIM/IMG_2.JPG": "on the beach"}
    assert kinds(source) == {"DCIM/metadata.json": "no table"}
    assert captions(folder(tmp_path / "DCIM/IMG_1.MOV")) == {"IMG_1.MOV": None}


def test_a_dataset_in_the_folder_is_no_part_of_it(tmp_path):
    make(tmp_path, "a.png", "sub/b.png")
    before = folder(tmp_path).digest
    make(tmp_path / "sub/data", "contact_sheet.png", dataset__json="{}", x__array_record="")
    make(tmp_path / ".data.sora_jax-unfinished", "c.png")
    assert folder(tmp_path).digest == before
    with pytest.raises(UserError, match="it is a dataset, which needs --source=array_record"):
        folder(tmp_path / "sub/data")
