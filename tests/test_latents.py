"""The latent cache: what is written is read, nothing half-written looks good, shares and stops leave no trace."""

import dataclasses
import pickle
import resource
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fixtures_caches import INFO, TEXT, clip_row, embeddings_of, latent_of, write_cache
from fixtures_datasets import same_folder

from sora_jax.data.shard_spec import ShardSpec
from sora_jax.data.storing import shards
from sora_jax.data.storing.latents import LatentCache, add_latent, clip_id_of, finish_cache, start_cache
from sora_jax.errors import UserError
from sora_jax.train.denoiser import check_text

OTHER = dataclasses.replace(INFO, fingerprint="another")


def rows(count):
    draws = np.random.default_rng(0)
    splits = ["test" if number % 5 == 0 else "train" for number in range(count)]
    grids = draws.integers(1, 5, (count, 3)).tolist()
    return [clip_row(n, grids[n], {"original": f"caption {n} 圆"}, split=splits[n], label=n % 3) for n in range(count)]


def check(cache, expected):
    assert len(cache) == len(expected)
    assert cache.ids(range(len(cache))) == [row["id"] for row in expected]
    for index, row in enumerate(expected):
        np.testing.assert_array_equal(cache[index], latent_of(row))
        assert cache[index].dtype == np.float16
        assert cache.clip_ids[index] == clip_id_of(row["id"]) and cache.grids[index].tolist() == row["grid"]
        for name in ("captions", "kinds", "label", "weight", "split", "frames", "height", "width", "fps"):
            assert cache.column(name)[index].as_py() == row[name]


@pytest.mark.parametrize("each", [1, 4, 7, 100])
def test_what_is_written_is_read(tmp_path, each):
    check(write_cache(tmp_path / "cache", rows(14), each=each), rows(14))
    assert [folder.name for folder in tmp_path.iterdir()] == ["cache"]
    assert not list((tmp_path / "cache").glob("part-*"))


def test_the_header_splits_and_fingerprint(tmp_path):
    cache = write_cache(tmp_path / "cache", rows(11))
    assert cache.info == INFO
    np.testing.assert_array_equal(cache.indices("test"), [0, 5, 10])
    np.testing.assert_array_equal(np.union1d(cache.indices("train"), cache.indices("test")), np.arange(11))
    with pytest.raises(UserError, match="config.split is 'valid'; .* has test, train"):
        cache.indices("valid")
    cache.check("print")
    with pytest.raises(UserError, match="sora-jax data encode --autoencoder=.*--out="):
        cache.check("f" * 16)


def test_text_embeddings_stand_beside_the_latents(tmp_path):
    info = dataclasses.replace(INFO, text=TEXT)
    captions = [{"original": "a b c", "synthetic": "d"}, {}, {"original": ""}, {"original": "e f"}]
    made = [clip_row(n, (1, 2, 2), captions[n]) for n in range(4)]
    cache = write_cache(tmp_path / "cache", made, info, each=3)
    assert cache.info.text == TEXT
    for index, row in enumerate(made):
        for number, expected in enumerate(embeddings_of(row)):
            np.testing.assert_array_equal(cache.text(index, number), expected)
    check_text(cache, "encoder", 3, 16)
    plain = write_cache(tmp_path / "plain", rows(1))
    check_text(plain, "", 0, 64)
    wrong = [(cache, "", 0, 64), (cache, "other", 3, 16), (cache, "encoder", 4, 16), (cache, "encoder", 3, 8)]
    for wanted in [*wrong, (plain, "encoder", 3, 16)]:
        with pytest.raises(UserError, match="text.pretrained is .* make it again"):
            check_text(*wanted)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_shares_of_several_processes_make_the_cache_of_one(tmp_path, order):
    made = rows(23)
    whole = write_cache(tmp_path / "whole", made, each=3)
    for number, index in enumerate(order):
        shared = write_cache(tmp_path / "shared", made, each=3, share=ShardSpec(index, 3))
        assert (shared is None) == (number < 2) == (not (tmp_path / "shared").exists())
    check(shared, made)
    same_folder(tmp_path / "whole", tmp_path / "shared")
    assert whole.column("shard").to_pylist() == [n // 3 for n in range(23)]


def test_a_stopped_cache_is_none_and_goes_on_after_its_whole_parts(tmp_path):
    made = rows(8)
    write_cache(tmp_path / "cache", made, each=3, share=ShardSpec(0, 3))
    parts = start_cache(tmp_path / "cache", INFO, 3)
    for part in (1, 0):  # one that is not there, and one that is made again
        with pytest.raises(KeyboardInterrupt), parts.write(part) as writer:
            add_latent(writer, INFO, made[4], latent_of(made[4]))
            raise KeyboardInterrupt
    with pytest.raises(UserError, match="no complete latent cache"):
        LatentCache(tmp_path / "cache")
    first = next(parts.folder.glob("latents-00000-*"))
    written = first.stat().st_mtime_ns
    assert start_cache(tmp_path / "cache", INFO, 3).missing() == [1, 2]
    check(write_cache(tmp_path / "cache", made, each=3), made)
    assert (tmp_path / "cache" / first.name).stat().st_mtime_ns == written  # kept, not made again


def test_what_was_started_is_never_gone_on_with_as_something_else(tmp_path):
    write_cache(tmp_path / "cache", rows(4), each=1, share=ShardSpec(0, 2))
    for info, count, layout in ((OTHER, 4, None), (INFO, 2, None), (INFO, 4, {"canvases": []})):
        with pytest.raises(UserError, match="was started with another .*: remove .* to start anew"):
            start_cache(tmp_path / "cache", info, count, layout)
    assert start_cache(tmp_path / "cache", INFO, 4).missing() == [1, 3]


def test_processes_that_start_at_once_work_on_one_folder(tmp_path):
    """Twelve at a barrier: all get the same folder, and none removes what another has made."""
    barrier = threading.Barrier(12)

    def work(index):
        barrier.wait()
        return write_cache(tmp_path / "cache", rows(24), each=2, share=ShardSpec(index, 12))

    with ThreadPoolExecutor(12) as pool:
        made = list(pool.map(work, range(12)))
    assert any(cache is not None for cache in made)
    check(LatentCache(tmp_path / "cache"), rows(24))
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith((".", "part-"))]


def test_equal_clips_in_another_order_are_another_cache(tmp_path):
    one, other = (write_cache(tmp_path / name, order) for name, order in (("a", rows(4)), ("b", rows(4)[::-1])))
    assert one.digest != other.digest
    assert one.digest == write_cache(tmp_path / "c", rows(4)).digest


def test_a_pickled_cache_and_many_threads_read_the_same_with_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_OPEN", 8)
    made = rows(60)
    cache = write_cache(tmp_path / "cache", made, each=1)
    cache[3]
    again, opened = pickle.loads(pickle.dumps(cache)), Path("/proc/self/fd")
    before = len(list(opened.glob("*")))
    order = np.random.default_rng(0).integers(0, 60, 400)
    with ThreadPoolExecutor(8) as pool:
        for number, read in zip(order, pool.map(again.__getitem__, order), strict=True):
            np.testing.assert_array_equal(read, latent_of(made[number]))
    assert len(list(opened.glob("*"))) - before < 30


@pytest.mark.parametrize(
    "bad,word",
    [
        (np.zeros((1, 2, 2, 3)), "shape"),
        (np.zeros((2, 2, 2)), "shape"),
        (np.full((1, 2, 2, 2), np.nan), "not finite"),
        (np.full((1, 2, 2, 2), 1e6), "float16"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_bad_latents_are_refused(tmp_path, bad, word):
    with pytest.raises(UserError, match=word), start_cache(tmp_path / "c", INFO, 1).write(0) as writer:
        add_latent(writer, INFO, rows(1)[0], bad)


def test_equal_clips_are_kept_once_and_an_empty_cache_is_refused(tmp_path):
    twice = rows(3) + rows(2)
    assert write_cache(tmp_path / "cache", twice, each=2).ids(range(3)) == [row["id"] for row in rows(3)]
    empty = start_cache(tmp_path / "empty", INFO, 0)
    with pytest.raises(UserError, match="no clip"):
        finish_cache(empty, INFO)


FULL_DISK = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from fixtures_caches import clip_row, write_cache
from sora_jax.errors import UserError
from sora_jax.train.denoiser import check_text
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    write_cache(sys.argv[1], [clip_row(n, (4, 16, 32)) for n in range(40)])
except UserError as error:
    print("told:", error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on file sizes")
def test_a_disk_that_fills_up_is_told_and_leaves_no_cache(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "cache"), str(Path(__file__).parent)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert "told: --out is " in run.stdout and "cannot be written" in run.stdout, run.stderr
    assert not (tmp_path / "cache").exists()


def test_clip_ids_are_32_bit_stable_across_processes_and_spread():
    assert clip_id_of("clip-7") == 0xE9286922
    made = {clip_id_of(f"world-{n}") for n in range(20_000)} | {clip_id_of("\udce9")}
    assert len(made) > 19_990 and min(made) > 0 and max(made) < 2**32
