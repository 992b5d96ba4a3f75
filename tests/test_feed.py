"""The stream for real: worker processes, hosts as processes, killed and gone on with by another number of hosts."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from fixtures_caches import clip_row, write_cache

from sora_jax.data.feeding.feed import FeedConfig
from sora_jax.data.feeding.pipeline import PackedBatches
from sora_jax.data.feeding.tokenizer import TokenizerConfig, train
from sora_jax.data.packing.packs import PackingConfig, unstack
from sora_jax.data.shard_spec import ShardSpec
from sora_jax.errors import UserError

CONFIG = PackingConfig(length=64, slots=8, text_length=120, patch=(1, 2, 2), window=16)
BATCH, SECTION, STEPS = 4, 40, 60


def stream_of(cache, host=0, hosts=1):
    tokenizer = train([], TokenizerConfig(kind="bytes", max_tokens=24))
    return PackedBatches(cache, tokenizer, CONFIG, BATCH, 5, "train", ShardSpec(host, hosts), "sd3", section=SECTION)


def digest(pack) -> str:
    """Of everything in a pack."""
    return hashlib.sha256(b"".join(name.encode() + pack[name].tobytes() for name in sorted(pack))).hexdigest()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    draws = np.random.default_rng(0)
    both = [{"original": f"clip {n}", "synthetic": f"a longer caption of {n}"} for n in range(110)]
    grids = [(int(t), 2 * int(h), 2 * int(w)) for t, h, w in draws.integers(1, 4, (110, 3))]
    rows = [clip_row(n, grids[n], both[n], weight=1.0 + n % 2 / 2) for n in range(110)]
    return write_cache(tmp_path_factory.mktemp("feed") / "cache", rows)


@pytest.fixture(scope="module")
def expected(cache):
    """Digests (STEPS, BATCH) of all packs, made one by one in this process."""
    stream = stream_of(cache)
    return [[digest(pack) for pack in unstack(stream[step])] for step in range(STEPS)]


HOST = """
import json, sys
sys.path[:0] = [{tests!r}, {root!r}]
from itertools import islice
from test_feed import digest, stream_of
from sora_jax.data.feeding.epochs import Position
from sora_jax.data.feeding.feed import FeedConfig
from sora_jax.data.storing.latents import LatentCache
from sora_jax.data.packing.packs import unstack

if __name__ == "__main__":
    path, host, hosts, start, position, workers = json.loads(sys.argv[1])
    stream = stream_of(LatentCache(path), host, hosts)
    feed = FeedConfig(workers=workers, threads=1, ahead=2)
    for step, (batch, position) in enumerate(stream.stream(start, feed, Position(*position)), start):
        print(json.dumps([step, [digest(pack) for pack in unstack(batch)], position]), flush=True)
"""


def host(tmp_path, cache, index, hosts, start=0, position=(0, 0), workers=0) -> subprocess.Popen:
    """A process that prints (step, digests of its rows, position) line by line, without end."""
    script = tmp_path / "host.py"
    tests = Path(__file__).parent
    if not script.exists():  # another host may be reading it
        script.write_text(HOST.format(tests=str(tests), root=str(tests.parent)))
    arguments = json.dumps([str(cache.path), index, hosts, start, list(position), workers])
    command = [sys.executable, str(script), arguments]
    # A group of its own, so that its workers can be ended with it.
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def read(process, count) -> list:
    lines = [json.loads(line) for line in islice(process.stdout, count)]
    assert len(lines) == count
    return lines


def kill(*processes) -> None:
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def joined(shares: list[list]) -> list[list[str]]:
    """The global batches that the lines of all hosts make up; all must be at the same steps and positions."""
    batches = []
    for lines in zip(*shares, strict=True):
        assert len({(line[0], tuple(line[2])) for line in lines}) == 1
        batches.append([name for line in lines for name in line[1]])
    return batches


def test_killed_hosts_go_on_as_any_number_of_hosts(tmp_path, cache, expected):
    """1 host, killed by SIGKILL; then 2, killed; then 4; then 2 with worker processes: one stream all along."""
    made, position = [], (0, 0)
    for hosts, count, workers in ((1, 13, 0), (2, 11, 0), (4, 7, 0), (2, 9, 1)):
        start = len(made)
        group = [host(tmp_path, cache, index, hosts, start, position, workers) for index in range(hosts)]
        shares = [read(process, count) for process in group]
        kill(*group)
        made += joined(shares)
        position = shares[0][-1][2]
    assert position[0] > 3  # several sections, and epochs, have passed
    assert made == expected[: len(made)]


@pytest.mark.parametrize("workers", [1, 3])
def test_worker_processes_change_nothing(tmp_path, cache, expected, workers):
    process = host(tmp_path, cache, 0, 1, start=3, workers=workers)
    lines = read(process, 20)
    kill(process)
    assert joined([lines]) == expected[3:23]


def test_a_section_that_ends_finds_the_next_one_planned(cache):
    stream = stream_of(cache)
    asked = []
    real = stream._epochs._plan_of
    stream._epochs._plan_of = lambda epoch, section: asked.append((epoch, section)) or real(epoch, section)
    stream[0]
    deadline = time.monotonic() + 30
    while len(asked) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert asked == [(0, 0), (0, 1)]  # the second one before a row of it was asked for


@pytest.mark.parametrize("options", [{"workers": -1}, {"threads": -1}, {"ahead": 0}])
def test_mistakes(options):
    with pytest.raises(UserError, match=f"feed.{next(iter(options))} is "):
        FeedConfig(**options)
