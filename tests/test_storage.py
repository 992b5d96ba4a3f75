"""gs:// paths in every command: what is made there equals what is made on the disk, to the bit.

The bucket is one of `fixtures_bucket`: the arrays of checkpoints go through TensorStore's own client of Google Cloud
Storage, all other files through epath and fsspec.
"""

import errno
import json
import pickle
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
from fixtures_bucket import BucketFileSystem, Handler, bucket  # noqa: F401
from fixtures_runs import TINY, chain, run  # noqa: F401
from fixtures_toy import train as train_toy
from test_sources_tar import png, write_tar  # noqa: F401
from test_sources_tfds import GreyDigits

from sora_jax import cli, files
from sora_jax.convert.tensors import read_tensors, write_tensors
from sora_jax.data.feeding.feed import FeedConfig
from sora_jax.data.feeding.pipeline import PackedBatches
from sora_jax.data.feeding.tokenizer import TokenizerConfig
from sora_jax.data.feeding.tokenizer import train as train_tokenizer
from sora_jax.data.packing.packs import PackingConfig
from sora_jax.data.reading.media import SpanRule, decode
from sora_jax.data.shard_spec import ShardSpec
from sora_jax.data.sources import SourceConfig, make_source
from sora_jax.data.storing import shards
from sora_jax.data.storing.latents import LatentCache
from sora_jax.data.storing.manifest import Dataset
from sora_jax.data.storing.parts import Kind, start
from sora_jax.data.storing.shards import FLOATS, RecordWriter, shard_name
from sora_jax.data.viewing.write import save_png, write_video
from sora_jax.errors import UserError, install_command
from sora_jax.evaluate.curves import draw_losses
from sora_jax.files import (
    as_path,
    create,
    is_remote,
    local_copy,
    read_text,
    remote_files,
    replacing,
    temporary_path,
    write_text,
)
from sora_jax.generate.recipe import read_recipe
from sora_jax.train import mirror
from sora_jax.train.checkpoint import Checkpoints
from sora_jax.train.frozen import load_autoencoder
from sora_jax.train.metrics import MetricsWriter, read_metrics

ROOT = "gs://bucket"
BYTES = TokenizerConfig(kind="bytes")
LOOP = ["loop.steps=6", "loop.save_every=3", "loop.preview_every=6"]
SHOW = ["preview.prompts=('a red square moves right','a green square')", "preview.sizes=((9,16,24),(1,16,16))"]


def train(variant, workdir, *changes):
    return run("train", f"--config={TINY}:{variant}", f"--workdir={workdir}", *(f"--config.{c}" for c in changes))


def losses(workdir):
    names = ("step", "loss", "gradient_norm", "parameter_norm")
    return [[row[name] for name in names] for row in read_metrics(workdir)]


@pytest.fixture(scope="module")
def remote(bucket, chain):  # noqa: F811
    """The chain of `fixtures_runs` once more, by the same commands, every path of them in the bucket."""
    clips = bucket.upload(chain.clips, "clips")
    sizes = ["--max-frames=9", "--multiple=8", "--max-pixels=384"]
    assert run("data", "build", f"--path={clips}", f"--out={ROOT}/dataset", "--workers=0", *sizes) == 0
    assert train("autoencoder", f"{ROOT}/autoencoder", f"data={ROOT}/dataset", *LOOP) == 0
    data = [f"--autoencoder={ROOT}/autoencoder", f"--data={ROOT}/dataset"]
    assert run("data", "encode", *data, f"--out={ROOT}/latents") == 0
    show = [*LOOP, *SHOW, "preview.steps=2", "loop.keep_best=1"]
    assert train("transformer", f"{ROOT}/transformer", f"latents={ROOT}/latents", *show) == 0
    return bucket.root / "bucket"


def test_a_dataset_there_is_the_dataset_here(remote, chain):  # noqa: F811
    here, there = Dataset(chain.dataset), Dataset(f"{ROOT}/dataset")
    assert there.digest == here.digest and len(there) == len(here) and there.refused == []
    again = pickle.loads(pickle.dumps(there))
    for i in range(len(here)):
        np.testing.assert_array_equal(again[i].frames, here[i].frames)
        assert again[i].captions == here[i].captions
    names = {"dataset.json", "manifest.parquet", "refused.jsonl", "clips-00000-of-00001.array_record"}
    assert set(remote_files(as_path(f"{ROOT}/dataset"))) == names
    assert not (remote / ".dataset.sora_jax-unfinished").exists()


def test_what_is_learnt_and_encoded_there_is_the_same_to_the_bit(remote, chain):  # noqa: F811
    assert losses(f"{ROOT}/autoencoder") == losses(chain.autoencoder)
    frozen = load_autoencoder(chain.autoencoder)
    assert load_autoencoder(f"{ROOT}/autoencoder").fingerprint == frozen.fingerprint
    here, there = LatentCache(chain.latents), LatentCache(f"{ROOT}/latents")
    assert there.digest == here.digest
    np.testing.assert_array_equal(there[2], here[2])
    assert losses(f"{ROOT}/transformer") == losses(chain.transformer)


def test_a_run_there_has_all_its_files(remote):
    run_folder = remote / "transformer"
    written = {path.relative_to(run_folder).parts[0] for path in run_folder.rglob("*") if path.is_file()}
    files_of_a_run = {"config.json", "data.json", "history.jsonl", "metrics.jsonl", "seen.json", "time.json"}
    files_of_a_run |= {"tokenizer.json", "run.json", "README.md"}
    assert written == files_of_a_run | {"captions", "checkpoints", "frozen", "samples", "tensorboard"}
    assert list((run_folder / "tensorboard").glob("events*"))
    assert decode(run_folder / "samples" / "step_000006" / "00.mp4").frames.shape[0] == 9
    assert not [path for path in remote.rglob("*") if ".tmp" in path.name or path.name.startswith(".")]


def test_a_damaged_checkpoint_there_is_set_aside_and_its_steps_are_replayed(remote, chain, capfd):  # noqa: F811
    bucket_folder = remote / "resumed"
    shutil.copytree(remote / "transformer", bucket_folder)
    arrays = [path for path in (bucket_folder / "checkpoints/6/state").rglob("*") if path.is_file()]
    largest = max(arrays, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)
    show = [*LOOP, *SHOW, "preview.steps=2", "loop.keep_best=1"]
    assert train("transformer", f"{ROOT}/resumed", f"latents={ROOT}/latents", *show) == 0
    assert f"checkpoint 6 in {ROOT}/resumed/checkpoints is damaged, checkpoint 3 is used" in capfd.readouterr().err
    assert losses(f"{ROOT}/resumed") == losses(chain.transformer)
    steps = {path.name for path in (bucket_folder / "checkpoints").iterdir()}
    assert {"3", "6", "damaged-6"} <= steps
    table = "checkpoints/6/arrays/metadata"  # a digest of every array
    assert json.loads((bucket_folder / table).read_text()) == json.loads((remote / "transformer" / table).read_text())


def test_a_store_that_refuses_is_not_damage(remote, chain, monkeypatch, capfd):  # noqa: F811
    answer = Handler.answer
    refuse = lambda self, status, *_, **__: answer(self, 403 if self.command == "GET" else status)  # noqa: E731
    monkeypatch.setattr(Handler, "answer", refuse)
    asked = ["--prompt=a", "--frames=1", "--height=16", "--width=24", "--out=x.png"]
    assert run("sample", f"--workdir={ROOT}/transformer", *asked) == 2
    said = capfd.readouterr().err
    assert f"checkpoint 6 in {ROOT}/transformer/checkpoints cannot be read: " in said and "damaged" not in said


@pytest.mark.parametrize("which", ["newest", "best", "3"])
def test_samples_there_are_the_samples_here(remote, chain, tmp_path, which):  # noqa: F811
    rows = {row["step"]: row["loss"] for row in read_metrics(chain.transformer)}
    step = {"newest": 6, "best": min((3, 6), key=rows.get), "3": 3}[which]
    asked = ["--prompt=a red square", "--frames=5", "--height=16", "--width=24", "--steps=2"]
    there = f"{ROOT}/made/{which}.gif"
    assert run("sample", f"--workdir={ROOT}/transformer", f"--checkpoint={which}", *asked, f"--out={there}") == 0
    here = tmp_path / "clip.gif"
    assert run("sample", f"--workdir={chain.transformer}", f"--checkpoint={step}", *asked, f"--out={here}") == 0
    made = remote / "made" / f"{which}.gif"
    np.testing.assert_array_equal(decode(made).frames, decode(here).frames)
    assert read_recipe(made)["step"] == read_recipe(here)["step"] == step


def test_other_commands_there(remote, chain, tmp_path, capsys):  # noqa: F811
    assert run("data", "inspect", f"{ROOT}/dataset", f"--out={ROOT}/look") == 0
    assert f"picture          {ROOT}/look/contact_sheet.png" in capsys.readouterr().out
    assert decode(remote / "look/histogram.png").frames.shape[0] == 1
    draw_losses({"transformer": as_path(f"{ROOT}/transformer")}, f"{ROOT}/made/losses.png")
    assert decode(remote / "made/losses.png").frames.shape[0] == 1
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    write_tensors(f"{ROOT}/made/x.safetensors", tensors)
    np.testing.assert_array_equal(read_tensors(f"{ROOT}/made/x.safetensors")["a"], tensors["a"])
    for out in (f"{ROOT}/dataset", f"{ROOT}/transformer"):  # what is there is not written over
        assert run("data", "encode", f"--autoencoder={ROOT}/autoencoder", f"--data={ROOT}/dataset", f"--out={out}") == 2
    assert train("autoencoder", f"{ROOT}/transformer", f"data={ROOT}/dataset") == 2
    assert run("sample", f"--workdir={ROOT}/none", "--prompt=a", f"--out={ROOT}/x.gif") == 2
    assert "there is no config.json, so it is not a run folder" in capsys.readouterr().err


@pytest.fixture
def sources(tmp_path, png):  # noqa: F811
    """kind -> a folder of one source of every kind, and the pattern of names in it."""
    folder = tmp_path / "folder"
    for name, shade in (("b", 20), ("sub/a", 40), ("sub/deep/c", 50), ("t", 70), (".hidden/x", 60)):
        save_png(folder / f"{name}.png", np.full((8, 8, 3), shade, np.uint8))
    write_video(folder / "sub/film.mp4", np.full((5, 16, 16, 3), 90, np.uint8), 8)
    (folder / "b.txt").write_text("\ufeffa grey\nsquare", encoding="utf-8")
    (folder / "sub/deep/c.[1].txt").write_text("\u00e9cru")
    (folder / "sub/deep/c.broken.txt").write_bytes(b"\xff")
    (folder / "t.txt").write_text("")
    (folder / "sub/captions.csv").write_text("\ufefffile,caption\na.png,écru\nfilm.mp4,grey\n", encoding="utf-8")
    (folder / ".hidden/captions.csv").write_text("file,caption\nnone.png,not looked at\n")
    with zipfile.ZipFile(folder / "more.zip", "w") as more:
        more.writestr("z.png", png(80))
    (folder / "notes.txt").write_text("beside")
    for k in range(2):
        members = [(f"{n}.png", png(10 * k + n)) for n in range(3)] + [(f"{n}.txt", b"said") for n in range(3)]
        write_tar(tmp_path / "tars/part" / f"{k}.tar", members)
    return tmp_path


KINDS = {
    "folder": ("folder", "folder"),
    "tars of a folder": ("webdataset", "tars"),
    "tars by a pattern": ("webdataset", "tars/*/[01].tar"),
    "one tar": ("webdataset", "tars/part/1.tar"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_sources_there_are_the_sources_here(bucket, sources, kind):  # noqa: F811
    name, path = KINDS[kind]
    place = f"{kind.replace(' ', '_')}"
    bucket.upload(sources / path.partition("/")[0], f"{place}/{path.partition('/')[0]}")
    _same(SourceConfig(name, str(sources / path)), SourceConfig(name, f"{ROOT}/{place}/{path}"))


def _same(here, there):
    here, there = make_source(here), make_source(there)
    there = pickle.loads(pickle.dumps(there))
    assert len(there) == len(here) > 0
    assert [there.entry(i) for i in range(len(there))] == [here.entry(i) for i in range(len(here))]
    assert there.refused == here.refused and there.digest == here.digest
    for i in range(len(here)):
        mine, theirs = here.open(i), pickle.loads(pickle.dumps(there.open(i)))
        assert theirs.content_id() == mine.content_id()
        np.testing.assert_array_equal(theirs.decode(SpanRule(), None).frames, mine.decode(SpanRule(), None).frames)


def test_a_shard_of_files_comes_by_one_read(bucket, tmp_path, png, monkeypatch):  # noqa: F811
    write_tar(tmp_path / "tar" / "0.tar", [(f"{n}.png", png(n)) for n in range(100)])
    path, asked = f"{bucket.upload(tmp_path / 'tar', 'one_read')}/0.tar", []
    for name in ("read", "below"):
        ask = getattr(bucket, name)
        monkeypatch.setattr(bucket, name, lambda *a, ask=ask, name=name: asked.append(name) or ask(*a))
    source = make_source(SourceConfig("webdataset", path))
    assert [source.open(n).decode(SpanRule(), None).frames[0, 0, 0, 0] for n in range(100)] == [*range(100)]
    assert asked.count("read") == 1 and len(asked) < 20
    write_tar(tmp_path / "tar" / "0.tar", [(f"{n}.png", png(n + 100)) for n in range(9)])
    bucket.write("bucket/one_read/0.tar", (tmp_path / "tar" / "0.tar").read_bytes())
    source = make_source(SourceConfig("webdataset", path))
    assert source.open(8).decode(SpanRule(), None).frames[0, 0, 0, 0] == 108


def test_a_shard_that_does_not_come_is_not_damaged(bucket, tmp_path, png, monkeypatch):  # noqa: F811
    write_tar(tmp_path / "tar" / "0.tar", [("a.png", png(1))])
    path = f"{bucket.upload(tmp_path / 'tar', 'does_not_come')}/0.tar"

    def refuse(*_, **__):
        raise OSError("503")

    monkeypatch.setattr(BucketFileSystem, "get_file", refuse)
    with pytest.raises(UserError, match="0.tar cannot be read: 503"):
        make_source(SourceConfig("webdataset", path))


def test_a_dataset_as_a_source_there(remote, chain):  # noqa: F811
    _same(SourceConfig("array_record", str(chain.dataset)), SourceConfig("array_record", f"{ROOT}/dataset"))


def test_a_prepared_dataset_there(bucket, tmp_path):  # noqa: F811
    GreyDigits(data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()
    bucket.upload(tmp_path / "tfds", "tfds")
    _same(SourceConfig("tfds:grey_digits", str(tmp_path / "tfds")), SourceConfig("tfds:grey_digits", f"{ROOT}/tfds"))


def test_a_failed_write_leaves_the_old_object_and_nothing_else(bucket):  # noqa: F811
    path = as_path(f"{ROOT}/whole/notes.txt")
    write_text(path, "old")
    with pytest.raises(ValueError), replacing(path) as temporary:
        temporary.write_text("half")
        raise ValueError
    assert read_text(path) == "old" and sorted(remote_files(path.parent)) == ["notes.txt"] and not temporary.exists()


def test_what_a_killed_process_has_not_finished_goes(bucket):  # noqa: F811
    path, folder = as_path(f"{ROOT}/whole/late.txt"), files.cache_folder() / "unfinished"
    half = f"files._own_folder(pathlib.Path({str(folder)!r})).joinpath('x.part').write_text('half')"
    script = f"import pathlib, time; from sora_jax import files; {half}; print(flush=True); time.sleep(60)"
    with (
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as other,
        replacing(path) as temporary,
    ):
        temporary.write_text("here")
        assert other.stdout.readline() == b"\n"
        for left in (1, 0):
            files._own_folder.cache_clear()  # as in the next process
            temporary_path(path)
            assert len([*folder.glob("*/x.part")]) == left
            other.kill()
            other.wait()
    assert read_text(path) == "here"


def test_of_several_one_creates_a_file(bucket):  # noqa: F811
    path = as_path(f"{ROOT}/created/started.json")
    assert [create(path, "first"), create(path, "second")] == [True, False] and read_text(path) == "first"


def test_of_several_processes_one_keeps_the_tokens_there(bucket, chain, monkeypatch):  # noqa: F811
    cache, tokenizer, written, put = LatentCache(chain.latents), train_tokenizer([], BYTES), [], files.put

    def note(temporary, path):
        written.append(str(path))
        put(temporary, path)

    monkeypatch.setattr(files, "put", note)
    arguments = cache, tokenizer, PackingConfig(length=512, patch=(1, 2, 2)), 2, 0
    folder = as_path(f"{ROOT}/shares/captions")
    shares = [
        PackedBatches(*arguments, share=ShardSpec(k, 2), folder=folder, first=first)
        for k, first in ((0, False), (1, False), (0, True))  # two that read the same rows, of which one is the first
    ]
    for batches in shares:
        stream = batches.stream(feed=FeedConfig(threads=0))
        next(stream)
        stream.close()
    there = [name for name in written if name.startswith(ROOT)]
    assert sorted(there) == [
        f"{ROOT}/shares/captions/{name}" for name in ("ends.npy", "ids.npy", "made_of.txt", "uncut.npy")
    ]
    assert len(pickle.dumps(shares[0].captions)) < 2000  # to workers a file goes by name
    np.testing.assert_array_equal(shares[0].captions.ids(1, 0), shares[1].captions.ids(1, 0))


def test_a_folder_in_the_making_goes_on_and_is_not_taken_for_another(bucket):  # noqa: F811
    kind = Kind({}, {"id": "string", "variant": "int32"}, "info.json")
    out = f"{ROOT}/parts"
    parts = start(out, kind, {"a": 1}, 2)
    with parts.write(1) as writer:
        writer.add({"id": "late"})
    assert start(out, kind, {"a": 1}, 2).missing() == [0]
    assert not parts.finish({}) and not (as_path(out) / "info.json").exists()
    with pytest.raises(UserError, match="was started with another a"):
        start(out, kind, {"a": 2}, 2)
    with parts.write(0) as writer:
        writer.add({"id": "early"})
    assert parts.finish({})
    assert sorted(remote_files(as_path(out))) == ["info.json", "manifest.parquet", "refused.jsonl"]
    with pytest.raises(UserError, match="already exists"):
        start(out, kind, {"a": 1}, 2)


def test_a_killed_run_has_its_reports_up_to_the_last_save(bucket):  # noqa: F811
    workdir = f"{ROOT}/reports"
    killed = MetricsWriter(workdir)
    for step in (1, 2):
        killed.write(step, {"loss": step})
    killed.flush()
    killed.write(3, {"loss": 3.0})  # too soon after the last copy
    assert [row["step"] for row in read_metrics(workdir)] == [1, 2]
    with MetricsWriter(workdir, 1) as writer:
        writer.write(2, {"loss": 7.0})
    assert [(row["step"], row["loss"]) for row in read_metrics(workdir)] == [(1, 1.0), (2, 7.0)]
    killed.__exit__(None, None, None)


def test_a_failed_upload_of_reports_ends_no_run(bucket, monkeypatch, capfd):  # noqa: F811
    workdir = f"{ROOT}/silent"
    put, told = files.put, "metrics.jsonl cannot be written: 503"

    def fail(temporary, path):
        if is_remote(path):
            raise OSError("503")
        put(temporary, path)

    with MetricsWriter(workdir) as writer:
        monkeypatch.setattr(files, "put", fail)
        writer.write(1, {"loss": 1.0})
        writer.flush_rows()
        writer.flush()
        assert capfd.readouterr().err.count(told) == 1
        monkeypatch.setattr(files, "put", put)
        writer.flush_rows()
        assert sorted(remote_files(as_path(workdir))) == ["metrics.jsonl"]
        monkeypatch.setattr(files, "put", fail)
        writer.write(2, {"loss": 2.0})
        writer.flush_rows()
        assert capfd.readouterr().err.count(told) == 1
        monkeypatch.setattr(files, "put", put)
    assert [row["step"] for row in read_metrics(workdir)] == [1, 2]
    monkeypatch.setattr(files, "put", fail)
    with pytest.raises(UserError, match=told), MetricsWriter(workdir):
        pass
    with pytest.raises(ZeroDivisionError), MetricsWriter(workdir) as writer:
        writer.write(1 // 0, {})


def test_a_save_waits_for_the_reports_and_not_for_their_pictures(bucket, monkeypatch):  # noqa: F811
    order, save, put = [], Checkpoints.save, files.put

    def note_put(temporary, path):
        order.append(path.name)
        put(temporary, path)

    def note_save(*arguments):
        order.append("save")
        save(*arguments)

    monkeypatch.setattr(files, "put", note_put)
    monkeypatch.setattr(Checkpoints, "save", note_save)
    monkeypatch.setattr(mirror, "FLUSH_INTERVAL", 1000)
    train_toy(as_path(f"{ROOT}/ordered"), steps=4, save_every=4)
    order = [name.partition(".tfevents")[0] for name in order if "time.json" not in name]
    first = order.index("save")
    assert order[first - 1 : first + 2] == ["metrics.jsonl", "save", "events.out"]


def test_a_local_copy_is_made_once_for_each_content(bucket, monkeypatch):  # noqa: F811
    path = as_path(f"{ROOT}/copied/x.npy")
    write_text(path, "one")
    first = local_copy(path)
    inode = first.stat().st_ino
    assert local_copy(path) == first and first.stat().st_ino == inode and first.name == "x.npy"
    write_text(path, "two")
    assert local_copy(path).read_text() == "two" and first.read_text() == "one"
    assert local_copy(first) is first
    with pytest.raises(FileNotFoundError):
        local_copy(as_path(f"{ROOT}/copied/none"))


def test_of_several_one_makes_the_local_copy(bucket, monkeypatch):  # noqa: F811
    path, log = as_path(f"{ROOT}/together/x.bin"), []
    write_text(path, "one")
    get_file = BucketFileSystem.get_file

    def get_slowly(*arguments, **options):
        log.append(1)
        time.sleep(0.2)
        get_file(*arguments, **options)

    monkeypatch.setattr(BucketFileSystem, "get_file", get_slowly)
    with ThreadPoolExecutor(3) as pool:
        assert [copy.read_text() for copy in pool.map(local_copy, [path] * 3)] == ["one"] * 3
    assert log == [1]


def test_a_read_that_is_refused_is_no_failed_write(bucket, monkeypatch):  # noqa: F811
    path = as_path(f"{ROOT}/refused/x.npy")
    write_text(path, "one")

    def refuse(error):
        def get_file(*_, **__):
            raise error

        monkeypatch.setattr(BucketFileSystem, "get_file", get_file)

    of_library = type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})
    for error in (OSError("Forbidden:\nno permission"), of_library("Forbidden: no permission")):
        refuse(error)
        with pytest.raises(UserError, match=f"^{path} cannot be read: Forbidden: no permission.$"):
            local_copy(path)
    refuse(OSError(errno.ENOSPC, "disk full"))
    with pytest.raises(UserError, match=f"^{files.cache_folder()}.*x.npy cannot be written: disk full.$"):
        local_copy(path)
    refuse(ValueError("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        local_copy(path)


def test_a_shard_on_its_way_keeps_no_other_waiting(monkeypatch, tmp_path):
    for k in range(2):
        writer = RecordWriter(tmp_path / shard_name("clips", k, 2), FLOATS)
        writer.write(bytes([k]))
        writer.finish()
    comes, asked = threading.Event(), []

    def slow(path):
        asked.append(path.name)
        assert "00000-of" not in path.name or comes.wait(20)
        return path

    monkeypatch.setattr(shards, "local_copy", slow)
    reader = shards.ShardReader(tmp_path, "clips", 2)
    with ThreadPoolExecutor(2) as pool:
        late = [pool.submit(reader.read, 0, 0) for _ in range(2)]
        assert reader.read(1, 0) == b"\x01" and not any(one.done() for one in late)
        comes.set()
        assert [one.result() for one in late] == [b"\x00"] * 2 and len(asked) == 2


def test_paths(bucket, tmp_path):  # noqa: F811
    path = as_path(f"{ROOT}/a/b.png")
    assert str(path) == f"{ROOT}/a/b.png" and is_remote(path) and str(path.with_name("c").parent) == f"{ROOT}/a"
    assert as_path(path) == path == pickle.loads(pickle.dumps(path))
    assert str(as_path(tmp_path / "x" / ".." / "y")) == f"{tmp_path}/x/../y" and type(as_path("a")) is type(tmp_path)
    with pytest.raises(UserError, match="^'s3://b/x' cannot be used"):
        as_path("s3://b/x")


def test_an_object_in_the_name_of_a_folder_does_not_fill_it(bucket, monkeypatch):  # noqa: F811
    folder = as_path(f"{ROOT}/made_by_a_console")
    assert files.is_empty(folder)
    marked = SimpleNamespace(ls=lambda name, detail: [f"{name}/"])
    with monkeypatch.context() as change:
        change.setattr(files, "_storage", lambda path: (marked, path.name))
        assert files.is_empty(folder)
    create(folder / "config.json", "{}")
    assert not files.is_empty(folder)


def test_what_the_store_refuses_is_one_sentence(monkeypatch, capsys):
    library = {"__name__": "gcsfs.retry"}
    exec("def refuse(*_):\n    raise kind('Forbidden:\\nno permission')", library)
    monkeypatch.setattr(cli, "run", library["refuse"])
    of_library = type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})
    for library["kind"] in (OSError, of_library):
        assert cli.main(["data", "inspect", "here"]) == 2
        name = library["kind"].__name__
        assert capsys.readouterr().err == f"sora-jax: gs:// cannot be used: {name}: Forbidden: no permission\n"
    for library["kind"] in (ValueError, AttributeError):  # a mistake of ours that is met there
        with pytest.raises(library["kind"], match="Forbidden"):
            cli.main(["data", "inspect", "here"])
    library["__name__"], library["kind"] = "elsewhere", OSError
    with pytest.raises(OSError, match="Forbidden"):
        cli.main(["data", "inspect", "here"])


def test_without_gcsfs_there_is_one_sentence(bucket, monkeypatch, capsys):  # noqa: F811
    def missing(protocol):
        raise ImportError(f"Install gcsfs to access {protocol}")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    files._prepare_storage.cache_clear()
    assert cli.main(["sample", f"--workdir={ROOT}/run", "--prompt=a", "--out=x.gif"]) == 2
    said, how = capsys.readouterr().err, install_command("gcs")
    assert said == f"sora-jax: '{ROOT}/run' needs gcsfs, which is not installed: {how}\n"
