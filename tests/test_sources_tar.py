"""Tar shards: samples, their texts, hostile and damaged shards."""

import io
import json
import tarfile
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from operator import methodcaller
from pathlib import Path

import numpy as np
import pytest

from sora_jax.data.reading.media import SpanRule
from sora_jax.data.sources import SourceConfig, make_source
from sora_jax.data.sources.opened import FileMedia
from sora_jax.data.viewing.write import save_png, write_video
from sora_jax.errors import UserError


def frame(shade: int) -> np.ndarray:
    return np.full((8, 8, 3), shade, np.uint8)


@pytest.fixture
def png(tmp_path):
    """png(shade): the bytes of a picture."""
    return lambda shade: save_png(tmp_path / "made/x.png", frame(shade)).read_bytes()


def write_tar(path: Path, members, **options) -> Path:
    """members: pairs of a name, or a TarInfo, and bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for member, data in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            info.size = info.size or len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shards(path, **options):
    return make_source(SourceConfig("webdataset", str(path), **options))


def entries(source):
    return [source.entry(i) for i in range(len(source))]


def shade(source, index) -> int:
    return int(source.open(index).decode(SpanRule(), None).frames.mean().round())


def kinds(source) -> dict[str, str]:
    return {name: reason.split(":")[0] for name, reason in source.refused}


def test_samples_are_members_of_one_name(tmp_path, png):
    video = write_video(tmp_path / "v.mp4", np.stack([frame(90)] * 5), 8).read_bytes()
    row = {"caption": "overruled", "caption_long": "in words", "label": 3, "split": "test"}
    members = [
        ("a/fox.txt", b"\xef\xbb\xbf a\nfox "),
        ("a/fox.png", png(10)),
        ("a/fox.json", json.dumps(row).encode()),
        ("b/owl.mp4", video),
        ("b/owl.synthetic.txt", b"an owl"),
        ("b/owl.cls", b"7\n"),
        ("a/fox.npy", b"not looked at"),
        ("b/._owl.mp4", b"of a Mac"),
        ("a.b/cat.JPG", png(30)),
    ]
    source = shards(write_tar(tmp_path / "s/00.tar", members), label="class")
    assert [(e.file, e.captions, e.label, e.split) for e in entries(source)] == [
        ("00.tar/a/fox.png", {"original": "a fox", "long": "in words"}, 3, "test"),
        ("00.tar/b/owl.mp4", {"synthetic": "an owl"}, 7, None),
        ("00.tar/a.b/cat.JPG", {}, None, None),
    ]
    assert [shade(source, i) for i in (0, 2)] == [10, 30] and abs(shade(source, 1) - 90) <= 2
    assert source.open(1).decode(SpanRule(), None).frames.shape == (5, 8, 8, 3)
    assert source.refused == []


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_and_long_names(tmp_path, png, form):
    name = "d" * 60 + "/" + "é" * 25
    path = write_tar(tmp_path / "x.tar", [(f"{name}.png", png(5)), (f"{name}.txt", b"long")], format=form)
    source = shards(path)
    assert [(e.file, e.captions["original"]) for e in entries(source)] == [(f"x.tar/{name}.png", "long")]
    assert shade(source, 0) == 5 and not source.refused


def test_media_is_the_member_s_bytes(tmp_path, png):
    path = write_tar(tmp_path / "x.tar", [("a.png", png(5)), ("b.png", png(6))])
    (tmp_path / "b.png").write_bytes(png(6))
    assert shards(path).open(1).content_id() == FileMedia(tmp_path / "b.png").content_id()


def test_files_folders_and_patterns(tmp_path, png):
    for number in (2, 1, 0):
        write_tar(tmp_path / f"data/sub{number}/{number}.tar", [("x.png", png(number))])
    everything = ["sub0/0.tar/x.png", "sub1/1.tar/x.png", "sub2/2.tar/x.png"]
    assert [entry.file for entry in entries(shards(tmp_path / "data"))] == everything
    assert [entry.file for entry in entries(shards(tmp_path / "data/*/[01].tar"))] == everything[:2]
    assert [entry.file for entry in entries(shards(tmp_path / "data/sub1/1.tar"))] == ["1.tar/x.png"]
    for path, match in (
        ("none", "must be a tar"),
        ("data/*/*.zip", "must be a tar"),
        ("data/{0..2}.tar", "a pattern with "),
    ):
        with pytest.raises(UserError, match=match):
            shards(tmp_path / path)


def test_packed_tars_are_refused_in_a_sentence(tmp_path, png):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz"):
        pass
    assert shards(tmp_path / "a.tar.gz").refused[0][1].startswith("compressed: such a tar has no random access")
    (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar.gz").read_bytes())
    write_tar(tmp_path / "c.tar", [("x.png", png(1))])
    source = shards(tmp_path)
    assert len(source) == 1 and kinds(source) == {"a.tar.gz": "compressed", "b.tar": "damaged"}


def info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.size = kind, link, size
    return made


def test_hostile_members_are_refused(tmp_path, png):
    members = [
        ("../up.png", png(1)),
        ("/abs.png", png(1)),
        ("x/../../y.png", png(1)),
        ("c:/z.png", png(1)),
        (info("link.png", tarfile.SYMTYPE, "/etc/passwd"), b""),
        (info("hard.png", tarfile.LNKTYPE, "good.png"), b""),
        (info("device.png", tarfile.CHRTYPE), b""),
        (info("pipe.png", tarfile.FIFOTYPE), b""),
        (info("folder.png", tarfile.DIRTYPE), b""),
        ("link.txt", b"of the link"),
        ("good.png", png(9)),
    ]
    source = shards(write_tar(tmp_path / "x.tar", members))
    assert [entry.file for entry in entries(source)] == ["x.tar/good.png"] and shade(source, 0) == 9
    names = ("../up.png", "/abs.png", "x/../../y.png", "c:/z.png", "link.png", "hard.png", "device.png", "pipe.png")
    assert kinds(source) == {f"x.tar/{name}": "unsafe" for name in names}


def test_unusable_samples_have_reasons(tmp_path, png):
    members = [
        ("none.txt", b"words alone"),
        ("two.png", png(1)),
        ("two.jpg", png(2)),
        ("latin.png", png(1)),
        ("latin.txt", b"caf\xe9"),
        ("broken.png", png(1)),
        ("broken.json", b"{"),
        ("list.png", png(1)),
        ("list.json", b"[1]"),
        ("nested.png", png(1)),
        ("nested.json", b"[" * 100_000),
        ("book.png", png(1)),
        ("book.txt", b"x" * (2**20 + 1)),
    ]
    path = write_tar(tmp_path / "x.tar", members)
    source = shards(path)
    assert len(source) == 0
    texts = {f"x.tar/{name}.png": "bad name or caption" for name in ("latin", "book")}
    rows = {f"x.tar/{name}.png": "bad row" for name in ("broken", "list", "nested")}
    assert kinds(source) == {"x.tar/none": "no media", "x.tar/two": "several media"} | texts | rows
    chosen = shards(path, media_field="jpg")
    assert [entry.file for entry in entries(chosen)] == ["x.tar/two.jpg"] and shade(chosen, 0) == 2


def test_names_that_come_again_are_refused(tmp_path, png):
    members = [("1.png", png(1)), ("1.txt", b"one"), ("1.png", png(7)), ("1.txt", b"seven"), ("./2.png", png(2))]
    source = shards(write_tar(tmp_path / "x.tar", members))
    assert [(entry.file, entry.captions) for entry in entries(source)] == [
        ("x.tar/1.png", {"original": "one"}),
        ("x.tar/2.png", {}),
    ]
    assert [shade(source, i) for i in range(2)] == [1, 2]
    assert [name for name, _ in source.refused] == ["x.tar/1.png", "x.tar/1.txt"]
    assert all(why.startswith("repeated: ") for _, why in source.refused)


def test_media_of_every_ending_and_labels_that_are_no_class(tmp_path):
    endings = ["heic", "HEIF", "M4V", "mpg", "ts", "bmp", "TIF", "tiff", "MOV", "jpeg", "3gp"]
    members = [(f"{ending}.{ending}", b"not opened") for ending in endings]
    labels = {"list": '["cat", "dog"]', "inf": "Infinity", "nan": "NaN"}
    members += [(f"{name}.json", f'{{"label": {label}}}'.encode()) for name, label in labels.items()]
    source = shards(write_tar(tmp_path / "x.tar", members + [(f"{name}.png", b"not opened") for name in labels]))
    assert [entry.file for entry in entries(source)] == [*(f"x.tar/{e}.{e}" for e in endings), "x.tar/nan.png"]
    assert kinds(source) == {"x.tar/list.png": "bad row", "x.tar/inf.png": "bad row"}


def sample_tar(tmp_path, png) -> bytes:
    members = [pair for n in range(3) for pair in ((f"{n}.png", png(n)), (f"{n}.txt", b"words"))]
    return write_tar(tmp_path / "whole.tar", members).read_bytes()


def test_a_shard_cut_anywhere_gives_the_samples_before(tmp_path, png):
    data = sample_tar(tmp_path, png)
    cut = tmp_path / "cut/x.tar"
    cut.parent.mkdir()
    for length in range(1, 3 * 2048 + 1, 100):  # each of the six members takes two blocks of 512 bytes
        cut.write_bytes(data[:length])
        source = shards(cut)
        whole = [entry.file for entry in entries(source) if entry.captions]
        assert whole == [f"x.tar/{n}.png" for n in range(3) if length >= 2048 * n + 1536 + 5]
        assert any(name == "x.tar" and reason.startswith("damaged") for name, reason in source.refused)
        assert all(shade(source, i) == i for i in range(len(source)))


def test_a_damaged_header_and_what_follows_the_end_are_listed(tmp_path, png):
    data = sample_tar(tmp_path, png)
    header = bytearray(data)
    header[4096 + 150] ^= 0xFF  # the checksum of the third picture's header
    (tmp_path / "d").mkdir()
    for content, count, at in ((header, 2, 4096), (data + data, 3, 6144)):
        (tmp_path / "d/x.tar").write_bytes(content)
        source = shards(tmp_path / "d/x.tar")
        assert [entry.file for entry in entries(source)] == [f"x.tar/{n}.png" for n in range(count)]
        assert source.refused == [("x.tar", f"damaged: no end mark at byte {at}; what follows is not read")]


@pytest.mark.parametrize("size", [-512, -(2**40), 2**62, 2**33])
def test_a_lying_size_neither_hangs_nor_fills_the_memory(tmp_path, png, size):
    header = tarfile.TarInfo("big.png")
    header.size = size
    lie = header.tobuf(tarfile.GNU_FORMAT)
    extended = tarfile.TarInfo("pax")
    extended.type, extended.size = tarfile.XHDTYPE, size
    whole = sample_tar(tmp_path, png)
    (tmp_path / "d").mkdir()
    for name, block in (("a", lie), ("b", extended.tobuf(tarfile.GNU_FORMAT))):
        (tmp_path / f"d/{name}.tar").write_bytes(whole[: 3 * 2048] + block + whole[3 * 2048 :])
    source = shards(tmp_path / "d")
    assert len(source) == 6
    assert {name for name, _ in source.refused} >= {"a.tar", "b.tar"}


def test_a_header_that_claims_a_long_name_is_not_read_whole(tmp_path, png):
    path = write_tar(tmp_path / "x.tar", [("a.png", png(5))])
    name = tarfile.TarInfo("name")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 2**28
    with path.open("r+b") as file:
        file.seek(1024)
        file.write(name.tobuf(tarfile.GNU_FORMAT))
        file.truncate(2**29)
    tracemalloc.start()
    source = shards(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(source) == 1 and kinds(source) == {"x.tar": "damaged"} and peak < 2**24


def test_a_shard_is_read_in_another_process(tmp_path, png):
    source = shards(write_tar(tmp_path / "x.tar", [("a.png", png(5)), ("b.png", png(6)), ("b.txt", b"six")]))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(methodcaller("entry", 1), source).result() == source.entry(1)
        there = pool.submit(methodcaller("decode", SpanRule(), None), source.open(1)).result()
    np.testing.assert_array_equal(there.frames[0], frame(6))


def test_bytes_between_do_not_count(tmp_path, png):
    """Only headers and texts are read: a shard with a hole of gigabytes is listed at once."""
    header = tarfile.TarInfo("big.mp4")
    header.size = 2**31
    path = write_tar(tmp_path / "x.tar", [("a.png", png(5))])
    with path.open("r+b") as file:
        file.seek(1024)
        file.write(header.tobuf())
        file.seek(1024 + 512 + 2**31)
        huge = tarfile.TarInfo("huge.mp4")
        huge.size = 2**31 + 1
        file.write(huge.tobuf())
        file.truncate(1024 + 2 * 512 + 2**32 + 4096)
    source = shards(path)
    assert [entry.file for entry in entries(source)] == ["x.tar/a.png", "x.tar/big.mp4"]
    assert kinds(source) == {"x.tar/huge.mp4": "too large"}
    assert len(source.open(1).content_id()) == 24
