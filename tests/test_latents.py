"""The latent cache: what is written is read, nothing half-written looks good, a stopped writer goes on."""

import pickle
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sora_jax.data.latents import LatentCache, LatentEntry, LatentWriter, clip_uid
from sora_jax.errors import UserError

PRINT = "0123456789abcdef"


def latent(number, channels=4):
    draws = np.random.default_rng(number)
    return draws.normal(size=(*draws.integers(1, 5, 3), channels)).astype(np.float16)


def entry(number):
    split = "test" if number % 5 == 0 else "train"
    return LatentEntry(f"clip-{number}", 9, 32, 48 + number, 8.0, f"caption {number} 圆", split)


def writer(path, fingerprint=PRINT, **options):
    return LatentWriter(path, fingerprint, "data", 4, (2, 4, 4), **options)


def write(path, numbers, **options):
    with writer(path, **options) as cache:
        for number in numbers:
            if entry(number).id not in cache.done:
                cache.add(entry(number), latent(number))
    return LatentCache(path)


def check(cache, numbers):
    assert len(cache) == len(numbers)
    for index, number in enumerate(numbers):
        np.testing.assert_array_equal(cache[index], latent(number))
        assert cache[index].dtype == np.float16
        assert cache.ids[index] == entry(number).id and cache.captions[index] == entry(number).caption
        assert cache.uids[index] == clip_uid(entry(number).id)
        assert tuple(cache.grids[index]) == latent(number).shape[:3]
        assert cache.manifest["width"][index] == 48 + number


@pytest.mark.parametrize("shard_clips", [1, 4, 7, 100])
def test_what_is_written_is_read(tmp_path, shard_clips):
    check(write(tmp_path / "cache", range(14), shard_clips=shard_clips), range(14))
    assert [folder.name for folder in tmp_path.iterdir()] == ["cache"]


def test_header_and_splits(tmp_path):
    cache = write(tmp_path / "cache", range(11))
    assert (cache.fingerprint, cache.channels, cache.factors) == (PRINT, 4, (2, 4, 4))
    np.testing.assert_array_equal(cache.indices("test"), [0, 5, 10])
    np.testing.assert_array_equal(np.union1d(cache.indices("train"), cache.indices("test")), np.arange(11))
    with pytest.raises(UserError, match="'valid'.*test, train"):
        cache.indices("valid")


def test_the_fingerprint_is_checked(tmp_path):
    cache = write(tmp_path / "cache", range(2))
    cache.check(PRINT)
    with pytest.raises(UserError, match="data encode"):
        cache.check("f" * 16)


class Stop(Exception):
    pass


def test_a_stopped_writer_goes_on(tmp_path):
    with pytest.raises(Stop), writer(tmp_path / "cache", shard_clips=3) as first:
        for number in range(8):
            first.add(entry(number), latent(number))
        raise Stop
    with pytest.raises(UserError, match="not a latent cache"):
        LatentCache(tmp_path / "cache")
    with writer(tmp_path / "cache", shard_clips=3) as second:
        assert second.done == {entry(number).id for number in range(6)}  # the third shard was not complete
    check(write(tmp_path / "again", range(8), shard_clips=3), range(8))


def test_going_on_gives_the_whole_cache(tmp_path):
    with pytest.raises(Stop), writer(tmp_path / "cache", shard_clips=3) as first:
        for number in range(8):
            first.add(entry(number), latent(number))
        raise Stop
    check(write(tmp_path / "cache", range(10), shard_clips=3), range(10))


def test_another_fingerprint_starts_again(tmp_path):
    with pytest.raises(Stop), writer(tmp_path / "cache", shard_clips=1) as first:
        first.add(entry(0), latent(0))
        raise Stop
    assert writer(tmp_path / "cache", fingerprint="other").done == set()


def test_a_new_cache_takes_the_place_of_the_old(tmp_path):
    write(tmp_path / "cache", range(3))
    check(write(tmp_path / "cache", range(5, 9), fingerprint="other"), range(5, 9))
    assert [folder.name for folder in tmp_path.iterdir()] == ["cache"]


def test_a_folder_that_is_no_cache_is_left_alone(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="not a latent cache"):
        writer(tmp_path / "home")
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"


def test_a_pickled_cache_and_many_threads_read_the_same(tmp_path):
    cache = write(tmp_path / "cache", range(40), shard_clips=6)
    cache[3]
    again = pickle.loads(pickle.dumps(cache))
    order = np.random.default_rng(0).integers(0, 40, 400)
    with ThreadPoolExecutor(8) as pool:
        for number, read in zip(order, pool.map(again.__getitem__, order), strict=True):
            np.testing.assert_array_equal(read, latent(number))


@pytest.mark.parametrize(
    "bad,word",
    [
        (np.zeros((1, 2, 2, 3)), "shape"),
        (np.zeros((2, 2, 4)), "shape"),
        (np.full((1, 2, 2, 4), np.nan), "float16"),
        (np.full((1, 2, 2, 4), 1e6), "float16"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_bad_latents_are_refused(tmp_path, bad, word):
    with pytest.raises(UserError, match=word):
        writer(tmp_path / "cache").add(entry(0), bad)


def test_equal_ids_and_an_empty_cache_are_refused(tmp_path):
    cache = writer(tmp_path / "cache")
    cache.add(entry(0), latent(0))
    with pytest.raises(UserError, match="clip-0"):
        cache.add(entry(0), latent(1))
    with pytest.raises(UserError, match="no clip"):
        write(tmp_path / "empty", [])


FULL_DISK = """
import resource, sys, numpy as np
from sora_jax.data.latents import LatentEntry, LatentWriter
from sora_jax.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    with LatentWriter(sys.argv[1], "f", "d", 4, (1, 1, 1)) as cache:
        for n in range(40):
            noise = np.random.default_rng(n).normal(size=(4, 16, 16, 4))
            cache.add(LatentEntry(str(n), 4, 16, 16, 8.0, ""), noise)
except UserError as error:
    print("told:", error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on file sizes")
def test_a_disk_that_fills_up_is_told_and_leaves_no_cache(tmp_path):
    run = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path / "cache")], capture_output=True, text=True)
    assert "told: cannot write the latent cache" in run.stdout, run.stderr
    assert not (tmp_path / "cache").exists()


@given(st.text())
def test_uids_are_32_bit_and_never_zero(id):
    assert 0 < clip_uid(id) < 2**32 and clip_uid(id) == clip_uid(id)


def test_uid_is_stable_across_processes_and_spreads():
    code = "from sora_jax.data.latents import clip_uid; print(clip_uid('clip-7'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) == clip_uid("clip-7")
    assert len({clip_uid(f"world-{n}") for n in range(20_000)}) > 19_990
